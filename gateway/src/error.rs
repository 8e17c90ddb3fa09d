//! Everything that can fail on the data plane, in one table.
//!
//! A row says, for one variant, what each protocol shows: HTTP status, gRPC code, the OpenAI `type` and `code`, the
//! field at fault, and when to come back. The public text is the variant's `Display`; what went wrong inside is its
//! `source`, which is logged and never sent.
//!
//! ```text
//! {"error":{"message":"'temperature' must be between 0 and 2","type":"invalid_request_error",
//!           "param":"temperature","code":"invalid_value"}}
//! ```

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use sluice_billing::{AdmitError, BillingError, ServiceTier};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{auth::AuthError, webhooks::WebhookError};

const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// `google.rpc.ErrorInfo.domain` of every gRPC failure.
const ERROR_DOMAIN: &str = "sluice";

type Source = Box<dyn std::error::Error + Send + Sync>;

/// How the caller speaks, and so how it is told of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Rest,
    Grpc,
}

/// A failure of one request, as its caller may know it.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("the request body is not valid JSON: {detail}")]
    InvalidJson { detail: String },
    #[error("'{param}' {message}")]
    Field { fault: Fault, param: String, message: String },
    #[error(
        "this model's context holds {context_tokens_max} tokens, but the request needs {prompt_tokens} for its prompt \
         and {output_tokens} for the answer; shorten the prompt or lower the answer's limit"
    )]
    ContextLengthExceeded {
        param: &'static str,
        prompt_tokens: u64,
        output_tokens: u64,
        context_tokens_max: u64,
    },
    #[error("no API key was given; send it in the header 'Authorization: Bearer YOUR_KEY'")]
    KeyMissing,
    #[error("the Authorization header must be of the form 'Bearer YOUR_KEY'")]
    KeyMalformed,
    #[error("the API key is not known: {redacted}")]
    KeyUnknown { redacted: String },
    #[error("the API key was revoked: {redacted}")]
    KeyRevoked { redacted: String },
    #[error("an admin key cannot call models; use a project's API key")]
    AdminKey,
    #[error("this is for administrators; use an admin key (`sluice keys create --role admin`)")]
    AdminKeyRequired,
    #[error("there is no {what} '{id}'")]
    NotFound { what: &'static str, id: String },
    #[error("the database does not answer at the moment; try again shortly")]
    DatabaseUnavailable {
        #[source]
        source: Source,
        retry_after: Duration,
    },
    #[error("the model '{model}' does not exist; GET /v1/models lists those that do")]
    ModelNotFound { model: String },
    #[error("nothing is served at {method} {path}")]
    RouteNotFound { method: String, path: String },
    #[error("{path} does not answer to {method}")]
    MethodNotAllowed { method: String, path: String },
    #[error("the request body did not arrive in time")]
    BodyTimeout,
    #[error("the request body broke off")]
    BodyBroken(#[source] Source),
    #[error("the request body is over the limit of {bytes_max} bytes")]
    BodyTooLarge { bytes_max: usize },
    #[error("the content type must be application/json, but is '{content_type}'")]
    MediaType { content_type: String },
    #[error(
        "the account's credit does not cover this request beside those in flight; add credit, then try again"
    )]
    InsufficientQuota,
    #[error(
        "the budget {budget} does not cover this request beside those in flight; raise it, or wait for its next period"
    )]
    OverBudget { budget: String },
    #[error("the client read too slowly; generation was ended")]
    ClientTooSlow,
    #[error("the deadline passed before the answer was complete")]
    DeadlineExceeded,
    #[error("too many requests are in flight; try again shortly")]
    Overloaded { retry_after: Duration },
    #[error("this gateway is shutting down; try again")]
    Draining { retry_after: Duration },
    #[error("every node that serves '{model}' is busy; try again shortly")]
    NodesBusy { model: String, retry_after: Duration },
    #[error("no node that serves '{model}' is reachable; try again shortly")]
    NodesDown { model: String, retry_after: Duration },
    #[error("the node failed while it computed the answer; try again")]
    NodeFailed {
        #[source]
        source: Source,
        retry_after: Duration,
    },
    #[error("the model '{model}' has no price at this time")]
    NoPrice { model: String },
    #[error("usage cannot be recorded at the moment; try again shortly")]
    BillingUnavailable {
        #[source]
        source: Option<Source>,
        retry_after: Duration,
    },
    #[error("keys cannot be checked at the moment; try again shortly")]
    AuthUnavailable {
        #[source]
        source: Source,
        retry_after: Duration,
    },
    #[error("something failed on our side")]
    Internal(#[source] Source),
}

/// What is wrong with a field of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Missing,
    Type,
    Value,
    /// The field asks for something this version does not do, whatever its value.
    UnsupportedParameter,
    /// The field is known, this value of it is not done.
    UnsupportedValue,
}

