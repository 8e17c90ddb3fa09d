//! Months: closed once, in order, when everything has been shipped; invoices, payments, credit notes.

use sluice_billing::{
    AccountId, AccountKind, Books, ClosedPeriod, Closing, InvoiceError, InvoiceKind, InvoiceRules,
    InvoiceState, InvoiceStatus, IssueCreditNote, LineKind, Money, Period, RecordPayment, TaxRules,
};
use time::{Duration, OffsetDateTime, macros::datetime};
use uuid::Uuid;

use crate::support::*;

/// Prices of dollars, so that cents count: 3, 1 and 5 dollars a thousand tokens.
const PRICES_IN_CENTS: &str = r#"
    currency = "USD"
    effective_from = "2026-01-01T00:00:00Z"
    price = [
        { model = "m", meter = "input", usd_per_million = "3000" },
        { model = "m", meter = "cached_input", usd_per_million = "1000" },
        { model = "m", meter = "output", usd_per_million = "5000" },
    ]
"#;
const USD: i64 = 1_000_000_000_000;
const CENT: i64 = USD / 100;
const APRIL: OffsetDateTime = datetime!(2026-04-01 06:00 UTC);

on_both!(
    a_month_is_closed_once_in_order_and_when_it_is_over,
    an_invoice_is_paid_in_parts_and_frees_the_limit,
    credit_notes_take_back_at_most_what_was_invoiced,
    late_usage_is_on_the_next_invoice,
    a_month_waits_for_every_outbox,
    an_open_hold_keeps_its_month_open,
    a_prepaid_account_gets_a_statement,
    what_is_closed_cannot_be_changed,
    less_than_half_a_cent_is_not_asked_for,
    several_closers_close_a_month_once,
    tiers_give_back_at_the_close_and_late_usage_moves_them,
);

pub fn month(text: &str) -> Period {
    text.parse().expect("a month")
}

fn rules() -> InvoiceRules {
    InvoiceRules::default()
}

fn vat() -> TaxRules {
    toml::from_str("rate = [{ name = \"VAT\", rate = \"0.19\" }]").expect("rules")
}

/// A world where `acme` pays later, and prices are dollars.
pub async fn postpaid(limit_usd: i64) -> World {
    let world = World::with(0, limits()).await;
    let book = sluice_billing::PriceBook::from_toml(PRICES_IN_CENTS).expect("the prices are valid");
    world.billing.apply_price_book(&book).await.expect("prices apply");
    let kind = AccountKind::Postpaid { credit_limit: pico(limit_usd * USD) };
    world.billing.create_account(&AccountId::new("later"), kind).await.expect("the account is new");
    world
}

/// One settled request of an account, admitted at a moment: input tokens cost 0.003 dollars, output tokens 0.005.
pub async fn used(world: &World, account: &str, at: OffsetDateTime, input: u64, output: u64) {
    let mut request = request(input, output);
    request.account = AccountId::new(account);
    request.admitted_at = at;
    let mut hold = world.billing.admit(request).await.expect("admitted");
    hold.extend(output).await;
    hold.settle(outcome(input, 0, output)).await.expect("settled");
}

pub async fn close_at(
    books: &Books,
    account: &str,
    period: &str,
    now: OffsetDateTime,
) -> Result<ClosedPeriod, InvoiceError> {
    let (rules, tax) = (rules(), vat());
    let closing = Closing { rules: &rules, tax: &tax, now, without_gateways: &[] };
    books.close_period(&AccountId::new(account), month(period), &closing).await
}

/// Ships everything, reports it at `now`, and closes.
pub async fn close(world: &World, account: &str, period: &str, now: OffsetDateTime) -> Option<InvoiceStatus> {
    world.set_now(now);
    assert!(world.billing.report_horizon().await.expect("reported"));
    let books = world.billing.books();
    let closed = close_at(books, account, period, now).await.expect("closed");
    match closed.invoice {
        Some(number) => Some(books.invoice(&number, now).await.expect("the invoice")),
        None => None,
    }
}

