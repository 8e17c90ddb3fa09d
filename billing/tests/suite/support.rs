//! A world: one gateway's billing over real files in a temporary folder, and a real database: SQLite or PostgreSQL.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use sluice_billing::{
    AccountId, AccountKind, AdmitRequest, Audit, Billing, BillingError, BillingLimits, BillingOptions, Clock,
    CreditGrant, Database, DatabaseOptions, FinishReason, Media, Money, Outcome, PriceBook, Raw, RequestId,
    ServiceTier,
};
use tempfile::TempDir;
use time::{OffsetDateTime, macros::datetime};
use uuid::Uuid;

pub const START: OffsetDateTime = datetime!(2026-03-01 12:00 UTC);
pub const INPUT: i64 = 3;
pub const CACHED: i64 = 1;
pub const OUTPUT: i64 = 5;

/// Prices of 3, 1 and 5 pico-USD a token, and a model that is free.
pub const PRICES: &str = r#"
    currency = "USD"
    effective_from = "2026-01-01T00:00:00Z"
    price = [
        { model = "m", meter = "input", usd_per_million = "0.000003" },
        { model = "m", meter = "cached_input", usd_per_million = "0.000001" },
        { model = "m", meter = "output", usd_per_million = "0.000005" },
        { model = "free", meter = "input", usd_per_million = "0" },
        { model = "free", meter = "cached_input", usd_per_million = "0" },
        { model = "free", meter = "output", usd_per_million = "0" },
    ]
"#;

/// Limits under which nothing happens by itself: bills are shipped when a test says so, leases are exact.
pub fn limits() -> BillingLimits {
    BillingLimits {
        hold_output_tokens: 4,
        lease_slice: Money::ZERO,
        ship_linger: Duration::from_secs(3600),
        refresh: Duration::from_secs(3600),
        ..BillingLimits::default()
    }
}

pub struct World {
    pub dir: TempDir,
    pub database: Database,
    pub url: String,
    pub billing: Billing,
    pub limits: BillingLimits,
    /// Seconds since START.
    pub elapsed_s: Arc<AtomicI64>,
}

pub fn account() -> AccountId {
    AccountId::new("acme")
}

pub fn pico(amount: i64) -> Money {
    Money::from_pico(amount)
}

/// How long a connection waits for another writer, where a test is not about waiting.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Where a world keeps its books.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Sqlite,
    Postgres,
}

tokio::task_local! {
    pub static KIND: Kind;
}

/// Makes two tests of each function: one with SQLite, one with PostgreSQL.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                $crate::support::KIND.scope($crate::support::Kind::Sqlite, super::$name()).await;
            })*
        }
        mod postgres {
            $(#[tokio::test]
            async fn $name() {
                $crate::support::KIND.scope($crate::support::Kind::Postgres, super::$name()).await;
            })*
        }
    };
}
pub(crate) use on_both;

pub fn kind() -> Kind {
    KIND.try_with(|kind| *kind).unwrap_or(Kind::Sqlite)
}

pub fn file_url(path: &Path) -> String {
    format!("sqlite:{}", path.display())
}

pub async fn open_url(url: &str, patience: Duration) -> Database {
    let options = DatabaseOptions { connections_max: 4, wait_max: patience, create: true };
    Database::open(url, &options).await.expect("the database opens")
}

/// The server that the tests may make databases on.
pub fn postgres_server() -> String {
    std::env::var("SLUICE_TEST_POSTGRES").expect(
        "SLUICE_TEST_POSTGRES names a PostgreSQL server: run ./tests/run, which starts one, or `tests/postgres start DIR`",
    )
}

/// The file, or an empty database on the server that SLUICE_TEST_POSTGRES names.
async fn new_url(dir: &TempDir) -> String {
    if kind() == Kind::Sqlite {
        return file_url(&dir.path().join("ledger.db"));
    }
    let server = postgres_server();
    let name = format!("t{}", Uuid::now_v7().simple());
    let admin = open_url(&server, PATIENCE).await;
    run(&admin, &format!("CREATE DATABASE {name}")).await.expect("a database");
    admin.close().await.expect("closed");
    server.replacen("/postgres?", &format!("/{name}?"), 1)
}

/// Runs a statement that is put together here, and returns how many rows it changed.
pub async fn run(database: &Database, sql: &str) -> Result<u64, sqlx::Error> {
    let mut conn = database.read().await?;
    let sql = sqlx::AssertSqlSafe(sql.to_owned());
    Ok(match conn.raw() {
        Raw::Sqlite(conn) => sqlx::raw_sql(sql).execute(conn).await?.rows_affected(),
        Raw::Postgres(conn) => sqlx::raw_sql(sql).execute(conn).await?.rows_affected(),
    })
}

pub fn request(input_tokens: u64, output_tokens_max: u64) -> AdmitRequest {
    AdmitRequest {
        request_id: RequestId::new(Uuid::now_v7()),
        account: account(),
        org: "org".into(),
        project: "project".into(),
        api_key: "key".into(),
        user: String::new(),
        model: "m".into(),
        service_tier: ServiceTier::Default,
        input_tokens,
        output_tokens_max,
        media_max: Media::default(),
        admitted_at: START,
    }
}

