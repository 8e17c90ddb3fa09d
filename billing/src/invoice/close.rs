//! Closing a month: from what was posted to an invoice, in one transaction.
//!
//! - Months of an account are closed in order, each once. Closing again returns what the first close made.
//! - A month is closed when it is over and every known outbox has reported that it holds nothing of it ([`horizon`]), save
//!   those of gateways that the caller leaves out by name.
//! - An event belongs to the month that it was admitted in. One that arrives after that month was closed is late usage on
//!   the account's next invoice ([`super::charges`]).
//! - What is due is what no credit has paid ([`crate::credit`]). A prepaid account owes nothing; its paper is a statement.
//!
//! ```text
//! adjustment   customer:acme  +2     revenue:SKU      -2   what the tiers give back
//! invoice      receivable:acme -1.9  tax              +1.9  tax and rounding: what is due beyond the balance
//! ```

use std::collections::BTreeMap;

use serde::Serialize;
use time::OffsetDateTime;

use super::{
    InvoiceError, InvoiceRules,
    charges::{Gathered, MonthCharges, Window},
    document::{Invoice, InvoiceKind},
    horizon,
    line::{Charge, draw},
    period::Period,
    profile,
    store::{self, ClosedRow},
    tax::TaxRules,
};
use crate::{
    Books, counter,
    credit::{self, Share},
    database::Conn,
    error::BillingError,
    event::AccountId,
    ledger::{self, AccountKind, Posting},
    money::{Money, Total},
    notice::{self, Notice, NoticeKind},
    ship,
};

/// What a close goes by.
#[derive(Clone, Debug)]
pub struct Closing<'a> {
    pub rules: &'a InvoiceRules,
    pub tax: &'a TaxRules,
    pub now: OffsetDateTime,
    /// Gateways that are not waited for.
    pub without_gateways: &'a [String],
}

/// A month that is closed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClosedPeriod {
    pub account: AccountId,
    pub period: Period,
    /// None where there was nothing to tell.
    pub invoice: Option<String>,
    /// False: it had been closed before.
    pub now: bool,
}

/// What closing the months of all accounts came to.
#[derive(Debug, Default)]
pub struct CloseReport {
    /// Closed now.
    pub closed: Vec<ClosedPeriod>,
    /// Why the first open month of an account could not be closed.
    pub failed: Vec<(AccountId, InvoiceError)>,
}

impl Books {
    /// Closes a month of an account, and draws up its invoice.
    pub async fn close_period(
        &self,
        account: &AccountId,
        period: Period,
        closing: &Closing<'_>,
    ) -> Result<ClosedPeriod, InvoiceError> {
        if closing.now < period.end() {
            return Err(InvoiceError::NotOver { period });
        }
        // A month may have millions of events: they are read before anybody has to wait for this.
        let mut conn = self.database.read().await?;
        let previous = store::last_closed(&mut conn, account).await?;
        let mut gathered = Gathered::new(Window::after(period, previous.as_ref()));
        gathered.read(&mut conn, account, i64::MAX).await?;
        drop(conn);
        let mut tx = self.database.write().await?;
        let closed = close(&mut tx, account, period, closing, gathered).await?;
        tx.commit().await?;
        Ok(closed)
    }

    /// Closes, of every account, each open month up to `period`. An account that cannot be closed keeps no other from it.
    pub async fn close_through(
        &self,
        period: Period,
        closing: &Closing<'_>,
    ) -> Result<CloseReport, InvoiceError> {
        outboxes_are_past(&mut self.database.read().await?, period, closing.without_gateways).await?;
        let mut report = CloseReport::default();
        for balance in self.accounts().await? {
            let account = balance.account;
            let mut next = next_open(&mut self.database.read().await?, &account).await?;
            while let Some(month) = next.filter(|next| *next <= period) {
                match self.close_period(&account, month, closing).await {
                    Ok(closed) => report.closed.extend(Some(closed).filter(|closed| closed.now)),
                    Err(InvoiceError::Billing(BillingError::Database(error))) => return Err(error.into()),
                    Err(error) => {
                        report.failed.push((account.clone(), error));
                        break;
                    }
                }
                next = Some(month.next());
            }
        }
        Ok(report)
    }

    /// Closes every month that ended `close_after_s` ago. Nothing while an outbox may still hold some of it.
    pub async fn close_due(&self, closing: &Closing<'_>) -> Result<CloseReport, InvoiceError> {
        let grace = time::Duration::seconds(i64::try_from(closing.rules.close_after_s).unwrap_or(i64::MAX));
        let ended_before = closing.now.checked_sub(grace).map(Period::containing);
        match ended_before.and_then(Period::previous) {
            Some(period) => self.close_through(period, closing).await,
            None => Ok(CloseReport::default()),
        }
    }
}

/// The first month of an account that is not closed; None if nothing was ever posted to it.
async fn next_open(conn: &mut Conn, account: &AccountId) -> Result<Option<Period>, BillingError> {
    if let Some(last) = store::last_closed(conn, account).await? {
        return Ok(Some(period_of(&last.period)?.next()));
    }
    Ok(ledger::first_moment(conn, account).await?.map(Period::of_second))
}

