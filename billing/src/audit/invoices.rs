//! The audit of credit and invoices: everything is derived again from the ledger and the events, and compared.

use std::collections::{BTreeMap, BTreeSet};

use super::Check;
use crate::{
    credit::{self, Checkpoint},
    database::Conn,
    error::BillingError,
    event::AccountId,
    invoice::{
        Charge, Gathered, Invoice, InvoiceLine, LineKind, Period, Window, net_due, rounded, settle,
        store::{self, ClosedRow, InvoiceRow},
    },
    ledger::{self, Balance},
    money::{Money, Total},
};

const PICO_PER_CENT: i128 = 10_000_000_000;

struct Checks {
    burn_down: Check,
    expiries: Check,
    closed: Check,
    derived: Check,
    rounded: Check,
    numbers: Check,
    settled: Check,
}

/// Amounts by book, as a transaction must have them.
type Entries = BTreeMap<String, Money>;

/// Checks grants, expiries, closed months, invoices, payments and credit notes.
pub(super) async fn check(conn: &mut Conn, checks: &mut Vec<Check>) -> Result<(), BillingError> {
    let mut all = Checks {
        burn_down: Check::new("what is left of every grant follows from the ledger, at each closed month"),
        expiries: Check::new("every expiry = its ledger transaction"),
        closed: Check::new("every closed month is as it was when it was closed"),
        derived: Check::new("every invoice = fold of its events, its tiers and what credit paid"),
        rounded: Check::new("every invoice's cents follow from its exact lines and sum to what is due"),
        numbers: Check::new("the numbers of invoices and of credit notes have no gaps"),
        settled: Check::new(
            "payments and credit notes = their ledger transactions, within what was invoiced",
        ),
    };
    let mut rows: BTreeMap<String, InvoiceRow> = BTreeMap::new();
    let mut numbers = Vec::new();
    for row in store::all_rows(conn).await? {
        numbers.push((row.series.clone(), row.ordinal));
        let expect = format!("{}{:06}", row.series, row.ordinal);
        all.numbers.expect(row.number == expect, || format!("the invoice {} should be {expect}", row.number));
        rows.insert(row.number.clone(), row);
    }
    all.gapless(&numbers);
    let notes = settle::note_numbers(conn).await?;
    all.gapless(&notes);
    all.expiries(conn).await?;
    let mut closed_ones = BTreeSet::new();
    for balance in ledger::accounts(conn).await? {
        all.account(conn, &balance, &rows, &mut closed_ones).await?;
    }
    for row in rows.values() {
        all.closed.expect(closed_ones.contains(&row.number), || {
            format!("no closed month knows the invoice {}", row.number)
        });
        all.settlement(conn, row).await?;
    }
    let Checks { burn_down, expiries, closed, derived, rounded, numbers, settled } = all;
    checks.extend([burn_down, expiries, closed, derived, rounded, numbers, settled]);
    Ok(())
}

impl Checks {
    fn gapless(&mut self, numbers: &[(String, i64)]) {
        let mut last: Option<&(String, i64)> = None;
        for number in numbers {
            let expect = last.filter(|last| last.0 == number.0).map_or(1, |last| last.1 + 1);
            self.numbers.expect(number.1 == expect, || {
                format!("{}{} is where {expect} should be", number.0, number.1)
            });
            last = Some(number);
        }
    }

    async fn expiries(&mut self, conn: &mut Conn) -> Result<(), BillingError> {
        let grants: BTreeMap<String, String> =
            credit::all_grants(conn).await?.into_iter().map(|row| (row.id, row.account)).collect();
        let mut by_transaction = BTreeSet::new();
        for row in credit::all_expiries(conn).await? {
            let Some(id) = row.transaction_id else { continue };
            by_transaction.insert(id);
            let account = AccountId::new(grants.get(&row.grant_id).cloned().unwrap_or_default());
            let amount = Money::from_pico(row.amount_pico);
            let expect = Entries::from([
                (ledger::customer(&account), amount.checked_neg().unwrap_or_default()),
                ("expiry".to_owned(), amount),
            ]);
            let found = ledger::transaction(conn, id).await?;
            let same = found.as_ref().is_some_and(|found| {
                found.kind == "expiry" && found.reference == row.grant_id && found.entries == expect
            });
            self.expiries.expect(same, || format!("{} of the grant {} is {found:?}", amount, row.grant_id));
        }
        for id in ledger::transactions_of(conn, "expiry").await? {
            self.expiries
                .expect(by_transaction.contains(&id), || format!("no grant expired by transaction {id}"));
        }
        Ok(())
    }

