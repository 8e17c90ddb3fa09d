//! The tower column: what every request passes, from the connection to its handler, read from top to bottom in
//! [`service`].
//!
//! Request ids are ours alone, UUIDv7, since they are also the key under which a request is billed once: a client that
//! could choose one could be answered twice and billed once. A client's own `x-client-request-id` (or the
//! `x-request-id` of a proxy before us) is logged and echoed as `x-client-request-id`.
//!
//! There is no total timeout: a stream may last. A body has a time to arrive, a node a longest silence, a client a
//! longest time not to read (`Limits`); headers and idle connections are the listener's.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{MatchedPath, Request, State},
    middleware::{Next, from_fn, from_fn_with_state},
    response::Response,
    routing::{get, post},
};
use futures::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use sluice_proto::v1::{chat_service_server as chat, model_service_server as model};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceBuilder;
use tracing::Instrument;
use uuid::Uuid;

use crate::{
    app::App,
    auth::{Principal, Role},
    budgets,
    complete::{Caller, Delivery},
    dialect::{grpc, models, openai_chat, openai_completions},
    error::{ApiError, Protocol, RETRY_AFTER},
    health, organization, receipts, webhooks,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const CLIENT_REQUEST_ID: HeaderName = HeaderName::from_static("x-client-request-id");
const CLIENT_REQUEST_ID_BYTES_MAX: usize = 128;
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");
const ORGANIZATION: HeaderName = HeaderName::from_static("openai-organization");
const VERSION: HeaderName = HeaderName::from_static("openai-version");
/// The version of OpenAI's API whose shapes these are.
const OPENAI_VERSION: HeaderValue = HeaderValue::from_static("2020-10-01");

/// REST, gRPC, health and metrics: everything on one port.
pub fn service(app: Arc<App>) -> Router {
    let permits_max = app.limits.requests_in_flight_max.min(Semaphore::MAX_PERMITS);
    let permits = Arc::new(Semaphore::new(permits_max));
    app.metrics.observe(&app.billing, &app.nodes, &permits, permits_max);
    app.metrics.observe_webhooks(&app.webhooks);

    let with_trailers = ServiceBuilder::new().map_response(grpc::append_trailers);
    let with_key = Router::new()
        .route("/v1/chat/completions", post(openai_chat::create))
        .route("/v1/completions", post(openai_completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::get))
        .route_service(&every_method_of(chat::SERVICE_NAME), with_trailers.service(grpc::chat_service(&app)))
        .route_service(&every_method_of(model::SERVICE_NAME), grpc::model_service(&app))
        .route_layer(
            ServiceBuilder::new()
                .layer(from_fn_with_state(app.clone(), refuse_while_draining))
                .layer(from_fn_with_state(permits, hold_a_permit))
                .layer(from_fn_with_state(app.clone(), authenticate)),
        );
    let with_admin_key =
        webhooks::rest::routes().merge(budgets::routes()).merge(organization::routes()).route_layer(
            ServiceBuilder::new()
                .layer(from_fn_with_state(app.clone(), refuse_while_draining))
                .layer(from_fn_with_state(app.clone(), authenticate_admin)),
        );
    with_key
        .merge(with_admin_key)
        .merge(health::routes(&app))
        .merge(receipts::routes())
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(
            ServiceBuilder::new()
                .layer(from_fn(arrive))
                .layer(from_fn_with_state(app.clone(), measure))
                .layer(from_fn(catch_panics)),
        )
        .with_state(app)
}

/// The path of all methods of a gRPC service.
pub fn every_method_of(service: &str) -> String {
    format!("/{service}/{{*method}}")
}

/// When a request came in, its id, and how its caller speaks.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub request_id: Uuid,
    pub received: Instant,
    pub protocol: Protocol,
}

impl Arrival {
    fn of(headers: &HeaderMap) -> Arrival {
        let content_type = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
        let protocol =
            if content_type.starts_with(b"application/grpc") { Protocol::Grpc } else { Protocol::Rest };
        Arrival { request_id: Uuid::now_v7(), received: Instant::now(), protocol }
    }

    pub fn id(&self) -> String {
        self.request_id.to_string()
    }

    pub fn caller(&self, principal: Arc<Principal>, delivery: Delivery, deadline: Option<Instant>) -> Caller {
        Caller { request_id: self.request_id, principal, received: self.received, deadline, delivery }
    }

    fn refuse(&self, error: ApiError) -> Response {
        error.log();
        error.respond(self.protocol, &self.id())
    }
}

