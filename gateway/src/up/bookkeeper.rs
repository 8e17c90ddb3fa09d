//! What a server does for the books by itself: reports how far its outbox is, posts out credit that has expired, closes
//! months that are over. Several servers may do so at once; each step is done once.

use std::time::Duration;

use sluice_billing::{Billing, BillingError, Closing, InvoiceError, InvoiceRules, Money, TaxRules};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Runs until `stop`.
pub async fn run(billing: Billing, rules: InvoiceRules, tax: TaxRules, stop: CancellationToken) {
    let mut every = tokio::time::interval(Duration::from_secs(rules.sweep_interval_s));
    let mut told = None;
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = every.tick() => {}
        }
        // A step that fails is tried again with the next tick; the others do not depend on it.
        if let Err(error) = sweep(&billing, &rules, &tax, &mut told).await {
            warn!(error = &error as &dyn std::error::Error, "the books wait for the next sweep");
        }
    }
}

/// `told`: why months wait, as it was logged last.
async fn sweep(
    billing: &Billing,
    rules: &InvoiceRules,
    tax: &TaxRules,
    told: &mut Option<String>,
) -> Result<(), BillingError> {
    let now = OffsetDateTime::now_utc();
    billing.report_horizon().await?;
    for expiry in billing.books().expire_credits(now).await? {
        if expiry.expired != Money::ZERO {
            info!(grant = expiry.grant, account = %expiry.account, expired = %expiry.expired, waiting = %expiry.waiting, "credit expired");
        }
    }
    if !rules.close_automatically {
        return Ok(());
    }
    let closing = Closing { rules, tax, now, without_gateways: &[] };
    let report = match billing.books().close_due(&closing).await {
        Ok(report) => report,
        Err(InvoiceError::Billing(error)) => return Err(error),
        Err(error) => {
            tell(told, Some(error.to_string()));
            return Ok(());
        }
    };
    for month in report.closed {
        info!(account = %month.account, period = %month.period, invoice = month.invoice, "month closed");
    }
    let why: Vec<String> =
        report.failed.iter().map(|(account, error)| format!("{account}: {error}")).collect();
    tell(told, (!why.is_empty()).then(|| why.join("; ")));
    Ok(())
}

/// Logs why months wait when that has changed, and not with every sweep.
fn tell(told: &mut Option<String>, why: Option<String>) {
    if let Some(why) = why.as_ref().filter(|why| told.as_ref() != Some(*why)) {
        warn!(why, "a month waits to be closed");
    }
    *told = why;
}
