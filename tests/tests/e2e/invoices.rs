//! Credit and invoices over real processes: the command line, the admin API, and a PDF that another reader reads.

use serde_json::{Value, json};
use sluice_billing::{
    AccountId, AdmitRequest, Billing, BillingLimits, BillingOptions, Clock, Database, DatabaseOptions,
    FinishReason, Outcome, PriceBook, RequestId, ServiceTier,
};
use sluice_tests::{Cluster, Signal, assert_error, pytest};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

/// A book that follows the one which the server wrote, and has its model too.
const LATER_PRICES: &str = r#"
    currency = "USD"
    effective_from = "2026-01-02T00:00:00Z"
    price = [
        { model = "m", meter = "input", usd_per_million = "300" },
        { model = "m", meter = "cached_input", usd_per_million = "100" },
        { model = "m", meter = "output", usd_per_million = "500" },
        { model = "sluice-demo", meter = "input", usd_per_million = "1" },
        { model = "sluice-demo", meter = "cached_input", usd_per_million = "1" },
        { model = "sluice-demo", meter = "output", usd_per_million = "1" },
    ]
"#;

/// A moment in the middle of last month, and that month.
fn last_month() -> (OffsetDateTime, String) {
    let first = OffsetDateTime::now_utc().replace_day(1).expect("every month has a first day");
    let at = first - Duration::days(10);
    (at, format!("{:04}-{:02}", at.year(), u8::from(at.month())))
}

/// Usage of last month, shipped by a gateway that is gone: the server is down meanwhile.
async fn use_last_month(cluster: &Cluster, at: OffsetDateTime) {
    let url = format!("sqlite:{}", cluster.data_dir().join("ledger.db").display());
    let database = Database::open(&url, &DatabaseOptions::default()).await.expect("the database");
    let options = BillingOptions {
        database: database.clone(),
        outbox_path: cluster.data_dir().join("past.db"),
        gateway: "gateway-past".into(),
        limits: BillingLimits::default(),
    };
    let billing = Billing::open_at(options, Clock::new(move || at)).await.expect("billing");
    let book = PriceBook::from_toml(LATER_PRICES).expect("prices");
    billing.apply_price_book(&book).await.expect("prices apply");
    for project in ["proj-default", "Köln"] {
        let request = AdmitRequest {
            media_max: Default::default(),
            request_id: RequestId::new(Uuid::now_v7()),
            account: AccountId::new("acct-default"),
            org: "org-default".into(),
            project: project.into(),
            api_key: "key".into(),
            user: String::new(),
            model: "m".into(),
            service_tier: ServiceTier::Default,
            input_tokens: 1_111,
            output_tokens_max: 222,
            admitted_at: at,
        };
        let outcome = Outcome {
            media: Default::default(),
            reasoning_tokens: 0,
            input_tokens: 1_111,
            cached_input_tokens: 0,
            output_tokens: 222,
            finish_reason: FinishReason::Stop,
            node: "node".into(),
            time_to_first_token_ms: Some(1),
            duration_ms: 2,
        };
        billing.admit(request).await.expect("admitted").settle(outcome).await.expect("settled");
    }
    billing.close().await.expect("closed");
    database.close().await.expect("closed");
}

async fn admin_get(cluster: &Cluster, path: &str) -> Value {
    cluster.send(cluster.request("GET", path).bearer_auth(&cluster.admin_key)).await.ok()
}

