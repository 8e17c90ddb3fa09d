//! Where the programs under test are, and running one of them to its end.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::patience::PATIENCE;

/// The path of `sluice` or `sluice-node`: in `SLUICE_BIN_DIR`, else where cargo put it beside this test.
pub fn binary(name: &str) -> PathBuf {
    let dir = match std::env::var_os("SLUICE_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => profile_dir(),
    };
    let path = dir.join(name);
    assert!(
        path.is_file(),
        "{} does not exist: run ./tests/run, or `cargo build --release --workspace` before `cargo test --release`",
        path.display()
    );
    path
}

/// `target/release` for `target/release/deps/e2e-0123`.
pub(crate) fn profile_dir() -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    test.ancestors().nth(2).expect("cargo puts tests two levels down").to_path_buf()
}

/// The root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository")
}

/// A command without this test run's own settings, which `sluice` would take for its configuration.
pub(crate) fn clean_command(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SLUICE_") {
            command.env_remove(name);
        }
    }
    command.env("RUST_BACKTRACE", "0").stdin(Stdio::null());
    command
}

/// Runs a command to its end without blocking the test's other tasks; `timeout` (coreutils) ends one that is stuck.
pub(crate) async fn output_of(command: &Command) -> Output {
    let seconds = PATIENCE.as_secs().to_string();
    let mut limited = Command::new("timeout");
    limited.args(["--signal=KILL", &seconds]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        limited.current_dir(dir);
    }
    limited.stdin(Stdio::null());
    let shown = format!("{command:?}");
    let ended = tokio::task::spawn_blocking(move || limited.output()).await.expect("waiting does not panic");
    let output = ended.unwrap_or_else(|error| panic!("{shown} cannot be run: {error}"));
    assert_ne!(output.status.code(), Some(137), "{shown} was still running after {seconds} s");
    output
}

/// Runs a program under test until it exits.
pub async fn run_to_end<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Output {
    let mut command = clean_command(&binary(name));
    command.args(args);
    output_of(&command).await
}

/// Runs a program under test that must succeed and print one JSON value.
pub async fn run_to_json<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Value {
    let mut command = clean_command(&binary(name));
    command.args(args);
    let output = output_of(&command).await;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stderr}{stdout}", output.status);
    serde_json::from_str(&stdout).unwrap_or_else(|error| {
        panic!("{command:?} must print one JSON value: {error}\nstdout: {stdout}\nstderr: {stderr}")
    })
}
