//! Delivery by several gateways over one database, SQLite and PostgreSQL: each event once, none lost when one dies.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, extract::State, routing::post};
use sluice_billing::{
    AccountId, AccountKind, Books, Database, DatabaseOptions,
    notice::{self, Notice, NoticeKind},
};
use sluice_gateway::{
    auth::Tenancy,
    config::Config,
    store,
    webhooks::{
        DeliveryQuery, DeliveryState, EndpointDraft, Secret, WebhookSettings, Webhooks, store as endpoints,
    },
};
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::{net::TcpListener, sync::Semaphore, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const ORG: &str = "org-1";
const ACCOUNT: &str = "acct-1";
const PATIENCE: Duration = Duration::from_secs(60);

fn settings() -> WebhookSettings {
    WebhookSettings {
        allow_private_addresses: true,
        allow_http: true,
        poll_interval_ms: 5,
        ..WebhookSettings::default()
    }
}

/// A platform's database with one organisation, and a receiver that counts.
struct Platform {
    database: Database,
    receiver: Receiver,
    _folder: TempDir,
}

/// How often each event has come, and how many may be answered.
#[derive(Clone)]
struct Receiver {
    url: String,
    seen: Arc<Mutex<BTreeMap<String, u64>>>,
    answers: Arc<Semaphore>,
}

impl Receiver {
    async fn start() -> Receiver {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/hook", listener.local_addr().expect("an address"));
        let (seen, answers) = (Arc::default(), Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)));
        let receiver = Receiver { url, seen, answers };
        let router = Router::new().route("/hook", post(Receiver::take)).with_state(receiver.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.expect("it serves") });
        receiver
    }

    async fn take(State(receiver): State<Receiver>, body: String) {
        let body: serde_json::Value = serde_json::from_str(&body).expect("the body is JSON");
        let id = body["id"].as_str().expect("an id").to_owned();
        *receiver.seen.lock().expect("the count").entry(id).or_default() += 1;
        receiver.answers.acquire().await.expect("open").forget();
    }

    fn seen(&self) -> Vec<u64> {
        self.seen.lock().expect("the count").values().copied().collect()
    }
}

impl Platform {
    async fn start(database_url: Option<String>) -> Platform {
        let folder = tempfile::tempdir().expect("a folder");
        let config = Config { data_dir: folder.path().to_owned(), database_url, ..Config::default() };
        let database = store::open(&config, true).await.expect("a database");
        let books = Books::open(database.clone()).await.expect("books");
        books.create_account(&AccountId::new(ACCOUNT), AccountKind::Prepaid).await.expect("an account");
        Tenancy::new(database.clone()).ensure_org(ORG, "Org", ACCOUNT).await.expect("an organisation");
        let receiver = Receiver::start().await;
        let draft = EndpointDraft {
            org_id: ORG.into(),
            account: ACCOUNT.into(),
            url: receiver.url.clone(),
            ..EndpointDraft::default()
        };
        endpoints::create(&database, &settings(), &draft, endpoints::now_ms()).await.expect("an endpoint");
        Platform { database, receiver, _folder: folder }
    }

    fn gateway(&self, stop: &CancellationToken) -> JoinHandle<()> {
        self.gateway_with(settings(), stop)
    }

    fn gateway_with(&self, settings: WebhookSettings, stop: &CancellationToken) -> JoinHandle<()> {
        let webhooks = Webhooks::new(self.database.clone(), settings).expect("the settings are valid");
        tokio::spawn(webhooks.run(stop.clone()))
    }

    async fn raise(&self, number: usize) {
        let mut tx = self.database.write().await.expect("a transaction");
        notice::raise(&mut tx, &numbered(number)).await.expect("a notice");
        tx.commit().await.expect("committed");
    }

