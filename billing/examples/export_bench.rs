//! How fast a large ledger is exported, and in how much memory.
//!
//! ```text
//! cargo run --release -p sluice-billing --example export_bench -- DIR 10000000              makes DIR/ledger.db
//! cargo run --release -p sluice-billing --example export_bench -- DIR usage parquet         exports it, and says how
//! ```
//! The bills are made in SQL, priced exactly, and not posted: this measures exports and nothing else.
#![forbid(unsafe_code)]

use std::{path::Path, time::Instant};

use anyhow::{Context, bail};
use sluice_billing::{
    AccountId, AccountKind, Books, Database, DatabaseOptions, Dataset, ExportFilter, ExportOptions,
    ExportRange, Format, PriceBook, Raw,
};

const PRICES: &str = r#"
    currency = "USD"
    effective_from = "2026-01-01T00:00:00Z"
    price = [
        { model = "large", meter = "input", usd_per_million = "3" },
        { model = "large", meter = "cached_input", usd_per_million = "0.3" },
        { model = "large", meter = "output", usd_per_million = "15" },
    ]
"#;
const ACCOUNTS: usize = 20;
/// Bills of one transaction.
const STEP: i64 = 250_000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, rest @ ..] = &args[..] else { bail!("say a folder") };
    let url = format!("sqlite:{dir}/ledger.db");
    let options = DatabaseOptions { create: true, ..DatabaseOptions::default() };
    std::fs::create_dir_all(dir)?;
    let database = Database::open(&url, &options).await?;
    let books = Books::open(database.clone()).await?;
    match rest {
        [count] => fill(&books, &database, count.parse()?).await,
        [dataset, format] => export(&books, Path::new(dir), dataset, format).await,
        _ => bail!("say a count, or a dataset and a format"),
    }
}

async fn fill(books: &Books, database: &Database, count: i64) -> anyhow::Result<()> {
    let book = books.apply_price_book(&PriceBook::from_toml(PRICES)?).await?;
    for number in 0..ACCOUNTS {
        books.create_account(&AccountId::new(format!("account-{number:02}")), AccountKind::Prepaid).await?;
    }
    let began = Instant::now();
    let mut conn = database.write().await?;
    sql(&mut conn, "INSERT INTO ship_state VALUES ('bench', 'bench', 0)".to_owned()).await?;
    conn.commit().await?;
    for first in (1..=count).step_by(STEP as usize) {
        let last = (first + STEP - 1).min(count);
        let mut conn = database.write().await?;
        sql(&mut conn, bills(first, last, book.as_str())).await?;
        conn.commit().await?;
        eprintln!("{last} bills after {:.0?}", began.elapsed());
    }
    Ok(())
}

/// A statement that makes the bills of these ordinals: one day, 20 accounts, 200 keys, all quantities different.
fn bills(first: i64, last: i64, book: &str) -> String {
    format!(
        "WITH RECURSIVE n (n) AS (VALUES ({first}) UNION ALL SELECT n + 1 FROM n WHERE n < {last}), \
         q AS (SELECT n, 100 + n * 7919 % 4000 AS i, n * 104729 % 2000 AS c, 20 + n * 1299709 % 900 AS o FROM n) \
         INSERT INTO usage_events (request_id, epoch, seq, ordinal, account, org, project, api_key, end_user, model, \
         node, service_tier, input_tokens, cached_input_tokens, output_tokens, overrun_tokens, finish_reason, \
         time_to_first_token_ms, duration_ms, admitted_at_ms, price_book, cost_pico) \
         SELECT printf('01900000-0000-7000-8000-%012x', n), 'bench', n, n, printf('account-%02d', n % {ACCOUNTS}), \
         printf('org-%02d', n % {ACCOUNTS}), printf('project-%03d', n % 100), printf('key-%03d', n % 200), \
         printf('user-%04d', n % 5000), 'large', printf('node-%d', n % 8), 'default', i, c, o, 0, 'stop', \
         50 + n % 400, 500 + n % 9000, 1767225600000 + n * 8, '{book}', i * 3000000 + c * 300000 + o * 15000000 FROM q"
    )
}

async fn sql(tx: &mut sluice_billing::Tx, text: String) -> anyhow::Result<()> {
    let Raw::Sqlite(conn) = tx.raw() else { bail!("the bench fills SQLite") };
    sqlx::raw_sql(sqlx::AssertSqlSafe(text)).execute(conn).await?;
    Ok(())
}

async fn export(books: &Books, dir: &Path, dataset: &str, format: &str) -> anyhow::Result<()> {
    let out = dir.join(format!("{dataset}-{format}"));
    if out.exists() {
        std::fs::remove_dir_all(&out)?;
    }
    let options = ExportOptions {
        dir: out,
        dataset: Dataset::named(dataset).context("no such dataset")?,
        format: Format::named(format).context("no such format")?,
        filter: ExportFilter::default(),
        range: ExportRange::Next,
        part_rows: 250_000,
        provider: "Sluice".to_owned(),
        csv_guard: true,
    };
    let began = Instant::now();
    let manifest = books.export(options, |_| {}).await?.manifest.context("no manifest")?;
    let seconds = began.elapsed().as_secs_f64();
    let events = manifest.ranges[0].through as f64;
    let bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    let peak = std::fs::read_to_string("/proc/self/status")?;
    let peak = peak.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    println!(
        "{dataset} {format}: {} rows of {events} bills in {seconds:.1} s, {:.0} bills/s, {} MB in {} files, {peak}",
        manifest.rows,
        events / seconds,
        bytes / 1_000_000,
        manifest.files.len(),
    );
    Ok(())
}
