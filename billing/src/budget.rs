//! Budgets: what an organisation, a project or a key may spend in a day, a month or altogether (UTC).
//!
//! A hard budget is a fund like an account: gateways lease of its window, so no number of them overspends it by a token.
//! A soft one only counts. `spent` of a window caches the fold of the events admitted in it. Owns the tables `budgets` and
//! `budget_windows`.
//!
//! ```text
//! limit >= spent + leased        hard: whatever gateways do        soft: no limit, notices only
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};
use sqlx::FromRow;
use time::{Date, Month, OffsetDateTime};

use crate::{
    args,
    clock::moment_ms,
    counter,
    database::Conn,
    error::BillingError,
    event::{AccountId, UsageEvent},
    fund::Fund,
    money::{Money, Total},
    notice::{self, Notice, NoticeKind},
};

const THRESHOLDS_MAX: usize = 10;
const ID_BYTES_MAX: usize = 128;

/// Whose spending is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BudgetScope {
    Org,
    Project,
    Key,
}

/// How long until a budget begins anew, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BudgetPeriod {
    Day,
    Month,
    Total,
}

/// A limit on what a scope may spend in each period.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    pub id: String,
    pub scope: BudgetScope,
    /// The organisation's, project's or key's id.
    pub scope_id: String,
    pub period: BudgetPeriod,
    pub limit: Money,
    /// Nothing is spent beyond the limit. A soft budget only raises notices.
    pub hard: bool,
    /// Percentages of the limit at which a notice is raised, ascending.
    pub thresholds: Vec<u16>,
}

/// A budget and its present window.
#[derive(Clone, Debug, Serialize)]
pub struct BudgetStatus {
    #[serde(flatten)]
    pub budget: Budget,
    /// First day of the window and the day after its last, YYYY-MM-DD, UTC.
    pub from: String,
    pub to: String,
    /// Cost of the requests admitted in the window that have arrived in the ledger.
    pub spent: Money,
    /// What gateways have leased: open requests, bills on their way, and room for the next.
    pub leased: Money,
}

/// What ends a window: the days it spans, and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    name: String,
    from: String,
    to: String,
}