    async fn delivered(&self, count: usize) {
        let delivered = async {
            loop {
                let query = DeliveryQuery {
                    org_id: ORG,
                    state: Some(DeliveryState::Delivered),
                    endpoint_id: None,
                    after: None,
                    limit: 1000,
                };
                let found = endpoints::deliveries(&self.database, &query).await.expect("deliveries");
                if found.len() == count {
                    return;
                }
                assert!(found.len() < count, "{} are delivered of {count}", found.len());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, delivered).await.expect("everything is delivered in the end");
    }
}

fn numbered(number: usize) -> Notice {
    Notice {
        kind: NoticeKind::INVOICE_READY,
        account: AccountId::new(ACCOUNT),
        subject: format!("inv-{number}"),
        payload: serde_json::json!({ "number": number }),
        dedupe_key: format!("invoice:{number}"),
        at: OffsetDateTime::now_utc(),
    }
}

/// An empty database of its own on the server that the tests run with.
async fn postgres() -> Option<String> {
    let server = std::env::var("SLUICE_TEST_POSTGRES").expect(
        "SLUICE_TEST_POSTGRES names a PostgreSQL server: run ./tests/run, which starts one, or `tests/postgres start DIR`",
    );
    let name = format!("t{}", Uuid::now_v7().simple());
    let admin = Database::open(&server, &DatabaseOptions::default()).await.expect("the server answers");
    let mut conn = admin.read().await.expect("a connection");
    let statement = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
    match conn.raw() {
        sluice_billing::Raw::Postgres(conn) => {
            sqlx::raw_sql(statement).execute(conn).await.expect("a database")
        }
        sluice_billing::Raw::Sqlite(_) => panic!("SLUICE_TEST_POSTGRES must begin with postgres://"),
    };
    Some(server.replacen("/postgres?", &format!("/{name}?"), 1))
}

async fn several_gateways_deliver_each_event_once(database_url: Option<String>) {
    let platform = Platform::start(database_url).await;
    let stop = CancellationToken::new();
    let gateways = [platform.gateway(&stop), platform.gateway(&stop), platform.gateway(&stop)];
    for number in 0..40 {
        platform.raise(number).await;
    }
    platform.delivered(40).await;
    stop.cancel();
    for gateway in gateways {
        gateway.await.expect("a gateway ends in order");
    }
    assert_eq!(platform.receiver.seen(), [1; 40]);
}

/// The gateway dies after the receiver has the event and before it has answered.
async fn what_a_dead_gateway_was_sending_is_sent_by_another(database_url: Option<String>) {
    let platform = Platform::start(database_url).await;
    platform.receiver.answers.forget_permits(Semaphore::MAX_PERMITS);
    // Its lease ends soon after it.
    let short = WebhookSettings { timeout_ms: 1_000, lease_margin_ms: 200, ..settings() };
    let dies = platform.gateway_with(short, &CancellationToken::new());
    platform.raise(0).await;
    let sent = async {
        while platform.receiver.seen().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, sent).await.expect("it is sent");
    dies.abort();
    let _ = dies.await;
    platform.receiver.answers.add_permits(1_000);
    let stop = CancellationToken::new();
    let lives = platform.gateway(&stop);
    platform.delivered(1).await;
    stop.cancel();
    lives.await.expect("it ends in order");
    assert_eq!(platform.receiver.seen(), [2], "at least once: one event, sent by both");
}

/// Numbers are given when a notice is raised, and seen when its transaction commits: the lower one may come later.
async fn a_notice_that_commits_late_is_not_passed_by(database_url: Option<String>) {
    let platform = Platform::start(database_url).await;
    let stop = CancellationToken::new();
    let gateway = platform.gateway(&stop);
    let mut late = platform.database.write().await.expect("a transaction");
    notice::raise(&mut late, &numbered(0)).await.expect("a notice");
    platform.raise(1).await;
    platform.delivered(1).await;
    late.commit().await.expect("committed");
    platform.delivered(2).await;
    stop.cancel();
    gateway.await.expect("it ends in order");
    assert_eq!(platform.receiver.seen(), [1, 1]);
}

#[tokio::test]
async fn several_gateways_deliver_each_event_once_on_sqlite() {
    several_gateways_deliver_each_event_once(None).await;
}

#[tokio::test]
async fn several_gateways_deliver_each_event_once_on_postgres() {
    several_gateways_deliver_each_event_once(postgres().await).await;
}

#[tokio::test]
async fn what_a_dead_gateway_was_sending_is_sent_by_another_on_sqlite() {
    what_a_dead_gateway_was_sending_is_sent_by_another(None).await;
}

#[tokio::test]
async fn what_a_dead_gateway_was_sending_is_sent_by_another_on_postgres() {
    what_a_dead_gateway_was_sending_is_sent_by_another(postgres().await).await;
}

/// SQLite has one writer at a time: there, nothing commits late.
#[tokio::test]
async fn a_notice_that_commits_late_is_not_passed_by_on_postgres() {
    a_notice_that_commits_late_is_not_passed_by(postgres().await).await;
}

#[tokio::test]
async fn an_organisation_sees_and_changes_only_what_is_its_own() {
    let platform = Platform::start(None).await;
    let database = &platform.database;
    let id = endpoints::endpoints(database, ORG).await.expect("a list")[0].id.clone();
    let other = "org-2";
    Tenancy::new(database.clone()).ensure_org(other, "Other", "acct-2").await.expect("an organisation");
    let now_ms = endpoints::now_ms();
    let delivery = endpoints::test(database, ORG, &id, now_ms).await.expect("a delivery");
    assert!(endpoints::endpoints(database, other).await.expect("a list").is_empty());
    let change = sluice_gateway::webhooks::EndpointChange { enabled: Some(false), ..Default::default() };
    let refusals = [
        endpoints::endpoint(database, other, &id).await.err(),
        endpoints::update(database, &settings(), other, &id, &change).await.err(),
        endpoints::delete(database, other, &id).await.err(),
        endpoints::rotate(database, &settings(), other, &id, now_ms).await.err(),
        endpoints::test(database, other, &id, now_ms).await.err(),
        endpoints::replay(database, other, &delivery.id, now_ms).await.err(),
    ];
    for refusal in refusals {
        let refusal = refusal.expect("another organisation's").to_string();
        assert!(refusal.starts_with("there is no "), "{refusal}");
    }
    assert!(endpoints::endpoint(database, ORG, &id).await.expect("it is there").enabled);
}

/// A secret ends when its overlap does; no more than three are in force.
#[tokio::test]
async fn rotated_secrets_end() {
    let platform = Platform::start(None).await;
    let database = &platform.database;
    let id = endpoints::endpoints(database, ORG).await.expect("a list")[0].id.clone();
    let settings = WebhookSettings { rotation_overlap_ms: 1_000, ..settings() };
    let in_force = async |at_ms: i64| {
        let mut conn = database.read().await.expect("a connection");
        endpoints::secrets(&mut conn, &id, at_ms).await.expect("secrets")
    };
    let start_ms = endpoints::now_ms();
    let first = in_force(start_ms).await;
    let second = endpoints::rotate(database, &settings, ORG, &id, start_ms).await.expect("a secret");
    assert_eq!(in_force(start_ms + 999).await, [&[second.clone()][..], &first].concat());
    assert_eq!(in_force(start_ms + 1_000).await, std::slice::from_ref(&second));
    let third: Secret =
        endpoints::rotate(database, &settings, ORG, &id, start_ms + 1).await.expect("a secret");
    let refused = endpoints::rotate(database, &settings, ORG, &id, start_ms + 2).await.expect_err("too many");
    assert!(refused.to_string().contains("3 secrets in force"), "{refused}");
    assert_eq!(in_force(start_ms + 2).await[..2], [third, second]);
    endpoints::rotate(database, &settings, ORG, &id, start_ms + 1_000).await.expect("the first has ended");
}
