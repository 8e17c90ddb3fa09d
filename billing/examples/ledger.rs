//! How many requests a second one gateway can bill, beside what the disk allows: `tests/bench/run ledger` runs it.
//!
//! Everything is on: an account, hard budgets of the organisation, the project and each key, bills durable before they
//! are answered, the shipper working beside, an audit at the end. The floor is measured in the same run: 4 KiB and an
//! fdatasync, again and again, in the same folder.

use std::{
    error::Error,
    fs::File,
    io::{Seek, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use sluice_billing::{
    AccountId, AccountKind, AdmitRequest, Billing, BillingLimits, BillingOptions, Budget, BudgetPeriod,
    BudgetScope, CreditGrant, Database, DatabaseOptions, FinishReason, Money, Outcome, PICO_PER_USD,
    PriceBook, Raw, RequestId, ServiceTier,
};
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use uuid::Uuid;

const USAGE: &str = "\
ledger [OPTIONS]
  --dir DIR          where the files are written, and the floor is measured [the system's folder for temporary files]
  --postgres URL     measure a database made on this server too
  --seconds N        time for each measurement [5]
  --clients N        requests in flight [64]
  --backlog N        bills that are shipped at once [20000]";

const KEYS: u64 = 16;
const FLOOR_BYTES: usize = 4096;
const PROMPT_TOKENS: u64 = 500;
const ANSWER_TOKENS: u64 = 200;
const PRICES: &str = r#"
    currency = "USD"
    effective_from = "2026-01-01T00:00:00Z"
    price = [
        { model = "m", meter = "input", usd_per_million = "0.40" },
        { model = "m", meter = "cached_input", usd_per_million = "0.04" },
        { model = "m", meter = "output", usd_per_million = "2.20" },
    ]
"#;

type Outcomes<T> = Result<T, Box<dyn Error + Send + Sync>>;

struct Options {
    dir: PathBuf,
    postgres: Option<String>,
    duration: Duration,
    clients: u64,
    backlog: u64,
}

impl Options {
    fn parse() -> Outcomes<Options> {
        let mut options = Options {
            dir: std::env::temp_dir(),
            postgres: None,
            duration: Duration::from_secs(5),
            clients: 64,
            backlog: 20_000,
        };
        let mut args = std::env::args().skip(1);
        while let Some(name) = args.next() {
            let value = args.next().ok_or(USAGE)?;
            let number = || value.parse::<u64>().map_err(|_| format!("{name}: {value:?} is no number"));
            match name.as_str() {
                "--dir" => options.dir = PathBuf::from(value),
                "--postgres" => options.postgres = Some(value),
                "--seconds" => options.duration = Duration::from_secs(number()?.max(1)),
                "--clients" => options.clients = number()?.max(1),
                "--backlog" => options.backlog = number()?.max(1),
                _ => return Err(USAGE.into()),
            }
        }
        Ok(options)
    }
}

/// What one database achieved.
struct Measured {
    name: &'static str,
    settled_per_s: f64,
    settle_ms_p50: f64,
    settle_ms_p99: f64,
    commits_per_s: f64,
    bills_per_commit: f64,
    shipped_beside_per_s: f64,
    shipped_alone_per_s: f64,
    audited: u64,
}

#[tokio::main]
async fn main() -> Outcomes<()> {
    if std::env::args().any(|arg| arg == "--help" || arg == "-h") {
        println!("{USAGE}");
        return Ok(());
    }
    let options = Options::parse()?;
    let floor_per_s = floor(&options.dir, options.duration)?;
    let mut measured = vec![measure("SQLite", None, &options).await?];
    if let Some(server) = &options.postgres {
        measured.push(measure("PostgreSQL", Some(server), &options).await?);
    }
    print(floor_per_s, &options, &measured);
    Ok(())
}

/// How often a second this disk makes 4 KiB durable, one after the other.
fn floor(dir: &Path, duration: Duration) -> Outcomes<f64> {
    let mut file: File = tempfile::tempfile_in(dir)?;
    let (page, begun) = ([7; FLOOR_BYTES], Instant::now());
    let mut count = 0;
    while begun.elapsed() < duration {
        // The outbox's log is overwritten from its start too: a file that grows costs more.
        file.seek(std::io::SeekFrom::Start(count % 1_000 * FLOOR_BYTES as u64))?;
        file.write_all(&page)?;
        file.sync_data()?;
        count += 1;
    }
    Ok(count as f64 / begun.elapsed().as_secs_f64())
}

async fn measure(name: &'static str, server: Option<&String>, options: &Options) -> Outcomes<Measured> {
    let folder = TempDir::new_in(&options.dir)?;
    let billing = open(&folder, server, BillingLimits::default()).await?;
    let begun = Instant::now();
    let mut settle_times = settle_for(&billing, options).await?;
    let elapsed_s = begun.elapsed().as_secs_f64();
    let stats = billing.stats();
    billing.flush().await?;
    let shipped_s = begun.elapsed().as_secs_f64();
    let audited = audit(&billing).await?;
    billing.close().await?;

    let patient = BillingLimits {
        ship_linger: Duration::from_secs(3600),
        outbox_events_max: options.backlog + options.clients,
        ..BillingLimits::default()
    };
    let folder = TempDir::new_in(&options.dir)?;
    let billing = open(&folder, server, patient).await?;
    settle_many(&billing, options).await?;
    let begun = Instant::now();
    let waiting = billing.stats().outbox_backlog;
    billing.flush().await?;
    let shipped_alone_per_s = waiting as f64 / begun.elapsed().as_secs_f64();
    audit(&billing).await?;
    billing.close().await?;

    settle_times.sort_unstable();
    let ms_at = |part: f64| settle_times[(settle_times.len() as f64 * part) as usize].as_secs_f64() * 1e3;
    Ok(Measured {
        name,
        settled_per_s: settle_times.len() as f64 / elapsed_s,
        settle_ms_p50: ms_at(0.50),
        settle_ms_p99: ms_at(0.99),
        commits_per_s: stats.outbox_commits as f64 / elapsed_s,
        bills_per_commit: stats.settled as f64 / stats.outbox_commits as f64,
        shipped_beside_per_s: settle_times.len() as f64 / shipped_s,
        shipped_alone_per_s,
        audited,
    })
}

/// Books with prices, one account and budgets that all apply, empty at first.
async fn open(folder: &TempDir, server: Option<&String>, limits: BillingLimits) -> Outcomes<Billing> {
    let options = DatabaseOptions { create: true, ..DatabaseOptions::default() };
    let url = match server {
        None => format!("sqlite:{}", folder.path().join("ledger.db").display()),
        Some(server) => {
            let name = format!("bench_{}", Uuid::now_v7().simple());
            let admin = Database::open(server, &options).await?;
            let statement = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
            match admin.read().await?.raw() {
                Raw::Postgres(conn) => sqlx::raw_sql(statement).execute(conn).await?,
                Raw::Sqlite(_) => return Err("--postgres takes a postgres:// URL".into()),
            };
            let (before, after) =
                server.split_at(server.find("/postgres?").ok_or("the URL names /postgres?")?);
            format!("{before}/{name}{}", &after["/postgres".len()..])
        }
    };
    let database = Database::open(&url, &options).await?;
    let outbox_path = folder.path().join("outbox.db");
    let billing =
        Billing::open(BillingOptions { database, outbox_path, gateway: "bench".into(), limits }).await?;
    billing.apply_price_book(&PriceBook::from_toml(PRICES)?).await?;
    let account = AccountId::new("acme");
    billing.create_account(&account, AccountKind::Prepaid).await?;
    let amount = Money::from_pico(1_000_000 * PICO_PER_USD);
    let (id, memo, granted_at) = (Uuid::now_v7(), "bench".to_owned(), OffsetDateTime::now_utc());
    billing.credit(&CreditGrant { id, account, amount, memo, granted_at }).await?;
    let keys = (0..KEYS).map(|number| (BudgetScope::Key, format!("key-{number}")));
    let scopes = [(BudgetScope::Org, "org".to_owned()), (BudgetScope::Project, "project".to_owned())];
    for (scope, scope_id) in scopes.into_iter().chain(keys) {
        let (id, period, hard) = (format!("of-{scope_id}"), BudgetPeriod::Month, true);
        let thresholds = vec![50, 80, 100];
        billing.put_budget(&Budget { id, scope, scope_id, period, limit: amount, hard, thresholds }).await?;
    }
    Ok(billing)
}

/// Clients that are admitted and settled for as long as the measurement lasts; how long each settling took.
async fn settle_for(billing: &Billing, options: &Options) -> Outcomes<Vec<Duration>> {
    let until = Instant::now() + options.duration;
    let mut clients = JoinSet::new();
    for client in 0..options.clients {
        let billing = billing.clone();
        clients.spawn(async move {
            let mut times = Vec::new();
            while Instant::now() < until {
                times.push(bill(&billing, client).await?);
            }
            Outcomes::Ok(times)
        });
    }
    Ok(clients.join_all().await.into_iter().collect::<Outcomes<Vec<_>>>()?.concat())
}

async fn settle_many(billing: &Billing, options: &Options) -> Outcomes<()> {
    let mut clients = JoinSet::new();
    for client in 0..options.clients {
        let (billing, bills) = (billing.clone(), options.backlog.div_ceil(options.clients));
        clients.spawn(async move {
            for _ in 0..bills {
                bill(&billing, client).await?;
            }
            Outcomes::Ok(())
        });
    }
    clients.join_all().await.into_iter().collect()
}

/// One request from admission to its durable bill; how long the latter took.
async fn bill(billing: &Billing, client: u64) -> Outcomes<Duration> {
    let request = AdmitRequest {
        media_max: Default::default(),
        request_id: RequestId::new(Uuid::now_v7()),
        account: AccountId::new("acme"),
        org: "org".to_owned(),
        project: "project".to_owned(),
        api_key: format!("key-{}", client % KEYS),
        user: "user".to_owned(),
        model: "m".to_owned(),
        service_tier: ServiceTier::Default,
        input_tokens: PROMPT_TOKENS,
        output_tokens_max: ANSWER_TOKENS,
        admitted_at: OffsetDateTime::now_utc(),
    };
    let hold = billing.admit(request).await?;
    let begun = Instant::now();
    let outcome = Outcome {
        media: Default::default(),
        reasoning_tokens: 0,
        input_tokens: PROMPT_TOKENS,
        cached_input_tokens: 0,
        output_tokens: ANSWER_TOKENS,
        finish_reason: FinishReason::Stop,
        node: "node".to_owned(),
        time_to_first_token_ms: Some(50),
        duration_ms: 900,
    };
    hold.settle(outcome).await?;
    Ok(begun.elapsed())
}

/// How many things were checked; an error if one of them is not true.
async fn audit(billing: &Billing) -> Outcomes<u64> {
    let audit = billing.books().audit().await?;
    if !audit.is_clean() {
        return Err(format!("the books do not balance: {audit:#?}").into());
    }
    Ok(audit.checks.iter().map(|check| check.checked).sum())
}

fn print(floor_per_s: f64, options: &Options, measured: &[Measured]) {
    let Options { clients, duration, backlog, .. } = options;
    println!("One gateway, {clients} requests in flight, {} s for each figure.", duration.as_secs());
    println!("Floor: {floor_per_s:.0} times 4 KiB + fdatasync a second, one after the other.\n");
    let row = |what: &str, figure: &dyn Fn(&Measured) -> String| {
        let figures: Vec<String> = measured.iter().map(figure).collect();
        println!("| {what} | {} |", figures.join(" | "));
    };
    row("", &|m| m.name.to_owned());
    row("---", &|_| "---:".to_owned());
    row("settled requests/s, durable, budgets on, shipping beside", &|m| format!("{:.0}", m.settled_per_s));
    row("times the floor", &|m| format!("{:.2}", m.settled_per_s / floor_per_s));
    row("outbox commits/s (an fsync each)", &|m| format!("{:.0}", m.commits_per_s));
    row("of the floor", &|m| format!("{:.2}", m.commits_per_s / floor_per_s));
    row("bills that shared a commit", &|m| format!("{:.1}", m.bills_per_commit));
    row("settle, median / 99th percentile, ms", &|m| {
        format!("{:.1} / {:.1}", m.settle_ms_p50, m.settle_ms_p99)
    });
    row("billed and in the ledger, requests/s", &|m| format!("{:.0}", m.shipped_beside_per_s));
    row(&format!("a backlog of {backlog} shipped, events/s"), &|m| format!("{:.0}", m.shipped_alone_per_s));
    row("audit: things checked, all true", &|m| m.audited.to_string());
}
