//! The tables `invoices`, `invoice_lines`, `closed_periods` and `number_series`. All but the series are append-only.

use serde::Serialize;
use sqlx::FromRow;
use time::OffsetDateTime;

use super::{
    InvoiceError,
    document::{Invoice, InvoiceKind, Party},
    line::{InvoiceLine, LineKind},
    period::Period,
    settle::{self, CreditNote, Payment},
    tax::Rate,
};
use crate::{
    Books, args,
    credit::Checkpoint,
    database::Conn,
    error::BillingError,
    event::AccountId,
    money::{Money, Total},
};

/// Which invoices are asked for, newest first.
#[derive(Clone, Debug, Default)]
pub struct InvoiceQuery {
    pub account: Option<AccountId>,
    pub period: Option<Period>,
    /// Only invoices older than this one.
    pub after: Option<String>,
    /// At most so many; 0 stands for all.
    pub limit: u32,
}

/// What became of an invoice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum InvoiceState {
    Open,
    Overdue,
    Paid,
}

/// An invoice, and what came after it.
#[derive(Clone, Debug, Serialize)]
pub struct InvoiceStatus {
    pub invoice: Invoice,
    pub state: InvoiceState,
    pub paid: Money,
    /// What credit notes took off what was due.
    pub credited: Money,
    pub open: Money,
    /// The part of the open amount that the account's balance owes.
    #[serde(skip)]
    pub(crate) net_open: Money,
    pub payments: Vec<Payment>,
    pub credit_notes: Vec<CreditNote>,
    /// SHA-256 over everything that the invoice says.
    pub digest: String,
}

/// One row of `closed_periods`.
#[derive(Clone, FromRow)]
pub(crate) struct ClosedRow {
    pub account: String,
    pub period: String,
    pub last_event: i64,
    pub settled_through: i64,
    pub last_transaction: i64,
    pub checkpoint: String,
    pub invoice: Option<String>,
    pub digest: String,
}

/// One row of `invoices`.
#[derive(Clone, FromRow)]
pub(crate) struct InvoiceRow {
    pub number: String,
    pub series: String,
    pub ordinal: i64,
    pub kind: String,
    pub account: String,
    pub period: String,
    pub issued_at_s: i64,
    pub due_at_s: i64,
    pub issuer: String,
    pub customer: String,
    pub tax_note: Option<String>,
    pub due_pico: i64,
    pub net_due_pico: i64,
}

#[derive(FromRow)]
struct LineRow {
    position: i64,
    kind: String,
    period: String,
    description: String,
    project: String,
    model: String,
    sku: String,
    unit: String,
    quantity: i64,
    exact_pico: i64,
    amount_pico: i64,
    tax_category: String,
    tax_rate: Option<i64>,
}

/// A number taken of a series.
pub(crate) struct Numbered {
    pub number: String,
    pub series: String,
    pub ordinal: i64,
}

impl Books {
    /// One invoice by its number.
    pub async fn invoice(&self, number: &str, now: OffsetDateTime) -> Result<InvoiceStatus, InvoiceError> {
        status(&mut *self.database.snapshot().await?, number, now).await
    }

    /// Invoices, newest first.
    pub async fn invoices(
        &self,
        query: &InvoiceQuery,
        now: OffsetDateTime,
    ) -> Result<Vec<InvoiceStatus>, InvoiceError> {
        let mut conn = self.database.snapshot().await?;
        let before = match &query.after {
            Some(number) => Some(row(&mut conn, number).await?),
            None => None,
        };
        let (before_s, before_number) =
            before.as_ref().map_or((i64::MAX, ""), |row| (row.issued_at_s, row.number.as_str()));
        let limit = if query.limit == 0 { i64::MAX } else { i64::from(query.limit) };
        let period = query.period.map(|period| period.to_string());
        let numbers: Vec<(String,)> = conn
            .fetch_all(
                "SELECT number FROM invoices WHERE (CAST($1 AS TEXT) IS NULL OR account = $1) \
                 AND (CAST($2 AS TEXT) IS NULL OR period = $2) AND (issued_at_s, number) < ($3, $4) \
                 ORDER BY issued_at_s DESC, number DESC LIMIT $5",
                args![query.account.as_ref().map(AccountId::as_str), &period, before_s, before_number, limit],
            )
            .await?;
        let mut invoices = Vec::with_capacity(numbers.len());
        for (number,) in numbers {
            invoices.push(status(&mut conn, &number, now).await?);
        }
        Ok(invoices)
    }
}

impl InvoiceState {
    pub fn as_str(self) -> &'static str {
        match self {
            InvoiceState::Open => "open",
            InvoiceState::Overdue => "overdue",
            InvoiceState::Paid => "paid",
        }
    }
}