fn lines(status: &InvoiceStatus) -> Vec<(LineKind, String, i64)> {
    let line =
        |line: &sluice_billing::InvoiceLine| (line.kind, line.description.clone(), line.amount.pico() / CENT);
    status.invoice.lines.iter().map(line).collect()
}

async fn owed(world: &World, account: &str) -> i64 {
    world.billing.balance(&AccountId::new(account)).await.expect("the account").posted.pico()
}

async fn pay(world: &World, number: &str, amount: Option<i64>) -> Result<InvoiceStatus, InvoiceError> {
    let amount = amount.map(|cents| pico(cents * CENT));
    let payment = RecordPayment { id: Uuid::now_v7(), invoice: number.into(), amount, memo: "wire".into() };
    world.billing.books().record_payment(&payment, APRIL).await
}

async fn take_back(
    world: &World,
    number: &str,
    line: Option<u32>,
    amount: Option<i64>,
) -> Result<sluice_billing::CreditNote, InvoiceError> {
    let amount = amount.map(|cents| pico(cents * CENT));
    let request = IssueCreditNote {
        id: Uuid::now_v7(),
        invoice: number.into(),
        line,
        amount,
        reason: "a slow week".into(),
    };
    world.billing.books().issue_credit_note(&request, &rules(), APRIL).await
}

async fn a_month_is_closed_once_in_order_and_when_it_is_over() {
    let world = postpaid(1_000).await;
    used(&world, "later", START, 1_000, 1_000).await;
    used(&world, "later", datetime!(2026-04-02 0:00 UTC), 100, 0).await;
    world.billing.flush().await.unwrap();
    let books = world.billing.books();
    let early = close_at(books, "later", "2026-03", datetime!(2026-03-31 23:59:59 UTC)).await;
    assert!(matches!(early, Err(InvoiceError::NotOver { .. })), "{early:?}");
    world.set_now(datetime!(2026-05-02 0:00 UTC));
    world.billing.report_horizon().await.unwrap();
    let may = datetime!(2026-05-02 0:00 UTC);
    let skipped = close_at(books, "later", "2026-04", may).await;
    assert!(
        matches!(&skipped, Err(InvoiceError::EarlierOpen { earlier, .. }) if *earlier == month("2026-03"))
    );
    let before = close_at(books, "later", "2026-02", may).await;
    assert!(matches!(before, Err(InvoiceError::Nothing { .. })), "{before:?}");

    let first = close(&world, "later", "2026-03", may).await.expect("an invoice");
    assert_eq!((first.invoice.number.as_str(), first.invoice.kind), ("INV-000001", InvoiceKind::Invoice));
    let expect = [
        (LineKind::Usage, "m.input".to_owned(), 300),
        (LineKind::Usage, "m.output".to_owned(), 500),
        (LineKind::Tax, "VAT 19 %".to_owned(), 152),
    ];
    assert_eq!(lines(&first), expect);
    assert_eq!((first.open, first.state), (pico(952 * CENT), InvoiceState::Open));
    let told: Vec<(String, String)> = world
        .database
        .read()
        .await
        .unwrap()
        .fetch_all("SELECT kind, subject FROM notices WHERE account = 'later'", &[])
        .await
        .unwrap();
    assert_eq!(told, [("invoice.ready".to_owned(), "INV-000001".to_owned())]);
    let again = close_at(books, "later", "2026-03", may).await.unwrap();
    assert_eq!((again.invoice.as_deref(), again.now), (Some("INV-000001"), false));
    let second = close(&world, "later", "2026-04", may).await.expect("an invoice");
    assert_eq!(second.invoice.number, "INV-000002");
    assert_eq!(lines(&second)[0], (LineKind::Usage, "m.input".to_owned(), 30));
    // What was invoiced stays owed, and tax is beside the balance: the limit is for usage.
    assert_eq!(owed(&world, "later").await, -830 * CENT);
    world.assert_clean().await;
}

