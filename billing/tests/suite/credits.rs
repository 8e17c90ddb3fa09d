//! Grants that expire, and the audit of credit and invoices: it can fail.

use sluice_billing::{BillingError, CreditGrant, CreditTerms, Dialect, Money};
use time::{Duration, OffsetDateTime, macros::datetime};
use uuid::Uuid;

use crate::{
    invoices::{close, postpaid, used},
    support::*,
};

const DAY: Duration = Duration::DAY;

on_both!(
    what_is_left_of_a_grant_expires_once,
    leased_credit_expires_when_it_is_free,
    a_grant_is_posted_once_on_the_same_terms,
    every_corruption_of_credit_and_invoices_is_found,
);

async fn grant(world: &World, amount: i64, expires_at: Option<OffsetDateTime>, priority: i32) -> String {
    let grant = CreditGrant {
        id: Uuid::now_v7(),
        account: account(),
        amount: pico(amount),
        memo: "test".into(),
        granted_at: START,
    };
    let terms = CreditTerms { expires_at, priority };
    world.billing.books().credit_on(&grant, &terms).await.expect("credit is posted");
    grant.id.to_string()
}

/// (left, expired) of each grant, oldest first.
async fn left(world: &World) -> Vec<(i64, i64)> {
    let grants = world.billing.books().grants(&account()).await.expect("grants");
    grants.iter().map(|grant| (grant.left.pico(), grant.expired.pico())).collect()
}

async fn what_is_left_of_a_grant_expires_once() {
    let world = World::new(0).await;
    grant(&world, 1_000, None, 0).await;
    let soon = grant(&world, 100, Some(START + DAY), 0).await;
    grant(&world, 50, Some(START + DAY * 2), -1).await;
    // 10 x 3 + 4 x 5 = 50: the third pays first. Then 50 of the second.
    for _ in 0..2 {
        world.billing.admit(request(10, 4)).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
    }
    world.posted().await;
    assert_eq!(left(&world).await, [(1_000, 0), (50, 0), (0, 0)]);
    let books = world.billing.books();
    assert!(books.expire_credits(START + DAY - Duration::SECOND).await.unwrap().is_empty());
    let expired = books.expire_credits(START + DAY).await.unwrap();
    let told: Vec<_> =
        expired.iter().map(|e| (e.grant.as_str(), e.expired.pico(), e.waiting.pico())).collect();
    assert_eq!(told, [(soon.as_str(), 50, 0)]);
    assert!(books.expire_credits(START + DAY * 9).await.unwrap().is_empty());
    assert_eq!(left(&world).await, [(1_000, 0), (0, 50), (0, 0)]);
    assert_eq!(world.posted().await, 1_000);
    world.assert_clean().await;
}

async fn leased_credit_expires_when_it_is_free() {
    let world = World::new(0).await;
    grant(&world, 100, Some(START + DAY), 0).await;
    // 10 x 3 + 4 x 5 are held; 50 are free.
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    let books = world.billing.books();
    let told = |expiries: &[sluice_billing::Expiry]| -> Vec<(i64, i64)> {
        expiries.iter().map(|e| (e.expired.pico(), e.waiting.pico())).collect()
    };
    let first = books.expire_credits(START + DAY).await.unwrap();
    assert_eq!(told(&first), [(50, 50)]);
    let second = books.expire_credits(START + DAY).await.unwrap();
    assert_eq!(told(&second), [(0, 50)]);
    world.assert_clean().await;
    // What was held is used, and the rest is free.
    hold.settle(outcome(10, 0, 2)).await.unwrap();
    world.posted().await;
    world.billing.close().await.unwrap();
    let last = books.expire_credits(START + DAY).await.unwrap();
    assert_eq!(told(&last), [(10, 0)]);
    assert!(books.expire_credits(START + DAY).await.unwrap().is_empty());
    assert_eq!(left(&world).await, [(0, 60)]);
    assert_eq!(books.balance(&account()).await.unwrap().posted, Money::ZERO);
    assert!(world.audit().await.is_clean());
}

async fn a_grant_is_posted_once_on_the_same_terms() {
    let world = World::new(0).await;
    let grant = CreditGrant {
        id: Uuid::now_v7(),
        account: account(),
        amount: pico(5),
        memo: "test".into(),
        granted_at: START,
    };
    let books = world.billing.books();
    let terms = CreditTerms { expires_at: Some(START + DAY), priority: 3 };
    for _ in 0..2 {
        books.credit_on(&grant, &terms).await.unwrap();
    }
    for other in [
        CreditTerms { priority: 4, ..terms },
        CreditTerms { expires_at: None, ..terms },
        CreditTerms::default(),
    ] {
        assert!(matches!(books.credit_on(&grant, &other).await, Err(BillingError::GrantConflict(_))));
    }
    let passed = CreditTerms { expires_at: Some(START), priority: 0 };
    let late = CreditGrant { id: Uuid::now_v7(), ..grant };
    assert!(matches!(books.credit_on(&late, &passed).await, Err(BillingError::ExpiryPassed)));
    assert_eq!(left(&world).await, [(5, 0)]);
    world.assert_clean().await;
}

