//! The listener: accepts connections under a limit, speaks HTTP/1.1 and HTTP/2 (REST and gRPC) on one port, and
//! drains: after `stop`, no new connection and no new request on an old one, while streams in flight finish.

use std::{sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Bounds on connections, so that slow or hostile clients cannot exhaust the process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConnectionLimits {
    /// Open connections; at the limit, new ones wait in the kernel's backlog.
    pub connections_max: usize,
    /// Time to send a request's headers.
    pub header_read_timeout_ms: u64,
    pub headers_max: usize,
    pub header_bytes_max: u32,
    /// Concurrent HTTP/2 streams on one connection.
    pub streams_max: u32,
    /// An HTTP/2 connection is pinged this often, and closed when no answer comes in time.
    pub keep_alive_interval_ms: u64,
    pub keep_alive_timeout_ms: u64,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        ConnectionLimits {
            connections_max: 10_000,
            header_read_timeout_ms: 10_000,
            headers_max: 100,
            header_bytes_max: 64 * 1024,
            streams_max: 1_000,
            keep_alive_interval_ms: 30_000,
            keep_alive_timeout_ms: 20_000,
        }
    }
}

/// Serves until `stop`, then returns once every connection has finished.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: &ConnectionLimits,
    stop: CancellationToken,
) {
    let builder = Arc::new(connection_builder(limits));
    let permits = Arc::new(Semaphore::new(limits.connections_max));
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &permits) => accepted,
        };
        let (stream, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: closing connections frees some.
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        let watcher = graceful.watcher();
        let builder = builder.clone();
        let first_byte_max = Duration::from_millis(limits.header_read_timeout_ms);
        tokio::spawn(async move {
            // Telling HTTP/1 from HTTP/2 has no timeout of its own: whoever says nothing is let go here.
            if tokio::time::timeout(first_byte_max, stream.readable()).await.is_err() {
                return;
            }
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            if let Err(error) = watcher.watch(connection).await {
                debug!(%error, "connection ended");
            }
            drop(permit);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> std::io::Result<(tokio::net::TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await.expect("the semaphore is never closed");
    let (stream, _) = listener.accept().await?;
    // Tokens are small frames that someone is waiting for.
    stream.set_nodelay(true)?;
    Ok((stream, permit))
}

fn connection_builder(limits: &ConnectionLimits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(limits.header_read_timeout_ms))
        .max_headers(limits.headers_max)
        .max_buf_size(limits.header_bytes_max.max(8192) as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams_max)
        .max_header_list_size(limits.header_bytes_max)
        .keep_alive_interval(Duration::from_millis(limits.keep_alive_interval_ms))
        .keep_alive_timeout(Duration::from_millis(limits.keep_alive_timeout_ms));
    builder
}
