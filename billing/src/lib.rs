#![forbid(unsafe_code)]
//! Money for Sluice. Work in progress: the public face with its real types.

mod error;
mod event;
mod money;
mod price;

use std::{path::PathBuf, sync::Arc, time::Duration};

pub use error::{AdmitError, BillingError, SettleError};
pub use event::{AccountId, AdmitRequest, FinishReason, Outcome, Quantities, RequestId, UsageEvent};
pub use money::{Money, MoneyError, PICO_PER_USD, Total};
pub use price::{Line, Meter, ModelPrices, Price, PriceBook, PriceBookError, PriceBookHash, PriceError, cost};
use sqlx::SqlitePool;
use time::{Date, OffsetDateTime};
use uuid::Uuid;

pub struct BillingOptions {
    pub database: SqlitePool,
    pub outbox_path: PathBuf,
    /// The name of this gateway in the ledger.
    pub gateway: String,
    pub limits: BillingLimits,
}

#[derive(Clone, Debug)]
pub struct BillingLimits {
    /// Output tokens that a hold covers at admission.
    pub hold_output_tokens: u64,
    /// What the gateway takes from an account's balance at a time.
    pub lease_slice: Money,
    /// A lease that its gateway has not renewed for this long goes back to the account.
    pub lease_ttl: Duration,
    /// Bills that may wait for the ledger, open holds included. Beyond: `AdmitError::OutboxFull`.
    pub outbox_events_max: usize,
    /// Bills that share one fsync at most.
    pub commit_events_max: usize,
    /// Bills that one ledger transaction posts at most.
    pub ship_events_max: usize,
    /// How long a bill waits for others before it is shipped.
    pub ship_linger: Duration,
    /// The longest pause between two attempts while the ledger does not answer.
    pub ship_backoff_max: Duration,
}

impl Default for BillingLimits {
    fn default() -> BillingLimits {
        BillingLimits {
            hold_output_tokens: 256,
            lease_slice: Money::from_pico(PICO_PER_USD),
            lease_ttl: Duration::from_secs(24 * 3600),
            outbox_events_max: 100_000,
            commit_events_max: 256,
            ship_events_max: 1_000,
            ship_linger: Duration::from_millis(100),
            ship_backoff_max: Duration::from_secs(5),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccountKind {
    /// Pays first: the balance never goes below zero.
    Prepaid,
    /// Pays later: the balance never goes below the negative limit.
    Postpaid { credit_limit: Money },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balance {
    pub account: AccountId,
    pub kind: AccountKind,
    /// Credits less posted usage.
    pub posted: Money,
    /// The part that gateways have leased: open holds, bills on their way, and room for the next requests.
    pub leased: Money,
    /// What can still be leased: posted + credit limit - leased. Never negative.
    pub available: Money,
}

/// Credit bought or given. `id` makes a repeated call a no-op.
#[derive(Clone, Debug)]
pub struct CreditGrant {
    pub id: Uuid,
    pub account: AccountId,
    pub amount: Money,
    /// Why, for the statement.
    pub memo: String,
    pub granted_at: OffsetDateTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UsageGroup {
    Key,
    Model,
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

/// A group's sums. A dimension that was not asked for is None.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
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

/// Counters for `/metrics`. admitted = settled + voided + expired + stranded + holds_open, always.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct BillingStats {
    pub admitted: u64,
    pub refused_credit: u64,
    pub refused_outbox_full: u64,
    pub settled: u64,
    pub voided: u64,
    /// Holds dropped without settle or void.
    pub expired: u64,
    /// Holds whose bill the outbox failed to take.
    pub stranded: u64,
    pub holds_open: u64,
    /// Bills durable here and not yet in the ledger.
    pub outbox_backlog: u64,
    pub outbox_oldest_age_ms: u64,
    pub outbox_commits: u64,
    pub outbox_commit_us_total: u64,
    pub outbox_commit_us_max: u64,
    pub shipped: u64,
    pub ship_failures: u64,
    /// Trips to the ledger for a larger slice.
    pub lease_refills: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VoidCause {
    /// No node took the request, or it failed before a token came.
    NodeFailed,
    /// The client went away before anything was computed.
    ClientGone,
    /// A later check refused it.
    Refused,
    /// The server is going down.
    Draining,
}

#[derive(Clone)]
pub struct Billing {
    _inner: Arc<()>,
}

/// The books without a gateway: what the command line opens beside a running server.
#[derive(Clone)]
pub struct Books {
    _pool: SqlitePool,
}

impl Books {
    pub async fn open(_database: SqlitePool) -> Result<Books, BillingError> {
        unimplemented!()
    }
    pub async fn create_account(&self, _account: &AccountId, _kind: AccountKind) -> Result<(), BillingError> {
        unimplemented!()
    }
    pub async fn credit(&self, _grant: &CreditGrant) -> Result<(), BillingError> {
        unimplemented!()
    }
    pub async fn balance(&self, _account: &AccountId) -> Result<Balance, BillingError> {
        unimplemented!()
    }
    pub async fn accounts(&self) -> Result<Vec<Balance>, BillingError> {
        unimplemented!()
    }
    pub async fn usage(&self, _query: &UsageQuery) -> Result<Vec<UsageRow>, BillingError> {
        unimplemented!()
    }
}

impl Billing {
    pub async fn open(_options: BillingOptions) -> Result<Billing, BillingError> {
        unimplemented!()
    }
    pub async fn close(&self) -> Result<(), BillingError> {
        unimplemented!()
    }
    pub async fn admit(&self, _request: AdmitRequest) -> Result<Hold, AdmitError> {
        unimplemented!()
    }
    pub async fn apply_price_book(&self, _book: &PriceBook) -> Result<PriceBookHash, BillingError> {
        unimplemented!()
    }
    /// accounts, credit, balances, usage
    pub fn books(&self) -> &Books {
        unimplemented!()
    }
    pub async fn create_account(&self, _account: &AccountId, _kind: AccountKind) -> Result<(), BillingError> {
        unimplemented!()
    }
    pub async fn credit(&self, _grant: &CreditGrant) -> Result<(), BillingError> {
        unimplemented!()
    }
    pub async fn balance(&self, _account: &AccountId) -> Result<Balance, BillingError> {
        unimplemented!()
    }
    pub async fn accounts(&self) -> Result<Vec<Balance>, BillingError> {
        unimplemented!()
    }
    pub async fn usage(&self, _query: &UsageQuery) -> Result<Vec<UsageRow>, BillingError> {
        unimplemented!()
    }
    pub fn stats(&self) -> BillingStats {
        unimplemented!()
    }
}

#[must_use = "a hold ends by settle or void; dropping it counts as expired"]
pub struct Hold {
    _inner: Arc<()>,
}

impl Hold {
    pub fn granted_output_tokens(&self) -> u64 {
        unimplemented!()
    }
    pub fn is_final(&self) -> bool {
        unimplemented!()
    }
    pub async fn extend(&mut self, _output_tokens: u64) {
        unimplemented!()
    }
    pub async fn settle(self, _outcome: Outcome) -> Result<UsageEvent, SettleError> {
        unimplemented!()
    }
    pub async fn void(self, _cause: VoidCause) {
        unimplemented!()
    }
}