/// One row of the table.
struct Row {
    http: u16,
    grpc: Code,
    kind: &'static str,
    code: &'static str,
    retry_after: Option<Duration>,
}

impl ApiError {
    #[rustfmt::skip]
    fn row(&self) -> Row {
        use ApiError as E;
        const INVALID: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        let row = |http, grpc, kind, code, retry_after| Row { http, grpc, kind, code, retry_after };
        match self {
            E::InvalidJson { .. }                         => row(400, Code::InvalidArgument,   INVALID, "invalid_json",               None),
            E::Field { fault: Fault::Missing, .. }        => row(400, Code::InvalidArgument,   INVALID, "missing_required_parameter", None),
            E::Field { fault: Fault::Type, .. }           => row(400, Code::InvalidArgument,   INVALID, "invalid_type",               None),
            E::Field { fault: Fault::Value, .. }          => row(400, Code::InvalidArgument,   INVALID, "invalid_value",              None),
            E::Field { fault: Fault::UnsupportedParameter, .. } => row(400, Code::InvalidArgument, INVALID, "unsupported_parameter", None),
            E::Field { fault: Fault::UnsupportedValue, .. }     => row(400, Code::InvalidArgument, INVALID, "unsupported_value",     None),
            E::ContextLengthExceeded { .. }               => row(400, Code::InvalidArgument,   INVALID, "context_length_exceeded",    None),
            E::BodyBroken(_)                              => row(400, Code::InvalidArgument,   INVALID, "invalid_body",               None),
            E::KeyMissing                                 => row(401, Code::Unauthenticated,   INVALID, "invalid_api_key",            None),
            E::KeyMalformed                               => row(401, Code::Unauthenticated,   INVALID, "invalid_api_key",            None),
            E::KeyUnknown { .. }                          => row(401, Code::Unauthenticated,   INVALID, "invalid_api_key",            None),
            E::KeyRevoked { .. }                          => row(401, Code::Unauthenticated,   INVALID, "invalid_api_key",            None),
            E::AdminKey                                   => row(403, Code::PermissionDenied,  INVALID, "admin_key_not_allowed",      None),
            E::AdminKeyRequired                           => row(403, Code::PermissionDenied,  INVALID, "admin_key_required",         None),
            E::NotFound { .. }                            => row(404, Code::NotFound,          INVALID, "not_found",                  None),
            E::ModelNotFound { .. }                       => row(404, Code::NotFound,          INVALID, "model_not_found",            None),
            E::RouteNotFound { .. }                       => row(404, Code::Unimplemented,     INVALID, "unknown_url",                None),
            E::MethodNotAllowed { .. }                    => row(405, Code::Unimplemented,     INVALID, "method_not_supported",       None),
            E::BodyTimeout                                => row(408, Code::DeadlineExceeded,  INVALID, "request_timeout",            None),
            E::ClientTooSlow                              => row(408, Code::DeadlineExceeded,  INVALID, "client_too_slow",            None),
            E::BodyTooLarge { .. }                        => row(413, Code::ResourceExhausted, INVALID, "request_too_large",          None),
            E::MediaType { .. }                           => row(415, Code::InvalidArgument,   INVALID, "unsupported_content_type",   None),
            E::InsufficientQuota                          => row(429, Code::ResourceExhausted, "insufficient_quota", "insufficient_quota", None),
            E::OverBudget { .. }                          => row(429, Code::ResourceExhausted, "insufficient_quota", "budget_exceeded", None),
            E::Internal(_)                                => row(500, Code::Internal,          SERVER,  SERVER,                       None),
            E::NoPrice { .. }                             => row(503, Code::FailedPrecondition, SERVER, SERVER,                       None),
            E::DeadlineExceeded                           => row(504, Code::DeadlineExceeded,  SERVER,  "deadline_exceeded",          None),
            E::Overloaded { retry_after }                 => row(503, Code::Unavailable,       SERVER,  SERVER,                       Some(*retry_after)),
            E::Draining { retry_after }                   => row(503, Code::Unavailable,       SERVER,  SERVER,                       Some(*retry_after)),
            E::NodesBusy { retry_after, .. }              => row(503, Code::Unavailable,       SERVER,  SERVER,                       Some(*retry_after)),
            E::NodesDown { retry_after, .. }              => row(503, Code::Unavailable,       SERVER,  SERVER,                       Some(*retry_after)),
            E::NodeFailed { retry_after, .. }             => row(503, Code::Unavailable,       SERVER,  SERVER,                       Some(*retry_after)),
            E::BillingUnavailable { retry_after, .. }     => row(503, Code::Unavailable,       SERVER,  SERVER,                       Some(*retry_after)),
            E::DatabaseUnavailable { retry_after, .. }    => row(503, Code::Unavailable,       SERVER,  SERVER,                       Some(*retry_after)),
            E::AuthUnavailable { retry_after, .. }        => row(503, Code::Unavailable,       SERVER,  SERVER,                       Some(*retry_after)),
        }
    }

