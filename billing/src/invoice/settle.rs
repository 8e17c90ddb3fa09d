//! What comes after an invoice: payments and credit notes, each posted to the ledger. Owns the append-only tables
//! `invoice_payments` and `credit_notes`.
//!
//! What is due has two parts: what the account's balance owes (usage, exact) and the rest, tax and rounding, which is in
//! `receivable:ACCOUNT`. Money goes to the balance first, since that frees the credit limit; the last of it settles both
//! exactly.
//!
//! ```text
//! payment      customer:acme +10  receivable:acme +1.9  funding      -11.9
//! credit note  customer:acme  +5  receivable:acme +0.9  credit_note   -5     tax  -0.9   what is still due
//! credit note  refund         +5                        credit_note   -4.2   tax  -0.8   what was paid
//! refund       customer:acme  +5                        refund        -5
//! ```
//!
//! A credit note takes back what was invoiced, its tax with it, and at most all of it. It lowers what is still due; what
//! was paid already, by money or by credit, becomes credit without expiry.

use std::collections::BTreeMap;

use serde::Serialize;
use sqlx::FromRow;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    InvoiceError, InvoiceRules,
    line::{InvoiceLine, LineKind, PICO_PER_CENT},
    store::{self, InvoiceStatus},
};
use crate::{
    Books,
    alert::{self, Change},
    args, counter,
    database::Conn,
    error::BillingError,
    event::AccountId,
    ledger::{self, Posting},
    money::{Money, Total},
};

/// Money that came in for an invoice.
#[derive(Clone, Debug)]
pub struct RecordPayment {
    /// The idempotency key: recording twice under one id records once.
    pub id: Uuid,
    pub invoice: String,
    /// None: all that is due.
    pub amount: Option<Money>,
    pub memo: String,
}

/// A request to take back some of an invoice.
#[derive(Clone, Debug)]
pub struct IssueCreditNote {
    /// The idempotency key.
    pub id: Uuid,
    pub invoice: String,
    /// The line that it is about; None: the invoice as a whole.
    pub line: Option<u32>,
    /// With tax, in whole cents. None: all that no credit note has taken back yet.
    pub amount: Option<Money>,
    pub reason: String,
}

/// A payment as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Payment {
    pub id: String,
    pub amount: Money,
    pub memo: String,
    /// Seconds since 1970.
    pub paid_at: i64,
}

/// A credit note as it was issued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CreditNote {
    pub number: String,
    pub id: String,
    pub invoice: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<i64>,
    pub amount: Money,
    /// The tax in it.
    pub tax: Money,
    /// What of it lowered what was due; the rest became credit.
    pub applied: Money,
    pub reason: String,
    /// Seconds since 1970.
    pub issued_at: i64,
}

#[derive(FromRow)]
pub(crate) struct PaymentRow {
    pub id: String,
    pub invoice: String,
    pub amount_pico: i64,
    pub net_pico: i64,
    pub memo: String,
    pub paid_at_s: i64,
    pub transaction_id: i64,
}

#[derive(FromRow)]
pub(crate) struct NoteRow {
    pub number: String,
    pub id: String,
    pub invoice: String,
    pub position: Option<i64>,
    pub amount_pico: i64,
    pub tax_pico: i64,
    pub applied_pico: i64,
    pub net_pico: i64,
    pub reason: String,
    pub issued_at_s: i64,
    pub transaction_id: i64,
}

impl Books {
    /// Records a payment, which frees the credit limit. More than is due is refused; add the rest as credit.
    pub async fn record_payment(
        &self,
        payment: &RecordPayment,
        now: OffsetDateTime,
    ) -> Result<InvoiceStatus, InvoiceError> {
        let mut tx = self.database.write().await?;
        pay(&mut tx, payment, now).await?;
        let status = store::status(&mut tx, &payment.invoice, now).await?;
        tx.commit().await?;
        Ok(status)
    }

    /// Takes back some of an invoice or all of it.
    pub async fn issue_credit_note(
        &self,
        request: &IssueCreditNote,
        rules: &InvoiceRules,
        now: OffsetDateTime,
    ) -> Result<CreditNote, InvoiceError> {
        let mut tx = self.database.write().await?;
        let note = credit_note(&mut tx, request, rules, now).await?;
        tx.commit().await?;
        Ok(note)
    }
}