/// Gives the request its id and its span, and the response its headers.
async fn arrive(mut request: Request, next: Next) -> Response {
    let arrival = Arrival::of(request.headers());
    let client_id = client_request_id(request.headers());
    let span = tracing::info_span!(
        "request",
        id = %arrival.request_id,
        client_id = client_id.as_ref().and_then(|id| id.to_str().ok()),
        method = %request.method(),
        path = request.uri().path(),
    );
    request.extensions_mut().insert(arrival.clone());
    let mut response = next.run(request).instrument(span).await;
    let headers = response.headers_mut();
    let id = HeaderValue::try_from(arrival.id()).expect("a UUID is ASCII");
    headers.insert(REQUEST_ID, id);
    if let Some(client_id) = client_id {
        headers.insert(CLIENT_REQUEST_ID, client_id);
    }
    headers.insert(PROCESSING_MS, HeaderValue::from(arrival.received.elapsed().as_millis() as u64));
    headers.insert(VERSION, OPENAI_VERSION);
    response
}

/// The id by which the client knows the request, if it has a plain one.
fn client_request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    let id = headers.get(CLIENT_REQUEST_ID).or_else(|| headers.get(REQUEST_ID))?;
    let plain = (1..=CLIENT_REQUEST_ID_BYTES_MAX).contains(&id.len())
        && id.as_bytes().iter().all(u8::is_ascii_graphic);
    plain.then(|| id.clone())
}

/// Counts and logs every answer. No body, key or query is logged.
async fn measure(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    // Labels come from our routes and a fixed list, never from the caller: he could make any number of them.
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let method = match *request.method() {
        Method::GET => "GET",
        Method::POST => "POST",
        _ => "other",
    };
    let started = Instant::now();
    let response = next.run(request).await;
    let status = match response.headers().get("grpc-status").and_then(|value| value.to_str().ok()) {
        Some(code) => format!("grpc-{code}"),
        None => response.status().as_u16().to_string(),
    };
    let elapsed_ms = started.elapsed().as_millis() as u64;
    match route.as_str() {
        "/health" | "/metrics" => tracing::debug!(status, elapsed_ms, "answered"),
        _ => tracing::info!(status, elapsed_ms, "answered"),
    }
    app.metrics.request(&route, method, status);
    response
}

/// A panic is our fault, and one request's only.
async fn catch_panics(request: Request, next: Next) -> Response {
    let arrival = arrival_of(&request);
    match std::panic::AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            arrival.refuse(ApiError::internal(format!("panic: {text}")))
        }
    }
}

async fn refuse_while_draining(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if app.draining.is_cancelled() {
        return arrival_of(&request).refuse(ApiError::Draining { retry_after: RETRY_AFTER });
    }
    next.run(request).await
}

/// Sheds load over the limit. The response's body keeps the permit: a stream outlives its handler.
async fn hold_a_permit(State(permits): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    let Ok(permit) = permits.try_acquire_owned() else {
        return arrival_of(&request).refuse(ApiError::Overloaded { retry_after: RETRY_AFTER });
    };
    next.run(request).await.map(|body| Body::new(Permitted { body, _permit: permit }))
}

async fn authenticate(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let principal = match app.auth.authenticate(request.headers()).await {
        Ok(principal) if principal.role == Role::Admin => {
            return arrival_of(&request).refuse(ApiError::AdminKey);
        }
        Ok(principal) => principal,
        Err(error) => return arrival_of(&request).refuse(error.into()),
    };
    // Handlers have no use for the key, and so cannot leak it.
    request.headers_mut().remove(header::AUTHORIZATION);
    request.extensions_mut().insert(principal.clone());
    let mut response = next.run(request).await;
    if let Ok(organization) = HeaderValue::try_from(principal.org_id.as_str()) {
        response.headers_mut().insert(ORGANIZATION, organization);
    }
    response
}

async fn authenticate_admin(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let principal = match app.auth.authenticate(request.headers()).await {
        Ok(principal) if principal.role != Role::Admin => {
            return arrival_of(&request).refuse(ApiError::AdminKeyRequired);
        }
        Ok(principal) => principal,
        Err(error) => return arrival_of(&request).refuse(error.into()),
    };
    request.headers_mut().remove(header::AUTHORIZATION);
    request.extensions_mut().insert(principal);
    next.run(request).await
}

async fn no_route(request: Request) -> Response {
    let (method, path) = asked_for(&request);
    arrival_of(&request).refuse(ApiError::RouteNotFound { method, path })
}

async fn no_method(request: Request) -> Response {
    let (method, path) = asked_for(&request);
    arrival_of(&request).refuse(ApiError::MethodNotAllowed { method, path })
}

fn asked_for(request: &Request) -> (String, String) {
    (request.method().to_string(), request.uri().path().chars().take(200).collect())
}

fn arrival_of(request: &Request) -> Arrival {
    request.extensions().get::<Arrival>().cloned().unwrap_or_else(|| Arrival::of(request.headers()))
}

/// A body that keeps its request counted as in flight.
struct Permitted {
    body: Body,
    _permit: OwnedSemaphorePermit,
}

impl http_body::Body for Permitted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