    /// Folds the account's whole ledger, stopping at each closed month.
    async fn account(
        &mut self,
        conn: &mut Conn,
        balance: &Balance,
        invoices: &BTreeMap<String, InvoiceRow>,
        closed_ones: &mut BTreeSet<String>,
    ) -> Result<(), BillingError> {
        let account = &balance.account;
        let (mut state, mut after) = (Checkpoint::default(), 0);
        let mut previous: Option<ClosedRow> = None;
        for row in store::closed_of(conn, account).await? {
            let folded = credit::fold(conn, account, state, after, row.last_transaction).await;
            (state, after) = match folded {
                Ok((state, _)) => (state, row.last_transaction),
                Err(error) => return self.broken(account, error),
            };
            closed_ones.extend(row.invoice.clone());
            self.month(conn, balance, &row, previous.as_ref(), &mut state, invoices).await?;
            previous = Some(row);
        }
        match credit::fold(conn, account, state, after, i64::MAX).await {
            Ok(_) => {
                self.burn_down.expect(true, String::new);
                Ok(())
            }
            Err(error) => self.broken(account, error),
        }
    }

    /// The ledger says what cannot be: that is evidence. Anything else is a failure of the audit itself.
    fn broken(&mut self, account: &AccountId, error: BillingError) -> Result<(), BillingError> {
        match error {
            BillingError::Corrupt { table, source } => {
                self.burn_down.expect(false, || format!("{account}: {table}: {source}"));
                Ok(())
            }
            other => Err(other),
        }
    }

    async fn month(
        &mut self,
        conn: &mut Conn,
        balance: &Balance,
        row: &ClosedRow,
        previous: Option<&ClosedRow>,
        state: &mut Checkpoint,
        invoices: &BTreeMap<String, InvoiceRow>,
    ) -> Result<(), BillingError> {
        let account = &balance.account;
        let what = format!("{} of {account}", row.period);
        let Ok(period) = row.period.parse::<Period>() else {
            self.closed.expect(false, || format!("{what} is not a month"));
            return Ok(());
        };
        let follows = previous.is_none_or(|previous| {
            previous.period.parse::<Period>().is_ok_and(|before| before.next() == period)
                && previous.last_event <= row.last_event
        });
        self.closed.expect(follows, || format!("{what} does not follow the month closed before it"));
        let share = state.take_share(period);
        let same =
            store::parsed::<Checkpoint>("closed_periods", &row.checkpoint).is_ok_and(|kept| kept == *state);
        self.burn_down.expect(same, || format!("{what} was closed with another rest: {}", row.checkpoint));
        let gathered = Gathered::new(Window::after(period, previous));
        let charges = match gathered.charges(conn, account, row.last_event).await {
            Ok(charges) => charges,
            Err(error) => {
                self.derived.expect(false, || format!("{what}: {error}"));
                return Ok(());
            }
        };
        self.closed.expect(charges.settled_through == row.settled_through, || {
            format!("{what} took events up to {}, not {}", charges.settled_through, row.settled_through)
        });
        let charges: Vec<Charge> = charges.usage.into_iter().chain(charges.adjustments).collect();
        let Some(number) = &row.invoice else {
            self.derived.expect(charges.is_empty(), || format!("{what} has usage, and no invoice"));
            return Ok(());
        };
        let loaded = match invoices.get(number) {
            Some(found) => {
                store::load(conn, found).await.map(|invoice| (found, invoice)).map_err(|e| e.to_string())
            }
            None => Err("it is not there".to_owned()),
        };
        let (found, invoice) = match loaded {
            Ok(loaded) => loaded,
            Err(why) => {
                self.closed.expect(false, || format!("the invoice {number}: {why}"));
                return Ok(());
            }
        };
        let sealed =
            invoice.digest() == row.digest && invoice.account == *account && invoice.period == period;
        self.closed.expect(sealed, || {
            format!("the invoice {number} does not say what it said when {what} was closed")
        });
        self.derived(conn, balance, &invoice, &charges, share).await?;
        self.cents(found, &invoice);
        self.rest(conn, found, &invoice).await?;
        Ok(())
    }

