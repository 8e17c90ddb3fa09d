//! [`Cluster`]: one `sluice up` on a data directory of its own, from its announcement to the epilogue.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binaries::{output_of, run_to_end, run_to_json};
use crate::metrics::Metrics;
use crate::patience::eventually;
use crate::process::{Process, Signal};
use crate::rest::Reply;
use crate::sse::{Stream, Transcript};

#[derive(Debug, Clone, Default)]
pub struct ClusterOptions {
    /// A Hugging Face directory; absent: the bundled model.
    pub model: Option<PathBuf>,
    /// Where the books are; absent: a SQLite file in the data directory. Several clusters may share a PostgreSQL.
    pub database_url: Option<String>,
    /// A remote node; absent: one in the process.
    pub node_url: Option<String>,
    /// Settings in TOML, for what has no flag.
    pub settings: String,
    /// Further arguments of `sluice up`.
    pub args: Vec<String>,
}

/// A running platform. End every test with [`Cluster::finish`].
pub struct Cluster {
    /// What a newcomer pastes into an SDK: `http://127.0.0.1:PORT/v1`.
    pub base_url: String,
    pub grpc_url: String,
    pub api_key: String,
    pub admin_key: String,
    /// The only model it serves.
    pub model: String,
    /// Further environment for Python clients.
    pub python_env: Vec<(&'static str, String)>,
    options: ClusterOptions,
    http: reqwest::Client,
    process: Option<Process>,
    folder: TempDir,
    finished: bool,
}

impl Cluster {
    pub async fn start() -> Cluster {
        Cluster::start_with(ClusterOptions::default()).await
    }

    /// Gateways on one PostgreSQL, started at the same moment.
    pub async fn start_together(options: impl IntoIterator<Item = ClusterOptions>) -> Vec<Cluster> {
        futures::future::join_all(options.into_iter().map(Cluster::start_with)).await
    }

    pub async fn start_with(options: ClusterOptions) -> Cluster {
        let folder = TempDir::with_prefix("sluice-test-").expect("a temporary directory");
        let nowhere = String::new;
        let mut cluster = Cluster {
            base_url: nowhere(),
            grpc_url: nowhere(),
            api_key: nowhere(),
            admin_key: nowhere(),
            model: nowhere(),
            python_env: Vec::new(),
            options,
            http: reqwest::Client::new(),
            process: None,
            folder,
            finished: false,
        };
        cluster.restart().await;
        cluster
    }

    /// Starts `sluice up` on the same data directory, after a [`Cluster::stop`].
    pub async fn restart(&mut self) {
        assert!(self.process.is_none(), "stop it first");
        let mut process = Process::spawn("sluice", self.up_args(), &self.log_path());
        let ready = process.announcement().await;
        let field = |name: &str| match ready[name].as_str() {
            Some(text) if !text.is_empty() => text.to_owned(),
            _ => panic!("the announcement has no {name}: {ready}"),
        };
        self.base_url = field("base_url");
        self.grpc_url = field("grpc_url");
        self.api_key = field("api_key");
        self.admin_key = field("admin_key");
        self.process = Some(process);
        let models = self.get("/models").await.ok();
        let ids: Vec<&str> =
            models["data"].as_array().into_iter().flatten().filter_map(|m| m["id"].as_str()).collect();
        let [model] = ids[..] else { panic!("one model is served: {models}") };
        self.model = model.to_owned();
    }

    /// Sends a signal and waits for the end.
    pub async fn stop(&mut self, signal: Signal) {
        self.signal(signal);
        self.ended(signal).await;
    }

    /// Sends a signal without waiting: for clients that are still connected. Then [`Cluster::ended`].
    pub fn signal(&self, signal: Signal) {
        self.process.as_ref().expect("it runs").signal(signal);
    }

    /// Waits for the end that a signal asked for. A drain exits with status 0.
    pub async fn ended(&mut self, signal: Signal) {
        let mut process = self.process.take().expect("it runs");
        let (status, more) = process.exit().await;
        assert!(more.is_empty(), "stdout carries the announcement and nothing else: {more:?}");
        let as_asked = matches!(signal, Signal::Kill) || status.success();
        assert!(as_asked, "a drain exits with 0, not {status}; its log:\n{}", process.log());
    }

    /// The epilogue of every test: no open hold, a clean drain, clean books.
    pub async fn finish(mut self) {
        if self.process.is_some() {
            self.settled().await;
            self.stop(Signal::Terminate).await;
        }
        self.assert_books_balance().await;
        self.finished = true;
    }

    /// Waits until every request in flight has been settled or voided, and what was settled is in the ledger.
    pub async fn settled(&self) {
        eventually("every hold ends, and is shipped", async || {
            let metrics = self.metrics().await;
            match (metrics.holds_open(), metrics.outbox_backlog()) {
                (0, 0) => Ok(()),
                (open, backlog) => Err(format!("{open} open holds, {backlog} events in the outbox")),
            }
        })
        .await;
    }

    /// `sluice audit`: every request ended once, every transaction sums to zero, every line re-derives.
    pub async fn assert_books_balance(&self) {
        let output = self.cli_output(&["audit", "--json"]).await;
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "the books do not balance: {said}");
    }

