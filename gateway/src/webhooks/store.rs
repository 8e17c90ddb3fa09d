//! Endpoints, their secrets and their deliveries, as they are stored and as their owner sees and changes them.
//!
//! Every look-up names the organisation, so that one cannot see another's by guessing an id. Secrets are stored as they
//! are: each attempt is signed with them, so a hash would not do. They are as private as the database, whose file is its
//! owner's alone, and are shown only when they are made.

use serde::Serialize;
use sluice_billing::{Conn, Database, args, notice::NoticeKind};
use sqlx::FromRow;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use uuid::Uuid;

use super::{TEST_EVENT, WebhookSettings, signature::Secret, target::Target};

const DESCRIPTION_BYTES_MAX: usize = 500;
/// Secrets of one endpoint in force at the same time: the newest, and those that its last rotations retired.
const SECRETS_MAX: i64 = 3;

/// Why an endpoint or a delivery cannot be had or changed.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// The message goes on from the field's name.
    #[error("'{field}' {message}")]
    Field { field: String, message: String },
    #[error("there is no {what} '{id}'")]
    NotFound { what: &'static str, id: String },
    #[error("the database does not answer")]
    Database(#[from] sqlx::Error),
}

fn fault(field: impl Into<String>, message: impl Into<String>) -> WebhookError {
    WebhookError::Field { field: field.into(), message: message.into() }
}

/// Who is told, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub id: String,
    pub url: String,
    pub description: String,
    /// The kinds of events it wants; empty: all.
    pub events: Vec<String>,
    pub enabled: bool,
    /// Why it was switched off, where not its owner did.
    pub disabled_reason: Option<String>,
    pub created_at_ms: i64,
}

/// An endpoint as it is asked for.
#[derive(Clone, Debug, Default)]
pub struct EndpointDraft {
    pub org_id: String,
    /// The account whose notices it gets.
    pub account: String,
    pub url: String,
    pub description: String,
    pub events: Vec<String>,
    /// A secret of the receiver's own; absent: one is made.
    pub secret: Option<String>,
}

/// What to change of an endpoint; `None` leaves it.
#[derive(Clone, Debug, Default)]
pub struct EndpointChange {
    pub url: Option<String>,
    pub description: Option<String>,
    pub events: Option<Vec<String>>,
    pub enabled: Option<bool>,
}

/// Where a delivery stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryState {
    Pending,
    Delivered,
    /// Given up on; it can be replayed.
    Dead,
}

impl DeliveryState {
    pub const ALL: [DeliveryState; 3] =
        [DeliveryState::Pending, DeliveryState::Delivered, DeliveryState::Dead];

    pub fn as_str(self) -> &'static str {
        match self {
            DeliveryState::Pending => "pending",
            DeliveryState::Delivered => "delivered",
            DeliveryState::Dead => "dead",
        }
    }

    pub fn parse(text: &str) -> Option<DeliveryState> {
        DeliveryState::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

/// One event on its way to one endpoint.
#[derive(Clone, Debug, FromRow)]
pub struct Delivery {
    pub id: String,
    pub endpoint_id: String,
    /// The `webhook-id`: the same for every attempt, and for every endpoint that is told of the event.
    pub event_id: String,
    pub event_type: String,
    pub body: String,
    pub state: String,
    /// Attempts that were answered, or failed; a replay counts from 0 again.
    pub attempts: i64,
    pub next_attempt_at_ms: i64,
    pub last_status: Option<i64>,
    pub last_error: Option<String>,
    pub created_at_ms: i64,
    pub finished_at_ms: Option<i64>,
}

/// Which deliveries to list: newest first, those older than `after`.
#[derive(Clone, Debug)]
pub struct DeliveryQuery<'a> {
    pub org_id: &'a str,
    pub state: Option<DeliveryState>,
    pub endpoint_id: Option<&'a str>,
    pub after: Option<&'a str>,
    pub limit: i64,
}

#[derive(FromRow)]
struct EndpointRow {
    id: String,
    url: String,
    description: String,
    events: String,
    enabled: i64,
    disabled_reason: Option<String>,
    created_at_ms: i64,
}

impl From<EndpointRow> for Endpoint {
    fn from(row: EndpointRow) -> Endpoint {
        Endpoint {
            id: row.id,
            url: row.url,
            description: row.description,
            events: serde_json::from_str(&row.events).expect("this module writes the list of events as JSON"),
            enabled: row.enabled == 1,
            disabled_reason: row.disabled_reason,
            created_at_ms: row.created_at_ms,
        }
    }
}

pub fn now_ms() -> i64 {
    (OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000) as i64
}

pub fn new_id(prefix: &str) -> String {
    format!("{prefix}_{}", Uuid::now_v7().simple())
}

