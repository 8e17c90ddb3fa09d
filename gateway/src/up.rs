//! `sluice up`: from an empty folder to a serving platform, and back down without losing anything.
//!
//! ```text
//! folder, lock ─▶ port ─▶ database, ledger ─▶ first tenant ─▶ node ─▶ serve ─▶ signal ─▶ drain
//! ```
//! What can fail for the operator's reasons (folder, port, model) fails before anything is served, and says what to do.

mod bookkeeper;
#[cfg(feature = "embedded-node")]
mod embedded;
mod prices;
mod tenant;

use std::{fs::File, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use sluice_billing::{Billing, BillingOptions};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

pub use tenant::{DEFAULT_ACCOUNT, DEFAULT_ORG, DEFAULT_PROJECT};

use crate::{
    app::App,
    auth::Auth,
    config::Config,
    metrics::Metrics,
    receipts::Receipts,
    route::{NodeEndpoint, Nodes},
    server, stack, store,
    webhooks::Webhooks,
};

/// Runs until SIGINT or SIGTERM, then drains. A second signal ends the process at once.
pub async fn run(config: Config, json: bool) -> anyhow::Result<()> {
    let signalled = stop_signals()?;
    let _lock = lock_data_dir(&config)?;
    let invoice_font = config.invoice_font()?;
    let listener = bind(&config.listen).await?;
    let address = listener.local_addr()?;

    let database = store::open(&config, true).await?;
    sluice_billing::create_private(&config.outbox_path())
        .with_context(|| format!("cannot create {}", config.outbox_path().display()))?;
    let billing = Billing::open(BillingOptions {
        database: database.clone(),
        outbox_path: config.outbox_path(),
        gateway: config.gateway.clone(),
        limits: config.billing.limits(),
    })
    .await?;
    let receipts = Receipts::open(&config)?;
    let credentials = tenant::ensure(&database, &billing, &config.credentials_path()).await?;

    let webhooks = Webhooks::new(database.clone(), config.webhooks.clone())?;
    let fleet = Fleet::start(&config).await?;
    let models = fleet.nodes.models().into_iter().map(|model| model.name).collect::<Vec<_>>();
    prices::ensure(&billing, &config.data_dir.join("prices.toml"), &models).await?;
    let app = Arc::new(App {
        auth: Auth::new(database.clone()),
        billing: billing.clone(),
        receipts,
        nodes: fleet.nodes.clone(),
        limits: config.limits.clone(),
        invoice_font,
        metrics: Metrics::new(),
        webhooks: webhooks.clone(),
        tracker: TaskTracker::new(),
        draining: CancellationToken::new(),
        cut: CancellationToken::new(),
    });
    let stop_delivering = CancellationToken::new();
    let delivering = tokio::spawn(webhooks.run(stop_delivering.clone()));
    let stop_keeping = CancellationToken::new();
    let keeping = tokio::spawn(bookkeeper::run(
        billing.clone(),
        config.invoices.clone(),
        config.tax.clone(),
        stop_keeping.clone(),
    ));
    let stop_accepting = CancellationToken::new();
    let connections = config.connections.clone();
    let mut serving = tokio::spawn({
        let (router, stop) = (stack::service(app.clone()), stop_accepting.clone());
        async move { server::serve(listener, router, &connections, stop).await }
    });

    welcome(address, &credentials, &models, &config, json)?;
    info!(%address, models = models.join(","), "ready");

    signalled.cancelled().await;
    info!("draining: no new requests, streams in flight finish");
    app.draining.cancel();
    stop_accepting.cancel();
    app.tracker.close();
    let drained = tokio::time::timeout(Duration::from_millis(config.drain_timeout_ms), async {
        let _ = (&mut serving).await;
        app.tracker.wait().await;
    });
    if drained.await.is_err() {
        warn!(
            timeout_ms = config.drain_timeout_ms,
            "streams still in flight are cut; what they used so far is settled"
        );
        serving.abort();
        app.cut.cancel();
        app.tracker.wait().await;
    }
    stop_keeping.cancel();
    if let Err(error) = keeping.await {
        warn!(%error, "the bookkeeper failed; the next start goes on where it was");
    }
    stop_delivering.cancel();
    let closed = billing.close().await;
    if let Err(error) = delivering.await {
        warn!(%error, "the webhook worker failed; what is due is sent at the next start");
    }
    closed?;
    fleet.stop().await;
    if let Err(error) = database.close().await {
        warn!(%error, "the database did not close cleanly; a SQLite file's write-ahead log stays beside it: keep both files together");
    }
    info!("stopped");
    Ok(())
}

/// The nodes requests go to: remote ones, or one in this process.
struct Fleet {
    nodes: Nodes,
    #[cfg(feature = "embedded-node")]
    embedded: Option<embedded::EmbeddedNode>,
}

impl Fleet {
    async fn start(config: &Config) -> anyhow::Result<Fleet> {
        if !config.nodes.is_empty() {
            let endpoints = config.nodes.iter().cloned().map(NodeEndpoint::Url).collect();
            let nodes = Nodes::connect(endpoints).await?;
            #[cfg(not(feature = "embedded-node"))]
            return Ok(Fleet { nodes });
            #[cfg(feature = "embedded-node")]
            return Ok(Fleet { nodes, embedded: None });
        }
        #[cfg(not(feature = "embedded-node"))]
        bail!("this build has no node of its own: name one with --node URL");
        #[cfg(feature = "embedded-node")]
        {
            let embedded = embedded::EmbeddedNode::start(config).await?;
            let endpoint = NodeEndpoint::Channel { name: "embedded".to_owned(), channel: embedded.channel() };
            let nodes = Nodes::connect(vec![endpoint]).await?;
            Ok(Fleet { nodes, embedded: Some(embedded) })
        }
    }

    async fn stop(self) {
        #[cfg(feature = "embedded-node")]
        if let Some(embedded) = self.embedded {
            embedded.stop().await;
        }
    }
}

/// Creates the folder and takes it for this process; the lock goes with the returned file.
fn lock_data_dir(config: &Config) -> anyhow::Result<File> {
    let folder = &config.data_dir;
    let advice = || {
        format!("cannot use the data folder {}: name a writable one with --data-dir DIR", folder.display())
    };
    create_private(folder).with_context(advice)?;
    let path = folder.join("sluice.lock");
    let lock = File::options().create(true).truncate(false).write(true).open(&path).with_context(advice)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!(
                "the data folder {} is in use by another `sluice up`: stop that one, or name another folder with --data-dir DIR",
                folder.display()
            )
        }
        Err(std::fs::TryLockError::Error(error)) => Err(error).with_context(advice),
    }
}