async fn pay(conn: &mut Conn, payment: &RecordPayment, now: OffsetDateTime) -> Result<(), InvoiceError> {
    counter::take(conn, "transaction", 0).await?;
    let id = payment.id.to_string();
    let status = store::status(conn, &payment.invoice, now).await?;
    if let Some(known) = find_payment(conn, &id).await? {
        let same_amount = payment.amount.is_none_or(|amount| amount.pico() == known.amount_pico);
        let same = known.invoice == payment.invoice && same_amount;
        return if same { Ok(()) } else { Err(InvoiceError::Conflict(payment.id)) };
    }
    let amount = cents(payment.amount.unwrap_or(status.open))?;
    if amount > status.open {
        let invoice = payment.invoice.clone();
        return Err(InvoiceError::MoreThanDue { invoice, amount, open: status.open });
    }
    let account = &status.invoice.account;
    let (net, rest) = split(&status, amount, account)?;
    let funding = amount.checked_neg().ok_or_else(|| overflow(account))?;
    let entries = [
        (ledger::customer(account), net),
        (ledger::receivable(account), rest),
        (ledger::FUNDING.to_owned(), funding),
    ];
    let paid_at_s = now.unix_timestamp();
    let posting = Posting {
        kind: "payment",
        account,
        at_s: paid_at_s,
        reference: &payment.invoice,
        entries: present(entries),
    };
    let transaction_id = ledger::post_to_balance(conn, posting).await?;
    conn.execute(
        "INSERT INTO invoice_payments (id, invoice, amount_pico, net_pico, memo, paid_at_s, transaction_id) \
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
        args![&id, &payment.invoice, amount.pico(), net.pico(), &payment.memo, paid_at_s, transaction_id],
    )
    .await?;
    Ok(alert::check(conn, account, Change::Credited, now).await?)
}

async fn credit_note(
    conn: &mut Conn,
    request: &IssueCreditNote,
    rules: &InvoiceRules,
    now: OffsetDateTime,
) -> Result<CreditNote, InvoiceError> {
    counter::take(conn, "transaction", 0).await?;
    let id = request.id.to_string();
    let status = store::status(conn, &request.invoice, now).await?;
    if let Some(known) = find_note(conn, &id).await? {
        let same_amount = request.amount.is_none_or(|amount| amount.pico() == known.amount_pico);
        let same_line = known.position == request.line.map(i64::from);
        return match known.invoice == request.invoice && same_amount && same_line {
            true => Ok(CreditNote::from_row(known)),
            false => Err(InvoiceError::Conflict(request.id)),
        };
    }
    let account = &status.invoice.account;
    let left = left_to_take_back(&status, request.line)?;
    let amount = cents(request.amount.unwrap_or(left))?;
    if amount > left {
        return Err(InvoiceError::MoreThanInvoiced { invoice: request.invoice.clone(), amount, left });
    }
    let tax = tax_part(&status, amount, account)?;
    let applied = amount.min(status.open);
    let (net, rest) = split(&status, applied, account)?;
    let less = |from: Money, part: Money| from.checked_sub(part).ok_or_else(|| overflow(account));
    let refund = less(amount, applied)?;
    let entries = [
        (ledger::customer(account), net),
        (ledger::receivable(account), rest),
        (ledger::REFUND.to_owned(), refund),
        (ledger::TAX.to_owned(), less(Money::ZERO, tax)?),
        (ledger::CREDIT_NOTE.to_owned(), less(tax, amount)?),
    ];
    let numbered = store::take_number(conn, &rules.credit_note_series).await?;
    let issued_at_s = now.unix_timestamp();
    let posting = Posting {
        kind: "credit_note",
        account,
        at_s: issued_at_s,
        reference: &numbered.number,
        entries: present(entries),
    };
    let transaction_id = ledger::post_to_balance(conn, posting).await?;
    if refund != Money::ZERO {
        ledger::fund(conn, ledger::REFUND, account, refund, issued_at_s, &numbered.number).await?;
    }
    conn.execute(
        "INSERT INTO credit_notes (number, series, ordinal, id, invoice, position, amount_pico, tax_pico, applied_pico, \
         net_pico, reason, issued_at_s, transaction_id) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        args![
            &numbered.number,
            &numbered.series,
            numbered.ordinal,
            &id,
            &request.invoice,
            request.line.map(i64::from),
            amount.pico(),
            tax.pico(),
            applied.pico(),
            net.pico(),
            &request.reason,
            issued_at_s,
            transaction_id
        ],
    )
    .await?;
    alert::check(conn, account, Change::Credited, now).await?;
    let row = find_note(conn, &id).await?.ok_or(sqlx::Error::RowNotFound)?;
    Ok(CreditNote::from_row(row))
}

/// What of an amount goes to the balance, and what to the receivable: the balance first, and all of both with the last.
fn split(status: &InvoiceStatus, amount: Money, account: &AccountId) -> Result<(Money, Money), BillingError> {
    let net = if amount == status.open { status.net_open } else { amount.min(status.net_open) };
    Ok((net, amount.checked_sub(net).ok_or_else(|| overflow(account))?))
}

/// What was invoiced, with tax, and not yet taken back: of the whole, or of one line.
fn left_to_take_back(status: &InvoiceStatus, line: Option<u32>) -> Result<Money, InvoiceError> {
    let invoice = &status.invoice;
    let invoiced = gross(status);
    let taken: Total = status.credit_notes.iter().map(|note| note.amount).sum();
    let mut left = invoiced - taken;
    if let Some(position) = line {
        let unknown = || InvoiceError::UnknownLine { invoice: invoice.number.clone(), position };
        let charged = |line: &&InvoiceLine| {
            line.position == position && !matches!(line.kind, LineKind::Credit | LineKind::Tax)
        };
        let of_line = invoice.lines.iter().find(charged).ok_or_else(unknown)?.amount;
        let of_line = with_tax(status, of_line);
        let taken: Total = status
            .credit_notes
            .iter()
            .filter(|note| note.line == Some(i64::from(position)))
            .map(|note| note.amount)
            .sum();
        left = left.min(of_line - taken);
    }
    Ok(left.max(Total::ZERO).to_money().ok_or_else(|| overflow(&invoice.account))?)
}

