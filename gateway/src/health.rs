//! What load balancers, Prometheus and gRPC tools ask, none of which have a key: `/health`, `/metrics`,
//! `grpc.health.v1` and reflection.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::State,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;
use sluice_proto::v1::{chat_service_server as chat, model_service_server as model};
use tokio::time::{Duration, interval};
use tonic::server::NamedService;
use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tonic_reflection::server::Builder as Reflection;

use crate::{app::App, error::ApiError, stack::every_method_of};

/// How soon gRPC health follows the nodes.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);
/// In gRPC health, the empty name is the whole server.
const SERVICES: [&str; 3] = ["", chat::SERVICE_NAME, model::SERVICE_NAME];

pub fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    let reporter = HealthReporter::new();
    let health = HealthServer::new(HealthService::from_health_reporter(reporter.clone()));
    tokio::spawn(follow(app.clone(), reporter));
    let v1 = reflection().build_v1().expect("the compiled-in descriptors are valid");
    let v1alpha = reflection().build_v1alpha().expect("the compiled-in descriptors are valid");
    Router::new()
        .route("/health", get(report))
        .route("/metrics", get(metrics))
        .route_service(&every_method_of(name_of(&health)), health)
        .route_service(&every_method_of(name_of(&v1)), v1)
        .route_service(&every_method_of(name_of(&v1alpha)), v1alpha)
}

fn name_of<S: NamedService>(_: &S) -> &'static str {
    S::NAME
}

/// The public services; what gateways and nodes say to each other is nobody else's business.
fn reflection() -> Reflection<'static> {
    Reflection::configure()
        .register_encoded_file_descriptor_set(sluice_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(chat::SERVICE_NAME)
        .with_service_name(model::SERVICE_NAME)
        .with_service_name("grpc.health.v1.Health")
}

fn state(app: &App) -> &'static str {
    match (app.draining.is_cancelled(), app.nodes.any_up()) {
        (true, _) => "draining",
        (false, false) => "no_node",
        (false, true) => "ok",
    }
}

/// `GET /health`: 200 while requests can be served.
async fn report(State(app): State<Arc<App>>) -> Response {
    let state = state(&app);
    let nodes: Vec<_> = app
        .nodes
        .nodes()
        .iter()
        .map(|node| {
            let seen = node.seen();
            let models: Vec<_> = seen.models.iter().map(|model| &model.name).collect();
            json!({ "name": node.name(), "up": seen.takes_requests(), "models": models })
        })
        .collect();
    let status = if state == "ok" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({ "status": state, "version": env!("CARGO_PKG_VERSION"), "nodes": nodes });
    (status, Json(body)).into_response()
}

/// `GET /metrics`. What the gateway says of itself, in Prometheus' text format.
async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    app.nodes.refresh().await;
    let text = app.metrics.render().map_err(ApiError::internal)?;
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

/// Keeps gRPC health true until the end of the drain, then ends the streams of those who watch it.
async fn follow(app: Arc<App>, mut reporter: HealthReporter) {
    let mut interval = interval(FOLLOW_INTERVAL);
    let mut last = None;
    while !app.draining.is_cancelled() {
        let serving = state(&app) == "ok";
        if last.replace(serving) != Some(serving) {
            let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
            set(&reporter, status).await;
        }
        tokio::select! {
            _ = interval.tick() => {}
            () = app.draining.cancelled() => {}
        }
    }
    set(&reporter, ServingStatus::NotServing).await;
    app.tracker.wait().await;
    for service in SERVICES {
        reporter.clear_service_status(service).await;
    }
}

async fn set(reporter: &HealthReporter, status: ServingStatus) {
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
}
