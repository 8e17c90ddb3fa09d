//! The admin API of webhooks and of the balance alert, for admin keys, each within its organisation.
//!
//! ```text
//! GET POST          /v1/organization/webhooks
//! GET POST DELETE   /v1/organization/webhooks/{id}
//! POST              /v1/organization/webhooks/{id}/rotate | /test
//! GET               /v1/organization/webhooks/deliveries ?state &endpoint_id &after &limit
//! POST              /v1/organization/webhooks/deliveries/{id}/replay
//! GET POST          /v1/organization/balance_alert
//! ```

use std::sync::Arc;

use axum::{
    Extension, Json, Router,
    extract::{Path, RawQuery, Request, State},
    routing::{get, post},
};
use serde_json::{Value, json};
use sluice_billing::{AccountId, Money};
use time::OffsetDateTime;

use super::store::{self, Delivery, DeliveryQuery, DeliveryState, Endpoint, EndpointChange, EndpointDraft};
use crate::{
    app::App,
    auth::Principal,
    dialect::{body::read_json, fields::Fields},
    error::{ApiError, Fault},
};

const LIMIT_DEFAULT: i64 = 20;
const LIMIT_MAX: i64 = 100;

type Caller = Extension<Arc<Principal>>;
type Answer = Result<Json<Value>, ApiError>;

pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/organization/webhooks", get(list).post(create))
        .route("/v1/organization/webhooks/deliveries", get(deliveries))
        .route("/v1/organization/webhooks/deliveries/{id}/replay", post(replay))
        .route("/v1/organization/webhooks/{id}", get(show).post(update).delete(delete))
        .route("/v1/organization/webhooks/{id}/rotate", post(rotate))
        .route("/v1/organization/webhooks/{id}/test", post(test))
        .route("/v1/organization/balance_alert", get(alert).post(set_alert))
}

async fn list(State(app): State<Arc<App>>, caller: Caller) -> Answer {
    let endpoints = store::endpoints(app.webhooks.database(), &caller.org_id).await?;
    let data: Vec<Value> = endpoints.iter().map(endpoint_json).collect();
    Ok(Json(json!({ "object": "list", "data": data, "has_more": false })))
}

async fn create(State(app): State<Arc<App>>, caller: Caller, request: Request) -> Answer {
    let body = read_json(request, &app.limits).await?;
    let body = Fields::of(&body, "")?;
    body.required("url")?;
    let draft = EndpointDraft {
        org_id: caller.org_id.clone(),
        account: caller.account_id.clone(),
        url: body.string("url")?.unwrap_or_default().to_owned(),
        description: body.string("description")?.unwrap_or_default().to_owned(),
        events: events(&body)?.unwrap_or_default(),
        secret: body.string("secret")?.map(str::to_owned),
    };
    let webhooks = &app.webhooks;
    let (endpoint, secret) =
        store::create(webhooks.database(), webhooks.settings(), &draft, store::now_ms()).await?;
    let mut shown = endpoint_json(&endpoint);
    shown["secret"] = secret.reveal().into();
    Ok(Json(shown))
}