pub fn outcome(input_tokens: u64, cached_input_tokens: u64, output_tokens: u64) -> Outcome {
    Outcome {
        input_tokens,
        cached_input_tokens,
        output_tokens,
        reasoning_tokens: 0,
        media: Media::default(),
        finish_reason: FinishReason::Stop,
        node: "node-0".into(),
        time_to_first_token_ms: Some(7),
        duration_ms: 70,
    }
}

impl World {
    /// An empty world with prices and one prepaid account that has `credit` pico-USD.
    pub async fn with(credit: i64, limits: BillingLimits) -> World {
        World::patient(credit, limits, PATIENCE).await
    }

    pub async fn patient(credit: i64, limits: BillingLimits, patience: Duration) -> World {
        let dir = TempDir::new().expect("a temporary folder");
        let url = new_url(&dir).await;
        let world = World::open_with(dir, url, limits, patience).await.expect("billing opens");
        let book = PriceBook::from_toml(PRICES).expect("the prices are valid");
        world.billing.apply_price_book(&book).await.expect("prices apply");
        world.billing.create_account(&account(), AccountKind::Prepaid).await.expect("the account is new");
        if credit > 0 {
            world.credit(credit).await;
        }
        world
    }

    pub async fn new(credit: i64) -> World {
        World::with(credit, limits()).await
    }

    pub async fn open_in(dir: TempDir, limits: BillingLimits) -> Result<World, BillingError> {
        let url = file_url(&dir.path().join("ledger.db"));
        World::open_with(dir, url, limits, PATIENCE).await
    }

    pub async fn open_with(
        dir: TempDir,
        url: String,
        limits: BillingLimits,
        patience: Duration,
    ) -> Result<World, BillingError> {
        let database = open_url(&url, patience).await;
        let elapsed_s = Arc::new(AtomicI64::new(0));
        let outbox = dir.path().join("outbox.db");
        let billing = open(&database, outbox, limits.clone(), &elapsed_s).await?;
        Ok(World { dir, url, database, billing, limits, elapsed_s })
    }

    pub async fn credit(&self, amount: i64) {
        let grant = CreditGrant {
            id: Uuid::now_v7(),
            account: account(),
            amount: pico(amount),
            memo: "test".into(),
            granted_at: START,
        };
        self.billing.credit(&grant).await.expect("credit is posted");
    }

    /// The files as a power cut would leave them now.
    pub fn image(&self) -> TempDir {
        let image = TempDir::new().expect("a temporary folder");
        if self.database.path().is_some() {
            copy(self.dir.path(), image.path(), "ledger.db");
        }
        copy(self.dir.path(), image.path(), "outbox.db");
        image
    }

    /// The power is cut, and the server starts again. PostgreSQL is on another machine, and goes on.
    pub async fn crash(self) -> World {
        let image = self.image();
        self.reopen(image).await
    }

    /// An orderly end, and a new start.
    pub async fn restart(self) -> World {
        let World { dir, url, database, limits, .. } = self;
        database.close().await.expect("the database closes");
        World::open_with(dir, url, limits, PATIENCE).await.expect("billing opens again")
    }

    /// Starts again with the files in `image`.
    pub async fn reopen(self, image: TempDir) -> World {
        let url = match self.database.path() {
            Some(_) => file_url(&image.path().join("ledger.db")),
            None => self.url.clone(),
        };
        World::open_with(image, url, self.limits.clone(), PATIENCE).await.expect("billing recovers")
    }

    /// Sets the clock of this world's gateway.
    pub fn set_now(&self, now: OffsetDateTime) {
        self.elapsed_s.store((now - START).whole_seconds(), Ordering::Relaxed);
    }

    pub async fn audit(&self) -> Audit {
        self.billing.books().audit().await.expect("the audit runs")
    }

    pub async fn assert_clean(&self) {
        let audit = self.audit().await;
        assert!(audit.is_clean(), "{audit:#?}");
        let stats = self.billing.stats();
        let ended = stats.settled + stats.voided + stats.expired + stats.stranded;
        assert_eq!(stats.admitted, ended + stats.holds_open, "{stats:?}");
    }

    /// Ships everything and returns the account's posted balance.
    pub async fn posted(&self) -> i64 {
        self.billing.flush().await.expect("bills are shipped");
        self.billing.balance(&account()).await.expect("the account exists").posted.pico()
    }
}

pub async fn open(
    database: &Database,
    outbox_path: PathBuf,
    limits: BillingLimits,
    elapsed_s: &Arc<AtomicI64>,
) -> Result<Billing, BillingError> {
    let elapsed_s = elapsed_s.clone();
    let clock =
        Clock::new(move || START + Duration::from_secs(elapsed_s.load(Ordering::Relaxed).unsigned_abs()));
    let options =
        BillingOptions { database: database.clone(), outbox_path, gateway: "gateway-0".into(), limits };
    Billing::open_at(options, clock).await
}

/// Copies a SQLite file with its log.
pub fn copy(from: &Path, to: &Path, name: &str) {
    for suffix in ["", "-wal"] {
        let file = format!("{name}{suffix}");
        if from.join(&file).exists() {
            std::fs::copy(from.join(&file), to.join(&file)).expect("the file copies");
        } else {
            std::fs::remove_file(to.join(&file)).ok();
        }
    }
}