impl Budget {
    /// Why a budget is refused: the field, and the fix.
    pub fn validate(&self) -> Result<(), BillingError> {
        let refuse =
            |field: &'static str, fix: &str| Err(BillingError::Budget { field, fix: fix.to_owned() });
        let is_id = |id: &str| {
            (1..=ID_BYTES_MAX).contains(&id.len())
                && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        if !is_id(&self.id) {
            return refuse("id", "write 1 to 128 letters, digits, '-', '_' or '.'");
        }
        if self.scope_id.is_empty() || self.scope_id.len() > ID_BYTES_MAX {
            return refuse("scope_id", "name the organisation, project or key");
        }
        if self.limit < Money::ZERO {
            return refuse("limit", "write an amount of dollars that is not negative");
        }
        let ascending = self.thresholds.windows(2).all(|pair| pair[0] < pair[1]);
        if self.thresholds.len() > THRESHOLDS_MAX
            || !ascending
            || self.thresholds.iter().any(|p| !(1..=1000).contains(p))
        {
            return refuse(
                "thresholds",
                "write up to 10 percentages from 1 to 1000, each larger than the one before",
            );
        }
        Ok(())
    }

    pub(crate) fn applies_to(&self, org: &str, project: &str, api_key: &str) -> bool {
        self.scope_id
            == match self.scope {
                BudgetScope::Org => org,
                BudgetScope::Project => project,
                BudgetScope::Key => api_key,
            }
    }

    /// The window that a moment falls in.
    pub(crate) fn window(&self, at: OffsetDateTime) -> Window {
        let day = at.to_offset(time::UtcOffset::UTC).date();
        let (name, from, to) = match self.period {
            BudgetPeriod::Day => (day.to_string(), day, day.next_day().unwrap_or(Date::MAX)),
            BudgetPeriod::Month => {
                let first = day.replace_day(1).expect("every month has a first day");
                let year = if first.month() == Month::December { first.year() + 1 } else { first.year() };
                let next = Date::from_calendar_date(year, first.month().next(), 1).unwrap_or(Date::MAX);
                (first.to_string()[..7].to_owned(), first, next)
            }
            BudgetPeriod::Total => ("total".to_owned(), Date::MIN, Date::MAX),
        };
        // Days are compared as text, so those of all time are the smallest and the largest text.
        let (from, to) = match self.period {
            BudgetPeriod::Total => (String::new(), "~".to_owned()),
            _ => (from.to_string(), to.to_string()),
        };
        Window { name, from, to }
    }

    pub(crate) fn fund(&self, window: &Window) -> Fund {
        Fund::Budget(format!("{}:{}", self.id, window.name))
    }
}

impl Window {
    pub fn of_event(budget: &Budget, event: &UsageEvent) -> Window {
        budget.window(moment_ms(event.admitted_at_ms))
    }
}

#[derive(FromRow)]
struct BudgetRow {
    id: String,
    scope: String,
    scope_id: String,
    period: String,
    limit_pico: i64,
    hard: i64,
    thresholds: String,
}

impl BudgetRow {
    fn into_budget(self) -> Budget {
        Budget {
            id: self.id,
            scope: BudgetScope::stored(&self.scope),
            scope_id: self.scope_id,
            period: match self.period.as_str() {
                "day" => BudgetPeriod::Day,
                "month" => BudgetPeriod::Month,
                _ => BudgetPeriod::Total,
            },
            limit: Money::from_pico(self.limit_pico),
            hard: self.hard == 1,
            thresholds: self.thresholds.split(',').filter_map(|percent| percent.parse().ok()).collect(),
        }
    }
}

/// Creates a budget or changes the one of this id; its scope and period stay what they were.
pub(crate) async fn put(conn: &mut Conn, budget: &Budget, now_s: i64) -> Result<(), BillingError> {
    budget.validate()?;
    let thresholds = budget.thresholds.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
    let put = conn
        .execute(
            "INSERT INTO budgets (id, scope, scope_id, period, limit_pico, hard, thresholds, created_s) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (id) DO UPDATE SET limit_pico = excluded.limit_pico, \
             hard = excluded.hard, thresholds = excluded.thresholds, deleted_s = NULL \
             WHERE budgets.scope = excluded.scope AND budgets.scope_id = excluded.scope_id \
             AND budgets.period = excluded.period",
            args![
                &budget.id,
                budget.scope.as_str(),
                &budget.scope_id,
                budget.period.as_str(),
                budget.limit.pico(),
                i64::from(budget.hard),
                &thresholds,
                now_s
            ],
        )
        .await?;
    if put == 1 {
        return Ok(());
    }
    let fix =
        format!("there is a budget {} already, of another scope or period; choose another id", budget.id);
    Err(BillingError::Budget { field: "id", fix })
}

/// Ends a budget; false where there is none.
pub(crate) async fn delete(conn: &mut Conn, id: &str, now_s: i64) -> Result<bool, BillingError> {
    let deleted = conn
        .execute("UPDATE budgets SET deleted_s = $1 WHERE id = $2 AND deleted_s IS NULL", args![now_s, id])
        .await?;
    Ok(deleted == 1)
}

pub(crate) async fn scope_of(
    conn: &mut Conn,
    id: &str,
) -> Result<Option<(BudgetScope, String)>, BillingError> {
    let row: Option<(String, String)> =
        conn.fetch_optional("SELECT scope, scope_id FROM budgets WHERE id = $1", args![id]).await?;
    Ok(row.map(|(scope, scope_id)| (BudgetScope::stored(&scope), scope_id)))
}

/// Every budget in force, by id.
pub(crate) async fn all(conn: &mut Conn) -> Result<Vec<Budget>, BillingError> {
    let rows: Vec<BudgetRow> = conn
        .fetch_all(
            "SELECT id, scope, scope_id, period, limit_pico, hard, thresholds FROM budgets \
             WHERE deleted_s IS NULL ORDER BY id",
            args![],
        )
        .await?;
    Ok(rows.into_iter().map(BudgetRow::into_budget).collect())
}

/// The budget in force with this id.
pub(crate) async fn get(conn: &mut Conn, id: &str) -> Result<Option<Budget>, BillingError> {
    let row: Option<BudgetRow> = conn
        .fetch_optional(
            "SELECT id, scope, scope_id, period, limit_pico, hard, thresholds FROM budgets \
             WHERE deleted_s IS NULL AND id = $1",
            args![id],
        )
        .await?;
    Ok(row.map(BudgetRow::into_budget))
}

/// A budget with the window that `at` falls in.
pub(crate) async fn status(
    conn: &mut Conn,
    budget: Budget,
    at: OffsetDateTime,
) -> Result<BudgetStatus, BillingError> {
    let window = budget.window(at);
    let row: Option<(i64, i64)> = conn
        .fetch_optional(
            "SELECT spent_pico, leased_pico FROM budget_windows WHERE fund = $1",
            args![&budget.fund(&window).to_string()],
        )
        .await?;
    let (spent, leased) = match row {
        Some(row) => row,
        None => (spent_before(conn, &budget, &window).await?, 0),
    };
    let (spent, leased) = (Money::from_pico(spent), Money::from_pico(leased));
    Ok(BudgetStatus { budget, from: window.from, to: window.to, spent, leased })
}

/// Makes the window's row, with what its scope has spent in it already. Takes part in the order of events, so none is
/// counted twice or not at all.
pub(crate) async fn ensure_window(
    conn: &mut Conn,
    budget: &Budget,
    window: &Window,
) -> Result<(), BillingError> {
    let fund = budget.fund(window).to_string();
    let known: Option<(i64,)> =
        conn.fetch_optional("SELECT spent_pico FROM budget_windows WHERE fund = $1", args![&fund]).await?;
    if known.is_some() {
        return Ok(());
    }
    counter::take(conn, "event", 0).await?;
    let spent = spent_before(conn, budget, window).await?;
    conn.execute(
        "INSERT INTO budget_windows (fund, budget, from_day, to_day, spent_pico, leased_pico) \
         VALUES ($1, $2, $3, $4, $5, 0) ON CONFLICT (fund) DO NOTHING",
        args![&fund, &budget.id, &window.from, &window.to, spent],
    )
    .await?;
    Ok(())
}

async fn spent_before(conn: &mut Conn, budget: &Budget, window: &Window) -> Result<i64, BillingError> {
    let (spent,): (i64,) = conn
        .fetch_one(
            "SELECT CAST(coalesce(sum(cost_pico), 0) AS BIGINT) FROM usage_rollups_1d WHERE day >= $1 AND day < $2 \
             AND CASE $3 WHEN 'org' THEN org WHEN 'project' THEN project ELSE api_key END = $4",
            args![&window.from, &window.to, budget.scope.as_str(), &budget.scope_id],
        )
        .await?;
    Ok(spent)
}

/// What of a hard budget's window can still be leased; nothing of one that is no longer in force.
pub(crate) async fn available(conn: &mut Conn, fund: &str) -> Result<Money, BillingError> {
    let left: Option<(i64, i64, i64)> = conn
        .fetch_optional(
            "SELECT b.limit_pico, w.spent_pico, w.leased_pico FROM budget_windows w JOIN budgets b ON b.id = w.budget \
             WHERE w.fund = $1",
            args![fund],
        )
        .await?;
    let Some((limit, spent, leased)) = left else { return Ok(Money::ZERO) };
    let left = Total::from_pico(i128::from(limit) - i128::from(spent) - i128::from(leased));
    Ok(left.to_money().unwrap_or(Money::ZERO).max(Money::ZERO))
}

pub(crate) async fn set_aside(conn: &mut Conn, fund: &str, amount: Money) -> Result<bool, BillingError> {
    let set = conn
        .execute(
            "UPDATE budget_windows SET leased_pico = leased_pico + $1 WHERE fund = $2 AND spent_pico + leased_pico + $1 \
             <= (SELECT limit_pico FROM budgets WHERE budgets.id = budget_windows.budget)",
            args![amount.pico(), fund],
        )
        .await?;
    Ok(set == 1)
}

pub(crate) async fn give_back(conn: &mut Conn, fund: &str, amount: Money) -> Result<(), BillingError> {
    conn.execute(
        "UPDATE budget_windows SET leased_pico = leased_pico - $1 WHERE fund = $2",
        args![amount.pico(), fund],
    )
    .await?;
    Ok(())
}

/// Counts `cost` in a window, `from_lease` of it out of a lease, and tells `account` of the thresholds that it went past.
pub(crate) async fn spend(
    conn: &mut Conn,
    budget: &Budget,
    window: &Window,
    cost: Money,
    from_lease: Money,
    (account, at): (&AccountId, OffsetDateTime),
) -> Result<(), BillingError> {
    let (spent,): (i64,) = conn
        .fetch_one(
            "UPDATE budget_windows SET spent_pico = spent_pico + $1, leased_pico = leased_pico - $2 WHERE fund = $3 \
             RETURNING spent_pico",
            args![cost.pico(), from_lease.pico(), &budget.fund(window).to_string()],
        )
        .await?;
    let (before, after) = (i128::from(spent) - i128::from(cost.pico()), i128::from(spent));
    let reached =
        |spent: i128, percent: u16| spent * 100 >= i128::from(budget.limit.pico()) * i128::from(percent);
    let crossed =
        budget.thresholds.iter().filter(|percent| !reached(before, **percent) && reached(after, **percent));
    for percent in crossed {
        let mut notice = told(budget, window, NoticeKind::BUDGET_THRESHOLD_REACHED, account, at);
        notice.payload["percent"] = (*percent).into();
        notice.payload["spent"] = Money::from_pico(spent).to_usd_string().into();
        notice.dedupe_key = format!("{}:{percent}", budget.fund(window));
        notice::raise(conn, &notice).await?;
    }
    Ok(())
}

/// Tells `account` that a window has refused a request, once.
pub(crate) async fn exhausted(
    conn: &mut Conn,
    budget: &Budget,
    window: &Window,
    account: &AccountId,
    at: OffsetDateTime,
) -> Result<(), BillingError> {
    let notice = told(budget, window, NoticeKind::BUDGET_EXHAUSTED, account, at);
    notice::raise(conn, &notice).await.map(drop)
}

fn told(
    budget: &Budget,
    window: &Window,
    kind: NoticeKind,
    account: &AccountId,
    at: OffsetDateTime,
) -> Notice {
    let payload = serde_json::json!({
        "currency": "USD",
        "budget": budget.id,
        "scope": budget.scope,
        "scope_id": budget.scope_id,
        "period": budget.period,
        "window": window.name,
        "limit": budget.limit.to_usd_string(),
        "hard": budget.hard,
    });
    let dedupe_key = format!("{}:exhausted", budget.fund(window));
    Notice { kind, account: account.clone(), subject: budget.id.clone(), payload, dedupe_key, at }
}

/// A window as the audit reads it: what it is of, and what it says.
#[derive(FromRow)]
pub(crate) struct WindowRow {
    pub fund: String,
    pub scope: String,
    pub scope_id: String,
    pub from_day: String,
    pub to_day: String,
    pub spent_pico: i64,
}

/// Every window of a budget in force.
pub(crate) async fn windows(conn: &mut Conn) -> Result<Vec<WindowRow>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT w.fund, b.scope, b.scope_id, w.from_day, w.to_day, w.spent_pico \
             FROM budget_windows w JOIN budgets b ON b.id = w.budget WHERE b.deleted_s IS NULL ORDER BY w.fund",
            args![],
        )
        .await?)
}