/// The next number of a series. Others wait for this transaction, and get the same number if it fails.
pub(crate) async fn take_number(conn: &mut Conn, series: &str) -> Result<Numbered, BillingError> {
    let (ordinal,): (i64,) = conn
        .fetch_one(
            "INSERT INTO number_series (series, last) VALUES ($1, 1) \
             ON CONFLICT (series) DO UPDATE SET last = number_series.last + 1 RETURNING last",
            args![series],
        )
        .await?;
    Ok(Numbered { number: format!("{series}{ordinal:06}"), series: series.to_owned(), ordinal })
}

/// Writes an invoice: its lines, then the row that seals them.
pub(crate) async fn insert(
    conn: &mut Conn,
    invoice: &Invoice,
    numbered: &Numbered,
    net_due: Money,
) -> Result<(), BillingError> {
    for line in &invoice.lines {
        conn.execute(
            "INSERT INTO invoice_lines (invoice, position, kind, period, description, project, model, sku, unit, \
             quantity, exact_pico, amount_pico, tax_category, tax_rate) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
            args![
                &invoice.number,
                i64::from(line.position),
                line.kind.as_str(),
                &line.period.to_string(),
                &line.description,
                &line.project,
                &line.model,
                &line.sku,
                &line.unit,
                i64::try_from(line.quantity).unwrap_or(i64::MAX),
                line.exact.pico(),
                line.amount.pico(),
                &line.tax_category,
                line.tax_rate.map(|rate| i64::from(rate.micros()))
            ],
        )
        .await?;
    }
    let json = |party: &Party| serde_json::to_string(party).expect("a party is plain data");
    let overflow = || BillingError::Overflow { account: invoice.account.clone() };
    conn.execute(
        "INSERT INTO invoices (number, series, ordinal, kind, account, period, issued_at_s, due_at_s, issuer, customer, \
         tax_note, due_pico, net_due_pico) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        args![
            &invoice.number,
            &numbered.series,
            numbered.ordinal,
            invoice.kind.as_str(),
            invoice.account.as_str(),
            &invoice.period.to_string(),
            invoice.issued_at.unix_timestamp(),
            invoice.due_at.unix_timestamp(),
            &json(&invoice.issuer),
            &json(&invoice.customer),
            &invoice.tax_note,
            invoice.totals().due.to_money().ok_or_else(overflow)?.pico(),
            net_due.pico()
        ],
    )
    .await?;
    Ok(())
}

pub(crate) async fn insert_closed(
    conn: &mut Conn,
    row: &ClosedRow,
    closed_at_s: i64,
) -> Result<(), BillingError> {
    conn.execute(
        "INSERT INTO closed_periods (account, period, closed_at_s, last_event, settled_through, last_transaction, checkpoint, \
         invoice, digest) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        args![
            &row.account,
            &row.period,
            closed_at_s,
            row.last_event,
            row.settled_through,
            row.last_transaction,
            &row.checkpoint,
            &row.invoice,
            &row.digest
        ],
    )
    .await?;
    Ok(())
}

/// The closed months of an account, oldest first.
pub(crate) async fn closed_of(conn: &mut Conn, account: &AccountId) -> Result<Vec<ClosedRow>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT account, period, last_event, settled_through, last_transaction, checkpoint, invoice, digest \
             FROM closed_periods \
             WHERE account = $1 ORDER BY period",
            args![account.as_str()],
        )
        .await?)
}

/// The last closed month of an account.
pub(crate) async fn last_closed(
    conn: &mut Conn,
    account: &AccountId,
) -> Result<Option<ClosedRow>, BillingError> {
    Ok(conn
        .fetch_optional(
            "SELECT account, period, last_event, settled_through, last_transaction, checkpoint, invoice, digest \
             FROM closed_periods \
             WHERE account = $1 ORDER BY period DESC LIMIT 1",
            args![account.as_str()],
        )
        .await?)
}

/// Where the fold of an account's ledger starts: its last closed month, or nothing.
pub(crate) async fn last_checkpoint(
    conn: &mut Conn,
    account: &AccountId,
) -> Result<(Checkpoint, i64), BillingError> {
    match last_closed(conn, account).await? {
        Some(row) => Ok((parsed("closed_periods", &row.checkpoint)?, row.last_transaction)),
        None => Ok((Checkpoint::default(), 0)),
    }
}

pub(crate) fn parsed<T: serde::de::DeserializeOwned>(
    table: &'static str,
    json: &str,
) -> Result<T, BillingError> {
    serde_json::from_str(json).map_err(|source| BillingError::Corrupt { table, source: source.into() })
}

