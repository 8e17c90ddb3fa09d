//! Notices: what customers are to be told of, written in the transaction of its cause. Owns the table `notices`.
//!
//! So a notice exists if and only if what it tells of has happened, whoever crashes when. Billing writes them and is done;
//! who is told, and how, is a matter of whoever reads them.

use serde_json::Value;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{args, database::Conn, error::BillingError, event::AccountId};

/// What a notice tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NoticeKind(&'static str);

impl NoticeKind {
    /// Spending went past a percentage of a budget.
    pub const BUDGET_THRESHOLD_REACHED: NoticeKind = NoticeKind("budget.threshold_reached");
    /// A budget is used up.
    pub const BUDGET_EXHAUSTED: NoticeKind = NoticeKind("budget.exhausted");
    /// What an account has left fell below its owner's threshold.
    pub const BALANCE_LOW: NoticeKind = NoticeKind("balance.low");
    /// What an account has left pays for nothing more.
    pub const BALANCE_EXHAUSTED: NoticeKind = NoticeKind("balance.exhausted");
    /// An invoice was drawn.
    pub const INVOICE_READY: NoticeKind = NoticeKind("invoice.ready");
    /// Credit ends soon.
    pub const CREDIT_EXPIRING: NoticeKind = NoticeKind("credit.expiring");

    pub const ALL: [NoticeKind; 6] = [
        NoticeKind::BUDGET_THRESHOLD_REACHED,
        NoticeKind::BUDGET_EXHAUSTED,
        NoticeKind::BALANCE_LOW,
        NoticeKind::BALANCE_EXHAUSTED,
        NoticeKind::INVOICE_READY,
        NoticeKind::CREDIT_EXPIRING,
    ];

    pub fn as_str(self) -> &'static str {
        self.0
    }
}

/// A notice to be raised.
#[derive(Clone, Debug)]
pub struct Notice {
    pub kind: NoticeKind,
    pub account: AccountId,
    /// What it is about: the id of a budget, an invoice, a grant, or of the account.
    pub subject: String,
    /// What there is to say, as an object. Amounts are decimal strings of dollars.
    pub payload: Value,
    /// Names the cause, such as `budget:b1:2026-11:80`: however often it is raised, there is one notice.
    pub dedupe_key: String,
    pub at: OffsetDateTime,
}

/// A notice as it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredNotice {
    /// Ascending in the order of raising. A lower one may become visible after a higher one, when its transaction commits.
    pub ordinal: i64,
    pub id: String,
    pub kind: String,
    pub account: String,
    pub subject: String,
    pub payload: Value,
    pub created_at_ms: i64,
}

/// Writes a notice in the transaction of its cause; false if there is one with this key already.
pub async fn raise(conn: &mut Conn, notice: &Notice) -> Result<bool, BillingError> {
    let id = format!("evt_{}", Uuid::now_v7().simple());
    let created_at_ms = (notice.at.unix_timestamp_nanos() / 1_000_000) as i64;
    let raised = conn
        .execute(
            "INSERT INTO notices (id, kind, account, subject, payload, created_at_ms, dedupe_key) \
             VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (dedupe_key) DO NOTHING",
            args![
                &id,
                notice.kind.as_str(),
                notice.account.as_str(),
                &notice.subject,
                &notice.payload.to_string(),
                created_at_ms,
                &notice.dedupe_key
            ],
        )
        .await?;
    Ok(raised == 1)
}

/// The numbers of up to `limit` notices after one, ascending.
pub async fn ordinals_after(conn: &mut Conn, ordinal: i64, limit: i64) -> Result<Vec<i64>, sqlx::Error> {
    let rows: Vec<(i64,)> = conn
        .fetch_all(
            "SELECT ordinal FROM notices WHERE ordinal > $1 ORDER BY ordinal LIMIT $2",
            args![ordinal, limit],
        )
        .await?;
    Ok(rows.into_iter().map(|(ordinal,)| ordinal).collect())
}

#[derive(sqlx::FromRow)]
struct NoticeRow {
    ordinal: i64,
    id: String,
    kind: String,
    account: String,
    subject: String,
    payload: String,
    created_at_ms: i64,
}

/// The notice of a number, if there is one.
pub async fn get(conn: &mut Conn, ordinal: i64) -> Result<Option<StoredNotice>, sqlx::Error> {
    let row: Option<NoticeRow> = conn
        .fetch_optional(
            "SELECT ordinal, id, kind, account, subject, payload, created_at_ms FROM notices WHERE ordinal = $1",
            args![ordinal],
        )
        .await?;
    Ok(row.map(|row| StoredNotice {
        ordinal: row.ordinal,
        id: row.id,
        kind: row.kind,
        account: row.account,
        subject: row.subject,
        payload: serde_json::from_str(&row.payload).expect("a notice's payload is written as JSON"),
        created_at_ms: row.created_at_ms,
    }))
}