    /// A field that is at fault; `message` goes on from the field's name.
    pub fn field(fault: Fault, param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError::Field { fault, param: param.into(), message: message.into() }
    }

    pub fn internal(source: impl Into<Source>) -> ApiError {
        ApiError::Internal(source.into())
    }

    pub fn http_status(&self) -> StatusCode {
        StatusCode::from_u16(self.row().http).expect("the table holds valid statuses")
    }

    /// The wire code, the same over REST and gRPC: `invalid_api_key`, `model_not_found`, ...
    pub fn code(&self) -> &'static str {
        self.row().code
    }

    /// The field of the request that is at fault, if one is.
    pub fn param(&self) -> Option<&str> {
        match self {
            ApiError::Field { param, .. } => Some(param),
            ApiError::ContextLengthExceeded { param, .. } => Some(param),
            ApiError::ModelNotFound { .. } => Some("model"),
            _ => None,
        }
    }

    /// Logs a failure that is ours, with its causes. A client's fault is not an error, and not logged as one.
    pub fn log(&self) {
        if self.row().http < 500 {
            tracing::debug!(code = self.code(), error = %self, "refused");
            return;
        }
        let mut causes = String::new();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            causes.push_str(if causes.is_empty() { "" } else { ": " });
            causes.push_str(&error.to_string());
            cause = error.source();
        }
        match self {
            ApiError::Internal(_) => tracing::error!(error = %self, causes, "request failed"),
            _ => tracing::warn!(error = %self, causes, "request failed"),
        }
    }

    /// The body of an OpenAI-shaped failure: always all four keys.
    pub fn envelope(&self) -> serde_json::Value {
        let row = self.row();
        serde_json::json!({ "error": {
            "message": self.to_string(), "type": row.kind, "param": self.param(), "code": row.code,
        }})
    }

    /// The gRPC status with `google.rpc` details: what is wrong, where, and when to come back.
    pub fn to_status(&self, request_id: &str) -> Status {
        let row = self.row();
        let mut details = ErrorDetails::new();
        details.set_error_info(row.code, ERROR_DOMAIN, std::collections::HashMap::<String, String>::new());
        details.set_request_info(request_id, "");
        if let Some(param) = self.param() {
            details.add_bad_request_violation(param, self.to_string());
        }
        if let Some(delay) = row.retry_after {
            details.set_retry_info(Some(delay));
        }
        if let ApiError::OverBudget { .. } = self {
            details.add_quota_failure_violation("budget", self.to_string());
        }
        if matches!(self, ApiError::InsufficientQuota) {
            details.add_quota_failure_violation("account", self.to_string());
        }
        Status::with_error_details(row.grpc, self.to_string(), details)
    }

    /// The whole response, as `protocol` tells of a failure before the first frame.
    pub fn respond(&self, protocol: Protocol, request_id: &str) -> Response {
        match protocol {
            Protocol::Rest => self.rest_response(),
            Protocol::Grpc => self.to_status(request_id).into_http::<axum::body::Body>(),
        }
    }

    fn rest_response(&self) -> Response {
        let row = self.row();
        let mut response = (self.http_status(), axum::Json(self.envelope())).into_response();
        let headers = response.headers_mut();
        if let Some(delay) = row.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(delay.as_millis().div_ceil(1000) as u64));
            headers.insert(RETRY_AFTER_MS, HeaderValue::from(delay.as_millis() as u64));
        }
        if matches!(self, ApiError::InsufficientQuota | ApiError::OverBudget { .. }) {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.log();
        self.rest_response()
    }
}

/// When to come back, where nothing better is known.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> ApiError {
        match error {
            AuthError::Missing => ApiError::KeyMissing,
            AuthError::Malformed => ApiError::KeyMalformed,
            AuthError::Unknown { redacted } => ApiError::KeyUnknown { redacted },
            AuthError::Revoked { redacted } => ApiError::KeyRevoked { redacted },
            AuthError::Unavailable(_) => {
                ApiError::AuthUnavailable { source: error.into(), retry_after: RETRY_AFTER }
            }
        }
    }
}

impl From<WebhookError> for ApiError {
    fn from(error: WebhookError) -> ApiError {
        match error {
            WebhookError::Field { field, message } => ApiError::field(Fault::Value, field, message),
            WebhookError::NotFound { what, id } => ApiError::NotFound { what, id },
            WebhookError::Database(source) => {
                ApiError::DatabaseUnavailable { source: source.into(), retry_after: RETRY_AFTER }
            }
        }
    }
}

