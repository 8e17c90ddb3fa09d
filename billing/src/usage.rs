//! Usage as facts and as sums: `usage_events`, its tripwire `usage_duplicates`, and the daily rollup.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt::Write,
};

use serde::Serialize;
use sqlx::{FromRow, PgConnection};
use time::{Date, OffsetDateTime};

use crate::{
    args,
    catalog::Catalog,
    counter,
    database::{Conn, Dialect, Raw},
    error::BillingError,
    event::{AccountId, Quantities, RequestId, ServiceTier, UsageEvent},
    money::{Money, Total},
    price::{Line, PriceBook, PriceBookHash, cost},
};

/// Smaller batches are not worth a stream of their own.
const COPY_MIN: usize = 8;

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
    pub reasoning_tokens: u64,
    pub characters: u64,
    pub seconds: u64,
    pub images: u64,
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
    pub reasoning_tokens: i64,
    pub characters: i64,
    pub seconds: i64,
    pub images: i64,
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
            reasoning_tokens: stored(event.quantities.reasoning_tokens),
            characters: stored(event.quantities.characters),
            seconds: stored(event.quantities.seconds),
            images: stored(event.quantities.images),
            cost_pico: event.cost.pico(),
        }
    }

    fn add(&mut self, other: &RollupRow) -> Result<(), BillingError> {
        let overflow = || BillingError::Overflow { account: AccountId::new(other.account.clone()) };
        let sums = [
            &mut self.requests,
            &mut self.input_tokens,
            &mut self.cached_input_tokens,
            &mut self.output_tokens,
            &mut self.reasoning_tokens,
            &mut self.characters,
            &mut self.seconds,
            &mut self.images,
            &mut self.cost_pico,
        ];
        for (sum, more) in sums.into_iter().zip(other.sums()) {
            *sum = sum.checked_add(more).ok_or_else(overflow)?;
        }
        Ok(())
    }

    /// Requests, then each class, then the cost.
    pub fn sums(&self) -> [i64; 9] {
        [
            self.requests,
            self.input_tokens,
            self.cached_input_tokens,
            self.output_tokens,
            self.reasoning_tokens,
            self.characters,
            self.seconds,
            self.images,
            self.cost_pico,
        ]
    }

    pub fn key(&self) -> [&str; 6] {
        [&self.day, &self.account, &self.org, &self.project, &self.api_key, &self.model]
    }
}

/// Counts are bounded far below 2^63 where a hold is made (`UNITS_MAX`).
fn stored(count: u64) -> i64 {
    i64::try_from(count).expect("a billed count fits an i64, since its hold did")
}

/// Writes the events of a batch and adds them to the rollup; returns the numbers of those whose request id has a bill
/// already. They are only kept as evidence, and must not be posted. `first` is the next number of the counter `event`,
/// whose row the caller holds.
pub(crate) async fn record(
    conn: &mut Conn,
    epoch: &str,
    batch: &[(i64, UsageEvent)],
    first: i64,
) -> Result<BTreeSet<i64>, BillingError> {
    let refused = match copy_in(conn, epoch, batch, first).await? {
        true => BTreeSet::new(),
        false => insert_each(conn, epoch, batch, first).await?,
    };
    counter::take(conn, "event", (batch.len() - refused.len()) as i64).await?;
    let mut rollup: BTreeMap<[String; 6], RollupRow> = BTreeMap::new();
    for (_, event) in batch.iter().filter(|(seq, _)| !refused.contains(seq)) {
        let row = RollupRow::of(event);
        match rollup.entry(row.key().map(str::to_owned)) {
            Entry::Occupied(mut sum) => sum.get_mut().add(&row)?,
            Entry::Vacant(place) => drop(place.insert(row)),
        }
    }
    for row in rollup.values() {
        add_to_rollup(conn, row).await?;
    }
    Ok(refused)
}

/// What an event is written with; `concat!` takes literals only.
macro_rules! written_columns {
    () => {
        "request_id, epoch, seq, ordinal, account, org, project, api_key, end_user, model, service_tier, node, \
         input_tokens, cached_input_tokens, output_tokens, reasoning_tokens, characters, seconds, images, \
         overrun_tokens, finish_reason, time_to_first_token_ms, duration_ms, admitted_at_ms, price_book, cost_pico"
    };
}

/// What an [`EventRow`] is read from.
macro_rules! event_columns {
    () => {
        "request_id, ordinal, account, org, project, api_key, model, service_tier, input_tokens, \
         cached_input_tokens, output_tokens, reasoning_tokens, characters, seconds, images, admitted_at_ms, \
         price_book, cost_pico"
    };
}
pub(crate) use event_columns;

