//! A fund: what money can be leased of. An account, or one window of a budget; a request is covered by all that apply.

use std::fmt;

use crate::{budget, database::Conn, error::BillingError, event::AccountId, ledger, money::Money};

const ACCOUNT: &str = "account:";
const BUDGET: &str = "budget:";

/// Its text form is its key in the database: `account:ID` or `budget:ID:WINDOW`. Accounts come before budgets, and that is
/// the order in which their rows are locked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Fund {
    Account(AccountId),
    /// `ID:WINDOW`.
    Budget(String),
}

impl Fund {
    pub fn parse(key: &str) -> Option<Fund> {
        match (key.strip_prefix(ACCOUNT), key.strip_prefix(BUDGET)) {
            (Some(id), _) => Some(Fund::Account(AccountId::new(id))),
            (None, Some(window)) => Some(Fund::Budget(window.to_owned())),
            (None, None) => None,
        }
    }

    /// What can still be leased.
    pub async fn available(&self, conn: &mut Conn) -> Result<Money, BillingError> {
        match self {
            Fund::Account(account) => Ok(ledger::balance(conn, account).await?.available),
            Fund::Budget(_) => budget::available(conn, &self.to_string()).await,
        }
    }

    /// Keeps others from changing this fund until the transaction ends. Taken before its leases are.
    pub async fn lock(&self, conn: &mut Conn) -> Result<(), BillingError> {
        self.give_back(conn, Money::ZERO).await
    }

    /// Sets `amount` aside for a lease if the fund has it; false, and nothing changed, if not.
    pub async fn set_aside(&self, conn: &mut Conn, amount: Money) -> Result<bool, BillingError> {
        match self {
            Fund::Account(account) => ledger::set_aside(conn, account, amount).await,
            Fund::Budget(_) => budget::set_aside(conn, &self.to_string(), amount).await,
        }
    }

    /// Gives `amount` of a lease back.
    pub async fn give_back(&self, conn: &mut Conn, amount: Money) -> Result<(), BillingError> {
        match self {
            Fund::Account(account) => ledger::give_back(conn, account, amount).await,
            Fund::Budget(_) => budget::give_back(conn, &self.to_string(), amount).await,
        }
    }
}

impl fmt::Display for Fund {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fund::Account(account) => write!(f, "{ACCOUNT}{account}"),
            Fund::Budget(window) => write!(f, "{BUDGET}{window}"),
        }
    }
}
