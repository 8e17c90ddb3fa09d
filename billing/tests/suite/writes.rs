//! The process dies after its n-th statement, for every n until it comes to its end. What was answered is billed, once;
//! nothing else changed; and the next process goes on from there.
//!
//! The dying process is this test itself, started again. It counts the statements that sqlx reports to `tracing`, of the
//! ledger as of the outbox, and aborts in the middle of whatever else it does. A commit lies between two statements, so
//! both sides of every commit are visited.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
};

use sluice_billing::{Billing, Budget, BudgetPeriod, BudgetScope, CreditGrant, Money};
use tempfile::TempDir;
use tracing::{Event, Metadata, Subscriber, span};
use uuid::Uuid;

use crate::support::*;

/// In the environment of a process that is to die: after how many statements, and where its books are.
const DIES_AFTER: &str = "SLUICE_TEST_DIES_AFTER";
const URL: &str = "SLUICE_TEST_DIES_URL";
const OUTBOX: &str = "SLUICE_TEST_DIES_OUTBOX";

const CREDIT: i64 = 10_000;
/// So many bills at once are one stream to PostgreSQL (COPY), fewer are single statements.
const MANY: usize = 9;
/// Less than this would mean that nothing is counted.
const STATEMENTS_MIN: u64 = 60;

/// Ends the process after so many statements.
struct Countdown {
    left: AtomicU64,
}

impl Subscriber for Countdown {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "sqlx::query"
    }

    fn event(&self, _statement: &Event<'_>) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            std::process::abort();
        }
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// Everything that writes: a grant, a budget, leases, bills alone and in a group, and their way to the ledger. `answer` is
/// told each bill that is durable.
async fn work(billing: &Billing, answer: impl Fn(Uuid)) {
    let grant = CreditGrant {
        id: Uuid::from_u128(7),
        account: account(),
        amount: pico(500),
        memo: "once, however often".into(),
        granted_at: START,
    };
    billing.credit(&grant).await.expect("credit is posted");
    let budget = Budget {
        id: "of-key".into(),
        scope: BudgetScope::Key,
        scope_id: "key".into(),
        period: BudgetPeriod::Total,
        limit: pico(CREDIT),
        hard: true,
        thresholds: vec![50],
    };
    billing.put_budget(&budget).await.expect("the budget is made");

    let mut alone = billing.admit(request(10, 9)).await.expect("there is money");
    let left_open = billing.admit(request(3, 2)).await.expect("there is money");
    alone.extend(9).await;
    answer(alone.settle(outcome(10, 0, 9)).await.expect("a durable bill").request_id.uuid());
    billing.flush().await.expect("bills are shipped");
    drop(left_open);

    let mut holds = Vec::new();
    for _ in 0..MANY {
        holds.push(billing.admit(request(5, 4)).await.expect("there is money"));
    }
    let mut settling = tokio::task::JoinSet::new();
    for hold in holds {
        settling.spawn(hold.settle(outcome(2, 3, 4)));
    }
    for settled in settling.join_all().await {
        answer(settled.expect("a durable bill").request_id.uuid());
    }
    billing.close().await.expect("billing closes");
}

async fn die(statements: u64) {
    let set = |name: &str| std::env::var(name).expect("whoever wants this process to die says where");
    let countdown = Countdown { left: AtomicU64::new(statements) };
    tracing::subscriber::set_global_default(countdown).expect("nobody else listens");
    let database = open_url(&set(URL), PATIENCE).await;
    let outbox = PathBuf::from(set(OUTBOX));
    let billing = open(&database, outbox, limits(), &Default::default()).await.expect("billing opens");
    work(&billing, |request_id| println!("\nbilled {request_id}")).await;
    println!("came to its end");
}

/// The books of a world that was closed, as files or as a database that others are copied from.
struct Template {
    dir: TempDir,
    url: String,
}

impl Template {
    async fn make() -> Template {
        let World { dir, url, billing, database, .. } = World::new(CREDIT).await;
        billing.close().await.expect("billing closes");
        drop(billing);
        database.close().await.expect("the database closes");
        Template { dir, url }
    }