#[tokio::test]
async fn a_month_becomes_an_invoice_in_three_forms() {
    let mut cluster = Cluster::start().await;
    cluster.stop(Signal::Terminate).await;
    let (at, month) = last_month();
    use_last_month(&cluster, at).await;
    let profile = ["invoices", "profile", "--name", "ООО «Ромашка»", "--address", "Tràn Hưng Đạo 5"];
    cluster.cli(&profile).await;
    let closed = cluster.cli(&["invoices", "close", "--period", &month]).await;
    assert_eq!(closed["data"][0]["invoice"], "INV-000001", "{closed}");
    let again = cluster.cli(&["invoices", "close", "--period", &month]).await;
    assert_eq!(again["data"], json!([]));
    let shown = cluster.cli(&["invoices", "show", "INV-000001"]).await;
    assert_eq!((shown["kind"].as_str(), shown["period"].as_str()), (Some("statement"), Some(month.as_str())));

    cluster.restart().await;
    let listed = admin_get(&cluster, "/organization/invoices?limit=1").await;
    assert_eq!((&listed["data"][0], &listed["has_more"]), (&shown, &json!(false)));
    assert_eq!(admin_get(&cluster, "/organization/invoices/INV-000001").await, shown);
    let raw = async |path: &str| -> (String, Vec<u8>) {
        let sent =
            cluster.request("GET", path).bearer_auth(&cluster.admin_key).send().await.expect("an answer");
        let form = sent.headers()["content-type"].to_str().expect("ASCII").to_owned();
        (form, sent.bytes().await.expect("a body").to_vec())
    };
    let (form, csv) = raw("/organization/invoices/INV-000001.csv").await;
    assert_eq!(form, "text/csv; charset=utf-8");
    assert_eq!(csv, cluster.cli_output(&["invoices", "csv", "INV-000001"]).await.stdout);
    let rows = String::from_utf8(csv).expect("UTF-8").lines().count();
    assert_eq!(rows, shown["lines"].as_array().expect("lines").len() + 1);
    let (form, pdf) = raw("/organization/invoices/INV-000001.pdf").await;
    assert_eq!(form, "application/pdf");
    assert_eq!(pdf, cluster.cli_output(&["invoices", "pdf", "INV-000001"]).await.stdout);

    let (json_path, pdf_path) =
        (cluster.data_dir().join("invoice.json"), cluster.data_dir().join("invoice.pdf"));
    std::fs::write(&json_path, shown.to_string()).expect("written");
    std::fs::write(&pdf_path, pdf).expect("written");
    cluster.python_env = vec![
        ("SLUICE_INVOICE_JSON", json_path.display().to_string()),
        ("SLUICE_INVOICE_PDF", pdf_path.display().to_string()),
    ];
    pytest(&cluster, "invoice_test.py").await;

    let nobody = cluster
        .send(cluster.request("GET", "/organization/invoices/INV-9").bearer_auth(&cluster.admin_key))
        .await;
    assert_error("nobody", &nobody, 404, Some("not_found"), None);
    cluster.finish().await;
}

#[tokio::test]
async fn credit_is_added_once_by_an_administrator() {
    let cluster = Cluster::start().await;
    let body =
        json!({ "amount": "25.50", "memo": "order 7", "priority": -1, "expires_at": 4_000_000_000_i64 });
    let add = async |key: &str, idempotency: &str, body: &Value| {
        let request = cluster.request("POST", "/organization/credits").bearer_auth(key).json(body);
        let request =
            if idempotency.is_empty() { request } else { request.header("Idempotency-Key", idempotency) };
        cluster.send(request).await
    };
    let refused = add(&cluster.api_key, "order-7", &body).await;
    assert_error("refused", &refused, 403, Some("admin_key_required"), None);
    let refused = add(&cluster.admin_key, "", &body).await;
    assert_error("refused", &refused, 400, Some("missing_required_parameter"), Some("id"));
    let refused = add(&cluster.admin_key, "order-7", &json!({ "amount": "a lot" })).await;
    assert_error("refused", &refused, 400, Some("invalid_value"), Some("amount"));

    let first = add(&cluster.admin_key, "order-7", &body).await.ok();
    assert_eq!(add(&cluster.admin_key, "order-7", &body).await.ok(), first);
    assert_eq!(
        (&first["amount"], &first["left"], &first["priority"]),
        (&json!("25.50"), &json!("25.50"), &json!(-1))
    );
    let other = add(&cluster.admin_key, "order-7", &json!({ "amount": "1" })).await;
    assert_error("other", &other, 400, Some("invalid_value"), Some("id"));

    let balance = admin_get(&cluster, "/organization/balance").await;
    assert_eq!((&balance["posted"], &balance["currency"]), (&json!("35.50"), &json!("USD")));
    let listed = admin_get(&cluster, "/organization/credits").await;
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(2));
    assert_eq!(listed["data"][1], first);
    let shown = cluster.cli(&["credits", "list"]).await;
    assert_eq!(shown["data"][1]["id"], first["id"]);

    let day = ["credit", "--amount", "1", "--expires-at", "2999-01-01", "--priority", "-5"];
    cluster.cli(&day).await;
    let shown = cluster.cli(&["credits", "list"]).await;
    assert_eq!(
        (&shown["data"][2]["priority"], &shown["data"][2]["expires_at"]),
        (&json!(-5), &json!(32_472_144_000_i64))
    );
    cluster.finish().await;
}