async fn show(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Answer {
    let endpoint = store::endpoint(app.webhooks.database(), &caller.org_id, &id).await?;
    Ok(Json(endpoint_json(&endpoint)))
}

async fn update(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let body = read_json(request, &app.limits).await?;
    let body = Fields::of(&body, "")?;
    let change = EndpointChange {
        url: body.string("url")?.map(str::to_owned),
        description: body.string("description")?.map(str::to_owned),
        events: events(&body)?,
        enabled: body.boolean("enabled")?,
    };
    let webhooks = &app.webhooks;
    let endpoint =
        store::update(webhooks.database(), webhooks.settings(), &caller.org_id, &id, &change).await?;
    webhooks.wake();
    Ok(Json(endpoint_json(&endpoint)))
}

async fn delete(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Answer {
    store::delete(app.webhooks.database(), &caller.org_id, &id).await?;
    Ok(Json(json!({ "object": "webhook_endpoint.deleted", "id": id, "deleted": true })))
}

async fn rotate(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Answer {
    let webhooks = &app.webhooks;
    let now_ms = store::now_ms();
    let secret = store::rotate(webhooks.database(), webhooks.settings(), &caller.org_id, &id, now_ms).await?;
    let overlap_s = webhooks.settings().rotation_overlap_ms / 1000;
    Ok(Json(json!({
        "object": "webhook_endpoint.secret", "id": id, "secret": secret.reveal(),
        "former_secret_expires_at": now_ms / 1000 + store::as_stored(overlap_s),
    })))
}

async fn test(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Answer {
    let delivery = store::test(app.webhooks.database(), &caller.org_id, &id, store::now_ms()).await?;
    app.webhooks.wake();
    Ok(Json(delivery_json(&delivery)))
}

async fn deliveries(State(app): State<Arc<App>>, caller: Caller, RawQuery(query): RawQuery) -> Answer {
    let asked = DeliveriesAsked::parse(query.as_deref().unwrap_or_default())?;
    let query = DeliveryQuery {
        org_id: &caller.org_id,
        state: asked.state,
        endpoint_id: asked.endpoint_id.as_deref(),
        after: asked.after.as_deref(),
        // One more than asked for tells whether there are more.
        limit: asked.limit + 1,
    };
    let mut found = store::deliveries(app.webhooks.database(), &query).await?;
    let has_more = found.len() as i64 > asked.limit;
    found.truncate(asked.limit as usize);
    let data: Vec<Value> = found.iter().map(delivery_json).collect();
    let id_of = |delivery: Option<&Delivery>| delivery.map(|delivery| delivery.id.clone());
    Ok(Json(json!({
        "object": "list", "data": data, "has_more": has_more,
        "first_id": id_of(found.first()), "last_id": id_of(found.last()),
    })))
}

async fn replay(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Answer {
    let delivery = store::replay(app.webhooks.database(), &caller.org_id, &id, store::now_ms()).await?;
    app.webhooks.wake();
    Ok(Json(delivery_json(&delivery)))
}

async fn alert(State(app): State<Arc<App>>, caller: Caller) -> Answer {
    let account = AccountId::new(caller.account_id.clone());
    let low_balance = app.billing.books().low_balance_alert(&account).await?;
    Ok(Json(alert_json(&account, low_balance)))
}

/// `{"low_balance": "5.00"}` sets the threshold, `{"low_balance": null}` removes it.
async fn set_alert(State(app): State<Arc<App>>, caller: Caller, request: Request) -> Answer {
    let body = read_json(request, &app.limits).await?;
    if body.get("low_balance").is_none() {
        let message = "is required: an amount of dollars such as \"5.00\", or null for no alert";
        return Err(ApiError::field(Fault::Missing, "low_balance", message));
    }
    let threshold = match Fields::of(&body, "")?.string("low_balance")? {
        None => None,
        Some(text) => Some(amount(text).map_err(|why| ApiError::field(Fault::Value, "low_balance", why))?),
    };
    let account = AccountId::new(caller.account_id.clone());
    let books = app.billing.books();
    books.set_low_balance_alert(&account, threshold, OffsetDateTime::now_utc()).await?;
    app.webhooks.wake();
    Ok(Json(alert_json(&account, threshold)))
}

fn amount(text: &str) -> Result<Money, String> {
    match Money::from_usd_str(text) {
        Ok(amount) if amount > Money::ZERO => Ok(amount),
        Ok(_) => Err("must be over 0; null means no alert".to_owned()),
        Err(error) => Err(format!("must be an amount of dollars: {error}")),
    }
}

fn events(body: &Fields<'_>) -> Result<Option<Vec<String>>, ApiError> {
    let Some(values) = body.array("events")? else { return Ok(None) };
    let text = |(index, value): (usize, &Value)| match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(body.wrong_type(&format!("events[{index}]"), "a string", value)),
    };
    values.iter().enumerate().map(text).collect::<Result<_, _>>().map(Some)
}

#[derive(Debug, Default)]
struct DeliveriesAsked {
    state: Option<DeliveryState>,
    endpoint_id: Option<String>,
    after: Option<String>,
    limit: i64,
}

impl DeliveriesAsked {
    fn parse(query: &str) -> Result<DeliveriesAsked, ApiError> {
        let mut asked = DeliveriesAsked { limit: LIMIT_DEFAULT, ..DeliveriesAsked::default() };
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let refuse = |message: String| ApiError::field(Fault::Value, name.to_string(), message);
            match &*name {
                "state" => {
                    let states = DeliveryState::ALL.map(DeliveryState::as_str).join(", ");
                    let state = DeliveryState::parse(&value);
                    asked.state = Some(state.ok_or_else(|| refuse(format!("must be one of {states}")))?);
                }
                "endpoint_id" => asked.endpoint_id = Some(value.into_owned()),
                "after" => asked.after = Some(value.into_owned()),
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=LIMIT_MAX).contains(limit));
                    asked.limit =
                        limit.ok_or_else(|| refuse(format!("must be between 1 and {LIMIT_MAX}")))?;
                }
                _ => {}
            }
        }
        Ok(asked)
    }
}

/// Without the secret.
pub fn endpoint_json(endpoint: &Endpoint) -> Value {
    json!({
        "object": "webhook_endpoint",
        "id": endpoint.id,
        "url": endpoint.url,
        "description": endpoint.description,
        "events": endpoint.events,
        "enabled": endpoint.enabled,
        "disabled_reason": endpoint.disabled_reason,
        "created_at": endpoint.created_at_ms / 1000,
    })
}

pub fn delivery_json(delivery: &Delivery) -> Value {
    let pending = delivery.state == DeliveryState::Pending.as_str();
    json!({
        "object": "webhook_delivery",
        "id": delivery.id,
        "endpoint_id": delivery.endpoint_id,
        "event_id": delivery.event_id,
        "event_type": delivery.event_type,
        "state": delivery.state,
        "attempts": delivery.attempts,
        "next_attempt_at": pending.then_some(delivery.next_attempt_at_ms / 1000),
        "last_status": delivery.last_status,
        "last_error": delivery.last_error,
        "created_at": delivery.created_at_ms / 1000,
        "finished_at": delivery.finished_at_ms.map(|at_ms| at_ms / 1000),
        "payload": serde_json::from_str::<Value>(&delivery.body).unwrap_or_default(),
    })
}

fn alert_json(account: &AccountId, low_balance: Option<Money>) -> Value {
    json!({
        "object": "balance_alert",
        "account": account.as_str(),
        "currency": "USD",
        "low_balance": low_balance.map(|amount| amount.to_usd_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_and_its_faults_are_named() {
        let asked =
            DeliveriesAsked::parse("state=dead&endpoint_id=whe_1&limit=100&other=x").expect("a query");
        assert_eq!((asked.state, asked.limit), (Some(DeliveryState::Dead), 100));
        assert_eq!(asked.endpoint_id.as_deref(), Some("whe_1"));
        assert_eq!(DeliveriesAsked::parse("").expect("an empty query").limit, LIMIT_DEFAULT);
        for (query, param) in
            [("state=lost", "state"), ("limit=0", "limit"), ("limit=101", "limit"), ("limit=", "limit")]
        {
            let error = DeliveriesAsked::parse(query).expect_err("a fault");
            assert_eq!(error.param(), Some(param), "{query}");
        }
    }
}
