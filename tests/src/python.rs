//! Python clients: the unmodified SDKs, in the virtual environment that `tests/run` makes.

use std::path::PathBuf;
use std::process::Command;

use crate::binaries::{output_of, profile_dir, repository};
use crate::cluster::Cluster;

/// Runs one file of `tests/sdk` with pytest against a cluster. Every test in it must pass, and none may be skipped.
pub async fn pytest(cluster: &Cluster, file: &str) {
    let path = repository().join("tests/sdk").join(file);
    let mut command = Command::new(python());
    command
        .args(["-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider"])
        .arg(&path)
        .env("SLUICE_BASE_URL", &cluster.base_url)
        .env("SLUICE_GRPC_URL", &cluster.grpc_url)
        .env("SLUICE_API_KEY", &cluster.api_key)
        .env("SLUICE_MODEL", &cluster.model)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env_remove("OPENAI_API_KEY")
        .env_remove("OPENAI_BASE_URL");
    for (name, value) in &cluster.python_env {
        command.env(name, value);
    }
    let output = output_of(&command).await;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{stdout}{stderr}");
    assert!(output.status.success(), "{file}: {}", output.status);
    let closing = stdout.lines().last().unwrap_or_default();
    assert!(closing.contains("passed") && !closing.contains("skipped"), "{file}: {closing}");
}

/// `SLUICE_TEST_PYTHON`, else the environment that `tests/run` keeps in the target directory.
pub(crate) fn python() -> PathBuf {
    let path = match std::env::var_os("SLUICE_TEST_PYTHON") {
        Some(path) => PathBuf::from(path),
        None => {
            profile_dir().parent().expect("a profile lies in the target directory").join("venv/bin/python")
        }
    };
    assert!(path.exists(), "{} does not exist: run ./tests/run once, it makes it", path.display());
    path
}