async fn an_invoice_is_paid_in_parts_and_frees_the_limit() {
    let world = postpaid(10).await;
    used(&world, "later", START, 1_001, 1_000).await;
    let invoice = close(&world, "later", "2026-03", APRIL).await.expect("an invoice");
    // 3.003 + 5.00 = 8.003, and 19 % of it 1.52057: 9.52357.
    assert_eq!(invoice.open, pico(952 * CENT));
    let number = invoice.invoice.number;
    assert!(matches!(pay(&world, &number, Some(953)).await, Err(InvoiceError::MoreThanDue { .. })));
    assert!(matches!(pay(&world, "INV-9", None).await, Err(InvoiceError::Unknown(_))));
    let half_a_cent = RecordPayment {
        id: Uuid::now_v7(),
        invoice: number.clone(),
        amount: Some(pico(CENT / 2)),
        memo: String::new(),
    };
    let refused = world.billing.books().record_payment(&half_a_cent, APRIL).await;
    assert!(matches!(refused, Err(InvoiceError::NotCents(_))), "{refused:?}");

    let id = Uuid::now_v7();
    let part =
        RecordPayment { id, invoice: number.clone(), amount: Some(pico(500 * CENT)), memo: "wire".into() };
    for _ in 0..2 {
        let paid = world.billing.books().record_payment(&part, APRIL).await.unwrap();
        assert_eq!((paid.open, paid.payments.len()), (pico(452 * CENT), 1));
    }
    let other = RecordPayment { amount: Some(pico(CENT)), ..part };
    assert!(matches!(
        world.billing.books().record_payment(&other, APRIL).await,
        Err(InvoiceError::Conflict(_))
    ));
    // The balance first: 8.003 - 5.00.
    assert_eq!(owed(&world, "later").await, -3_003 * CENT / 10);
    let overdue = world.billing.books().invoice(&number, APRIL + Duration::days(31)).await.unwrap();
    assert_eq!(overdue.state, InvoiceState::Overdue);
    let paid = pay(&world, &number, None).await.unwrap();
    assert_eq!((paid.state, paid.open), (InvoiceState::Paid, Money::ZERO));
    assert_eq!(owed(&world, "later").await, 0);
    assert!(matches!(pay(&world, &number, None).await, Err(InvoiceError::NotCents(_))));
    world.assert_clean().await;
}

async fn credit_notes_take_back_at_most_what_was_invoiced() {
    let world = postpaid(10).await;
    used(&world, "later", START, 1_000, 1_000).await;
    let invoice = close(&world, "later", "2026-03", APRIL).await.expect("an invoice");
    let number = invoice.invoice.number;
    assert!(matches!(take_back(&world, &number, Some(3), None).await, Err(InvoiceError::UnknownLine { .. })));
    assert!(matches!(
        take_back(&world, &number, Some(1), Some(358)).await,
        Err(InvoiceError::MoreThanInvoiced { left, .. }) if left == pico(357 * CENT)
    ));
    pay(&world, &number, Some(900)).await.unwrap();
    // 52 cents were still due; the rest was paid, and comes back as credit.
    let first = take_back(&world, &number, Some(1), None).await.unwrap();
    assert_eq!(
        (first.number.as_str(), first.amount, first.tax),
        ("CN-000001", pico(357 * CENT), pico(57 * CENT))
    );
    assert_eq!(first.applied, pico(52 * CENT));
    let status = world.billing.books().invoice(&number, APRIL).await.unwrap();
    assert_eq!((status.state, status.open), (InvoiceState::Paid, Money::ZERO));
    assert_eq!(owed(&world, "later").await, 305 * CENT);
    let rest = take_back(&world, &number, None, None).await.unwrap();
    assert_eq!((rest.amount, rest.tax), (pico(595 * CENT), pico(95 * CENT)));
    assert!(matches!(
        take_back(&world, &number, None, Some(1)).await,
        Err(InvoiceError::MoreThanInvoiced { .. })
    ));
    assert_eq!(owed(&world, "later").await, 900 * CENT);
    // The credit pays the next month.
    used(&world, "later", APRIL, 1_000, 0).await;
    let next = close(&world, "later", "2026-04", datetime!(2026-05-01 06:00 UTC)).await.expect("an invoice");
    let expect = [
        (LineKind::Usage, "m.input".to_owned(), 300),
        (LineKind::Credit, "Credit applied".to_owned(), -300),
        (LineKind::Tax, "VAT 19 %".to_owned(), 0),
    ];
    assert_eq!((lines(&next).as_slice(), next.state), (expect.as_slice(), InvoiceState::Paid));
    world.assert_clean().await;
}