pub(crate) async fn row(conn: &mut Conn, number: &str) -> Result<InvoiceRow, InvoiceError> {
    let row = conn
        .fetch_optional(
            "SELECT number, series, ordinal, kind, account, period, issued_at_s, due_at_s, issuer, customer, tax_note, \
             due_pico, net_due_pico FROM invoices WHERE number = $1",
            args![number],
        )
        .await?;
    row.ok_or_else(|| InvoiceError::Unknown(number.chars().take(100).collect()))
}

/// Every invoice, by series and number.
pub(crate) async fn all_rows(conn: &mut Conn) -> Result<Vec<InvoiceRow>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT number, series, ordinal, kind, account, period, issued_at_s, due_at_s, issuer, customer, tax_note, \
             due_pico, net_due_pico FROM invoices ORDER BY series, ordinal",
            args![],
        )
        .await?)
}

/// An invoice with its lines, as it was issued.
pub(crate) async fn load(conn: &mut Conn, row: &InvoiceRow) -> Result<Invoice, BillingError> {
    let corrupt = |why: &str| BillingError::Corrupt { table: "invoices", source: why.into() };
    let lines: Vec<LineRow> = conn
        .fetch_all(
            "SELECT position, kind, period, description, project, model, sku, unit, quantity, exact_pico, amount_pico, \
             tax_category, tax_rate FROM invoice_lines WHERE invoice = $1 ORDER BY position",
            args![&row.number],
        )
        .await?;
    let lines: Option<Vec<InvoiceLine>> = lines.into_iter().map(LineRow::into_line).collect();
    let time = |at_s| OffsetDateTime::from_unix_timestamp(at_s).map_err(|_| corrupt("a time"));
    Ok(Invoice {
        number: row.number.clone(),
        kind: match row.kind.as_str() {
            "invoice" => InvoiceKind::Invoice,
            _ => InvoiceKind::Statement,
        },
        account: AccountId::new(row.account.clone()),
        period: row.period.parse().map_err(|_| corrupt("a period"))?,
        currency: "USD",
        issued_at: time(row.issued_at_s)?,
        due_at: time(row.due_at_s)?,
        issuer: parsed("invoices", &row.issuer)?,
        customer: parsed("invoices", &row.customer)?,
        tax_note: row.tax_note.clone(),
        lines: lines.ok_or_else(|| corrupt("a line"))?,
    })
}

impl LineRow {
    /// None if it says what no line says.
    fn into_line(self) -> Option<InvoiceLine> {
        let rate = match self.tax_rate {
            Some(micros) => Some(Rate::from_micros(u32::try_from(micros).ok()?)),
            None => None,
        };
        Some(InvoiceLine {
            position: u32::try_from(self.position).ok()?,
            kind: LineKind::ALL.into_iter().find(|kind| kind.as_str() == self.kind)?,
            period: self.period.parse().ok()?,
            description: self.description,
            project: self.project,
            model: self.model,
            sku: self.sku,
            unit: self.unit,
            quantity: u64::try_from(self.quantity).ok()?,
            exact: Money::from_pico(self.exact_pico),
            amount: Money::from_pico(self.amount_pico),
            tax_category: self.tax_category,
            tax_rate: rate,
        })
    }
}

pub(crate) async fn status(
    conn: &mut Conn,
    number: &str,
    now: OffsetDateTime,
) -> Result<InvoiceStatus, InvoiceError> {
    let row = row(conn, number).await?;
    let invoice = load(conn, &row).await?;
    let payments = settle::payments(conn, number).await?;
    let notes = settle::notes(conn, number).await?;
    let overflow = || BillingError::Overflow { account: invoice.account.clone() };
    let sum = |amounts: &mut dyn Iterator<Item = i64>| amounts.map(Money::from_pico).sum::<Total>();
    let paid = sum(&mut payments.iter().map(|row| row.amount_pico));
    let credited = sum(&mut notes.iter().map(|row| row.applied_pico));
    let net = sum(&mut payments.iter().map(|row| row.net_pico).chain(notes.iter().map(|row| row.net_pico)));
    let open = Total::from(Money::from_pico(row.due_pico)) - paid - credited;
    let net_open = Total::from(Money::from_pico(row.net_due_pico)) - net;
    let state = match open {
        Total::ZERO => InvoiceState::Paid,
        _ if invoice.due_at < now => InvoiceState::Overdue,
        _ => InvoiceState::Open,
    };
    Ok(InvoiceStatus {
        state,
        paid: paid.to_money().ok_or_else(overflow)?,
        credited: credited.to_money().ok_or_else(overflow)?,
        open: open.to_money().ok_or_else(overflow)?,
        net_open: net_open.to_money().ok_or_else(overflow)?,
        payments: payments.into_iter().map(Payment::from_row).collect(),
        credit_notes: notes.into_iter().map(CreditNote::from_row).collect(),
        digest: invoice.digest(),
        invoice,
    })
}
