//! The admin API of money, for admin keys, each within its organisation.
//!
//! ```text
//! GET       /v1/organization/balance
//! GET POST  /v1/organization/credits                 POST: Idempotency-Key, or an id in the body
//! GET       /v1/organization/invoices                ?period &after &limit
//! GET       /v1/organization/invoices/{number}       as JSON; {number}.csv and {number}.pdf
//! ```
//! An admin key can add credit to its account: it belongs in the hands of whoever sells the credit.

use std::sync::Arc;

use axum::{
    Extension, Json, Router,
    extract::{Path, RawQuery, Request, State},
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderMap, HeaderValue, header};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sluice_billing::{
    AccountId, BillingError, Books, CreditGrant, CreditTerms, InvoiceError, InvoiceQuery, InvoiceStatus,
    Money, Period, render_pdf,
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    app::App,
    auth::Principal,
    dialect::{body::read_json, fields::Fields},
    error::{ApiError, Fault},
};

const IDEMPOTENCY_KEY: &str = "idempotency-key";
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;
const MEMO_CHARS_MAX: usize = 1_000;
const LIMIT_DEFAULT: u32 = 20;
const LIMIT_MAX: u32 = 100;

type Caller = Extension<Arc<Principal>>;
type Answer = Result<Json<Value>, ApiError>;

pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/organization/balance", get(balance))
        .route("/v1/organization/credits", get(credits).post(add_credit))
        .route("/v1/organization/invoices", get(invoices))
        .route("/v1/organization/invoices/{name}", get(invoice))
}

async fn balance(State(app): State<Arc<App>>, caller: Caller) -> Answer {
    let balance = app.billing.books().balance(&account_of(&caller)).await?;
    Ok(Json(json!({
        "object": "organization.balance",
        "account": balance.account.as_str(),
        "currency": "USD",
        "posted": balance.posted,
        "leased": balance.leased,
        "available": balance.available,
    })))
}

async fn credits(State(app): State<Arc<App>>, caller: Caller) -> Answer {
    let grants = app.billing.books().grants(&account_of(&caller)).await?;
    let data: Vec<Value> = grants.into_iter().map(|grant| object("organization.credit", grant)).collect();
    Ok(Json(json!({ "object": "list", "currency": "USD", "data": data, "has_more": false })))
}

async fn add_credit(State(app): State<Arc<App>>, caller: Caller, request: Request) -> Answer {
    let headers = request.headers().clone();
    let body = read_json(request, &app.limits).await?;
    let body = Fields::of(&body, "")?;
    let now = OffsetDateTime::now_utc();
    let account = account_of(&caller);
    own_account(&body, &account)?;
    let grant = CreditGrant {
        id: idempotency_id(&body, &headers, &account)?,
        account: account.clone(),
        amount: amount(&body)?,
        memo: memo(&body)?,
        granted_at: now,
    };
    let terms = CreditTerms { expires_at: expires_at(&body, now)?, priority: priority(&body)? };
    let books = app.billing.books();
    match books.credit_on(&grant, &terms).await {
        Ok(()) => {}
        Err(BillingError::GrantConflict(_)) => {
            let message = "was already used for another account, amount, expiry or priority";
            return Err(ApiError::field(Fault::Value, "id", message));
        }
        Err(BillingError::Overflow { .. }) => {
            return Err(ApiError::field(Fault::Value, "amount", "is more than the account can hold"));
        }
        Err(other) => return Err(other.into()),
    }
    let posted = grant_of(books, &account, &grant.id.to_string()).await?;
    Ok(Json(posted))
}

async fn grant_of(books: &Books, account: &AccountId, id: &str) -> Result<Value, ApiError> {
    let grants = books.grants(account).await?;
    let grant = grants.into_iter().find(|grant| grant.id == id);
    grant.map(|grant| object("organization.credit", grant)).ok_or_else(|| ApiError::internal("no such grant"))
}

