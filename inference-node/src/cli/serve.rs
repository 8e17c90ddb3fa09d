//! `sluice-node serve`: the node as a process of its own.

use crate::node::{Node, NodeOptions};
use anyhow::Context;
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_stream::wrappers::TcpListenerStream;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051")]
    listen: SocketAddr,

    /// Print one line of JSON when ready: {"grpc_url": ..., "models": [...]}
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    node: NodeOptions,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    // Before the model is loaded: a port that is taken should not take minutes to notice.
    let listener = listen(args.listen).await?;
    let address = listener.local_addr()?;
    let node = tokio::task::spawn_blocking(move || Node::start(args.node)).await??;
    let names: Vec<&str> = node.models().iter().map(|model| model.name.as_str()).collect();
    let url = format!("http://{address}");
    if args.json {
        println!("{}", serde_json::json!({"grpc_url": url, "models": names}));
    } else {
        println!("serving {} at {url}; stop with Ctrl-C", names.join(", "));
    }
    std::io::stdout().flush()?;

    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let shutdown = async {
        either(&mut interrupt, &mut terminate).await;
        tracing::info!("draining: running sequences finish, new ones are refused; signal again to stop at once");
        tokio::select! {
            () = node.drain() => tracing::info!("drained"),
            () = either(&mut interrupt, &mut terminate) => {
                tracing::warn!("stopped before every sequence had finished");
                std::process::exit(130);
            }
        }
    };
    node.serve(TcpListenerStream::new(listener), shutdown).await.context("the gRPC server failed")
}

async fn either(interrupt: &mut Signal, terminate: &mut Signal) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => anyhow::anyhow!(
            "--listen {address}: another process has this port; stop it, or choose another (port 0 takes a free one)"
        ),
        ErrorKind::PermissionDenied => {
            anyhow::anyhow!("--listen {address}: not allowed; ports below 1024 need privileges, choose a higher one")
        }
        ErrorKind::AddrNotAvailable => {
            anyhow::anyhow!("--listen {address}: not an address of this machine; 0.0.0.0 listens on all it has")
        }
        _ => anyhow::Error::new(error).context(format!("--listen {address}")),
    })
}
