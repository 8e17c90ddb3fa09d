//! [`NodeServer`]: a `sluice-node serve` in a process of its own, that may die and come back under the same address.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::checkpoint::random_model;
use crate::process::{Process, Signal};

/// A node with the random model. It ends with this value; [`NodeServer::stop`] also checks that it drains.
pub struct NodeServer {
    /// `http://127.0.0.1:PORT`, the same after a restart.
    pub url: String,
    /// The name of its model.
    pub model: String,
    process: Option<Process>,
    folder: TempDir,
    path: PathBuf,
    further: Vec<String>,
}

impl NodeServer {
    /// With further arguments of `sluice-node serve`.
    pub async fn start_with(further: &[&str]) -> NodeServer {
        let path = random_model().await;
        let model = path.file_name().expect("a name").to_string_lossy().into_owned();
        let mut server = NodeServer {
            url: String::new(),
            model,
            process: None,
            folder: TempDir::with_prefix("sluice-node-").expect("a temporary directory"),
            path,
            further: further.iter().map(|&text| text.to_owned()).collect(),
        };
        server.spawn("127.0.0.1:0").await;
        server
    }

    pub async fn start() -> NodeServer {
        NodeServer::start_with(&[]).await
    }

    /// Starts again under the same address, after a [`NodeServer::kill`].
    pub async fn restart(&mut self) {
        let address = self.url.strip_prefix("http://").expect("a node has an http address").to_owned();
        self.spawn(&address).await;
    }

    async fn spawn(&mut self, listen: &str) {
        assert!(self.process.is_none(), "kill it first");
        let model = self.path.to_str().expect("model paths are UTF-8");
        let args = ["serve", "--model", model, "--listen", listen, "--json"].map(str::to_owned);
        let args = args.into_iter().chain(self.further.iter().cloned());
        let mut process = Process::spawn("sluice-node", args, &self.folder.path().join("node.log"));
        let ready = process.announcement().await;
        self.url = ready["grpc_url"].as_str().unwrap_or_else(|| panic!("no grpc_url: {ready}")).to_owned();
        self.process = Some(process);
    }

    /// SIGKILL, and the end of it.
    pub async fn kill(&mut self) {
        let mut process = self.process.take().expect("it runs");
        process.signal(Signal::Kill);
        process.exit().await;
    }

    /// A drain, which exits with 0 once nobody is connected.
    pub async fn stop(mut self) {
        let mut process = self.process.take().expect("it runs");
        process.signal(Signal::Terminate);
        let (status, _) = process.exit().await;
        assert!(status.success(), "{status}: {}", process.log());
    }
}
