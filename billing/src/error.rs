//! What can go wrong, by what a caller would do about it.

use std::{sync::Arc, time::Duration};

use crate::{
    event::{AccountId, ServiceTier},
    money::Money,
    price::PriceBookHash,
};

/// A failure of the books: the database, or something in it that must not be.
#[derive(Debug, thiserror::Error)]
pub enum BillingError {
    #[error("the billing database does not answer")]
    Database(#[from] sqlx::Error),
    #[error(transparent)]
    Open(#[from] crate::database::DatabaseError),
    #[error("the outbox cannot be brought up to date; the file may come from a newer version")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// A field of a budget is at fault; `fix` goes on from its name.
    #[error("{field}: {fix}")]
    Budget { field: &'static str, fix: String },
    #[error(
        "the outbox {path} cannot be opened: check that the folder is writable and that no other server uses it"
    )]
    Outbox {
        path: String,
        #[source]
        source: sqlx::Error,
    },
    #[error(
        "the outbox has shipped events up to {shipped}, but the ledger knows them only up to {known}: \
         the database is older than the outbox; restore the newer database"
    )]
    LedgerBehindOutbox { shipped: i64, known: i64 },
    #[error("there is no account {0}")]
    UnknownAccount(AccountId),
    #[error("the account {0} exists already, with other terms")]
    AccountExists(AccountId),
    #[error("the grant {0} was already posted with another account or amount")]
    GrantConflict(uuid::Uuid),
    #[error("expires_at: credit cannot expire before it is granted; leave it out, or name a moment to come")]
    ExpiryPassed,
    #[error("amount: {0} is not positive")]
    NotPositive(Money),
    #[error("an amount of the account {account} would exceed {max}", max = Money::MAX)]
    Overflow { account: AccountId },
    #[error("the ledger transaction \"{0}\" does not sum to zero")]
    Unbalanced(String),
    #[error("no price book has the hash {0}")]
    UnknownPriceBook(PriceBookHash),
    #[error("{table}: a stored value cannot be read")]
    Corrupt {
        table: &'static str,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("ship_state moved without us: another server ships this outbox")]
    ShippedElsewhere,
    #[error("billing is closed")]
    Closed,
}

/// Why a request is not admitted.
#[derive(Debug, thiserror::Error)]
pub enum AdmitError {
    /// The prompt and one output token cost more than the account has.
    #[error("the request needs at least {needed}, and {available} are available")]
    InsufficientCredit { needed: Money, available: Money },
    /// The prompt and one output token cost more than a budget has left.
    #[error(
        "the budget {budget} has {available} left in this window, and the request needs at least {needed}"
    )]
    OverBudget { budget: String, needed: Money, available: Money },
    #[error("there is no {service_tier} price for the model {model}")]
    NoPrice { model: String, service_tier: ServiceTier },
    /// The ledger cannot be reached and as many bills wait as may.
    #[error("too many bills wait for the ledger; try again in {retry_after:?}")]
    OutboxFull { retry_after: Duration },
    #[error("billing is unavailable")]
    Unavailable(#[source] BillingError),
}

/// Why a bill could not be made durable. Its money stays held until the next start, when the outbox tells the truth.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    #[error("the outbox did not take the bill")]
    Outbox(#[source] Arc<sqlx::Error>),
    #[error("billing is closed")]
    Closed,
}
