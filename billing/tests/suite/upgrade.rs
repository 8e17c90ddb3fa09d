//! Books that an older version kept are brought up to date with all that is in them.

use sluice_billing::{Books, Money, PriceBook, Raw, UsageQuery};
use sqlx::migrate::Migrator;
use tempfile::TempDir;

use crate::support::*;

/// What the first version wrote: a grant, a bill of 10 input and 4 output tokens, a lease.
const FIRST: [&str; 9] = [
    "INSERT INTO billing_accounts (id, kind, credit_limit_pico, posted_pico, leased_pico) VALUES ('acme', 'prepaid', 0, 950, 7)",
    "INSERT INTO ledger_entries VALUES (1, 'customer:acme', 'USD', 1000), (1, 'funding', 'USD', -1000)",
    "INSERT INTO ledger_transactions VALUES (1, 'grant', 'acme', 5, '00000000-0000-0000-0000-000000000001')",
    "INSERT INTO credit_grants VALUES ('00000000-0000-0000-0000-000000000001', 'acme', 1000, 'first', 5, 1)",
    "INSERT INTO ledger_entries VALUES (2, 'customer:acme', 'USD', -50), (2, 'revenue:m.input', 'USD', 30), (2, 'revenue:m.output', 'USD', 20)",
    "INSERT INTO ledger_transactions VALUES (2, 'usage', 'acme', 1772366400, 'e:1-1')",
    "INSERT INTO ship_state VALUES ('e', 'gateway-0', 1)",
    "INSERT INTO leases VALUES ('e', 'acme', 'gateway-0', 7, 9999999999)",
    "INSERT INTO usage_rollups_1d VALUES ('2026-03-01', 'acme', 'org', 'project', 'key', 'm', 1, 10, 0, 4, 50)",
];

#[tokio::test]
async fn the_first_ledger_is_brought_up_to_date_and_audits_clean() {
    let dir = TempDir::new().expect("a folder");
    let database = open_url(&file_url(&dir.path().join("ledger.db")), PATIENCE).await;
    let first = dir.path().join("first");
    std::fs::create_dir(&first).expect("made");
    let name = "1001_ledger.sql";
    let migrations = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations/sqlite");
    std::fs::copy(migrations.join(name), first.join(name)).expect("copied");
    let mut migrator = Migrator::new(first).await.expect("migrations");
    migrator.dangerous_set_table_name("_billing_migrations");
    let mut conn = database.read().await.expect("a connection");
    let Raw::Sqlite(sqlite) = conn.raw() else { panic!("it is SQLite") };
    migrator.run_direct(None, sqlite, false).await.expect("the first tables");
    drop(conn);
    let book = PriceBook::from_toml(PRICES).expect("valid");
    let (hash, canonical) = (book.hash(), book.canonical());
    run(
        &database,
        &format!(
            "INSERT INTO price_books (hash, effective_from_s, canonical) VALUES ('{hash}', 0, '{canonical}')"
        ),
    )
    .await
    .expect("a book");
    for statement in FIRST {
        // A transaction's entries come before the row that they refer to.
        let statement = format!("PRAGMA foreign_keys = OFF; {statement}; PRAGMA foreign_keys = ON");
        run(&database, &statement).await.expect("it was valid then");
    }
    let event = format!(
        "INSERT INTO usage_events (request_id, epoch, seq, account, org, project, api_key, end_user, model, node, input_tokens, \
         cached_input_tokens, output_tokens, overrun_tokens, finish_reason, duration_ms, admitted_at_ms, price_book, cost_pico) \
         VALUES ('r', 'e', 1, 'acme', 'org', 'project', 'key', '', 'm', 'n', 10, 0, 4, 0, 'stop', 9, 1772366400123, '{hash}', 50)"
    );
    run(&database, &event).await.expect("it was valid then");

    let books = Books::open(database).await.expect("it is brought up to date");
    let audit = books.audit().await.expect("the audit runs");
    assert!(audit.is_clean(), "{audit:#?}");
    let balance = books.balance(&account()).await.expect("the account");
    assert_eq!((balance.posted, balance.leased), (pico(950), pico(7)));
    let usage = books.usage(&UsageQuery::default()).await.expect("usage");
    assert_eq!((usage[0].requests, usage[0].cost.to_money()), (1, Some(Money::from_pico(50))));
}