    async fn copy(&self) -> (TempDir, String) {
        let dir = TempDir::new().expect("a temporary folder");
        copy(self.dir.path(), dir.path(), "outbox.db");
        if kind() == Kind::Sqlite {
            copy(self.dir.path(), dir.path(), "ledger.db");
            let url = file_url(&dir.path().join("ledger.db"));
            return (dir, url);
        }
        // scheme://host/NAME?host=folder
        let name_of = |url: &str| {
            let path = url.splitn(4, '/').nth(3).expect("a database");
            path.split('?').next().expect("split has a first part").to_owned()
        };
        let (template, name) = (name_of(&self.url), format!("t{}", Uuid::now_v7().simple()));
        let admin = open_url(&postgres_server(), PATIENCE).await;
        run(&admin, &format!("CREATE DATABASE {name} TEMPLATE {template}")).await.expect("a copy");
        admin.close().await.expect("closed");
        (dir, self.url.replacen(&template, &name, 1))
    }
}

/// Lets a process die after so many statements, and looks at what it left. True: it came to its end before.
async fn dies_after(statements: u64, template: &Template) -> bool {
    let (dir, url) = template.copy().await;
    let (kind, outbox) = (format!("{:?}", kind()).to_lowercase(), dir.path().join("outbox.db"));
    let mut command = Command::new(std::env::current_exe().expect("a running test has a path"));
    command
        .arg(format!("writes::{kind}::each_statement_can_be_the_last"))
        .args(["--exact", "--nocapture"])
        .env(DIES_AFTER, statements.to_string())
        .env(URL, &url)
        .env(OUTBOX, &outbox)
        .stderr(Stdio::null());
    let died = tokio::task::spawn_blocking(move || command.output()).await.expect("waiting does not panic");
    let died = died.expect("this test can be started again");
    let said = String::from_utf8_lossy(&died.stdout).into_owned();
    let ended = said.contains("came to its end");
    assert_eq!(died.status.success(), ended, "after {statements} statements: {}: {said}", died.status);
    let answered: BTreeSet<&str> = said.lines().filter_map(|line| line.strip_prefix("billed ")).collect();

    let world = World::open_with(dir, url, limits(), PATIENCE).await.expect("billing recovers");
    let balance = world.billing.balance(&account()).await.expect("the account exists");
    assert_eq!(balance.leased, Money::ZERO, "after {statements} statements: what was leased is back");
    let billed: Vec<(String,)> = {
        let mut conn = world.database.read().await.expect("the database answers");
        conn.fetch_all("SELECT request_id FROM usage_events", &[]).await.expect("bills")
    };
    let billed: BTreeSet<&str> = billed.iter().map(|(id,)| id.as_str()).collect();
    assert!(answered.is_subset(&billed), "after {statements} statements: {answered:?} of {billed:?}");
    world.assert_clean().await;
    // Whoever comes next can do all of it, and what was done is not done again.
    work(&world.billing, |_| ()).await;
    world.assert_clean().await;
    let again = world.billing.balance(&account()).await.expect("the account exists");
    let bills = (billed.len() + 1 + MANY) as i64;
    let each_of_many = 2 * INPUT + 3 * CACHED + 4 * OUTPUT;
    let alone = 10 * INPUT + 9 * OUTPUT;
    let times = if billed.is_empty() { 1 } else { 2 };
    assert_eq!(again.posted, pico(CREDIT + 500 - times * alone - (bills - times) * each_of_many));
    ended
}

async fn each_statement_can_be_the_last() {
    if let Ok(statements) = std::env::var(DIES_AFTER) {
        return die(statements.parse().expect("a number of statements")).await;
    }
    let template = Template::make().await;
    let mut statements = 1;
    loop {
        let next = |more| dies_after(statements + more, &template);
        let ends = tokio::join!(next(0), next(1), next(2), next(3));
        statements += 4;
        if ends.0 {
            break;
        }
    }
    println!("died after each of {} statements", statements - 5);
    assert!(statements > STATEMENTS_MIN, "only {statements} statements were counted");
}

on_both! { each_statement_can_be_the_last }
