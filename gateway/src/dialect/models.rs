//! `GET /v1/models` and `GET /v1/models/{name}`: what the nodes serve.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use serde_json::{Value, json};
use sluice_proto::node::v1::ModelDescription;

use crate::{app::App, error::ApiError};

pub async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let models: Vec<Value> = app.nodes.models().iter().map(body).collect();
    Json(json!({ "object": "list", "data": models }))
}

/// A model's name may hold slashes, as names of organisations and repositories do.
pub async fn get(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    // A name that is not UTF-8 once decoded is no model's.
    let Ok(Path(name)) = name else { return Err(ApiError::ModelNotFound { model: "\u{fffd}".to_owned() }) };
    let models = app.nodes.models();
    let model = models.iter().find(|model| model.name == name);
    model.map(|model| Json(body(model))).ok_or(ApiError::ModelNotFound { model: name })
}

fn body(model: &ModelDescription) -> Value {
    json!({
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "sluice",
        // Beyond OpenAI's shape, by the name that other servers use.
        "max_model_len": model.context_tokens_max,
    })
}