async fn invoices(State(app): State<Arc<App>>, caller: Caller, RawQuery(query): RawQuery) -> Answer {
    let mut wanted =
        InvoiceQuery { account: Some(account_of(&caller)), limit: LIMIT_DEFAULT, ..InvoiceQuery::default() };
    for (name, value) in pairs(query.as_deref()) {
        let wrong = |message: String| ApiError::field(Fault::Value, name, message);
        match name {
            "limit" => {
                let limit = value.parse().ok().filter(|limit| (1..=LIMIT_MAX).contains(limit));
                wanted.limit = limit.ok_or_else(|| wrong(format!("must be from 1 to {LIMIT_MAX}")))?;
            }
            "period" => {
                wanted.period = Some(value.parse::<Period>().map_err(|error| wrong(error.to_string()))?)
            }
            "after" => wanted.after = Some(value.to_owned()),
            _ => {}
        }
    }
    let limit = wanted.limit;
    wanted.limit += 1;
    let found = app.billing.books().invoices(&wanted, OffsetDateTime::now_utc()).await;
    let mut found = found.map_err(|error| match error {
        InvoiceError::Unknown(_) => ApiError::field(Fault::Value, "after", "is not the number of an invoice"),
        other => invoice_refused(other),
    })?;
    let has_more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let number = |status: Option<&InvoiceStatus>| status.map(|status| status.invoice.number.clone());
    let (first, last) = (number(found.first()), number(found.last()));
    let data: Vec<Value> = found.iter().map(invoice_json).collect();
    Ok(Json(
        json!({ "object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more }),
    ))
}

/// `INV-000001` as JSON, `INV-000001.csv` and `INV-000001.pdf` as what they say.
async fn invoice(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let (number, form) = match name.rsplit_once('.') {
        Some((number, form @ ("csv" | "pdf"))) => (number, form),
        _ => (name.as_str(), "json"),
    };
    let status = app.billing.books().invoice(number, OffsetDateTime::now_utc()).await;
    let status = status.map_err(invoice_refused)?;
    // Whose it is not must not learn that it exists.
    if status.invoice.account != account_of(&caller) {
        return Err(ApiError::NotFound { what: "invoice", id: number.to_owned() });
    }
    let (content_type, bytes) = match form {
        "csv" => ("text/csv; charset=utf-8", status.invoice.to_csv().into_bytes()),
        "pdf" => ("application/pdf", pdf(&app, status).await?),
        _ => return Ok(Json(invoice_json(&status)).into_response()),
    };
    let disposition = HeaderValue::try_from(format!("attachment; filename=\"{name}\""))
        .map_err(|_| ApiError::NotFound { what: "invoice", id: number.to_owned() })?;
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (header::CONTENT_DISPOSITION, disposition),
    ];
    Ok((headers, bytes).into_response())
}

/// A long invoice takes milliseconds to draw: not where streams are served.
async fn pdf(app: &Arc<App>, status: InvoiceStatus) -> Result<Vec<u8>, ApiError> {
    let app = app.clone();
    let drawn =
        tokio::task::spawn_blocking(move || render_pdf(&status.invoice, app.invoice_font.as_deref())).await;
    drawn.map_err(ApiError::internal)?.map_err(ApiError::internal)
}

/// An invoice with what came after it, and its sums.
pub fn invoice_json(status: &InvoiceStatus) -> Value {
    let mut shown = object("organization.invoice", &status.invoice);
    shown["id"] = status.invoice.number.clone().into();
    shown["totals"] = json!(status.invoice.totals());
    shown["state"] = json!(status.state);
    shown["paid"] = json!(status.paid);
    shown["credited"] = json!(status.credited);
    shown["open"] = json!(status.open);
    shown["payments"] = json!(status.payments);
    shown["credit_notes"] = json!(status.credit_notes);
    shown["digest"] = status.digest.clone().into();
    shown
}

fn object(kind: &str, value: impl serde::Serialize) -> Value {
    let mut shown = json!({ "object": kind });
    if let (Value::Object(shown), Value::Object(fields)) = (&mut shown, json!(value)) {
        shown.extend(fields);
    }
    shown
}

fn account_of(caller: &Caller) -> AccountId {
    AccountId::new(caller.account_id.clone())
}

/// `account` may be named, and must be the caller's own.
fn own_account(body: &Fields<'_>, account: &AccountId) -> Result<(), ApiError> {
    match body.string("account")? {
        Some(named) if named != account.as_str() => {
            let message = "is not the account of this key's organisation; leave it out";
            Err(ApiError::field(Fault::Value, "account", message))
        }
        _ => Ok(()),
    }
}

/// The body's id, or one that follows from the header and the account.
fn idempotency_id(body: &Fields<'_>, headers: &HeaderMap, account: &AccountId) -> Result<Uuid, ApiError> {
    if let Some(id) = body.string("id")? {
        return Uuid::parse_str(id).map_err(|_| ApiError::field(Fault::Value, "id", "must be a UUID"));
    }
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else {
        let message = "is required, a UUID, unless the header Idempotency-Key is sent: credit that is sent twice is added once";
        return Err(ApiError::field(Fault::Missing, "id", message));
    };
    if !(1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&key.len()) {
        let message = format!("must have 1 to {IDEMPOTENCY_KEY_BYTES_MAX} bytes");
        return Err(ApiError::field(Fault::Value, "Idempotency-Key", message));
    }
    let digest = Sha256::new().chain_update(account.as_str()).chain_update([0]).chain_update(key.as_bytes());
    let digest: [u8; 32] = digest.finalize().into();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    Ok(Uuid::from_bytes(id))
}

fn amount(body: &Fields<'_>) -> Result<Money, ApiError> {
    body.required("amount")?;
    let text = body.string("amount")?.unwrap_or_default();
    match Money::from_usd_str(text) {
        Ok(amount) if amount > Money::ZERO => Ok(amount),
        Ok(_) => Err(ApiError::field(Fault::Value, "amount", "must be over 0")),
        Err(error) => Err(ApiError::field(Fault::Value, "amount", format!("is refused: {error}"))),
    }
}

fn memo(body: &Fields<'_>) -> Result<String, ApiError> {
    let memo = body.string("memo")?.unwrap_or("credit added through the admin API");
    if memo.chars().count() > MEMO_CHARS_MAX || memo.contains('\0') {
        let message = format!("must have at most {MEMO_CHARS_MAX} characters, and no NUL");
        return Err(ApiError::field(Fault::Value, "memo", message));
    }
    Ok(memo.to_owned())
}

/// Seconds since 1970, as everywhere in this API.
fn expires_at(body: &Fields<'_>, now: OffsetDateTime) -> Result<Option<OffsetDateTime>, ApiError> {
    let Some(seconds) = body.integer("expires_at")? else { return Ok(None) };
    let at = OffsetDateTime::from_unix_timestamp(seconds).ok().filter(|at| *at > now);
    let message = "must be a moment to come, in seconds since 1970 UTC";
    at.map(Some).ok_or_else(|| ApiError::field(Fault::Value, "expires_at", message))
}

fn priority(body: &Fields<'_>) -> Result<i32, ApiError> {
    let priority = body.integer("priority")?.unwrap_or(0);
    let message = "must be a whole number of 32 bits; the lowest pays first";
    i32::try_from(priority).map_err(|_| ApiError::field(Fault::Value, "priority", message))
}

fn pairs(query: Option<&str>) -> impl Iterator<Item = (&str, &str)> {
    query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='))
}

fn invoice_refused(error: InvoiceError) -> ApiError {
    match error {
        InvoiceError::Unknown(id) => ApiError::NotFound { what: "invoice", id },
        InvoiceError::Billing(error) => error.into(),
        other => ApiError::internal(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account() -> AccountId {
        AccountId::new("acme")
    }

    /// The field and the code of what is refused.
    fn told<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
        let error = result.expect_err("refused");
        format!("{} {}", error.param().unwrap_or("-"), error.code())
    }

    #[test]
    fn one_key_is_one_id_for_each_account() {
        let none = json!({});
        let none = Fields::of(&none, "").expect("an object");
        let mut headers = HeaderMap::new();
        assert_eq!(told(idempotency_id(&none, &headers, &account())), "id missing_required_parameter");
        headers.insert(IDEMPOTENCY_KEY, HeaderValue::from_static("order 7"));
        let id = idempotency_id(&none, &headers, &account()).expect("an id");
        assert_eq!(idempotency_id(&none, &headers, &account()).expect("an id"), id);
        assert_ne!(idempotency_id(&none, &headers, &AccountId::new("other")).expect("an id"), id);
        headers.insert(IDEMPOTENCY_KEY, HeaderValue::from_static(""));
        assert_eq!(told(idempotency_id(&none, &headers, &account())), "Idempotency-Key invalid_value");
        let named = json!({ "id": "0190a3a5-0000-7000-8000-000000000001" });
        let named = Fields::of(&named, "").expect("an object");
        let id = idempotency_id(&named, &headers, &account()).expect("an id");
        assert_eq!(id.to_string(), "0190a3a5-0000-7000-8000-000000000001");
    }

    #[test]
    fn bad_fields_are_named() {
        let now = OffsetDateTime::UNIX_EPOCH + time::Duration::DAY;
        let check = |body: Value, expect: &str| {
            let body = Fields::of(&body, "").expect("an object");
            let read = || -> Result<(), ApiError> {
                own_account(&body, &account())?;
                amount(&body)?;
                memo(&body)?;
                expires_at(&body, now)?;
                priority(&body).map(drop)
            };
            assert_eq!(told(read()), expect, "{}", body.path("body"));
        };
        check(json!({}), "amount missing_required_parameter");
        check(json!({ "amount": 5 }), "amount invalid_type");
        check(json!({ "amount": "0" }), "amount invalid_value");
        check(json!({ "amount": "-1" }), "amount invalid_value");
        check(json!({ "amount": "1e3" }), "amount invalid_value");
        check(json!({ "amount": "1", "account": "other" }), "account invalid_value");
        check(json!({ "amount": "1", "memo": "x".repeat(1001) }), "memo invalid_value");
        check(json!({ "amount": "1", "expires_at": 1 }), "expires_at invalid_value");
        check(json!({ "amount": "1", "expires_at": "soon" }), "expires_at invalid_type");
        check(json!({ "amount": "1", "priority": 5_000_000_000_i64 }), "priority invalid_value");
    }
}