/// Makes an endpoint; the secret is not to be had again.
pub async fn create(
    database: &Database,
    settings: &WebhookSettings,
    draft: &EndpointDraft,
    now_ms: i64,
) -> Result<(Endpoint, Secret), WebhookError> {
    let target = Target::parse(&draft.url, settings).map_err(|message| fault("url", message))?;
    check_description(&draft.description)?;
    check_events(&draft.events)?;
    let secret = match &draft.secret {
        Some(text) => Secret::parse(text).map_err(|message| fault("secret", message))?,
        None => Secret::generate(),
    };
    let endpoint = Endpoint {
        id: new_id("whe"),
        url: target.as_str().to_owned(),
        description: draft.description.clone(),
        events: draft.events.clone(),
        enabled: true,
        disabled_reason: None,
        created_at_ms: now_ms,
    };
    let mut tx = database.write().await?;
    let (count,): (i64,) = tx
        .fetch_one("SELECT count(*) FROM webhook_endpoints WHERE org_id = $1", args![draft.org_id.as_str()])
        .await?;
    if count >= as_stored(settings.endpoints_per_org_max as u64) {
        let most = settings.endpoints_per_org_max;
        return Err(fault(
            "url",
            format!("would be one endpoint too many: an organisation has at most {most}"),
        ));
    }
    tx.execute(
        "INSERT INTO webhook_endpoints (id, org_id, account, url, description, events, enabled, created_at_ms, \
         holder, held_until_ms) VALUES ($1, $2, $3, $4, $5, $6, 1, $7, '', 0)",
        args![
            endpoint.id.as_str(),
            draft.org_id.as_str(),
            draft.account.as_str(),
            endpoint.url.as_str(),
            endpoint.description.as_str(),
            events_json(&endpoint.events).as_str(),
            now_ms
        ],
    )
    .await?;
    insert_secret(&mut tx, &endpoint.id, 1, &secret, now_ms).await?;
    tx.commit().await?;
    Ok((endpoint, secret))
}

/// Every endpoint of an organisation, oldest first.
pub async fn endpoints(database: &Database, org_id: &str) -> Result<Vec<Endpoint>, WebhookError> {
    let rows: Vec<EndpointRow> = database
        .read()
        .await?
        .fetch_all(
            "SELECT id, url, description, events, enabled, disabled_reason, created_at_ms \
             FROM webhook_endpoints WHERE org_id = $1 ORDER BY id",
            args![org_id],
        )
        .await?;
    Ok(rows.into_iter().map(Endpoint::from).collect())
}

pub async fn endpoint(database: &Database, org_id: &str, id: &str) -> Result<Endpoint, WebhookError> {
    find(&mut database.read().await?, org_id, id).await
}

async fn find(conn: &mut Conn, org_id: &str, id: &str) -> Result<Endpoint, WebhookError> {
    let row: Option<EndpointRow> = conn
        .fetch_optional(
            "SELECT id, url, description, events, enabled, disabled_reason, created_at_ms \
             FROM webhook_endpoints WHERE org_id = $1 AND id = $2",
            args![org_id, id],
        )
        .await?;
    row.map(Endpoint::from).ok_or_else(|| no_endpoint(id))
}

fn no_endpoint(id: &str) -> WebhookError {
    WebhookError::NotFound { what: "webhook endpoint", id: id.chars().take(100).collect() }
}

/// Changes an endpoint. Deliveries that wait go to its new URL; switched on again, it gets those that waited.
pub async fn update(
    database: &Database,
    settings: &WebhookSettings,
    org_id: &str,
    id: &str,
    change: &EndpointChange,
) -> Result<Endpoint, WebhookError> {
    let mut tx = database.write().await?;
    lock(&mut tx, org_id, id).await?;
    let mut endpoint = find(&mut tx, org_id, id).await?;
    if let Some(url) = &change.url {
        let target = Target::parse(url, settings).map_err(|message| fault("url", message))?;
        endpoint.url = target.as_str().to_owned();
    }
    if let Some(description) = &change.description {
        check_description(description)?;
        endpoint.description = description.clone();
    }
    if let Some(events) = &change.events {
        check_events(events)?;
        endpoint.events = events.clone();
    }
    if let Some(enabled) = change.enabled {
        endpoint.enabled = enabled;
        endpoint.disabled_reason = None;
    }
    tx.execute(
        "UPDATE webhook_endpoints SET url = $1, description = $2, events = $3, enabled = $4, disabled_reason = $5 \
         WHERE id = $6",
        args![
            endpoint.url.as_str(),
            endpoint.description.as_str(),
            events_json(&endpoint.events).as_str(),
            i64::from(endpoint.enabled),
            endpoint.disabled_reason.as_deref(),
            id
        ],
    )
    .await?;
    tx.commit().await?;
    Ok(endpoint)
}

