//! One real process: started, announced, signalled, waited for, never left behind.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use serde_json::Value;
use tokio::sync::mpsc;

use crate::binaries::{binary, clean_command};
use crate::patience::{PATIENCE, eventually};

#[derive(Debug, Clone, Copy)]
pub enum Signal {
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// SIGTERM: what an orchestrator sends.
    Terminate,
    /// SIGKILL: the power cut.
    Kill,
}

/// A running program under test. Its stderr goes to `log`; it dies with this value, and with the test process.
pub struct Process {
    name: String,
    child: Child,
    stdout: mpsc::UnboundedReceiver<String>,
    log: PathBuf,
}

impl Process {
    /// Starts `name ARGS`. Call it from the test's own thread: the process ends when the thread that started it does.
    pub fn spawn<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>, log: &Path) -> Process {
        let stderr = std::fs::OpenOptions::new().create(true).append(true).open(log).expect("the log opens");
        let mut command = dies_with_its_parent(&binary(name));
        command.args(args).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{name} cannot be started: {error}"));
        let stdout = lines_of(child.stdout.take().expect("stdout is piped"));
        Process { name: name.to_owned(), child, stdout, log: log.to_path_buf() }
    }

    /// The first line of its stdout, which `--json` promises to be one JSON object.
    pub async fn announcement(&mut self) -> Value {
        let Ok(line) = tokio::time::timeout(PATIENCE, self.stdout.recv()).await else {
            panic!("{} said nothing on stdout; its log:\n{}", self.name, self.log());
        };
        let Some(line) = line else {
            let status = self.child.wait().expect("a child can be waited for");
            panic!("{} stopped before it was ready ({status}); its log:\n{}", self.name, self.log());
        };
        serde_json::from_str(&line).unwrap_or_else(|error| {
            panic!("the first line of stdout must be JSON: {error}\n{line}\nits log:\n{}", self.log())
        })
    }

    pub fn signal(&self, signal: Signal) {
        let flag = match signal {
            Signal::Interrupt => "-INT",
            Signal::Terminate => "-TERM",
            Signal::Kill => "-KILL",
        };
        // The shell's own `kill`: there without any package, and without `unsafe` here.
        let sent = Command::new("sh")
            .args(["-c", "kill \"$0\" \"$1\"", flag, &self.child.id().to_string()])
            .status();
        assert!(sent.expect("sh runs").success(), "{} has already ended:\n{}", self.name, self.log());
    }

    /// Waits until it has exited; returns its status and the lines it wrote to stdout meanwhile.
    pub async fn exit(&mut self) -> (ExitStatus, Vec<String>) {
        let status = eventually(&format!("{} ends", self.name), async || {
            let ended = self.child.try_wait().expect("a child can be asked");
            ended.ok_or_else(|| self.log.display().to_string())
        })
        .await;
        let mut lines = Vec::new();
        while let Some(line) = self.stdout.recv().await {
            lines.push(line);
        }
        (status, lines)
    }

    /// Everything it has written to stderr, by this and earlier processes with the same log.
    pub fn log(&self) -> String {
        // A device such as /dev/full has no end to read to.
        if !self.log.is_file() {
            return format!("(nothing to read at {})", self.log.display());
        }
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where it has already ended, and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads on a thread of its own, so that a full pipe never stops the process under test.
pub(crate) fn lines_of(stdout: ChildStdout) -> mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            // A test that no longer listens has let go of the process too.
            let _ = sender.send(line);
        }
    });
    receiver
}

/// A test that is itself killed cannot clean up: the kernel does, where `setpriv` (util-linux) is there to ask it.
pub(crate) fn dies_with_its_parent(program: &Path) -> Command {
    let setpriv = Path::new("/usr/bin/setpriv");
    if !setpriv.exists() {
        return clean_command(program);
    }
    let mut command = clean_command(setpriv);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}