async fn late_usage_is_on_the_next_invoice() {
    let world = postpaid(100).await;
    used(&world, "later", START, 1_000, 0).await;
    close(&world, "later", "2026-03", APRIL).await.expect("an invoice");
    // A bill of March that was stuck somewhere, one of April, and one of May that comes before April is closed.
    used(&world, "later", datetime!(2026-03-31 23:59:59 UTC), 0, 100).await;
    used(&world, "later", APRIL, 2_000, 0).await;
    let may = datetime!(2026-05-01 06:00 UTC);
    used(&world, "later", may, 3_000, 0).await;
    let april = close(&world, "later", "2026-04", may).await.expect("an invoice");
    let expect = [
        (LineKind::Usage, "m.input".to_owned(), 600),
        (LineKind::LateUsage, "m.output, late usage of 2026-03".to_owned(), 50),
        (LineKind::Tax, "VAT 19 %".to_owned(), 124),
    ];
    assert_eq!(lines(&april)[..2], expect[..2]);
    used(&world, "later", APRIL, 0, 200).await;
    let may = close(&world, "later", "2026-05", datetime!(2026-06-01 06:00 UTC)).await.expect("an invoice");
    let expect = [
        (LineKind::Usage, "m.input".to_owned(), 900),
        (LineKind::LateUsage, "m.output, late usage of 2026-04".to_owned(), 100),
    ];
    assert_eq!(lines(&may)[..2], expect);
    let nothing = close(&world, "later", "2026-06", datetime!(2026-07-01 06:00 UTC)).await;
    assert!(nothing.is_none());
    world.assert_clean().await;
}

async fn a_month_waits_for_every_outbox() {
    let world = postpaid(100).await;
    used(&world, "later", START, 1_000, 0).await;
    // Another gateway of which nothing was heard since March.
    let dir = tempfile::TempDir::new().unwrap();
    let outbox = dir.path().join("outbox.db");
    let options = |gateway: &str| sluice_billing::BillingOptions {
        database: world.database.clone(),
        outbox_path: outbox.clone(),
        gateway: gateway.into(),
        limits: limits(),
    };
    let clock = |at: OffsetDateTime| sluice_billing::Clock::new(move || at);
    let other = sluice_billing::Billing::open_at(options("gateway-1"), clock(START)).await.unwrap();
    world.set_now(APRIL);
    world.billing.report_horizon().await.unwrap();
    let books = world.billing.books();
    let refused = close_at(books, "later", "2026-03", APRIL).await;
    assert!(
        matches!(&refused, Err(InvoiceError::OutboxBehind { gateway, .. }) if gateway == "gateway-1"),
        "{refused:?}"
    );
    let (rules, tax) = (rules(), vat());
    let closing = Closing { rules: &rules, tax: &tax, now: APRIL, without_gateways: &[] };
    assert!(matches!(books.close_due(&closing).await, Err(InvoiceError::OutboxBehind { .. })));
    // Half an hour after midnight nothing is due yet, whoever has reported.
    let midnight = Closing { now: datetime!(2026-04-01 0:30 UTC), ..closing.clone() };
    assert!(books.close_due(&midnight).await.unwrap().closed.is_empty());
    // It ends in order, and has nothing more to say.
    other.close().await.unwrap();
    let report = books.close_due(&closing).await.unwrap();
    assert!(report.failed.is_empty());
    let closed: Vec<_> = report.closed.iter().map(|month| (month.account.as_str(), month.period)).collect();
    assert_eq!(closed, [("later", month("2026-03"))]);
    // It starts again in April: April waits for it, unless it is left out by name.
    let other = sluice_billing::Billing::open_at(options("gateway-1"), clock(APRIL)).await.unwrap();
    let may = datetime!(2026-05-01 06:00 UTC);
    world.set_now(may);
    world.billing.report_horizon().await.unwrap();
    assert!(matches!(close_at(books, "later", "2026-04", may).await, Err(InvoiceError::OutboxBehind { .. })));
    let without = ["gateway-1".to_owned()];
    let closing = Closing { now: may, without_gateways: &without, ..closing };
    books.close_period(&AccountId::new("later"), month("2026-04"), &closing).await.unwrap();
    other.close().await.unwrap();
    world.assert_clean().await;
}