fn period_of(text: &str) -> Result<Period, BillingError> {
    let corrupt =
        |source: super::PeriodError| BillingError::Corrupt { table: "closed_periods", source: source.into() };
    text.parse().map_err(corrupt)
}

async fn close(
    conn: &mut Conn,
    account: &AccountId,
    period: Period,
    closing: &Closing<'_>,
    mut gathered: Gathered,
) -> Result<ClosedPeriod, InvoiceError> {
    // From here on nothing is posted and no event arrives until this transaction ends.
    let last_event = counter::take(conn, "event", 0).await? - 1;
    counter::take(conn, "transaction", 0).await?;
    ledger::lock(conn, account).await?;
    let kind = ledger::balance(conn, account).await?.kind;
    if let Some(invoice) = closed_before(conn, account, period).await? {
        return Ok(ClosedPeriod { account: account.clone(), period, invoice, now: false });
    }
    is_next(conn, account, period).await?;
    outboxes_are_past(conn, period, closing.without_gateways).await?;

    let previous = store::last_closed(conn, account).await?;
    let (start, after) = store::last_checkpoint(conn, account).await?;
    let (mut checkpoint, seen) = credit::fold(conn, account, start, after, i64::MAX).await?;
    let share = checkpoint.take_share(period).ok_or_else(|| overflow(account))?;
    let window = Window::after(period, previous.as_ref());
    if gathered.window != window {
        gathered = Gathered::new(window);
    }
    let MonthCharges { usage, adjustments, settled_through } =
        gathered.charges(conn, account, last_event).await?;
    let used: Total = usage.iter().map(|charge| charge.exact).sum();
    if used != share.charged.into() {
        let why =
            format!("{account} was posted {} for {period}, and its events sum to {used}", share.charged);
        return Err(BillingError::Corrupt { table: "usage_events", source: why.into() }.into());
    }
    let net_due = net_due(kind, share, &adjustments).ok_or_else(|| overflow(account))?;
    let now_s = closing.now.unix_timestamp();
    post_adjustments(conn, account, period, &adjustments, now_s).await?;
    let charges = usage.into_iter().chain(adjustments).collect();
    let number = issue(conn, account, kind, period, charges, net_due, closing).await?;

    // What this close posted itself.
    let (checkpoint, last_transaction) = credit::fold(conn, account, checkpoint, seen, i64::MAX).await?;
    let row = ClosedRow {
        account: account.to_string(),
        period: period.to_string(),
        last_event,
        settled_through,
        last_transaction,
        checkpoint: serde_json::to_string(&checkpoint).expect("a checkpoint is plain data"),
        digest: number.as_ref().map_or(String::new(), |(_, digest)| digest.clone()),
        invoice: number.map(|(number, _)| number),
    };
    store::insert_closed(conn, &row, now_s).await?;
    Ok(ClosedPeriod { account: account.clone(), period, invoice: row.invoice, now: true })
}

/// Refuses a month that is not the first open one.
async fn is_next(conn: &mut Conn, account: &AccountId, period: Period) -> Result<(), InvoiceError> {
    match next_open(conn, account).await? {
        Some(next) if next == period => Ok(()),
        Some(earlier) if earlier < period => {
            Err(InvoiceError::EarlierOpen { account: account.clone(), earlier })
        }
        _ => Err(InvoiceError::Nothing { account: account.clone(), period }),
    }
}

/// The invoice of a month that is closed; the outer None if it is open.
async fn closed_before(
    conn: &mut Conn,
    account: &AccountId,
    period: Period,
) -> Result<Option<Option<String>>, BillingError> {
    let period = period.to_string();
    let rows = store::closed_of(conn, account).await?;
    Ok(rows.into_iter().find(|row| row.period == period).map(|row| row.invoice))
}

/// Refuses while an outbox has not reported that it is past the month.
async fn outboxes_are_past(
    conn: &mut Conn,
    period: Period,
    without_gateways: &[String],
) -> Result<(), InvoiceError> {
    let reported = horizon::reported(conn).await?;
    for (epoch, gateway) in ship::gateways(conn).await? {
        let past = reported.get(&epoch).is_some_and(|through_s| *through_s >= period.end_s());
        if !past && !without_gateways.contains(&gateway) {
            return Err(InvoiceError::OutboxBehind { gateway, epoch, period });
        }
    }
    Ok(())
}

/// What is to be paid before tax: nothing by a prepaid account; by others what no credit paid, less what the tiers give.
pub(crate) fn net_due(kind: AccountKind, share: Share, adjustments: &[Charge]) -> Option<Money> {
    let adjusted: Total = adjustments.iter().map(|charge| charge.exact).sum();
    match kind {
        AccountKind::Prepaid => Some(Money::ZERO),
        AccountKind::Postpaid { .. } => (Total::from(share.owed) + adjusted).max(Total::ZERO).to_money(),
    }
}

