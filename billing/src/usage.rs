//! Usage as facts and as sums: `usage_events`, its tripwire `usage_duplicates`, and the daily rollup.

use std::collections::BTreeMap;

use serde::Serialize;
use sqlx::{FromRow, SqliteConnection};
use time::{Date, OffsetDateTime};

use crate::{error::BillingError, event::UsageEvent, money::Total};

/// A dimension that usage is summed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UsageGroup {
    Key,
    Model,
    /// The UTC day of admission.
    Day,
    Project,
}

/// Usage from the UTC day `from` on, up to but not including `to`; None leaves that side open.
#[derive(Clone, Debug, Default)]
pub struct UsageQuery {
    pub from: Option<Date>,
    pub to: Option<Date>,
    pub org: Option<String>,
    pub project: Option<String>,
    pub api_key: Option<String>,
    pub group_by: Vec<UsageGroup>,
}

/// The sums of one group. A dimension that was not asked for is None.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct UsageRow {
    /// YYYY-MM-DD, UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub day: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    pub requests: u64,
    pub input_tokens: u64,
    pub cached_input_tokens: u64,
    pub output_tokens: u64,
    pub cost: Total,
}

/// A row of the daily rollup: what it is of, and its sums.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, FromRow)]
pub(crate) struct RollupRow {
    pub day: String,
    pub account: String,
    pub org: String,
    pub project: String,
    pub api_key: String,
    pub model: String,
    pub requests: i64,
    pub input_tokens: i64,
    pub cached_input_tokens: i64,
    pub output_tokens: i64,
    pub cost_pico: i64,
}

/// YYYY-MM-DD of a moment, UTC.
pub(crate) fn day_of(at_ms: i64) -> String {
    match OffsetDateTime::from_unix_timestamp_nanos(i128::from(at_ms) * 1_000_000) {
        Ok(at) => at.date().to_string(),
        Err(_) => "unknown".to_owned(),
    }
}

impl RollupRow {
    /// What one event adds.
    pub fn of(event: &UsageEvent) -> RollupRow {
        RollupRow {
            day: day_of(event.admitted_at_ms),
            account: event.account.to_string(),
            org: event.org.clone(),
            project: event.project.clone(),
            api_key: event.api_key.clone(),
            model: event.model.clone(),
            requests: 1,
            input_tokens: stored(event.quantities.input_tokens),
            cached_input_tokens: stored(event.quantities.cached_input_tokens),
            output_tokens: stored(event.quantities.output_tokens),
            cost_pico: event.cost.pico(),
        }
    }

    pub fn key(&self) -> [&str; 6] {
        [&self.day, &self.account, &self.org, &self.project, &self.api_key, &self.model]
    }
}

/// Counts are bounded far below 2^63 where a hold is made (`UNITS_MAX`).
fn stored(count: u64) -> i64 {
    i64::try_from(count).expect("a billed count fits an i64, since its hold did")
}

/// Writes one event and adds it to the rollup; false if its request id has a bill already. Then it is only kept as
/// evidence, and must not be posted.
pub(crate) async fn record(
    conn: &mut SqliteConnection,
    epoch: &str,
    seq: i64,
    event: &UsageEvent,
) -> Result<bool, BillingError> {
    let inserted = sqlx::query(
        "INSERT INTO usage_events (request_id, epoch, seq, account, org, project, api_key, end_user, model, node, \
         input_tokens, cached_input_tokens, output_tokens, overrun_tokens, finish_reason, time_to_first_token_ms, \
         duration_ms, admitted_at_ms, price_book, cost_pico) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (request_id) DO NOTHING",
    )
    .bind(event.request_id.to_string())
    .bind(epoch)
    .bind(seq)
    .bind(event.account.as_str())
    .bind(&event.org)
    .bind(&event.project)
    .bind(&event.api_key)
    .bind(&event.user)
    .bind(&event.model)
    .bind(&event.node)
    .bind(stored(event.quantities.input_tokens))
    .bind(stored(event.quantities.cached_input_tokens))
    .bind(stored(event.quantities.output_tokens))
    .bind(i64::try_from(event.overrun_tokens).unwrap_or(i64::MAX))
    .bind(event.finish_reason.as_str())
    .bind(event.time_to_first_token_ms.map(|ms| i64::try_from(ms).unwrap_or(i64::MAX)))
    .bind(i64::try_from(event.duration_ms).unwrap_or(i64::MAX))
    .bind(event.admitted_at_ms)
    .bind(event.price_book.as_str())
    .bind(event.cost.pico())
    .execute(&mut *conn)
    .await?;
    if inserted.rows_affected() == 0 {
        tracing::error!(request_id = %event.request_id, epoch, seq, "a second bill for one request: kept as evidence, not charged");
        let json = serde_json::to_string(event).expect("a usage event is plain data");
        sqlx::query("INSERT INTO usage_duplicates (epoch, seq, request_id, event) VALUES (?, ?, ?, ?)")
            .bind(epoch)
            .bind(seq)
            .bind(event.request_id.to_string())
            .bind(json)
            .execute(conn)
            .await?;
        return Ok(false);
    }
    add_to_rollup(conn, &RollupRow::of(event)).await?;
    Ok(true)
}