    /// The lines of usage are the events', those of tiers are posted, and credit is the rest.
    async fn derived(
        &mut self,
        conn: &mut Conn,
        balance: &Balance,
        invoice: &Invoice,
        charges: &[Charge],
        share: Option<credit::Share>,
    ) -> Result<(), BillingError> {
        let number = &invoice.number;
        let of = |wanted: fn(LineKind) -> bool| -> Vec<&InvoiceLine> {
            invoice.lines.iter().filter(|line| wanted(line.kind)).collect()
        };
        let charged: BTreeSet<Charge> =
            of(|kind| !matches!(kind, LineKind::Credit | LineKind::Tax)).into_iter().map(charge_of).collect();
        let expect: BTreeSet<Charge> = charges.iter().cloned().collect();
        self.derived.expect(charged == expect, || {
            let differ: Vec<_> = charged.symmetric_difference(&expect).collect();
            format!("the invoice {number} and its events differ in {differ:?}")
        });
        let adjustments: Vec<Charge> =
            of(|kind| kind == LineKind::Adjustment).into_iter().map(charge_of).collect();
        let mut sums: BTreeMap<String, i64> = BTreeMap::new();
        for charge in &adjustments {
            let revenue = sums.entry(ledger::revenue(&charge.sku)).or_default();
            *revenue = revenue.saturating_add(charge.exact.pico());
            let customer = sums.entry(ledger::customer(&invoice.account)).or_default();
            *customer = customer.saturating_sub(charge.exact.pico());
        }
        let expect = present(sums);
        let reference = ledger::volume_of(invoice.period);
        let posted = ledger::posted(conn, &invoice.account, "adjustment", &reference).await?;
        self.derived.expect(posted == expect, || {
            format!("the invoice {number} has adjustments of {expect:?}, posted were {posted:?}")
        });
        let owed = share.and_then(|share| net_due(balance.kind, share, &adjustments));
        let lines: Total = of(|kind| kind != LineKind::Tax).iter().map(|line| line.exact).sum();
        self.derived.expect(owed.map(Total::from) == Some(lines), || {
            format!("the invoice {number} leaves {lines} before tax, and {owed:?} was owed")
        });
        Ok(())
    }

    fn cents(&mut self, row: &InvoiceRow, invoice: &Invoice) {
        let number = &invoice.number;
        let amounts: Vec<i128> = invoice.lines.iter().map(|line| i128::from(line.amount.pico())).collect();
        let expect: Vec<i128> =
            rounded(&invoice.lines).into_iter().map(|cents| cents * PICO_PER_CENT).collect();
        self.rounded
            .expect(amounts == expect, || format!("the invoice {number} has {amounts:?}, not {expect:?}"));
        let due = invoice.totals().due.pico();
        self.rounded.expect(due == i128::from(row.due_pico), || {
            format!("the invoice {number} is due with {}, and its lines sum to {due}", row.due_pico)
        });
    }