/// Deletes an endpoint with its secrets and deliveries.
pub async fn delete(database: &Database, org_id: &str, id: &str) -> Result<(), WebhookError> {
    let mut tx = database.write().await?;
    let deleted =
        tx.execute("DELETE FROM webhook_endpoints WHERE org_id = $1 AND id = $2", args![org_id, id]).await?;
    tx.commit().await?;
    if deleted == 1 { Ok(()) } else { Err(no_endpoint(id)) }
}

/// Makes a new secret. Those before it stay valid for the overlap, so that receivers can change over.
pub async fn rotate(
    database: &Database,
    settings: &WebhookSettings,
    org_id: &str,
    id: &str,
    now_ms: i64,
) -> Result<Secret, WebhookError> {
    let secret = Secret::generate();
    let mut tx = database.write().await?;
    lock(&mut tx, org_id, id).await?;
    tx.execute(
        "DELETE FROM webhook_secrets WHERE endpoint_id = $1 AND expires_at_ms <= $2",
        args![id, now_ms],
    )
    .await?;
    let (newest, count): (i64, i64) = tx
        .fetch_one(
            "SELECT CAST(coalesce(max(ordinal), 0) AS BIGINT), count(*) FROM webhook_secrets WHERE endpoint_id = $1",
            args![id],
        )
        .await?;
    if count >= SECRETS_MAX {
        return Err(fault(
            "id",
            format!(
                "has {count} secrets in force already; wait until the oldest has ended, or make a new endpoint"
            ),
        ));
    }
    let ends_at_ms = now_ms.saturating_add(as_stored(settings.rotation_overlap_ms));
    tx.execute(
        "UPDATE webhook_secrets SET expires_at_ms = $1 WHERE endpoint_id = $2 AND expires_at_ms IS NULL",
        args![ends_at_ms, id],
    )
    .await?;
    insert_secret(&mut tx, id, newest + 1, &secret, now_ms).await?;
    tx.commit().await?;
    Ok(secret)
}

/// Sends an endpoint a `webhook.test`, whatever events it wants.
pub async fn test(
    database: &Database,
    org_id: &str,
    id: &str,
    now_ms: i64,
) -> Result<Delivery, WebhookError> {
    let mut tx = database.write().await?;
    let endpoint = find(&mut tx, org_id, id).await?;
    if !endpoint.enabled {
        return Err(switched_off(id));
    }
    let event_id = new_id("evt");
    let data = serde_json::json!({ "endpoint_id": id });
    let event = Event { id: &event_id, kind: TEST_EVENT, created_at_ms: now_ms, data };
    let delivery_id = insert_delivery(&mut tx, id, &event, now_ms).await?;
    let delivery = find_delivery(&mut tx, org_id, &delivery_id).await?;
    tx.commit().await?;
    Ok(delivery)
}

pub async fn deliveries(
    database: &Database,
    query: &DeliveryQuery<'_>,
) -> Result<Vec<Delivery>, WebhookError> {
    let listed = database
        .read()
        .await?
        .fetch_all(
            "SELECT d.id, d.endpoint_id, d.event_id, d.event_type, d.body, d.state, d.attempts, \
             d.next_attempt_at_ms, d.last_status, d.last_error, d.created_at_ms, d.finished_at_ms \
             FROM webhook_deliveries d JOIN webhook_endpoints e ON e.id = d.endpoint_id \
             WHERE e.org_id = $1 AND (CAST($2 AS TEXT) IS NULL OR d.state = $2) \
             AND (CAST($3 AS TEXT) IS NULL OR d.endpoint_id = $3) AND (CAST($4 AS TEXT) IS NULL OR d.id < $4) \
             ORDER BY d.id DESC LIMIT $5",
            args![
                query.org_id,
                query.state.map(DeliveryState::as_str),
                query.endpoint_id,
                query.after,
                query.limit
            ],
        )
        .await?;
    Ok(listed)
}

/// Sends a delivery again, with all its attempts before it; its body and `webhook-id` are the same.
pub async fn replay(
    database: &Database,
    org_id: &str,
    id: &str,
    now_ms: i64,
) -> Result<Delivery, WebhookError> {
    let mut tx = database.write().await?;
    let delivery = find_delivery(&mut tx, org_id, id).await?;
    if !find(&mut tx, org_id, &delivery.endpoint_id).await?.enabled {
        return Err(switched_off(&delivery.endpoint_id));
    }
    tx.execute(
        "UPDATE webhook_deliveries SET state = 'pending', attempts = 0, next_attempt_at_ms = $1, \
         finished_at_ms = NULL WHERE id = $2",
        args![now_ms, id],
    )
    .await?;
    let delivery = find_delivery(&mut tx, org_id, id).await?;
    tx.commit().await?;
    Ok(delivery)
}