async fn add_to_rollup(conn: &mut SqliteConnection, row: &RollupRow) -> Result<(), BillingError> {
    sqlx::query(
        "INSERT INTO usage_rollups_1d (day, account, org, project, api_key, model, requests, input_tokens, \
         cached_input_tokens, output_tokens, cost_pico) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) \
         ON CONFLICT DO UPDATE SET requests = requests + excluded.requests, \
         input_tokens = input_tokens + excluded.input_tokens, \
         cached_input_tokens = cached_input_tokens + excluded.cached_input_tokens, \
         output_tokens = output_tokens + excluded.output_tokens, cost_pico = cost_pico + excluded.cost_pico",
    )
    .bind(&row.day)
    .bind(&row.account)
    .bind(&row.org)
    .bind(&row.project)
    .bind(&row.api_key)
    .bind(&row.model)
    .bind(row.requests)
    .bind(row.input_tokens)
    .bind(row.cached_input_tokens)
    .bind(row.output_tokens)
    .bind(row.cost_pico)
    .execute(conn)
    .await?;
    Ok(())
}

/// The rollup rows of a query's days and filters.
pub(crate) async fn rollups(
    conn: &mut SqliteConnection,
    query: &UsageQuery,
) -> Result<Vec<RollupRow>, BillingError> {
    Ok(sqlx::query_as(
        "SELECT day, account, org, project, api_key, model, requests, input_tokens, cached_input_tokens, \
         output_tokens, cost_pico FROM usage_rollups_1d \
         WHERE (?1 IS NULL OR day >= ?1) AND (?2 IS NULL OR day < ?2) AND (?3 IS NULL OR org = ?3) \
         AND (?4 IS NULL OR project = ?4) AND (?5 IS NULL OR api_key = ?5) \
         ORDER BY day, account, org, project, api_key, model",
    )
    .bind(query.from.map(|day| day.to_string()))
    .bind(query.to.map(|day| day.to_string()))
    .bind(&query.org)
    .bind(&query.project)
    .bind(&query.api_key)
    .fetch_all(conn)
    .await?)
}

/// Sums rollup rows by the dimensions asked for, in their order. Without any, one row.
pub(crate) fn fold(rows: Vec<RollupRow>, group_by: &[UsageGroup]) -> Vec<UsageRow> {
    let by = |group| group_by.contains(&group);
    let mut groups: BTreeMap<[Option<String>; 4], UsageRow> = BTreeMap::new();
    for row in rows {
        let key = [
            by(UsageGroup::Day).then_some(row.day),
            by(UsageGroup::Project).then_some(row.project),
            by(UsageGroup::Key).then_some(row.api_key),
            by(UsageGroup::Model).then_some(row.model),
        ];
        let sum = groups.entry(key).or_default();
        sum.requests += row.requests.unsigned_abs();
        sum.input_tokens += row.input_tokens.unsigned_abs();
        sum.cached_input_tokens += row.cached_input_tokens.unsigned_abs();
        sum.output_tokens += row.output_tokens.unsigned_abs();
        sum.cost += Total::from_pico(row.cost_pico.into());
    }
    let named = groups.into_iter();
    named
        .map(|([day, project, api_key, model], sum)| UsageRow { day, project, api_key, model, ..sum })
        .collect()
}

/// An event as the audit reads it back: what its price and its sums follow from.
#[derive(FromRow)]
pub(crate) struct EventRow {
    pub request_id: String,
    pub epoch: String,
    pub seq: i64,
    pub account: String,
    pub org: String,
    pub project: String,
    pub api_key: String,
    pub model: String,
    pub input_tokens: i64,
    pub cached_input_tokens: i64,
    pub output_tokens: i64,
    pub admitted_at_ms: i64,
    pub price_book: String,
    pub cost_pico: i64,
}

/// Up to `limit` events after (epoch, seq), in that order.
pub(crate) async fn events_after(
    conn: &mut SqliteConnection,
    after: (&str, i64),
    limit: i64,
) -> Result<Vec<EventRow>, BillingError> {
    Ok(sqlx::query_as(
        "SELECT request_id, epoch, seq, account, org, project, api_key, model, input_tokens, cached_input_tokens, \
         output_tokens, admitted_at_ms, price_book, cost_pico FROM usage_events \
         WHERE (epoch, seq) > (?, ?) ORDER BY epoch, seq LIMIT ?",
    )
    .bind(after.0)
    .bind(after.1)
    .bind(limit)
    .fetch_all(conn)
    .await?)
}

/// (epoch, seq, request id) of every refused second bill.
pub(crate) async fn duplicates(
    conn: &mut SqliteConnection,
) -> Result<Vec<(String, i64, String)>, BillingError> {
    Ok(sqlx::query_as("SELECT epoch, seq, request_id FROM usage_duplicates ORDER BY epoch, seq")
        .fetch_all(conn)
        .await?)
}