/// A world with everything that the audit of this looks at: expired credit, two invoices, a payment, a credit note.
async fn full() -> World {
    let april = datetime!(2026-04-01 06:00 UTC);
    let world = postpaid(100).await;
    grant(&world, 500, Some(START + DAY), 0).await;
    world.billing.books().expire_credits(START + DAY).await.unwrap();
    used(&world, "later", START, 1_000, 1_000).await;
    let first = close(&world, "later", "2026-03", april).await.expect("an invoice").invoice.number;
    used(&world, "later", april, 1_000, 0).await;
    close(&world, "later", "2026-04", datetime!(2026-05-01 06:00 UTC)).await.expect("an invoice");
    let books = world.billing.books();
    let payment = sluice_billing::RecordPayment {
        id: Uuid::now_v7(),
        invoice: first.clone(),
        amount: Some(Money::from_usd_str("9.00").unwrap()),
        memo: String::new(),
    };
    books.record_payment(&payment, april).await.unwrap();
    let note = sluice_billing::IssueCreditNote {
        id: Uuid::now_v7(),
        invoice: first,
        line: None,
        amount: Some(Money::from_usd_str("1.00").unwrap()),
        reason: "test".into(),
    };
    books.issue_credit_note(&note, &sluice_billing::InvoiceRules::default(), april).await.unwrap();
    world.assert_clean().await;
    world
}

async fn every_corruption_of_credit_and_invoices_is_found() {
    let rest = "what is left of every grant follows from the ledger, at each closed month";
    let expiry = "every expiry = its ledger transaction";
    let closed = "every closed month is as it was when it was closed";
    let derived = "every invoice = fold of its events, its tiers and what credit paid";
    let cents = "every invoice's cents follow from its exact lines and sum to what is due";
    let numbers = "the numbers of invoices and of credit notes have no gaps";
    let settled = "payments and credit notes = their ledger transactions, within what was invoiced";
    let cases: &[(&str, &[&str])] = &[
        ("UPDATE credit_expiries SET amount_pico = 499", &[expiry]),
        ("DELETE FROM credit_expiries", &[expiry]),
        ("UPDATE ledger_transactions SET reference = 'x' WHERE kind = 'expiry'", &[rest, expiry]),
        ("UPDATE closed_periods SET checkpoint = replace(checkpoint, '0.00', '0.01')", &[rest]),
        ("UPDATE closed_periods SET digest = 'x' WHERE period = '2026-03'", &[closed]),
        ("UPDATE invoices SET customer = '{\"name\":\"Mallory\"}'", &[closed]),
        ("UPDATE invoices SET due_at_s = due_at_s + 1", &[closed]),
        ("UPDATE invoice_lines SET project = 'x' WHERE position = 1", &[closed, derived]),
        ("UPDATE invoice_lines SET exact_pico = exact_pico + 1 WHERE position = 1", &[closed, derived]),
        (
            "UPDATE invoice_lines SET amount_pico = amount_pico + 10000000000 WHERE position = 1",
            &[closed, derived, cents],
        ),
        ("UPDATE invoice_lines SET tax_rate = 180000 WHERE kind = 'tax'", &[closed, cents]),
        ("DELETE FROM invoice_lines WHERE position = 1", &[closed, derived, cents]),
        ("UPDATE invoices SET due_pico = due_pico + 10000000000", &[cents]),
        ("UPDATE invoices SET net_due_pico = net_due_pico + 1", &[derived]),
        ("UPDATE invoices SET ordinal = 7 WHERE number = 'INV-000002'", &[numbers]),
        ("UPDATE credit_notes SET ordinal = 2", &[numbers]),
        ("UPDATE invoice_payments SET amount_pico = amount_pico + 1", &[settled]),
        ("DELETE FROM closed_periods WHERE period = '2026-04'", &[closed]),
        ("UPDATE closed_periods SET last_event = 0 WHERE period = '2026-04'", &[closed, derived]),
        ("UPDATE credit_notes SET amount_pico = amount_pico + 10000000000", &[settled]),
        ("UPDATE credit_notes SET applied_pico = 0, net_pico = 0", &[settled]),
    ];
    for (corruption, expected) in cases {
        let world = full().await;
        unguard(&world).await;
        let changed = run(&world.database, corruption).await.expect(corruption);
        assert!(changed > 0, "{corruption}");
        let audit = world.audit().await;
        let found: Vec<_> =
            audit.checks.iter().filter(|check| check.failed > 0).map(|check| check.name).collect();
        assert_eq!(&found, expected, "{corruption}: {audit:#?}");
        assert!(audit.checks.iter().all(|check| check.failed == 0 || !check.evidence.is_empty()));
    }
}

/// Lifts the guards that a forger with the file in hand would lift.
async fn unguard(world: &World) {
    let triggers = match world.database.dialect() {
        Dialect::Sqlite => "SELECT name FROM sqlite_schema WHERE type = 'trigger'",
        Dialect::Postgres => {
            "SELECT tgname || ' ON ' || tgrelid::regclass::text FROM pg_trigger WHERE NOT tgisinternal"
        }
    };
    let triggers: Vec<(String,)> =
        world.database.read().await.unwrap().fetch_all(triggers, &[]).await.unwrap();
    for (trigger,) in triggers {
        run(&world.database, &format!("DROP TRIGGER {trigger}")).await.unwrap();
    }
}
