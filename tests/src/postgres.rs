//! [`Postgres`]: a PostgreSQL server of one test's own, which the test may stop, crash and start again.

use std::process::Command;

use tempfile::TempDir;

use crate::binaries::{output_of, repository};

/// How a server ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Its transactions are rolled back, its files are whole.
    Fast,
    /// As a power cut would: the next start recovers from its log.
    Immediate,
}

/// A running server in a folder of its own. It ends with this value.
pub struct Postgres {
    /// Its database `postgres`, which is empty at first.
    pub url: String,
    folder: TempDir,
}

impl Postgres {
    pub async fn start() -> Postgres {
        let folder = TempDir::with_prefix("sluice-postgres-").expect("a temporary directory");
        let mut server = Postgres { url: String::new(), folder };
        server.url = server.start_again().await;
        server
    }

    pub async fn stop(&self, mode: StopMode) {
        self.script(&mut self.stopping(mode)).await;
    }

    /// Starts on the same files, after a [`Postgres::stop`]; returns when it answers.
    pub async fn start_again(&self) -> String {
        let mut command = script();
        command.arg("start").arg(self.folder.path());
        self.script(&mut command).await
    }

    fn stopping(&self, mode: StopMode) -> Command {
        let mode = match mode {
            StopMode::Fast => "fast",
            StopMode::Immediate => "immediate",
        };
        let mut command = script();
        command.arg("stop").arg(self.folder.path()).arg(mode);
        command
    }

    async fn script(&self, command: &mut Command) -> String {
        let output = output_of(command).await;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {stderr}\n{}", self.log());
        String::from_utf8(output.stdout).expect("the script prints UTF-8").trim().to_owned()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // It fails only where the server has been stopped already.
        let _ = self.stopping(StopMode::Immediate).output();
    }
}

fn script() -> Command {
    Command::new(repository().join("tests/postgres"))
}
