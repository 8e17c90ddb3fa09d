//! The admin API of budgets, for admin keys, each within its organisation.
//!
//! ```text
//! GET POST          /v1/organization/budgets          POST makes one, or changes limit, hard and thresholds of its id
//! GET DELETE        /v1/organization/budgets/{id}
//! ```

use std::sync::Arc;

use axum::{
    Extension, Json, Router,
    extract::{Path, Request, State},
    routing::get,
};
use serde_json::{Value, json};
use sluice_billing::{Budget, BudgetPeriod, BudgetScope, BudgetStatus, Money};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    app::App,
    auth::{Principal, Tenancy},
    dialect::{body::read_json, fields::Fields},
    error::{ApiError, Fault},
};

/// Percentages at which notices are raised where a request names none.
const THRESHOLDS: [u16; 2] = [80, 100];

type Caller = Extension<Arc<Principal>>;
type Answer = Result<Json<Value>, ApiError>;

pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/organization/budgets", get(list).post(put))
        .route("/v1/organization/budgets/{id}", get(show).delete(delete))
}

async fn list(State(app): State<Arc<App>>, caller: Caller) -> Answer {
    let data: Vec<Value> = of_org(&app, &caller.org_id).await?.iter().map(budget_json).collect();
    Ok(Json(json!({ "object": "list", "data": data, "has_more": false })))
}

async fn show(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Answer {
    Ok(Json(budget_json(&find(&app, &caller.org_id, &id).await?)))
}

async fn put(State(app): State<Arc<App>>, caller: Caller, request: Request) -> Answer {
    let body = read_json(request, &app.limits).await?;
    let budget = read(&Fields::of(&body, "")?)?;
    let owner = tenancy(&app).org_of(budget.scope, &budget.scope_id).await?;
    if owner.as_deref() != Some(caller.org_id.as_str()) {
        let message = format!("names no {} of this organization", budget.scope.as_str());
        return Err(ApiError::field(Fault::Value, "scope_id", message));
    }
    // An id belongs to whoever used it first, even after its budget has ended.
    let taken = app.billing.books().budget_scope(&budget.id).await?;
    if let Some((scope, scope_id)) = taken
        && tenancy(&app).org_of(scope, &scope_id).await?.as_deref() != Some(caller.org_id.as_str())
    {
        return Err(ApiError::field(Fault::Value, "id", "is taken; choose another"));
    }
    app.billing.put_budget(&budget).await?;
    Ok(Json(budget_json(&find(&app, &caller.org_id, &budget.id).await?)))
}

async fn delete(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Answer {
    find(&app, &caller.org_id, &id).await?;
    app.billing.delete_budget(&id).await?;
    Ok(Json(json!({ "object": "organization.budget.deleted", "id": id, "deleted": true })))
}

fn tenancy(app: &App) -> Tenancy {
    Tenancy::new(app.webhooks.database().clone())
}

async fn of_org(app: &App, org_id: &str) -> Result<Vec<BudgetStatus>, ApiError> {
    let mut found = Vec::new();
    for status in app.billing.books().budgets(OffsetDateTime::now_utc()).await? {
        let owner = tenancy(app).org_of(status.budget.scope, &status.budget.scope_id).await?;
        if owner.as_deref() == Some(org_id) {
            found.push(status);
        }
    }
    Ok(found)
}

async fn find(app: &App, org_id: &str, id: &str) -> Result<BudgetStatus, ApiError> {
    let nobody = || ApiError::NotFound { what: "budget", id: id.to_owned() };
    let found = app.billing.books().budget(id, OffsetDateTime::now_utc()).await?.ok_or_else(nobody)?;
    let owner = tenancy(app).org_of(found.budget.scope, &found.budget.scope_id).await?;
    if owner.as_deref() == Some(org_id) { Ok(found) } else { Err(nobody()) }
}

fn read(body: &Fields<'_>) -> Result<Budget, ApiError> {
    let refuse = |name: &str, message: &str| ApiError::field(Fault::Value, body.path(name), message);
    body.required("scope")?;
    let scope = match body.string("scope")?.unwrap_or_default() {
        "org" => BudgetScope::Org,
        "project" => BudgetScope::Project,
        "key" => BudgetScope::Key,
        _ => return Err(refuse("scope", "must be one of org, project, key")),
    };
    body.required("scope_id")?;
    let scope_id = body.string("scope_id")?.unwrap_or_default().to_owned();
    body.required("period")?;
    let period = match body.string("period")?.unwrap_or_default() {
        "day" => BudgetPeriod::Day,
        "month" => BudgetPeriod::Month,
        "total" => BudgetPeriod::Total,
        _ => return Err(refuse("period", "must be one of day, month, total")),
    };
    body.required("limit")?;
    let limit = Money::from_usd_str(body.string("limit")?.unwrap_or_default());
    let limit = limit.map_err(|error| refuse("limit", &format!("must be an amount of dollars: {error}")))?;
    let thresholds = match body.array("thresholds")? {
        None => THRESHOLDS.to_vec(),
        Some(values) => {
            let percent = |value: &Value| value.as_u64().and_then(|percent| u16::try_from(percent).ok());
            let percents = values.iter().map(percent).collect::<Option<Vec<_>>>();
            percents.ok_or_else(|| refuse("thresholds", "must be whole percentages"))?
        }
    };
    let id = match body.string("id")? {
        Some(id) => id.to_owned(),
        None => format!("bud-{}", Uuid::now_v7().simple()),
    };
    let hard = body.boolean("hard")?.unwrap_or(true);
    Ok(Budget { id, scope, scope_id, period, limit, hard, thresholds })
}

fn budget_json(status: &BudgetStatus) -> Value {
    let mut value = serde_json::to_value(status).expect("a budget is plain data");
    value["object"] = "organization.budget".into();
    value["currency"] = "USD".into();
    value
}
