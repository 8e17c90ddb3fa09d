//! A node in this process. It speaks the same gRPC contract as a remote one, over an in-memory pipe: the gateway has
//! one way to reach a node, and a first start needs no second port.

use std::{io, sync::Arc};

use anyhow::Context;
use hyper_util::rt::TokioIo;
use sluice_node::{
    bundled,
    kernel::Dtype,
    node::{Node, NodeOptions},
};
use tokio::{io::DuplexStream, sync::mpsc, task::JoinHandle};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::config::Config;

/// Bytes in flight each way before the writer waits; one HTTP/2 window is 64 KiB.
const PIPE_BYTES: usize = 256 * 1024;
/// The gateway keeps one connection; more are only opened when that one breaks.
const CONNECTIONS_WAITING_MAX: usize = 4;

pub struct EmbeddedNode {
    node: Arc<Node>,
    channel: Channel,
    shutdown: CancellationToken,
    serving: JoinHandle<()>,
}

impl EmbeddedNode {
    /// Loads the model; seconds for a large one.
    pub async fn start(config: &Config) -> anyhow::Result<EmbeddedNode> {
        let options = options(config)?;
        let node = tokio::task::spawn_blocking(move || Node::start(options)).await?.map(Arc::new)?;
        let (dial, accept) = mpsc::channel::<DuplexStream>(CONNECTIONS_WAITING_MAX);
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn({
            let (node, stop) = (node.clone(), shutdown.clone().cancelled_owned());
            let incoming = ReceiverStream::new(accept).map(Ok::<_, io::Error>);
            async move {
                if let Err(error) = node.serve(incoming, stop).await {
                    tracing::error!(%error, "the embedded node stopped serving");
                }
            }
        });
        let channel = Endpoint::from_static("http://embedded").connect_with_connector_lazy(service_fn(
            move |_: Uri| {
                let dial = dial.clone();
                async move {
                    let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
                    let gone =
                        |_| io::Error::new(io::ErrorKind::ConnectionRefused, "the embedded node has stopped");
                    dial.send(theirs).await.map_err(gone)?;
                    Ok::<_, io::Error>(TokioIo::new(ours))
                }
            },
        ));
        Ok(EmbeddedNode { node, channel, shutdown, serving })
    }

    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Waits for every sequence, then ends the service.
    pub async fn stop(self) {
        self.node.drain().await;
        self.shutdown.cancel();
        drop(self.channel);
        let _ = self.serving.await;
    }
}

fn options(config: &Config) -> anyhow::Result<NodeOptions> {
    let settings = &config.node;
    let model_dir = match &settings.model {
        Some(directory) => directory.clone(),
        None => bundled::unpack(&config.data_dir.join("models")).with_context(|| {
            format!(
                "cannot unpack the bundled model into {}: it needs about 30 MB",
                config.data_dir.display()
            )
        })?,
    };
    let mut options = NodeOptions::new(model_dir);
    if let Some(dtype) = &settings.dtype {
        let known = Dtype::from_name(dtype);
        options.dtype =
            Some(known.with_context(|| format!("node.dtype is {dtype:?}; it must be f32, bf16 or int8"))?);
    }
    if let Some(threads) = settings.threads {
        options.threads = threads;
    }
    if let Some(slots) = settings.slots {
        options.slots = slots;
    }
    if let Some(waiting_max) = settings.waiting_max {
        options.waiting_max = waiting_max;
    }
    if let Some(cache_ram_bytes) = settings.cache_ram_bytes {
        options.cache_ram_bytes = cache_ram_bytes;
    }
    options.cache_dir = settings.cache_dir.clone();
    if let Some(cache_disk_bytes) = settings.cache_disk_bytes {
        options.cache_disk_bytes = cache_disk_bytes;
    }
    Ok(options)
}
