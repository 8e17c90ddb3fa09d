//! One attempt: an HTTP/1.1 POST over a connection of its own, which ends with it.
//!
//! It resolves the host itself and connects to an address that it has checked, so that nothing between the check and the
//! connection resolves again. It follows no redirect (a 3xx is a failure), uses no proxy of the environment, keeps no
//! connection, and reads of the answer no more than its limits say.

use std::{io, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::{
    WebhookSettings,
    target::{self, Target},
};

const USER_AGENT: HeaderValue = HeaderValue::from_static(concat!("Sluice/", env!("CARGO_PKG_VERSION")));
const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
/// hyper takes no smaller buffer.
const HEADER_BYTES_MIN: usize = 8192;

/// What is sent, signed already.
#[derive(Clone, Debug)]
pub struct Message {
    pub id: String,
    pub timestamp_s: i64,
    pub signature: String,
    pub body: String,
}

/// What a receiver answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// `retry-after`, where it is a number of seconds.
    pub retry_after: Option<Duration>,
}

/// Why there is no answer. The texts are for the endpoint's owner.
#[derive(Debug, thiserror::Error)]
pub enum PostError {
    #[error("the host {host} cannot be resolved")]
    Resolve {
        host: String,
        #[source]
        source: io::Error,
    },
    #[error("refused: {host} resolves to no public address, and the operator permits no other")]
    NotPublic { host: String },
    #[error("cannot connect to {host}")]
    Connect {
        host: String,
        #[source]
        source: io::Error,
    },
    #[error("the TLS handshake with {host} failed")]
    Tls {
        host: String,
        #[source]
        source: io::Error,
    },
    #[error("the answer is not HTTP, or broke off")]
    Http(#[source] hyper::Error),
    #[error("no answer within {timeout_ms} ms")]
    Timeout { timeout_ms: u64 },
    #[error("the request cannot be written")]
    Request(#[source] http::Error),
}

/// Makes attempts. Cheap to clone.
#[derive(Clone)]
pub struct Poster {
    settings: Arc<WebhookSettings>,
    tls: TlsConnector,
}

impl Poster {
    /// Trusts the authorities of the system (or `SSL_CERT_FILE`), and those of `ca_file`.
    pub fn new(settings: Arc<WebhookSettings>) -> anyhow::Result<Poster> {
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        let (known, unreadable) = roots.add_parsable_certificates(system.certs);
        tracing::debug!(known, unreadable, errors = ?system.errors, "certificate authorities of the system");
        if let Some(file) = &settings.ca_file {
            add_authorities(&mut roots, file).with_context(|| {
                format!("webhooks.ca_file: {} must hold certificates in PEM form", file.display())
            })?;
        }
        let mut config =
            ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .context("TLS cannot be set up")?
                .with_root_certificates(roots)
                .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Poster { settings, tls: TlsConnector::from(Arc::new(config)) })
    }

    /// Sends one message, within the time that the settings give an attempt.
    ///
    /// # Cancel safety
    /// Dropped, it closes its connection; the receiver may have had the message all the same.
    pub async fn post(&self, target: &Target, message: &Message) -> Result<Answer, PostError> {
        let timeout_ms = self.settings.timeout_ms;
        tokio::time::timeout(Duration::from_millis(timeout_ms), self.attempt(target, message))
            .await
            .unwrap_or(Err(PostError::Timeout { timeout_ms }))
    }

    async fn attempt(&self, target: &Target, message: &Message) -> Result<Answer, PostError> {
        let stream = self.connect(target).await?;
        if !target.is_https() {
            return self.exchange(stream, target, message).await;
        }
        let host = target.host();
        let not_tls = |source| PostError::Tls { host: host.clone(), source };
        let name = ServerName::try_from(host.clone()).map_err(|error| not_tls(io::Error::other(error)))?;
        let stream = self.tls.connect(name, stream).await.map_err(not_tls)?;
        self.exchange(stream, target, message).await
    }

    /// Connects to the first address that is permitted and answers.
    async fn connect(&self, target: &Target) -> Result<TcpStream, PostError> {
        let host = target.host();
        let resolved = tokio::net::lookup_host((host.as_str(), target.port()))
            .await
            .map_err(|source| PostError::Resolve { host: host.clone(), source })?;
        let mut failure = PostError::NotPublic { host: host.clone() };
        for address in target::permitted(resolved, &self.settings) {
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(source) => failure = PostError::Connect { host: host.clone(), source },
            }
        }
        Err(failure)
    }

    async fn exchange(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        target: &Target,
        message: &Message,
    ) -> Result<Answer, PostError> {
        let request = request(target, message).map_err(PostError::Request)?;
        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(self.settings.response_bytes_max.max(HEADER_BYTES_MIN))
            .handshake(TokioIo::new(stream))
            .await
            .map_err(PostError::Http)?;
        let receiving = async {
            let response = sender.send_request(request).await.map_err(PostError::Http)?;
            let answer =
                Answer { status: response.status().as_u16(), retry_after: retry_after(response.headers()) };
            self.discard(response.into_body()).await;
            Ok(answer)
        };
        // The connection does the reading and writing; it is dropped, and so closed, when the answer is here.
        tokio::pin!(receiving);
        tokio::pin!(connection);
        tokio::select! {
            answer = &mut receiving => answer,
            ended = &mut connection => match ended {
                Ok(()) => receiving.await,
                Err(error) => Err(PostError::Http(error)),
            },
        }
    }

    /// A receiver that is cut off while it answers may log an error; one that never ends is cut off.
    async fn discard(&self, mut body: hyper::body::Incoming) {
        let mut bytes = 0;
        while bytes <= self.settings.response_bytes_max {
            match body.frame().await {
                Some(Ok(frame)) => bytes += frame.data_ref().map_or(0, Bytes::len),
                Some(Err(_)) | None => return,
            }
        }
    }
}

fn request(target: &Target, message: &Message) -> Result<Request<Full<Bytes>>, http::Error> {
    Request::post(target.path_and_query())
        .header(header::HOST, target.authority())
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONNECTION, "close")
        .header(WEBHOOK_ID, &message.id)
        .header(WEBHOOK_TIMESTAMP, message.timestamp_s)
        .header(WEBHOOK_SIGNATURE, &message.signature)
        .body(Full::from(message.body.clone()))
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn add_authorities(roots: &mut RootCertStore, file: &Path) -> anyhow::Result<()> {
    let mut added = 0;
    for certificate in CertificateDer::pem_file_iter(file)? {
        roots.add(certificate?)?;
        added += 1;
    }
    anyhow::ensure!(added > 0, "it holds none");
    Ok(())
}