/// Everything that was charged, and the tax on it, whoever paid it.
fn gross(status: &InvoiceStatus) -> Total {
    let totals = status.invoice.totals();
    totals.charged + totals.tax
}

/// A line's amount with its share of the tax, up to whole cents.
fn with_tax(status: &InvoiceStatus, amount: Money) -> Total {
    let totals = status.invoice.totals();
    if totals.charged <= Total::ZERO {
        return amount.into();
    }
    let (charged, tax) = (totals.charged.pico() / PICO_PER_CENT, totals.tax.pico() / PICO_PER_CENT);
    let cents = i128::from(amount.pico()) / PICO_PER_CENT;
    let share = (cents * tax + charged - 1).div_euclid(charged);
    Total::from_pico((cents + share) * PICO_PER_CENT)
}

/// The tax in an amount, in whole cents: the tax in everything taken back so far, less that in the earlier notes. So
/// the notes that take back all take back all tax.
fn tax_part(status: &InvoiceStatus, amount: Money, account: &AccountId) -> Result<Money, BillingError> {
    let in_cents = |total: Total| total.pico() / PICO_PER_CENT;
    let (invoiced, tax) = (in_cents(gross(status)), in_cents(status.invoice.totals().tax));
    if invoiced <= 0 {
        return Ok(Money::ZERO);
    }
    let earlier: Total = status.credit_notes.iter().map(|note| note.amount).sum();
    let earlier_tax: Total = status.credit_notes.iter().map(|note| note.tax).sum();
    let taken = in_cents(earlier + amount.into());
    let tax_taken = (2 * taken * tax + invoiced).div_euclid(2 * invoiced);
    let part = Total::from_pico(tax_taken * PICO_PER_CENT) - earlier_tax;
    part.to_money().ok_or_else(|| overflow(account))
}

fn cents(amount: Money) -> Result<Money, InvoiceError> {
    let whole = i128::from(amount.pico()) % PICO_PER_CENT == 0;
    if whole && amount > Money::ZERO { Ok(amount) } else { Err(InvoiceError::NotCents(amount)) }
}

fn present<const N: usize>(entries: [(String, Money); N]) -> BTreeMap<String, Money> {
    entries.into_iter().filter(|(_, amount)| *amount != Money::ZERO).collect()
}

fn overflow(account: &AccountId) -> BillingError {
    BillingError::Overflow { account: account.clone() }
}

pub(crate) async fn payments(conn: &mut Conn, number: &str) -> Result<Vec<PaymentRow>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT id, invoice, amount_pico, net_pico, memo, paid_at_s, transaction_id FROM invoice_payments \
             WHERE invoice = $1 ORDER BY transaction_id",
            args![number],
        )
        .await?)
}

async fn find_payment(conn: &mut Conn, id: &str) -> Result<Option<PaymentRow>, BillingError> {
    Ok(conn
        .fetch_optional(
            "SELECT id, invoice, amount_pico, net_pico, memo, paid_at_s, transaction_id FROM invoice_payments \
             WHERE id = $1",
            args![id],
        )
        .await?)
}

pub(crate) async fn notes(conn: &mut Conn, number: &str) -> Result<Vec<NoteRow>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT number, id, invoice, position, amount_pico, tax_pico, applied_pico, net_pico, \
             reason, issued_at_s, transaction_id FROM credit_notes WHERE invoice = $1 ORDER BY transaction_id",
            args![number],
        )
        .await?)
}

async fn find_note(conn: &mut Conn, id: &str) -> Result<Option<NoteRow>, BillingError> {
    Ok(conn
        .fetch_optional(
            "SELECT number, id, invoice, position, amount_pico, tax_pico, applied_pico, net_pico, \
             reason, issued_at_s, transaction_id FROM credit_notes WHERE id = $1",
            args![id],
        )
        .await?)
}

/// Every credit note's series and number, in order.
pub(crate) async fn note_numbers(conn: &mut Conn) -> Result<Vec<(String, i64)>, BillingError> {
    Ok(conn.fetch_all("SELECT series, ordinal FROM credit_notes ORDER BY series, ordinal", args![]).await?)
}

impl Payment {
    pub(crate) fn from_row(row: PaymentRow) -> Payment {
        Payment {
            id: row.id,
            amount: Money::from_pico(row.amount_pico),
            memo: row.memo,
            paid_at: row.paid_at_s,
        }
    }
}

impl CreditNote {
    pub(crate) fn from_row(row: NoteRow) -> CreditNote {
        CreditNote {
            number: row.number,
            id: row.id,
            invoice: row.invoice,
            line: row.position,
            amount: Money::from_pico(row.amount_pico),
            tax: Money::from_pico(row.tax_pico),
            applied: Money::from_pico(row.applied_pico),
            reason: row.reason,
            issued_at: row.issued_at_s,
        }
    }
}