async fn an_open_hold_keeps_its_month_open() {
    let world = postpaid(100).await;
    used(&world, "later", START, 1_000, 0).await;
    let mut straddling = request(100, 4);
    straddling.account = AccountId::new("later");
    let hold = world.billing.admit(straddling).await.unwrap();
    world.billing.flush().await.unwrap();
    world.set_now(APRIL);
    assert!(!world.billing.report_horizon().await.unwrap());
    let waiting = close_at(world.billing.books(), "later", "2026-03", APRIL).await;
    assert!(matches!(waiting, Err(InvoiceError::OutboxBehind { .. })), "{waiting:?}");
    hold.settle(outcome(100, 0, 4)).await.unwrap();
    let invoice = close(&world, "later", "2026-03", APRIL).await.expect("an invoice");
    // 3.30 and 0.02: the hold's bill is in.
    assert_eq!(lines(&invoice)[0].2 + lines(&invoice)[1].2, 332);
    world.assert_clean().await;
}

async fn a_prepaid_account_gets_a_statement() {
    let world = postpaid(0).await;
    world.credit(20 * USD).await;
    used(&world, "acme", START, 1_001, 1_000).await;
    let statement = close(&world, "acme", "2026-03", APRIL).await.expect("a statement");
    assert_eq!(statement.invoice.kind, InvoiceKind::Statement);
    assert_eq!((statement.open, statement.state), (Money::ZERO, InvoiceState::Paid));
    let amounts: Vec<_> = lines(&statement).iter().map(|line| line.2).collect();
    assert_eq!(amounts.iter().sum::<i64>(), 0);
    assert_eq!(owed(&world, "acme").await, 20 * USD - 8_003 * CENT / 10);
    let note = take_back(&world, &statement.invoice.number, None, Some(100)).await.unwrap();
    assert_eq!((note.applied, note.tax), (Money::ZERO, Money::ZERO));
    assert_eq!(owed(&world, "acme").await, 21 * USD - 8_003 * CENT / 10);
    world.assert_clean().await;
}

async fn what_is_closed_cannot_be_changed() {
    let world = postpaid(100).await;
    used(&world, "later", START, 1_000, 0).await;
    let number = close(&world, "later", "2026-03", APRIL).await.expect("an invoice").invoice.number;
    pay(&world, &number, Some(100)).await.unwrap();
    take_back(&world, &number, None, Some(100)).await.unwrap();
    for table in ["invoices", "invoice_lines", "closed_periods", "invoice_payments", "credit_notes"] {
        for change in
            [format!("DELETE FROM {table}"), format!("UPDATE {table} SET {} = 'x'", text_column(table))]
        {
            let refused = run(&world.database, &change).await.expect_err(&change);
            assert!(refused.to_string().contains("append-only"), "{change}: {refused}");
        }
    }
    let more = "INSERT INTO invoice_lines SELECT invoice, 99, kind, period, description, project, model, sku, unit, quantity, \
                exact_pico, amount_pico, tax_category, tax_rate FROM invoice_lines WHERE position = 1";
    let refused = run(&world.database, more).await.expect_err(more);
    assert!(refused.to_string().contains("no more lines"), "{refused}");
}

fn text_column(table: &str) -> &'static str {
    match table {
        "invoices" => "customer",
        "invoice_lines" => "description",
        "closed_periods" => "digest",
        "invoice_payments" => "memo",
        _ => "reason",
    }
}

