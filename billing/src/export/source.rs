//! Where rows come from: facts with a sequence of their own, read in pages, in order.
//!
//! A further source (invoice lines, taxes, credit notes) is a variant of [`Source`], a page of [`Page`], and how its rows
//! look in [`super::focus`]. Each has its own range in the manifest.

use sqlx::FromRow;

use super::ExportFilter;
use crate::{args, database::Conn, error::BillingError};

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

#[derive(Debug, FromRow)]
pub(crate) struct EventFact {
    pub ordinal: i64,
    pub request_id: String,
    pub account: String,
    pub org: String,
    pub project: String,
    pub api_key: String,
    pub end_user: String,
    pub model: String,
    pub node: String,
    pub service_tier: String,
    pub input_tokens: i64,
    pub cached_input_tokens: i64,
    pub output_tokens: i64,
    pub reasoning_tokens: i64,
    pub characters: i64,
    pub seconds: i64,
    pub images: i64,
    pub overrun_tokens: i64,
    pub finish_reason: String,
    pub time_to_first_token_ms: Option<i64>,
    pub duration_ms: i64,
    pub admitted_at_ms: i64,
    pub price_book: String,
    pub cost_pico: i64,
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
                    "SELECT ordinal, request_id, account, org, project, api_key, end_user, model, node, service_tier, \
                     input_tokens, cached_input_tokens, output_tokens, reasoning_tokens, characters, seconds, images, \
                     overrun_tokens, finish_reason, time_to_first_token_ms, duration_ms, admitted_at_ms, price_book, \
                     cost_pico FROM usage_events WHERE ordinal > $1 AND ordinal <= $2 \
                     AND admitted_at_ms >= $3 AND admitted_at_ms < $4 AND ($5 IS NULL OR account = $5) \
                     AND ($6 IS NULL OR org = $6) ORDER BY ordinal LIMIT $7",
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