impl From<sqlx::Error> for ApiError {
    fn from(error: sqlx::Error) -> ApiError {
        ApiError::DatabaseUnavailable { source: error.into(), retry_after: RETRY_AFTER }
    }
}

/// For what an administrator asks of the books.
impl From<BillingError> for ApiError {
    fn from(error: BillingError) -> ApiError {
        match error {
            BillingError::UnknownAccount(account) => {
                ApiError::NotFound { what: "account", id: account.to_string() }
            }
            BillingError::Database(source) => source.into(),
            BillingError::Budget { field, fix } => ApiError::field(Fault::Value, field, fix),
            other => ApiError::internal(other),
        }
    }
}

impl From<AdmitError> for ApiError {
    fn from(error: AdmitError) -> ApiError {
        match error {
            AdmitError::InsufficientCredit { .. } => ApiError::InsufficientQuota,
            AdmitError::OverBudget { budget, .. } => ApiError::OverBudget { budget },
            AdmitError::NoPrice { model, service_tier: ServiceTier::Default } => ApiError::NoPrice { model },
            AdmitError::NoPrice { model, service_tier } => {
                let message = format!(
                    "is not supported with this value: the model '{model}' has no {service_tier} price"
                );
                ApiError::field(Fault::UnsupportedValue, "service_tier", message)
            }
            AdmitError::OutboxFull { retry_after } => {
                ApiError::BillingUnavailable { source: None, retry_after }
            }
            other => ApiError::BillingUnavailable { source: Some(other.into()), retry_after: RETRY_AFTER },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One error a line of the table, `http grpc type code param retry-after should-retry`.
    fn check(error: ApiError, expect: &str) {
        let response = error.rest_response();
        let status = error.to_status("req-1");
        let header = |name: &str| {
            response.headers().get(name).map_or("-", |value| value.to_str().expect("ASCII")).to_owned()
        };
        let envelope = error.envelope();
        let body = envelope["error"].as_object().expect("an object");
        assert_eq!(body.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        let details = status.get_error_details();
        assert_eq!(details.error_info().expect("ErrorInfo").reason, error.code());
        assert_eq!(details.request_info().expect("RequestInfo").request_id, "req-1");
        assert_eq!(details.retry_info().is_some(), header("retry-after") != "-");
        assert_eq!(details.bad_request().is_some(), error.param().is_some());
        let got = format!(
            "{} {:?} {} {} {} {} {}",
            response.status().as_u16(),
            status.code(),
            error.row().kind,
            error.code(),
            error.param().unwrap_or("-"),
            header("retry-after"),
            header("x-should-retry"),
        );
        assert_eq!(got, expect);
    }

    #[test]
    fn the_table_is_what_clients_depend_on() {
        let wait = Duration::from_millis(1500);
        check(
            ApiError::InvalidJson { detail: "x".into() },
            "400 InvalidArgument invalid_request_error invalid_json - - -",
        );
        check(
            ApiError::field(Fault::Value, "temperature", "must be between 0 and 2"),
            "400 InvalidArgument invalid_request_error invalid_value temperature - -",
        );
        check(
            ApiError::field(Fault::UnsupportedParameter, "logprobs", "is not supported"),
            "400 InvalidArgument invalid_request_error unsupported_parameter logprobs - -",
        );
        check(
            ApiError::ContextLengthExceeded {
                param: "messages",
                prompt_tokens: 9,
                output_tokens: 1,
                context_tokens_max: 8,
            },
            "400 InvalidArgument invalid_request_error context_length_exceeded messages - -",
        );
        check(ApiError::KeyMissing, "401 Unauthenticated invalid_request_error invalid_api_key - - -");
        check(
            ApiError::ModelNotFound { model: "m".into() },
            "404 NotFound invalid_request_error model_not_found model - -",
        );
        check(
            ApiError::BodyTooLarge { bytes_max: 1 },
            "413 ResourceExhausted invalid_request_error request_too_large - - -",
        );
        check(
            ApiError::InsufficientQuota,
            "429 ResourceExhausted insufficient_quota insufficient_quota - - false",
        );
        check(
            ApiError::OverBudget { budget: "b".into() },
            "429 ResourceExhausted insufficient_quota budget_exceeded - - false",
        );
        check(ApiError::Overloaded { retry_after: wait }, "503 Unavailable server_error server_error - 2 -");
        check(ApiError::internal("secret"), "500 Internal server_error server_error - - -");
    }

    #[test]
    fn what_is_internal_stays_inside() {
        let error = ApiError::internal("password=hunter2");
        assert!(!error.envelope().to_string().contains("hunter2"));
        assert!(!error.to_status("r").message().contains("hunter2"));
    }
}