fn switched_off(id: &str) -> WebhookError {
    fault("enabled", format!("is false for the endpoint {id}; set it to true first"))
}

async fn find_delivery(conn: &mut Conn, org_id: &str, id: &str) -> Result<Delivery, WebhookError> {
    let found = conn
        .fetch_optional(
            "SELECT d.id, d.endpoint_id, d.event_id, d.event_type, d.body, d.state, d.attempts, \
             d.next_attempt_at_ms, d.last_status, d.last_error, d.created_at_ms, d.finished_at_ms \
             FROM webhook_deliveries d JOIN webhook_endpoints e ON e.id = d.endpoint_id \
             WHERE e.org_id = $1 AND d.id = $2",
            args![org_id, id],
        )
        .await?;
    found.ok_or_else(|| WebhookError::NotFound { what: "delivery", id: id.chars().take(100).collect() })
}

/// What an endpoint is told.
pub struct Event<'a> {
    pub id: &'a str,
    pub kind: &'a str,
    pub created_at_ms: i64,
    pub data: serde_json::Value,
}

impl Event<'_> {
    /// The body, in the shape that Standard Webhooks recommends.
    fn body(&self) -> String {
        let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.created_at_ms) * 1_000_000);
        let timestamp = at.ok().and_then(|at| at.format(&Rfc3339).ok());
        serde_json::json!({ "type": self.kind, "id": self.id, "timestamp": timestamp, "data": self.data })
            .to_string()
    }
}

/// Puts an event on its way to an endpoint, once; returns the delivery's id.
pub async fn insert_delivery(
    conn: &mut Conn,
    endpoint_id: &str,
    event: &Event<'_>,
    now_ms: i64,
) -> Result<String, sqlx::Error> {
    let id = new_id("whd");
    conn.execute(
        "INSERT INTO webhook_deliveries (id, endpoint_id, event_id, event_type, body, state, attempts, \
         next_attempt_at_ms, created_at_ms) VALUES ($1, $2, $3, $4, $5, 'pending', 0, $6, $6) \
         ON CONFLICT (endpoint_id, event_id) DO NOTHING",
        args![id.as_str(), endpoint_id, event.id, event.kind, event.body().as_str(), now_ms],
    )
    .await?;
    Ok(id)
}

/// Secrets in force, the newest first.
pub async fn secrets(conn: &mut Conn, endpoint_id: &str, now_ms: i64) -> Result<Vec<Secret>, sqlx::Error> {
    let rows: Vec<(String,)> = conn
        .fetch_all(
            "SELECT secret FROM webhook_secrets \
             WHERE endpoint_id = $1 AND (expires_at_ms IS NULL OR expires_at_ms > $2) ORDER BY ordinal DESC",
            args![endpoint_id, now_ms],
        )
        .await?;
    let parse =
        |(text,): (String,)| Secret::parse(&text).expect("this module stores secrets as they are read");
    Ok(rows.into_iter().map(parse).collect())
}

async fn insert_secret(
    conn: &mut Conn,
    endpoint_id: &str,
    ordinal: i64,
    secret: &Secret,
    now_ms: i64,
) -> Result<(), sqlx::Error> {
    conn.execute(
        "INSERT INTO webhook_secrets (endpoint_id, ordinal, secret, created_at_ms) VALUES ($1, $2, $3, $4)",
        args![endpoint_id, ordinal, secret.reveal().as_str(), now_ms],
    )
    .await
    .map(drop)
}

/// Takes the endpoint's row for the rest of the transaction; an error if it is not there.
async fn lock(conn: &mut Conn, org_id: &str, id: &str) -> Result<(), WebhookError> {
    let found = conn
        .execute("UPDATE webhook_endpoints SET id = id WHERE org_id = $1 AND id = $2", args![org_id, id])
        .await?;
    if found == 1 { Ok(()) } else { Err(no_endpoint(id)) }
}

fn check_description(text: &str) -> Result<(), WebhookError> {
    match text.len() <= DESCRIPTION_BYTES_MAX && !text.chars().any(char::is_control) {
        true => Ok(()),
        false => Err(fault(
            "description",
            format!("must be at most {DESCRIPTION_BYTES_MAX} bytes of printable text"),
        )),
    }
}

fn check_events(events: &[String]) -> Result<(), WebhookError> {
    let known = || NoticeKind::ALL.iter().map(|kind| kind.as_str());
    match events.iter().position(|event| !known().any(|kind| kind == event)) {
        None => Ok(()),
        Some(index) => {
            let known = known().collect::<Vec<_>>().join(", ");
            Err(fault(format!("events[{index}]"), format!("is no kind of event; there are {known}")))
        }
    }
}

fn events_json(events: &[String]) -> String {
    serde_json::to_string(events).expect("a list of strings is JSON")
}

pub fn as_stored(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