/// The folder holds the ledger: a new one is its owner's alone. One that exists keeps the mode its owner gave it.
fn create_private(folder: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && folder.is_dir() => Ok(()),
        created => created,
    }
}

async fn bind(listen: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(listen).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => anyhow::anyhow!(
            "{listen} is taken by another program: stop it, or choose another port with --listen (port 0 takes a free one)"
        ),
        std::io::ErrorKind::InvalidInput => {
            anyhow::anyhow!("--listen {listen:?} is not an address: write HOST:PORT, such as 127.0.0.1:8080")
        }
        _ => anyhow::anyhow!("cannot listen on {listen}: {error}"),
    })
}

/// A token that the first SIGINT or SIGTERM cancels; the second ends the process.
fn stop_signals() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let token = CancellationToken::new();
    let signalled = token.clone();
    tokio::spawn(async move {
        for attempt in 0.. {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if attempt > 0 {
                warn!("second signal: stopping without a drain");
                std::process::exit(130);
            }
            signalled.cancel();
        }
    });
    Ok(token)
}

/// What a newcomer needs, once everything works.
fn welcome(
    address: std::net::SocketAddr,
    credentials: &tenant::Credentials,
    models: &[String],
    config: &Config,
    json: bool,
) -> anyhow::Result<()> {
    use std::io::Write;
    let host = if address.ip().is_unspecified() {
        format!("127.0.0.1:{}", address.port())
    } else {
        address.to_string()
    };
    let (base_url, grpc_url) = (format!("http://{host}/v1"), format!("http://{host}"));
    let mut stdout = std::io::stdout().lock();
    if json {
        let ready = serde_json::json!({
            "base_url": base_url,
            "grpc_url": grpc_url,
            "api_key": credentials.api_key,
            "admin_key": credentials.admin_key,
        });
        writeln!(stdout, "{ready}")?;
        return Ok(stdout.flush()?);
    }
    if models.is_empty() {
        warn!(
            "no node is reachable yet: requests get 503 until one is, and a model that was never served here needs prices in prices.toml"
        );
    }
    let model = models.first().map_or("MODEL", String::as_str);
    let key = &credentials.api_key;
    let data_dir = config.data_dir.display();
    writeln!(
        stdout,
        r#"
Sluice is up.

  Base URL   {base_url}
  gRPC       {grpc_url}  (sluice.v1, with reflection)
  API key    {key}
  Model      {model}
  Data       {data_dir}

Try it:

  curl -N {base_url}/chat/completions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \
    -d '{{"model":"{model}","stream":true,"messages":[{{"role":"user","content":"Hello! What are you?"}}]}}'

Python (pip install openai):

  from openai import OpenAI
  client = OpenAI(base_url="{base_url}", api_key="{key}")
  stream = client.chat.completions.create(model="{model}", stream=True,
      messages=[{{"role": "user", "content": "Tell me a story about a red kite."}}])
  for chunk in stream: print(chunk.choices[0].delta.content or "", end="", flush=True)

Usage and cost: sluice usage --data-dir {data_dir}     Stop: Ctrl-C (streams in flight finish)
"#
    )?;
    Ok(stdout.flush()?)
}
