//! Where rows come from: facts with a sequence of their own, read in pages, in order.
//!
//! A further source (invoice lines, taxes, credit notes) is a variant of [`Source`], a page of [`Page`], and how its rows
//! look in [`super::focus`]. Each has its own range in the manifest.

use std::ops::Deref;

use sqlx::FromRow;

use super::ExportFilter;
use crate::{
    args,
    database::Conn,
    error::BillingError,
    usage::{EventRow, event_columns},
};

/// Facts read at a time.
const PAGE: i64 = 4_096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Bills, by the ordinal that the ledger gave them.
    UsageEvents,
    /// Prepaid credit, by its ledger transaction.
    CreditGrants,
}

#[derive(Debug)]
pub(crate) enum Page {
    UsageEvents(Vec<EventFact>),
    CreditGrants(Vec<GrantFact>),
}

/// A bill with all that it says.
#[derive(Debug, FromRow)]
pub(crate) struct EventFact {
    #[sqlx(flatten)]
    event: EventRow,
    pub end_user: String,
    pub node: String,
    pub overrun_tokens: i64,
    pub finish_reason: String,
    pub time_to_first_token_ms: Option<i64>,
    pub duration_ms: i64,
}

impl Deref for EventFact {
    type Target = EventRow;

    fn deref(&self) -> &EventRow {
        &self.event
    }
}

#[derive(Debug, FromRow)]
pub(crate) struct GrantFact {
    pub transaction_id: i64,
    pub account: String,
    pub amount_pico: i64,
    pub memo: String,
    pub granted_at_s: i64,
}

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Source::UsageEvents => "usage_events",
            Source::CreditGrants => "credit_grants",
        }
    }

    pub fn named(name: &str) -> Option<Source> {
        [Source::UsageEvents, Source::CreditGrants].into_iter().find(|source| source.name() == name)
    }

    /// The newest sequence number there is, 0 when there is nothing.
    pub async fn newest(self, conn: &mut Conn) -> Result<i64, BillingError> {
        let sql = match self {
            Source::UsageEvents => "SELECT coalesce(max(ordinal), 0) FROM usage_events",
            Source::CreditGrants => "SELECT coalesce(max(transaction_id), 0) FROM credit_grants",
        };
        let (newest,): (i64,) = conn.fetch_one(sql, args![]).await?;
        Ok(newest)
    }

    /// The next facts after a sequence number, up to and including another. Empty at the end.
    pub async fn page(
        self,
        conn: &mut Conn,
        after: i64,
        through: i64,
        filter: &ExportFilter,
    ) -> Result<Page, BillingError> {
        let (from_ms, to_ms) = filter.bounds_ms();
        let (account, org) = (filter.account.as_deref(), filter.org.as_deref());
        Ok(match self {
            Source::UsageEvents => Page::UsageEvents(
                conn.fetch_all(
                    concat!(
                        "SELECT end_user, node, overrun_tokens, finish_reason, time_to_first_token_ms, duration_ms, ",
                        event_columns!(),
                        " FROM usage_events WHERE ordinal > $1 AND ordinal <= $2 \
                         AND admitted_at_ms >= $3 AND admitted_at_ms < $4 AND ($5 IS NULL OR account = $5) \
                         AND ($6 IS NULL OR org = $6) ORDER BY ordinal LIMIT $7"
                    ),
                    args![after, through, from_ms, to_ms, account, org, PAGE],
                )
                .await?,
            ),
            // Credit belongs to an account, and to no organisation: asked for one, there is none.
            Source::CreditGrants => Page::CreditGrants(
                conn.fetch_all(
                    "SELECT transaction_id, account, amount_pico, memo, granted_at_s FROM credit_grants \
                     WHERE transaction_id > $1 AND transaction_id <= $2 \
                     AND granted_at_s >= $3 AND granted_at_s < $4 AND ($5 IS NULL OR account = $5) \
                     AND $6 IS NULL ORDER BY transaction_id LIMIT $7",
                    args![
                        after,
                        through,
                        from_ms.div_euclid(1_000),
                        to_ms.div_euclid(1_000),
                        account,
                        org,
                        PAGE
                    ],
                )
                .await?,
            ),
        })
    }
}

impl Page {
    /// The sequence number of its last fact.
    pub fn last(&self) -> Option<i64> {
        match self {
            Page::UsageEvents(events) => events.last().map(|event| event.ordinal),
            Page::CreditGrants(grants) => grants.last().map(|grant| grant.transaction_id),
        }
    }
}