    /// Tax and rounding are posted beside the balance.
    async fn rest(
        &mut self,
        conn: &mut Conn,
        row: &InvoiceRow,
        invoice: &Invoice,
    ) -> Result<(), BillingError> {
        let (account, number) = (&invoice.account, &invoice.number);
        let charged = invoice.lines.iter().filter(|line| line.kind != LineKind::Tax);
        let net = charged.map(|line| line.exact).sum::<Total>();
        let totals = invoice.totals();
        let cleared = if totals.due == Total::ZERO { net } else { Total::ZERO };
        let rest = totals.due - net;
        let expect = present(
            [
                (ledger::customer(account), cleared),
                (ledger::receivable(account), Total::ZERO - rest - cleared),
                (ledger::TAX.to_owned(), totals.tax),
                (ledger::ROUNDING.to_owned(), rest - totals.tax),
            ]
            .map(|(book, amount)| (book, amount.to_money().map_or(0, Money::pico))),
        );
        let posted = ledger::posted(conn, account, "invoice", number).await?;
        self.derived.expect(posted == expect, || {
            format!("the invoice {number} was posted with {posted:?}, not {expect:?}")
        });
        let net_due = Total::from(Money::from_pico(row.net_due_pico));
        self.derived.expect(net_due == net - cleared, || {
            format!("the balance owes {net_due} of the invoice {number}, not {}", net - cleared)
        });
        Ok(())
    }

    async fn settlement(&mut self, conn: &mut Conn, row: &InvoiceRow) -> Result<(), BillingError> {
        let account = AccountId::new(row.account.clone());
        let number = &row.number;
        let (mut paid, mut noted) = (Total::ZERO, Total::ZERO);
        let pico = Money::from_pico;
        for payment in settle::payments(conn, number).await? {
            paid += pico(payment.amount_pico).into();
            let expect = present([
                (ledger::customer(&account), payment.net_pico),
                (ledger::receivable(&account), payment.amount_pico.saturating_sub(payment.net_pico)),
                (ledger::FUNDING.to_owned(), payment.amount_pico.saturating_neg()),
            ]);
            let found = ledger::transaction(conn, payment.transaction_id).await?;
            let same = found.as_ref().is_some_and(|found| {
                found.kind == "payment" && found.reference == *number && found.entries == expect
            });
            self.settled.expect(same, || format!("the payment {} of {number} is {found:?}", payment.id));
        }
        for note in settle::notes(conn, number).await? {
            paid += pico(note.applied_pico).into();
            noted += pico(note.amount_pico).into();
            let refund = note.amount_pico.saturating_sub(note.applied_pico);
            let expect = present([
                (ledger::customer(&account), note.net_pico),
                (ledger::receivable(&account), note.applied_pico.saturating_sub(note.net_pico)),
                (ledger::REFUND.to_owned(), refund),
                (ledger::TAX.to_owned(), note.tax_pico.saturating_neg()),
                (ledger::CREDIT_NOTE.to_owned(), note.tax_pico.saturating_sub(note.amount_pico)),
            ]);
            let found = ledger::transaction(conn, note.transaction_id).await?;
            let same = found.as_ref().is_some_and(|found| {
                found.kind == "credit_note" && found.reference == note.number && found.entries == expect
            });
            self.settled.expect(same, || format!("the credit note {} is {found:?}", note.number));
            let refunded = ledger::posted(conn, &account, "refund", &note.number).await?;
            let expect = present([
                (ledger::customer(&account), refund),
                (ledger::REFUND.to_owned(), refund.saturating_neg()),
            ]);
            self.settled.expect(refunded == expect, || {
                format!("the credit note {} gives back {expect:?}, posted was {refunded:?}", note.number)
            });
        }
        let due = Total::from(pico(row.due_pico));
        self.settled.expect(paid <= due, || format!("{number} is due with {due}, and {paid} settled it"));
        if let Ok(invoice) = store::load(conn, row).await {
            let totals = invoice.totals();
            let invoiced = totals.charged + totals.tax;
            self.settled.expect(noted <= invoiced, || {
                format!("{number} was {invoiced}, and credit notes take back {noted}")
            });
        }
        Ok(())
    }
}

fn present(entries: impl IntoIterator<Item = (String, i64)>) -> Entries {
    let present = entries.into_iter().filter(|(_, pico)| *pico != 0);
    present.map(|(book, pico)| (book, Money::from_pico(pico))).collect()
}

fn charge_of(line: &InvoiceLine) -> Charge {
    Charge {
        kind: line.kind,
        period: line.period,
        project: line.project.clone(),
        model: line.model.clone(),
        sku: line.sku.clone(),
        unit: line.unit.clone(),
        quantity: line.quantity,
        exact: line.exact,
    }
}