/// PostgreSQL takes a whole batch in one stream; false if it is not one, or if a bill of the batch is a second one.
async fn copy_in(
    conn: &mut Conn,
    epoch: &str,
    batch: &[(i64, UsageEvent)],
    first_ordinal: i64,
) -> Result<bool, BillingError> {
    if conn.dialect() != Dialect::Postgres || batch.len() < COPY_MIN {
        return Ok(false);
    }
    let mut text = String::new();
    for (ordinal, (seq, event)) in (first_ordinal..).zip(batch) {
        copy_line(&mut text, epoch, *seq, ordinal, event);
    }
    conn.savepoint().await?;
    let copied = match conn.raw() {
        Raw::Postgres(postgres) => copy_text(postgres, &text).await,
        Raw::Sqlite(_) => unreachable!("the dialect was asked above"),
    };
    match copied {
        Ok(()) => {
            conn.release_savepoint().await?;
            Ok(true)
        }
        Err(error) if error.as_database_error().is_some_and(|error| error.is_unique_violation()) => {
            conn.rollback_to_savepoint().await?;
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

async fn copy_text(postgres: &mut PgConnection, text: &str) -> Result<(), sqlx::Error> {
    let statement = concat!("COPY usage_events (", written_columns!(), ") FROM STDIN");
    let mut copy = postgres.copy_in_raw(statement).await?;
    copy.send(text.as_bytes()).await?;
    copy.finish().await.map(drop)
}

/// One line of PostgreSQL's text format: tabs between values, backslashes before what would end one, `\\N` for none.
fn copy_line(text: &mut String, epoch: &str, seq: i64, ordinal: i64, event: &UsageEvent) {
    let row = EventValues::of(event);
    let numbers = |text: &mut String, values: &[i64]| {
        for value in values {
            write!(text, "\t{value}").expect("a string takes everything");
        }
    };
    let words = |text: &mut String, values: &[&str]| {
        for value in values {
            text.push('\t');
            for character in value.chars() {
                match character {
                    '\\' => text.push_str("\\\\"),
                    '\t' => text.push_str("\\t"),
                    '\n' => text.push_str("\\n"),
                    '\r' => text.push_str("\\r"),
                    _ => text.push(character),
                }
            }
        }
    };
    text.push_str(&row.request_id);
    words(text, &[epoch]);
    numbers(text, &[seq, ordinal]);
    words(
        text,
        &[event.account.as_str(), &event.org, &event.project, &event.api_key, &event.user, &event.model],
    );
    words(text, &[event.service_tier.as_str(), &event.node]);
    numbers(text, &row.counts);
    words(text, &[event.finish_reason.as_str()]);
    match row.time_to_first_token_ms {
        Some(ms) => numbers(text, &[ms]),
        None => text.push_str("\t\\N"),
    }
    numbers(text, &[row.duration_ms, event.admitted_at_ms]);
    words(text, &[event.price_book.as_str()]);
    numbers(text, &[event.cost.pico()]);
    text.push('\n');
}

/// An event's values as the table has them.
struct EventValues {
    request_id: String,
    /// input, cached input, output, reasoning, characters, seconds, images, overrun.
    counts: [i64; 8],
    time_to_first_token_ms: Option<i64>,
    duration_ms: i64,
}

impl EventValues {
    fn of(event: &UsageEvent) -> EventValues {
        let clamped = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let Quantities {
            input_tokens,
            cached_input_tokens,
            output_tokens,
            reasoning_tokens,
            characters,
            seconds,
            images,
        } = event.quantities;
        let billed =
            [input_tokens, cached_input_tokens, output_tokens, reasoning_tokens, characters, seconds, images]
                .map(stored);
        let [input, cached, output, reasoning, characters, seconds, images] = billed;
        let overrun = clamped(event.overrun_tokens);
        EventValues {
            request_id: event.request_id.to_string(),
            counts: [input, cached, output, reasoning, characters, seconds, images, overrun],
            time_to_first_token_ms: event.time_to_first_token_ms.map(clamped),
            duration_ms: clamped(event.duration_ms),
        }
    }
}

async fn insert_each(
    conn: &mut Conn,
    epoch: &str,
    batch: &[(i64, UsageEvent)],
    first_ordinal: i64,
) -> Result<BTreeSet<i64>, BillingError> {
    let (mut refused, mut ordinal) = (BTreeSet::new(), first_ordinal);
    for (seq, event) in batch {
        match insert(conn, epoch, *seq, ordinal, event).await? {
            true => ordinal += 1,
            false => drop(refused.insert(*seq)),
        }
    }
    Ok(refused)
}

async fn insert(
    conn: &mut Conn,
    epoch: &str,
    seq: i64,
    ordinal: i64,
    event: &UsageEvent,
) -> Result<bool, BillingError> {
    let row = EventValues::of(event);
    let [input, cached, output, reasoning, characters, seconds, images, overrun] = row.counts;
    let inserted = conn
        .execute(
            concat!(
                "INSERT INTO usage_events (",
                written_columns!(),
                ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, \
                 $22, $23, $24, $25, $26) ON CONFLICT (request_id) DO NOTHING"
            ),
            args![
                &row.request_id,
                epoch,
                seq,
                ordinal,
                event.account.as_str(),
                &event.org,
                &event.project,
                &event.api_key,
                &event.user,
                &event.model,
                event.service_tier.as_str(),
                &event.node,
                input,
                cached,
                output,
                reasoning,
                characters,
                seconds,
                images,
                overrun,
                event.finish_reason.as_str(),
                row.time_to_first_token_ms,
                row.duration_ms,
                event.admitted_at_ms,
                event.price_book.as_str(),
                event.cost.pico()
            ],
        )
        .await?;
    if inserted == 1 {
        return Ok(true);
    }
    tracing::error!(request_id = %event.request_id, epoch, seq, "a second bill for one request: kept as evidence, not charged");
    let json = serde_json::to_string(event).expect("a usage event is plain data");
    conn.execute(
        "INSERT INTO usage_duplicates (epoch, seq, request_id, event) VALUES ($1, $2, $3, $4)",
        args![epoch, seq, &row.request_id, &json],
    )
    .await?;
    Ok(false)
}

async fn add_to_rollup(conn: &mut Conn, row: &RollupRow) -> Result<(), BillingError> {
    let [day, account, org, project, api_key, model] = row.key();
    let [requests, input, cached, output, reasoning, characters, seconds, images, cost] = row.sums();
    conn.execute(
        "INSERT INTO usage_rollups_1d AS r (day, account, org, project, api_key, model, requests, input_tokens, \
         cached_input_tokens, output_tokens, reasoning_tokens, characters, seconds, images, cost_pico) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15) \
         ON CONFLICT (day, account, org, project, api_key, model) DO UPDATE SET requests = r.requests + excluded.requests, \
         input_tokens = r.input_tokens + excluded.input_tokens, \
         cached_input_tokens = r.cached_input_tokens + excluded.cached_input_tokens, \
         output_tokens = r.output_tokens + excluded.output_tokens, \
         reasoning_tokens = r.reasoning_tokens + excluded.reasoning_tokens, \
         characters = r.characters + excluded.characters, seconds = r.seconds + excluded.seconds, \
         images = r.images + excluded.images, cost_pico = r.cost_pico + excluded.cost_pico",
        args![
            day, account, org, project, api_key, model, requests, input, cached, output, reasoning, characters,
            seconds, images, cost
        ],
    )
    .await?;
    Ok(())
}

/// The rollup rows of a query's days and filters.
pub(crate) async fn rollups(conn: &mut Conn, query: &UsageQuery) -> Result<Vec<RollupRow>, BillingError> {
    let day = |day: Option<Date>| day.map(|day| day.to_string());
    Ok(conn
        .fetch_all(
            "SELECT day, account, org, project, api_key, model, requests, input_tokens, cached_input_tokens, \
             output_tokens, reasoning_tokens, characters, seconds, images, cost_pico FROM usage_rollups_1d \
             WHERE ($1 IS NULL OR day >= $1) AND ($2 IS NULL OR day < $2) AND ($3 IS NULL OR org = $3) \
             AND ($4 IS NULL OR project = $4) AND ($5 IS NULL OR api_key = $5) \
             ORDER BY day, account, org, project, api_key, model",
            args![&day(query.from), &day(query.to), &query.org, &query.project, &query.api_key],
        )
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
        sum.reasoning_tokens += row.reasoning_tokens.unsigned_abs();
        sum.characters += row.characters.unsigned_abs();
        sum.seconds += row.seconds.unsigned_abs();
        sum.images += row.images.unsigned_abs();
        sum.cost += Total::from_pico(row.cost_pico.into());
    }
    let named = groups.into_iter();
    named
        .map(|([day, project, api_key, model], sum)| UsageRow { day, project, api_key, model, ..sum })
        .collect()
}

/// An event as it is read back: what its price and its sums follow from.
#[derive(Debug, FromRow)]
pub(crate) struct EventRow {
    pub request_id: String,
    pub ordinal: i64,
    pub account: String,
    pub org: String,
    pub project: String,
    pub api_key: String,
    pub model: String,
    pub service_tier: String,
    pub input_tokens: i64,
    pub cached_input_tokens: i64,
    pub output_tokens: i64,
    pub reasoning_tokens: i64,
    pub characters: i64,
    pub seconds: i64,
    pub images: i64,
    pub admitted_at_ms: i64,
    pub price_book: String,
    pub cost_pico: i64,
}

/// An event with its place in the outbox that it came from.
#[derive(FromRow)]
pub(crate) struct ShippedRow {
    #[sqlx(flatten)]
    pub event: EventRow,
    pub epoch: String,
    pub seq: i64,
}

impl EventRow {
    pub fn quantities(&self) -> Quantities {
        Quantities {
            input_tokens: self.input_tokens.unsigned_abs(),
            cached_input_tokens: self.cached_input_tokens.unsigned_abs(),
            output_tokens: self.output_tokens.unsigned_abs(),
            reasoning_tokens: self.reasoning_tokens.unsigned_abs(),
            characters: self.characters.unsigned_abs(),
            seconds: self.seconds.unsigned_abs(),
            images: self.images.unsigned_abs(),
        }
    }

    /// The book that it was priced by.
    pub fn book<'a>(&self, catalog: &'a Catalog) -> Result<&'a PriceBook, BillingError> {
        Ok(catalog.get(&PriceBookHash::from_stored(self.price_book.clone()))?)
    }

    /// Its lines, priced again; why not, in words. Whether they come to its cost, whoever asks has to see.
    pub fn lines(&self, book: &PriceBook) -> Result<Vec<Line>, String> {
        let tier = ServiceTier::parse(&self.service_tier);
        let tier = tier.ok_or_else(|| format!("an unknown service tier {}", self.service_tier))?;
        let account = AccountId::new(self.account.clone());
        book.price(&account, &self.model, tier, &self.quantities()).map_err(|error| error.to_string())
    }
}

