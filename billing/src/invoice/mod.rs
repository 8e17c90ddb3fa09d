//! Invoices: what an account used in a month, drawn up once the month is over, and never changed again.
//!
//! ```text
//! events of the month ─┐
//! late events          ├─► charges ─► lines, credit, tax ─► cents ─► invoice, closed month ─► payments, credit notes
//! tiers of the month  ─┘            (line, tax, rounding: pure)         (close)                   (settle)
//! ```
//!
//! | concept | module |
//! | --- | --- |
//! | a month | `period` |
//! | lines, tax, cents: pure | `line`, `tax`, `rounding` |
//! | the paper, its JSON and CSV | `document` |
//! | its PDF | `pdf` |
//! | the tables | `store` |
//! | what a month costs | `charges` |
//! | closing a month | `close` |
//! | to whom it goes | `profile` |
//! | has every gateway shipped it? | `horizon` |
//! | payments and credit notes | `settle` |

mod charges;
mod close;
mod document;
pub(crate) mod horizon;
mod line;
mod pdf;
mod period;
mod profile;
mod rounding;
pub(crate) mod settle;
pub(crate) mod store;
mod tax;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use self::{
    charges::{Gathered, Window},
    close::net_due,
    line::{Charge, rounded},
    store::last_checkpoint,
};
pub use self::{
    close::{CloseReport, ClosedPeriod, Closing},
    document::{Invoice, InvoiceKind, InvoiceTotals, Party},
    line::{InvoiceLine, LineKind, TooLarge},
    pdf::{FontError, check_font, render as render_pdf},
    period::{Period, PeriodError},
    profile::BillingProfile,
    settle::{CreditNote, IssueCreditNote, Payment, RecordPayment},
    store::{InvoiceQuery, InvoiceState, InvoiceStatus},
    tax::{TaxRate, TaxRules, TaxRulesError, is_country},
};
use crate::{error::BillingError, event::AccountId, money::Money};

/// How invoices are drawn up and when. The section `[invoices]` of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InvoiceRules {
    /// What the numbers of invoices begin with. Each series counts from 1, without gaps.
    pub series: String,
    pub credit_note_series: String,
    /// Days from issue until payment is due.
    pub due_days: u32,
    pub issuer: Party,
    /// A TrueType file for PDFs, where names need other scripts than the built-in font has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub font: Option<PathBuf>,
    /// Whether a running server closes months by itself.
    pub close_automatically: bool,
    /// How long after its end it closes one: requests that straddle midnight end within that.
    pub close_after_s: u64,
    /// How often a running server looks for months to close and credit that has expired.
    pub sweep_interval_s: u64,
}

impl Default for InvoiceRules {
    fn default() -> InvoiceRules {
        InvoiceRules {
            series: "INV-".to_owned(),
            credit_note_series: "CN-".to_owned(),
            due_days: 30,
            issuer: Party::default(),
            font: None,
            close_automatically: true,
            close_after_s: 6 * 3600,
            sweep_interval_s: 60,
        }
    }
}

/// Why the section is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invoices.{field}: {problem}")]
pub struct InvoiceRulesError {
    field: &'static str,
    problem: &'static str,
}

impl InvoiceRules {
    const DUE_DAYS_MAX: u32 = 3_650;
    const CLOSE_AFTER_MAX_S: u64 = 28 * 86_400;
    const SERIES_BYTES_MAX: usize = 32;

    /// Refuses what would number wrongly or never end.
    pub fn check(&self) -> Result<(), InvoiceRulesError> {
        let wrong = |field, problem| Err(InvoiceRulesError { field, problem });
        let is_series = |text: &str| {
            (1..=Self::SERIES_BYTES_MAX).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        };
        let series = "write 1 to 32 ASCII letters, digits, '-' and '_', such as \"INV-\"";
        if !is_series(&self.series) {
            return wrong("series", series);
        }
        if !is_series(&self.credit_note_series) {
            return wrong("credit_note_series", series);
        }
        if self.series == self.credit_note_series {
            return wrong("credit_note_series", "must differ from invoices.series, which counts invoices");
        }
        if self.due_days > Self::DUE_DAYS_MAX {
            return wrong("due_days", "is at most 3650");
        }
        if self.close_after_s > Self::CLOSE_AFTER_MAX_S {
            return wrong(
                "close_after_s",
                "is at most 28 days, 2419200, so that a month is closed before the next ends",
            );
        }
        if self.sweep_interval_s == 0 {
            return wrong("sweep_interval_s", "is at least 1");
        }
        if self.issuer.country.as_deref().is_some_and(|country| !is_country(country)) {
            return wrong("issuer.country", "write two capital letters, such as \"DE\"");
        }
        Ok(())
    }
}

/// Why nothing was closed, paid or credited.
#[derive(Debug, thiserror::Error)]
pub enum InvoiceError {
    #[error(transparent)]
    Billing(#[from] BillingError),
    #[error("period: {period} is not over; it can be closed from {end} on", end = .period.next())]
    NotOver { period: Period },
    #[error("period: nothing was posted to the account {account} before {period} had ended")]
    Nothing { account: AccountId, period: Period },
    #[error("period: {earlier} of the account {account} is still open; close it first")]
    EarlierOpen { account: AccountId, earlier: Period },
    #[error(
        "the gateway {gateway} (outbox {epoch}) may still hold usage of {period}: start it, so that it ships, or leave it \
         out by name, and what it ships later is on the next invoice"
    )]
    OutboxBehind { gateway: String, epoch: String, period: Period },
    #[error("there is no invoice {0}")]
    Unknown(String),
    #[error("line: the invoice {invoice} has no line {position} that was charged")]
    UnknownLine { invoice: String, position: u32 },
    #[error("amount: {amount} is more than the {open} that are still due on {invoice}")]
    MoreThanDue { invoice: String, amount: Money, open: Money },
    #[error("amount: {amount} is more than the {left} of {invoice} that no credit note has taken back")]
    MoreThanInvoiced { invoice: String, amount: Money, left: Money },
    #[error("amount: {0} is not a positive number of whole cents")]
    NotCents(Money),
    #[error("id: {0} was already used with another invoice or amount")]
    Conflict(uuid::Uuid),
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
}

impl From<sqlx::Error> for InvoiceError {
    fn from(error: sqlx::Error) -> InvoiceError {
        InvoiceError::Billing(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_rules_are_refused_by_the_field() {
        InvoiceRules::default().check().expect("the defaults hold");
        let check = |text: &str, expect: &str| {
            let rules: InvoiceRules = toml::from_str(text).expect(text);
            let told = rules.check().expect_err(text).to_string();
            assert!(told.starts_with(expect), "{told}");
        };
        check("series = \"\"", "invoices.series: write");
        check("series = \"é\"", "invoices.series: write");
        check("credit_note_series = \"INV-\"", "invoices.credit_note_series: must differ");
        check("due_days = 4000", "invoices.due_days");
        check("close_after_s = 9999999", "invoices.close_after_s");
        check("sweep_interval_s = 0", "invoices.sweep_interval_s");
        check("issuer = { country = \"Germany\" }", "invoices.issuer.country");
        assert!(toml::from_str::<InvoiceRules>("issuer = { adress = [] }").is_err());
    }
}
