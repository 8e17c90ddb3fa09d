//! Reads a JSON request body within its limits.

use std::time::Duration;

use axum::{body::Body, extract::Request};
use http::{HeaderMap, header};
use http_body_util::BodyExt;
use serde_json::Value;

use crate::{app::Limits, error::ApiError};

/// The body as a JSON object, or what is wrong with it.
pub async fn read_json(request: Request, limits: &Limits) -> Result<Value, ApiError> {
    check_content_type(request.headers())?;
    let timeout = Duration::from_millis(limits.body_read_timeout_ms);
    let bytes = tokio::time::timeout(timeout, read(request.into_body(), limits))
        .await
        .map_err(|_| ApiError::BodyTimeout)??;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| ApiError::InvalidJson { detail: error.to_string() })?;
    match value.is_object() {
        true => Ok(value),
        false => Err(ApiError::InvalidJson { detail: "it must be an object".to_owned() }),
    }
}

/// A body over the limit is read on and thrown away, up to another limit: a sender that is cut off while it sends
/// would see a broken connection, and not our answer.
async fn read(mut body: Body, limits: &Limits) -> Result<Vec<u8>, ApiError> {
    let bytes_max = limits.body_bytes_max;
    let (mut bytes, mut seen) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ApiError::BodyBroken(error.into()))?;
        let Some(data) = frame.data_ref() else { continue };
        seen += data.len();
        if seen <= bytes_max {
            bytes.extend_from_slice(data);
        } else if seen > limits.body_discard_bytes_max {
            break;
        }
    }
    match seen > bytes_max {
        true => Err(ApiError::BodyTooLarge { bytes_max }),
        false => Ok(bytes),
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let content_type = value.to_str().unwrap_or("unreadable");
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    match essence.eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => Err(ApiError::MediaType { content_type: content_type.chars().take(100).collect() }),
    }
}