/// Up to `limit` events after `ordinal`, in the order in which they were committed.
pub(crate) async fn events_after(
    conn: &mut Conn,
    ordinal: i64,
    limit: i64,
) -> Result<Vec<ShippedRow>, BillingError> {
    Ok(conn
        .fetch_all(
            concat!(
                "SELECT epoch, seq, ",
                event_columns!(),
                " FROM usage_events WHERE ordinal > $1 ORDER BY ordinal LIMIT $2"
            ),
            args![ordinal, limit],
        )
        .await?)
}

/// A bill as a receipt is held against it.
#[derive(FromRow)]
pub(crate) struct BillRow {
    #[sqlx(flatten)]
    pub event: EventRow,
    pub finish_reason: String,
}

/// The bill of one request, once it has arrived.
pub(crate) async fn bill(conn: &mut Conn, request_id: RequestId) -> Result<Option<BillRow>, BillingError> {
    Ok(conn
        .fetch_optional(
            concat!("SELECT finish_reason, ", event_columns!(), " FROM usage_events WHERE request_id = $1"),
            args![request_id.to_string().as_str()],
        )
        .await?)
}

/// The lines of an event, which come to its cost.
pub(crate) fn lines_of(catalog: &Catalog, event: &EventRow) -> Result<Vec<Line>, BillingError> {
    let corrupt = |why: String| BillingError::Corrupt { table: "usage_events", source: why.into() };
    let lines = event.lines(event.book(catalog)?);
    let lines = lines.map_err(|error| corrupt(format!("request {}: {error}", event.request_id)))?;
    if cost(&lines).map(Money::pico) != Some(event.cost_pico) {
        return Err(corrupt(format!(
            "request {} does not cost {}",
            event.request_id,
            Money::from_pico(event.cost_pico)
        )));
    }
    Ok(lines)
}

/// Up to `limit` events of one account after `after` and up to `through`, in the order in which they were committed.
pub(crate) async fn events_of(
    conn: &mut Conn,
    account: &AccountId,
    after: i64,
    through: i64,
    limit: i64,
) -> Result<Vec<EventRow>, BillingError> {
    Ok(conn
        .fetch_all(
            concat!(
                "SELECT ",
                event_columns!(),
                " FROM usage_events WHERE account = $1 AND ordinal > $2 AND ordinal <= $3 ORDER BY ordinal LIMIT $4"
            ),
            args![account.as_str(), after, through, limit],
        )
        .await?)
}

/// (epoch, seq, request id) of every refused second bill.
pub(crate) async fn duplicates(conn: &mut Conn) -> Result<Vec<(String, i64, String)>, BillingError> {
    Ok(conn
        .fetch_all("SELECT epoch, seq, request_id FROM usage_duplicates ORDER BY epoch, seq", args![])
        .await?)
}
