//! The audit can fail: one row of each kind is corrupted, and it finds each. And the database refuses most of it anyway.

use sluice_billing::{Dialect, Money};

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
    let triggers = match world.database.dialect() {
        Dialect::Sqlite => "SELECT name FROM sqlite_schema WHERE type = 'trigger'",
        Dialect::Postgres => {
            "SELECT tgname || ' ON ' || tgrelid::regclass::text FROM pg_trigger WHERE NOT tgisinternal"
        }
    };
    let triggers: Vec<(String,)> =
        world.database.read().await.unwrap().fetch_all(triggers, &[]).await.unwrap();
    assert!(triggers.len() >= 7);
    for (trigger,) in triggers {
        run(&world.database, &format!("DROP TRIGGER {trigger}")).await.unwrap();
    }
}

async fn every_corruption_is_found() {
    let derive = "every event's cost derives from its quantities and price book";
    let rollup = "every rollup = fold of the events";
    let posted = "posted usage = sum of the events, for each account, minute and SKU";
    let zero = "every ledger transaction sums to zero per currency";
    let balance = "every balance = fold of its entries";
    let gapless = "every outbox is in the ledger without a gap or a second bill for one request";
    let leased = "what every account and budget has leased = the sum of its leases";
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
        ("UPDATE billing_accounts SET leased_pico = leased_pico + 1", &[leased]),
        ("UPDATE fund_leases SET amount_pico = amount_pico + 1", &[leased]),
        ("UPDATE credit_grants SET amount_pico = 2000", &[grant]),
        ("UPDATE ship_state SET last_seq = 3", &[gapless]),
        (
            "UPDATE price_books SET canonical = replace(canonical, '0.000005', '0.000006')",
            &["every price book hashes to its address", derive, posted],
        ),
        ("INSERT INTO usage_duplicates VALUES ('e', 9, 'r', '{}')", &[gapless]),
    ];
    for (corruption, expected) in cases {
        let world = billed().await;
        unguard(&world).await;
        // A lease to corrupt.
        let _hold = world.billing.admit(request(1, 1)).await.unwrap();
        assert!(world.audit().await.is_clean());
        let changed = run(&world.database, corruption).await.expect(corruption);
        assert!(changed > 0, "{corruption}");
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
        ("INSERT INTO ledger_entries VALUES (99, 'customer:acme', 'USD', 5)", "foreign key"),
        ("UPDATE billing_accounts SET leased_pico = leased_pico + 1000000", "hard_cap"),
        ("UPDATE fund_leases SET amount_pico = -1", "check"),
    ] {
        let refused = run(&world.database, forgery).await.expect_err(forgery);
        let told = refused.to_string().to_lowercase();
        assert!(told.contains(refusal), "{forgery}: {refused}");
    }
    let mut tx = world.database.write().await.unwrap();
    let entries = "INSERT INTO ledger_entries VALUES (99, 'a', 'USD', 5), (99, 'b', 'USD', -4)";
    tx.execute(entries, &[]).await.unwrap();
    let unbalanced =
        tx.execute("INSERT INTO ledger_transactions VALUES (99, 'grant', 'acme', 0, '')", &[]).await;
    assert!(unbalanced.unwrap_err().to_string().contains("sum to zero"));
    tx.rollback().await.unwrap();
    world.assert_clean().await;
    assert_ne!(world.billing.balance(&account()).await.unwrap().leased, Money::ZERO);
}

on_both! {
    every_corruption_is_found,
    the_database_itself_refuses_a_forgery,
}
