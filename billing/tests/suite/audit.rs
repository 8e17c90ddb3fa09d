//! The audit can fail: one row of each kind is corrupted, and it finds each. And the database refuses most of it anyway.

use sluice_billing::Money;

use crate::support::*;

/// A world with a grant and two shipped bills.
async fn billed() -> World {
    let world = World::new(1_000).await;
    for _ in 0..2 {
        world.billing.admit(request(10, 4)).await.unwrap().settle(outcome(6, 4, 4)).await.unwrap();
    }
    world.posted().await;
    world.assert_clean().await;
    world
}

/// Lifts the guards that a forger with the file in hand would lift.
async fn unguard(world: &World) {
    for trigger in [
        "ledger_entries_no_update",
        "ledger_entries_no_delete",
        "ledger_entries_sealed",
        "ledger_transactions_no_update",
        "usage_events_no_update",
        "usage_events_no_delete",
        "credit_grants_no_update",
        "price_books_no_update",
    ] {
        let sql = format!("DROP TRIGGER {trigger}");
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&world.database).await.unwrap();
    }
}

#[tokio::test]
async fn every_corruption_is_found() {
    let derive = "every event's cost derives from its quantities and price book";
    let rollup = "every rollup = fold of the events";
    let posted = "posted usage = sum of the events, for each account, minute and SKU";
    let zero = "every ledger transaction sums to zero per currency";
    let balance = "every balance = fold of its entries";
    let gapless = "every outbox is in the ledger without a gap or a second bill for one request";
    let grant = "every grant = its ledger transaction";
    let cases: &[(&str, &[&str])] = &[
        ("UPDATE usage_events SET cost_pico = cost_pico + 1 WHERE seq = 1", &[derive, rollup]),
        ("UPDATE usage_events SET output_tokens = 5 WHERE seq = 1", &[derive, posted, rollup]),
        ("UPDATE usage_events SET model = 'free' WHERE seq = 2", &[derive, posted, rollup]),
        ("UPDATE usage_events SET admitted_at_ms = admitted_at_ms + 60000 WHERE seq = 2", &[posted]),
        ("DELETE FROM usage_events WHERE seq = 1", &[posted, rollup, gapless]),
        ("UPDATE usage_events SET seq = 7 WHERE seq = 2", &[gapless]),
        ("UPDATE usage_rollups_1d SET requests = 3", &[rollup]),
        ("DELETE FROM usage_rollups_1d", &[rollup]),
        ("UPDATE ledger_entries SET amount_pico = amount_pico + 1 WHERE book = 'funding'", &[zero]),
        (
            "UPDATE ledger_entries SET amount_pico = amount_pico + 1 WHERE book = 'customer:acme' AND transaction_id = 1",
            &[zero, grant, balance],
        ),
        ("UPDATE ledger_entries SET book = 'revenue:other' WHERE book = 'revenue:m.output'", &[posted]),
        ("UPDATE ledger_transactions SET at_s = at_s + 60 WHERE kind = 'usage'", &[posted]),
        ("UPDATE billing_accounts SET posted_pico = posted_pico + 1", &[balance]),
        (
            "UPDATE billing_accounts SET leased_pico = leased_pico + 1",
            &["every account's leased sum = its leases"],
        ),
        ("UPDATE leases SET amount_pico = amount_pico + 1", &["every account's leased sum = its leases"]),
        ("UPDATE credit_grants SET amount_pico = 2000", &[grant]),
        ("UPDATE ship_state SET last_seq = 3", &[gapless]),
        (
            "UPDATE price_books SET canonical = replace(canonical, '0.000005', '0.000006')",
            &["every price book hashes to its address", derive, posted],
        ),
        ("INSERT INTO usage_duplicates VALUES ('e', 9, 'r', '{}')", &[gapless]),
    ];
    let world = billed().await;
    unguard(&world).await;
    for (corruption, expected) in cases {
        let world = World::open_in(world.image(), limits()).await.unwrap();
        // A lease to corrupt.
        let _hold = world.billing.admit(request(1, 1)).await.unwrap();
        assert!(world.audit().await.is_clean());
        let changed = sqlx::query(*corruption).execute(&world.database).await.expect(corruption);
        assert!(changed.rows_affected() > 0, "{corruption}");
        let audit = world.audit().await;
        let found: Vec<_> =
            audit.checks.iter().filter(|check| check.failed > 0).map(|check| check.name).collect();
        for name in *expected {
            assert!(found.contains(name), "{corruption}: {name} is not in {found:?}");
        }
        assert_eq!(found.len(), expected.len(), "{corruption}: {found:?}");
        assert!(audit.checks.iter().all(|check| check.failed == 0 || !check.evidence.is_empty()));
    }
}

#[tokio::test]
async fn the_database_itself_refuses_a_forgery() {
    let world = billed().await;
    let _hold = world.billing.admit(request(1, 1)).await.unwrap();
    for (forgery, refusal) in [
        ("UPDATE ledger_entries SET amount_pico = 1", "append-only"),
        ("DELETE FROM ledger_entries", "append-only"),
        ("UPDATE ledger_transactions SET at_s = 0", "append-only"),
        ("DELETE FROM ledger_transactions", "append-only"),
        ("UPDATE usage_events SET cost_pico = 0", "append-only"),
        ("DELETE FROM usage_events", "append-only"),
        ("UPDATE credit_grants SET amount_pico = 1", "append-only"),
        ("DELETE FROM price_books", "append-only"),
        ("INSERT INTO ledger_entries VALUES (1, 'customer:acme', 'USD', 5)", "no more entries"),
        ("INSERT INTO ledger_transactions VALUES (99, 'grant', 'acme', 0, '')", "at least two entries"),
        ("INSERT INTO ledger_entries VALUES (99, 'customer:acme', 'USD', 5)", "FOREIGN KEY"),
        ("UPDATE billing_accounts SET leased_pico = leased_pico + 1000000", "hard_cap"),
        ("UPDATE leases SET amount_pico = -1", "CHECK"),
    ] {
        let refused = sqlx::query(forgery).execute(&world.database).await.expect_err(forgery);
        assert!(refused.to_string().contains(refusal), "{forgery}: {refused}");
    }
    let mut tx = world.database.begin().await.unwrap();
    sqlx::query("INSERT INTO ledger_entries VALUES (99, 'a', 'USD', 5), (99, 'b', 'USD', -4)")
        .execute(&mut *tx)
        .await
        .unwrap();
    let unbalanced = sqlx::query("INSERT INTO ledger_transactions VALUES (99, 'grant', 'acme', 0, '')")
        .execute(&mut *tx)
        .await;
    assert!(unbalanced.unwrap_err().to_string().contains("sum to zero"));
    tx.rollback().await.unwrap();
    world.assert_clean().await;
    assert_ne!(world.billing.balance(&account()).await.unwrap().leased, Money::ZERO);
}