/// Posts what the tiers make of the month. A charge beyond what the account has is written off: the cap stands.
async fn post_adjustments(
    conn: &mut Conn,
    account: &AccountId,
    period: Period,
    adjustments: &[Charge],
    now_s: i64,
) -> Result<(), BillingError> {
    let mut entries: BTreeMap<String, Money> = BTreeMap::new();
    for charge in adjustments {
        let entry = entries.entry(ledger::revenue(&charge.sku)).or_default();
        *entry = entry.checked_add(charge.exact).ok_or_else(|| overflow(account))?;
    }
    entries.retain(|_, amount| *amount != Money::ZERO);
    let charged = entries.values().copied().sum::<Total>().to_money().ok_or_else(|| overflow(account))?;
    if entries.is_empty() {
        return Ok(());
    }
    let reference = ledger::volume_of(period);
    let available = ledger::balance(conn, account).await?.available;
    let uncovered = charged.checked_sub(available).ok_or_else(|| overflow(account))?;
    if uncovered > Money::ZERO {
        tracing::error!(%account, %uncovered, "what the tiers charge is more than the account has; the rest is written off");
        ledger::fund(conn, "write_off", account, uncovered, now_s, &reference).await?;
    }
    if charged != Money::ZERO {
        let entry = charged.checked_neg().ok_or_else(|| overflow(account))?;
        entries.insert(ledger::customer(account), entry);
    }
    let posting = Posting { kind: "adjustment", account, at_s: now_s, reference: &reference, entries };
    ledger::post_to_balance(conn, posting).await.map(drop)
}

/// Draws up the paper and posts what it adds to the balance. Returns its number and digest; None without charges.
async fn issue(
    conn: &mut Conn,
    account: &AccountId,
    kind: AccountKind,
    period: Period,
    charges: Vec<Charge>,
    net_due: Money,
    closing: &Closing<'_>,
) -> Result<Option<(String, String)>, InvoiceError> {
    if charges.is_empty() {
        return Ok(None);
    }
    let profile = profile::profile(conn, account).await?;
    let lines = draw(period, charges, net_due, &profile.place(), closing.tax)?;
    let numbered = store::take_number(conn, &closing.rules.series).await?;
    let issued_at = closing.now.replace_nanosecond(0).unwrap_or(closing.now);
    let invoice = Invoice {
        number: numbered.number.clone(),
        kind: match kind {
            AccountKind::Prepaid => InvoiceKind::Statement,
            AccountKind::Postpaid { .. } => InvoiceKind::Invoice,
        },
        account: account.clone(),
        period,
        currency: ledger::CURRENCY,
        issued_at,
        due_at: issued_at + time::Duration::days(i64::from(closing.rules.due_days)),
        issuer: closing.rules.issuer.clone(),
        customer: profile.party,
        tax_note: profile.tax_exempt,
        lines,
    };
    let net_due = post_rest(conn, &invoice, net_due).await?;
    store::insert(conn, &invoice, &numbered, net_due).await?;
    notice::raise(conn, &ready(&invoice, closing.now)).await?;
    Ok(Some((invoice.number.clone(), invoice.digest())))
}

/// What its owner is told of an invoice.
fn ready(invoice: &Invoice, now: OffsetDateTime) -> Notice {
    let payload = serde_json::json!({
        "invoice": invoice.number,
        "kind": invoice.kind,
        "period": invoice.period,
        "currency": invoice.currency,
        "due": invoice.totals().due,
        "due_at": invoice.due_at.unix_timestamp(),
    });
    Notice {
        kind: NoticeKind::INVOICE_READY,
        account: invoice.account.clone(),
        subject: invoice.number.clone(),
        payload,
        dedupe_key: format!("invoice:{}", invoice.number),
        at: now,
    }
}

/// Tax and rounding: what is due beyond what the balance owes. Less than half a cent is not asked for: the balance gets it.
/// Returns what the balance owes of the invoice then.
async fn post_rest(conn: &mut Conn, invoice: &Invoice, net_due: Money) -> Result<Money, BillingError> {
    let account = &invoice.account;
    let totals = invoice.totals();
    let cleared = if totals.due == Total::ZERO { net_due } else { Money::ZERO };
    let rest = totals.due - net_due.into();
    let amount = |total: Total| total.to_money().ok_or_else(|| overflow(account));
    let entries = [
        (ledger::customer(account), cleared),
        (ledger::receivable(account), amount(Total::ZERO - rest - cleared.into())?),
        (ledger::TAX.to_owned(), amount(totals.tax)?),
        (ledger::ROUNDING.to_owned(), amount(rest - totals.tax)?),
    ];
    let entries: BTreeMap<String, Money> =
        entries.into_iter().filter(|(_, amount)| *amount != Money::ZERO).collect();
    if !entries.is_empty() {
        let at_s = invoice.issued_at.unix_timestamp();
        let posting = Posting { kind: "invoice", account, at_s, reference: &invoice.number, entries };
        ledger::post_to_balance(conn, posting).await?;
    }
    net_due.checked_sub(cleared).ok_or_else(|| overflow(account))
}

fn overflow(account: &AccountId) -> BillingError {
    BillingError::Overflow { account: account.clone() }
}