async fn less_than_half_a_cent_is_not_asked_for() {
    let world = postpaid(100).await;
    used(&world, "later", START, 1, 0).await;
    let invoice = close(&world, "later", "2026-03", APRIL).await.expect("an invoice");
    assert_eq!((invoice.open, invoice.state), (Money::ZERO, InvoiceState::Paid));
    assert_eq!(owed(&world, "later").await, 0);
    world.assert_clean().await;
}

async fn several_closers_close_a_month_once() {
    let world = postpaid(100).await;
    used(&world, "later", START, 1_000, 0).await;
    world.set_now(APRIL);
    world.billing.report_horizon().await.unwrap();
    let books = world.billing.books();
    let closes = (0..4).map(|_| close_at(books, "later", "2026-03", APRIL));
    let closed: Vec<_> = futures_of(closes.collect()).await;
    let numbers: Vec<_> = closed.iter().map(|closed| closed.invoice.clone().expect("an invoice")).collect();
    assert_eq!(numbers, vec!["INV-000001"; 4]);
    assert_eq!(closed.iter().filter(|closed| closed.now).count(), 1);
    world.assert_clean().await;
}

/// The first thousand input tokens of a month cost 0.003 dollars each, the others 0.001.
const TIERS: &str = r#"
    currency = "USD"
    effective_from = "2026-02-01T00:00:00Z"
    price = [
        { model = "m", meter = "input", scheme = "graduated", tiers = [{ up_to = 1000, usd_per_million = "3000" }, { usd_per_million = "1000" }] },
        { model = "m", meter = "cached_input", usd_per_million = "1000" },
        { model = "m", meter = "output", usd_per_million = "5000" },
    ]
"#;

async fn tiers_give_back_at_the_close_and_late_usage_moves_them() {
    let world = postpaid(100).await;
    let book = sluice_billing::PriceBook::from_toml(TIERS).expect("the prices are valid");
    world.billing.apply_price_book(&book).await.expect("prices apply");
    world.credit(20 * USD).await;
    for account in ["later", "acme"] {
        used(&world, account, START, 1_000, 0).await;
        used(&world, account, START, 1_000, 0).await;
    }
    let march = close(&world, "later", "2026-03", APRIL).await.expect("an invoice");
    let expect = [
        (LineKind::Usage, "m.input".to_owned(), 600),
        (LineKind::Adjustment, "m.input, volume of the month".to_owned(), -200),
        (LineKind::Tax, "VAT 19 %".to_owned(), 76),
    ];
    assert_eq!(lines(&march), expect);
    assert_eq!(owed(&world, "later").await, -4 * USD);
    let statement = close(&world, "acme", "2026-03", APRIL).await.expect("a statement");
    assert_eq!(statement.open, Money::ZERO);
    assert_eq!(owed(&world, "acme").await, 16 * USD);
    // 500 more of March: rated at the first tier, due at the second.
    used(&world, "later", datetime!(2026-03-31 23:00 UTC), 500, 0).await;
    let april = close(&world, "later", "2026-04", datetime!(2026-05-01 06:00 UTC)).await.expect("an invoice");
    let expect = [
        (LineKind::LateUsage, "m.input, late usage of 2026-03".to_owned(), 150),
        (LineKind::Adjustment, "m.input, volume of 2026-03".to_owned(), -100),
    ];
    assert_eq!(lines(&april)[..2], expect);
    assert_eq!(april.open, pico(60 * CENT));
    for number in [march.invoice.number, april.invoice.number] {
        pay(&world, &number, None).await.unwrap();
    }
    assert_eq!(owed(&world, "later").await, 0);
    world.assert_clean().await;
}

/// All of them at once.
async fn futures_of<F>(futures: Vec<F>) -> Vec<ClosedPeriod>
where
    F: std::future::Future<Output = Result<ClosedPeriod, InvoiceError>>,
{
    let mut pending: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut done: Vec<Option<ClosedPeriod>> = pending.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (future, done) in pending.iter_mut().zip(&mut done) {
            if done.is_none()
                && let std::task::Poll::Ready(closed) = future.as_mut().poll(context)
            {
                *done = Some(closed.expect("closed"));
            }
        }
        match done.iter().all(Option::is_some) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
    done.into_iter().flatten().collect()
}
