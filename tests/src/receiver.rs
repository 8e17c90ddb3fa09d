//! [`Receiver`]: a customer's receiver of webhooks, in Python, with the `standardwebhooks` package.

use std::process::{Child, Stdio};

use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::binaries::repository;
use crate::patience::PATIENCE;
use crate::process::{dies_with_its_parent, lines_of};
use crate::python::python;

/// A running receiver. It answers as the query of its URL says, see `tests/sdk/webhook_receiver.py`.
pub struct Receiver {
    child: Child,
    lines: mpsc::UnboundedReceiver<String>,
    port: u64,
    scheme: &'static str,
}

impl Receiver {
    pub async fn start() -> Receiver {
        Receiver::run("http", &[], &[]).await
    }

    /// One that speaks TLS, as `localhost`, and verifies with `secret`; see [`Receiver::authority`].
    pub async fn start_tls(secret: &str) -> Receiver {
        Receiver::run("https", &["localhost.pem", "localhost.key"], &[secret]).await
    }

    /// The authority that signed a TLS receiver's certificate.
    pub fn authority() -> String {
        tls_file("authority.pem")
    }

    async fn run(scheme: &'static str, certificate: &[&str], secrets: &[&str]) -> Receiver {
        let mut command = dies_with_its_parent(&python());
        command
            .arg(repository().join("tests/sdk/webhook_receiver.py"))
            .args(certificate.iter().map(|name| tls_file(name)))
            .env("WEBHOOK_SECRETS", json!(secrets).to_string())
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("python runs");
        let lines = lines_of(child.stdout.take().expect("stdout is piped"));
        let mut receiver = Receiver { child, lines, port: 0, scheme };
        let announced = receiver.line().await;
        receiver.port = announced["port"].as_u64().unwrap_or_else(|| panic!("no port: {announced}"));
        receiver
    }

    /// `path` may say what is answered: `/hook?answers=500,200`.
    pub fn url(&self, path: &str) -> String {
        format!("{}://localhost:{}{path}", self.scheme, self.port)
    }

    /// Verifies requests from now on with these secrets.
    pub async fn trust(&self, secrets: &[&str]) {
        let sent = reqwest::Client::new()
            .post(format!("http://127.0.0.1:{}/secrets", self.port))
            .json(&json!(secrets))
            .send()
            .await;
        assert_eq!(sent.expect("the receiver answers").status(), 204);
    }

    /// The next request: `path`, `headers`, `body`, `answer`, and which secrets it is `verified_by`.
    pub async fn next(&mut self) -> Value {
        loop {
            let line = self.line().await;
            if line["connected"].is_null() {
                return line;
            }
        }
    }

    /// Nobody has as much as connected since the last request that was read.
    pub fn assert_untouched(&mut self) {
        if let Ok(line) = self.lines.try_recv() {
            panic!("nobody should have called: {line}");
        }
    }

    async fn line(&mut self) -> Value {
        let line = tokio::time::timeout(PATIENCE, self.lines.recv()).await.expect("the receiver says more");
        let line = line.expect("the receiver runs");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("no JSON ({error}): {line}"))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tls_file(name: &str) -> String {
    repository().join("tests/sdk/tls").join(name).to_str().expect("repository paths are UTF-8").to_owned()
}