/// (fund, leased) of every window, of budgets no longer in force too.
pub(crate) async fn leased(conn: &mut Conn) -> Result<Vec<(String, i64)>, BillingError> {
    Ok(conn.fetch_all("SELECT fund, leased_pico FROM budget_windows", args![]).await?)
}

impl BudgetScope {
    /// The table's CHECK admits these three only.
    fn stored(text: &str) -> BudgetScope {
        match text {
            "org" => BudgetScope::Org,
            "project" => BudgetScope::Project,
            _ => BudgetScope::Key,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            BudgetScope::Org => "org",
            BudgetScope::Project => "project",
            BudgetScope::Key => "key",
        }
    }
}

impl BudgetPeriod {
    pub fn as_str(self) -> &'static str {
        match self {
            BudgetPeriod::Day => "day",
            BudgetPeriod::Month => "month",
            BudgetPeriod::Total => "total",
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Budget { id, scope, scope_id, period, limit, .. } = self;
        write!(f, "{id} ({} {scope_id}, {limit} a {})", scope.as_str(), period.as_str())
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn budget(period: BudgetPeriod) -> Budget {
        let (scope, scope_id) = (BudgetScope::Key, "key-1".to_owned());
        Budget {
            id: "b".into(),
            scope,
            scope_id,
            period,
            limit: Money::ZERO,
            hard: true,
            thresholds: vec![80],
        }
    }

    #[test]
    fn windows_are_utc_days_and_months() {
        let check = |period, at: OffsetDateTime, expect: [&str; 3]| {
            let Window { name, from, to } = budget(period).window(at);
            assert_eq!([name.as_str(), from.as_str(), to.as_str()], expect);
        };
        check(
            BudgetPeriod::Day,
            datetime!(2026-03-01 01:00 +02:00),
            ["2026-02-28", "2026-02-28", "2026-03-01"],
        );
        check(BudgetPeriod::Month, datetime!(2026-12-31 23:59 UTC), ["2026-12", "2026-12-01", "2027-01-01"]);
        check(BudgetPeriod::Total, datetime!(2026-12-31 23:59 UTC), ["total", "", "~"]);
    }

    #[test]
    fn a_bad_budget_is_refused_by_field() {
        let check = |change: fn(&mut Budget), expect: &str| {
            let mut budget = budget(BudgetPeriod::Day);
            change(&mut budget);
            let told = budget.validate().expect_err(expect).to_string();
            assert!(told.starts_with(expect), "{told}");
        };
        check(|budget| budget.id = "a:b".into(), "id:");
        check(|budget| budget.scope_id.clear(), "scope_id:");
        check(|budget| budget.limit = Money::from_pico(-1), "limit:");
        check(|budget| budget.thresholds = vec![80, 80], "thresholds:");
        check(|budget| budget.thresholds = vec![0], "thresholds:");
        assert!(budget(BudgetPeriod::Total).validate().is_ok());
    }
}