    pub fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub fn database_url(&self) -> String {
        let file = || format!("sqlite:{}", self.data_dir().join("ledger.db").display());
        self.options.database_url.clone().unwrap_or_else(file)
    }

    /// The data directory and the database, for a command.
    fn place(&self) -> Vec<String> {
        let data_dir = self.data_dir().to_str().expect("temporary paths are UTF-8").to_owned();
        let database =
            self.options.database_url.iter().flat_map(|url| ["--database-url".to_owned(), url.clone()]);
        ["--data-dir".to_owned(), data_dir].into_iter().chain(database).collect()
    }

    fn up_args(&self) -> Vec<String> {
        let ClusterOptions { model, node_url, settings, args, .. } = &self.options;
        let mut all: Vec<String> = ["up", "--listen", "127.0.0.1:0", "--json"].map(str::to_owned).into();
        all.extend(self.place());
        if let Some(model) = model {
            all.extend(["--model".to_owned(), model.to_str().expect("model paths are UTF-8").to_owned()]);
        }
        if let Some(url) = node_url {
            all.extend(["--node".to_owned(), url.clone()]);
        }
        if !settings.is_empty() {
            let path = self.folder.path().join("sluice.toml");
            std::fs::write(&path, settings).expect("the settings are written");
            all.extend(["--config".to_owned(), path.to_str().expect("temporary paths are UTF-8").to_owned()]);
        }
        all.extend(args.iter().cloned());
        all
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("sluice.log")
    }
}

/// What clients do.
impl Cluster {
    /// `path` is relative to the base URL; one that starts with `//` is relative to the server.
    pub fn url(&self, path: &str) -> String {
        match path.strip_prefix('/') {
            Some(absolute) if absolute.starts_with('/') => format!("{}{absolute}", self.grpc_url),
            _ => format!("{}{path}", self.base_url),
        }
    }

    pub fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method.parse().expect("a method"), self.url(path))
    }

    pub async fn send(&self, request: reqwest::RequestBuilder) -> Reply {
        match request.send().await {
            Ok(response) => Reply::read(response).await,
            Err(error) => panic!("no answer: {error:?}\nlog:\n{}", self.log()),
        }
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(self.request("GET", path).bearer_auth(&self.api_key)).await
    }

    pub async fn post(&self, path: &str, key: &str, body: &Value) -> Reply {
        self.send(self.request("POST", path).bearer_auth(key).json(body)).await
    }

    /// One chat completion, whole, with the default key.
    pub async fn chat(&self, body: &Value) -> Reply {
        self.post("/chat/completions", &self.api_key, body).await
    }

    /// Opens a stream, or returns what came instead. Adds `stream` and `include_usage` to `body`.
    pub async fn stream(&self, path: &str, key: &str, body: &Value) -> Result<Stream, Reply> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body["stream_options"] = json!({ "include_usage": true });
        let sent = self.request("POST", path).bearer_auth(key).json(&body).send().await;
        Stream::open(sent.unwrap_or_else(|error| panic!("no answer: {error:?}\nlog:\n{}", self.log()))).await
    }

    /// A chat stream with the default key, which must open.
    pub async fn open_chat(&self, body: &Value) -> Stream {
        match self.stream("/chat/completions", &self.api_key, body).await {
            Ok(stream) => stream,
            Err(reply) => panic!("no stream: {reply:?}"),
        }
    }

    /// A chat stream with the default key, read to its end.
    pub async fn stream_chat(&self, body: &Value) -> Transcript {
        self.open_chat(body).await.finish().await
    }

    /// A greedy chat request for the served model.
    pub fn question(&self, content: &str, tokens_max: u32) -> Value {
        json!({
            "model": self.model,
            "messages": [{ "role": "user", "content": content }],
            "temperature": 0,
            "max_tokens": tokens_max,
        })
    }

    /// Runs the real `curl` with these arguments and returns what it printed.
    pub async fn curl(&self, args: &[&str]) -> String {
        let mut command = Command::new("curl");
        let output = output_of(command.arg("-sS").args(args)).await;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "curl {args:?}: {}\n{stderr}", output.status);
        String::from_utf8(output.stdout).expect("answers are UTF-8")
    }
}

/// What operators do.
impl Cluster {
    pub async fn metrics(&self) -> Metrics {
        let reply = self.send(self.request("GET", "//metrics")).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        Metrics::parse(&reply.text)
    }

    /// A `sluice` subcommand on this data directory, beside the running server or after it.
    pub async fn cli(&self, args: &[&str]) -> Value {
        let place = self.place();
        let place = ["--json"].into_iter().chain(place.iter().map(String::as_str));
        run_to_json("sluice", args.iter().copied().chain(place)).await
    }

    /// The same, for one that may fail or print something else than JSON.
    pub async fn cli_output(&self, args: &[&str]) -> Output {
        let place = self.place();
        run_to_end("sluice", args.iter().copied().chain(place.iter().map(String::as_str))).await
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("--- the end of the log of `sluice up` ---");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        } else {
            assert!(self.finished, "a test ends with Cluster::finish, which checks the books");
        }
    }
}
