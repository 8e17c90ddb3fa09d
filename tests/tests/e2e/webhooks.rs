//! Webhooks, end to end: a receiver that verifies with the `standardwebhooks` package is told of what happened to an
//! account's money, whoever fails in between.

use serde_json::{Value, json};
use sluice_tests::{Cluster, ClusterOptions, Receiver, Reply, Signal, assert_error, eventually};
use tempfile::TempDir;

const WEBHOOKS: &str = "/organization/webhooks";
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
/// Receivers of tests are on this machine and speak HTTP.
const OPEN: &str = "allow_private_addresses = true\nallow_http = true\npoll_interval_ms = 20\n";

/// A platform with these settings of webhooks, and the folder of its configuration.
async fn cluster(settings: &str) -> (Cluster, TempDir) {
    let folder = TempDir::with_prefix("sluice-config-").expect("a temporary directory");
    let file = folder.path().join("sluice.toml");
    std::fs::write(&file, format!("[webhooks]\n{settings}")).expect("the configuration is written");
    let args = vec!["--config".to_owned(), file.to_str().expect("temporary paths are UTF-8").to_owned()];
    (Cluster::start_with(ClusterOptions { args, ..ClusterOptions::default() }).await, folder)
}

async fn admin(cluster: &Cluster, method: &str, path: &str, body: Option<&Value>) -> Reply {
    let request = cluster.request(method, path).bearer_auth(&cluster.admin_key);
    cluster
        .send(match body {
            Some(body) => request.json(body),
            None => request,
        })
        .await
}

/// Registers an endpoint with [`SECRET`]; returns its id.
async fn subscribe(cluster: &Cluster, url: &str) -> String {
    let body = json!({ "url": url, "secret": SECRET });
    let made = admin(cluster, "POST", WEBHOOKS, Some(&body)).await.ok();
    assert_eq!((made["secret"].as_str(), made["enabled"].as_bool()), (Some(SECRET), Some(true)), "{made}");
    made["id"].as_str().expect("an id").to_owned()
}

/// Raises a `balance.low`: the new account has 10 dollars, and each time asks to be told at another balance.
async fn raise(cluster: &Cluster, low_balance: &str) {
    let body = json!({ "low_balance": low_balance });
    let set = admin(cluster, "POST", "/organization/balance_alert", Some(&body)).await.ok();
    assert_eq!(set["low_balance"], low_balance, "{set}");
}

async fn deliveries(cluster: &Cluster, query: &str) -> Vec<Value> {
    let path = format!("{WEBHOOKS}/deliveries?{query}");
    let listed = admin(cluster, "GET", &path, None).await.ok();
    listed["data"].as_array().unwrap_or_else(|| panic!("no list: {listed}")).clone()
}

/// Waits until there is exactly one delivery in this state.
async fn only_delivery(cluster: &Cluster, state: &str) -> Value {
    eventually(&format!("one delivery is {state}"), async || {
        match <[Value; 1]>::try_from(deliveries(cluster, &format!("state={state}")).await) {
            Ok([delivery]) => Ok(delivery),
            Err(others) => Err(format!("{others:?}; all: {:?}", deliveries(cluster, "").await)),
        }
    })
    .await
}

#[track_caller]
fn assert_verified(request: &Value) {
    assert_eq!(request["verified_by"], json!([0]), "{request}");
    assert_eq!(request["headers"]["webhook-id"], request["body"]["id"], "{request}");
    assert_eq!(request["headers"]["content-type"], "application/json", "{request}");
}

#[tokio::test]
async fn a_receiver_verifies_what_it_is_told() {
    let (cluster, _folder) = cluster(OPEN).await;
    let mut receiver = Receiver::start().await;
    receiver.trust(&[SECRET]).await;
    let id = subscribe(&cluster, &receiver.url("/hook")).await;
    let invoices = json!({ "url": receiver.url("/invoices"), "events": ["invoice.ready"] });
    admin(&cluster, "POST", WEBHOOKS, Some(&invoices)).await.ok();

    raise(&cluster, "25.00").await;
    let request = receiver.next().await;
    assert_verified(&request);
    assert_eq!(request["path"], "/hook");
    let body = &request["body"];
    assert_eq!(body["type"], "balance.low");
    assert_eq!(
        (&body["data"]["account"], &body["data"]["left"], &body["data"]["low_balance"]),
        (&json!("acct-default"), &json!("10.00"), &json!("25.00"))
    );
    let delivered = only_delivery(&cluster, "delivered").await;
    assert_eq!(
        (&delivered["endpoint_id"], &delivered["attempts"], &delivered["last_status"]),
        (&json!(id), &json!(1), &json!(200))
    );
    assert_eq!(deliveries(&cluster, "").await.len(), 1, "invoices were asked for, not balances");

    // Once told, it is not told again for the same reason; a test comes whenever it is asked for.
    raise(&cluster, "25.00").await;
    admin(&cluster, "POST", &format!("{WEBHOOKS}/{id}/test"), None).await.ok();
    let request = receiver.next().await;
    assert_verified(&request);
    assert_eq!(request["body"]["type"], "webhook.test");
    let metrics = eventually("what was delivered is counted", async || {
        let metrics = cluster.metrics().await;
        let counts =
            [metrics.sum("sluice_webhook_delivered_total"), metrics.sum("sluice_webhook_deliveries_pending")];
        if counts == [2.0, 0.0] { Ok(metrics) } else { Err(format!("{counts:?}")) }
    })
    .await;
    assert_eq!(metrics.sum("sluice_webhook_dead_total"), 0.0);
    assert!(metrics.sum("sluice_webhook_oldest_age_seconds") >= 0.0);
    cluster.finish().await;
}

/// Usage that takes a balance under the threshold tells of it, from the transaction that posts the usage.
#[tokio::test]
async fn spending_below_the_threshold_is_told() {
    let (cluster, _folder) = cluster(OPEN).await;
    let mut receiver = Receiver::start().await;
    receiver.trust(&[SECRET]).await;
    subscribe(&cluster, &receiver.url("/hook")).await;
    raise(&cluster, "10.00").await;
    cluster.chat(&cluster.question("Hello?", 5)).await.ok();
    let request = receiver.next().await;
    assert_verified(&request);
    let data = &request["body"]["data"];
    assert_eq!(request["body"]["type"], "balance.low");
    let left = cluster.cli(&["balance"]).await["posted"].clone();
    assert_eq!((&data["left"], &data["low_balance"]), (&left, &json!("10.00")), "{request}");
    cluster.finish().await;
}

#[tokio::test]
async fn failures_are_tried_again_until_one_succeeds() {
    let settings = format!("{OPEN}timeout_ms = 2000\nretry_delays_ms = [10, 10, 10, 10]\n");
    let (cluster, _folder) = cluster(&settings).await;
    let mut receiver = Receiver::start().await;
    receiver.trust(&[SECRET]).await;
    subscribe(&cluster, &receiver.url("/hook?answers=500,302,stall,503,200")).await;
    raise(&cluster, "25.00").await;
    let mut ids = Vec::new();
    for answer in ["500", "302", "stall", "503", "200"] {
        let request = receiver.next().await;
        assert_verified(&request);
        assert_eq!(
            (request["answer"].as_str(), &request["method"]),
            (Some(answer), &Value::Null),
            "{request}"
        );
        ids.push(request["headers"]["webhook-id"].clone());
    }
    ids.dedup();
    assert_eq!(ids.len(), 1, "one event, one id: {ids:?}");
    let delivered = only_delivery(&cluster, "delivered").await;
    assert_eq!((&delivered["attempts"], &delivered["last_error"]), (&json!(5), &Value::Null));
    assert_eq!(cluster.metrics().await.sum("sluice_webhook_failed_total"), 4.0);
    cluster.finish().await;
}

#[tokio::test]
async fn what_is_given_up_on_is_listed_and_replayed() {
    let settings = format!("{OPEN}timeout_ms = 2000\nretry_delays_ms = [10]\n");
    let (cluster, _folder) = cluster(&settings).await;
    let mut receiver = Receiver::start().await;
    receiver.trust(&[SECRET]).await;
    subscribe(&cluster, &receiver.url("/hook?answers=500,stall,302,404,200")).await;
    raise(&cluster, "25.00").await;
    let first = receiver.next().await;
    let dead = only_delivery(&cluster, "dead").await;
    assert_eq!((&dead["attempts"], &dead["last_error"]), (&json!(2), &json!("no answer within 2000 ms")));
    assert_eq!(dead["payload"], first["body"]);
    assert_eq!(cluster.metrics().await.sum("sluice_webhook_dead_total"), 1.0);

    let id = dead["id"].as_str().expect("an id");
    let replay = format!("{WEBHOOKS}/deliveries/{id}/replay");
    let replayed = admin(&cluster, "POST", &replay, None).await.ok();
    assert_eq!((&replayed["state"], &replayed["attempts"]), (&json!("pending"), &json!(0)));
    let dead = only_delivery(&cluster, "dead").await;
    assert_eq!(
        (&dead["last_status"], &dead["last_error"]),
        (&json!(404), &json!("the receiver answered 404"))
    );

    // The command line does the same beside the server.
    let listed = cluster.cli(&["webhooks", "deliveries", "--state", "dead"]).await;
    assert_eq!(listed["data"], json!([dead]));
    assert_eq!(cluster.cli(&["webhooks", "replay", "--dead"]).await["replayed"], json!([id]));
    let delivered = only_delivery(&cluster, "delivered").await;
    assert_eq!((&delivered["id"], &delivered["attempts"]), (&dead["id"], &json!(1)));
    for answer in ["stall", "302", "404", "200"] {
        let request = receiver.next().await;
        assert_verified(&request);
        assert_eq!(request["answer"], answer);
        assert_eq!(
            request["headers"]["webhook-id"], first["headers"]["webhook-id"],
            "a replay has the same id"
        );
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_receiver_that_is_gone_is_left_alone_until_it_is_switched_on_again() {
    let (cluster, _folder) = cluster(OPEN).await;
    let mut receiver = Receiver::start().await;
    receiver.trust(&[SECRET]).await;
    let id = subscribe(&cluster, &receiver.url("/hook?answers=410,200")).await;
    raise(&cluster, "25.00").await;
    assert_eq!(receiver.next().await["answer"], "410");
    let dead = only_delivery(&cluster, "dead").await;
    assert_eq!((&dead["attempts"], &dead["last_status"]), (&json!(1), &json!(410)));
    let path = format!("{WEBHOOKS}/{id}");
    let endpoint = admin(&cluster, "GET", &path, None).await.ok();
    assert_eq!(endpoint["enabled"], false);
    assert_eq!(endpoint["disabled_reason"], "the receiver answered 410 Gone");

    // It is told of nothing now, while another endpoint is.
    subscribe(&cluster, &receiver.url("/witness")).await;
    raise(&cluster, "26.00").await;
    assert_eq!(receiver.next().await["path"], "/witness");
    assert_eq!(deliveries(&cluster, &format!("endpoint_id={id}")).await.len(), 1);
    let replay = format!("{WEBHOOKS}/deliveries/{}/replay", dead["id"].as_str().expect("an id"));
    let refused = admin(&cluster, "POST", &replay, None).await;
    assert_error("replay to a switched-off endpoint", &refused, 400, Some("invalid_value"), Some("enabled"));

    let on = admin(&cluster, "POST", &path, Some(&json!({ "enabled": true }))).await.ok();
    assert_eq!((&on["enabled"], &on["disabled_reason"]), (&json!(true), &Value::Null));
    admin(&cluster, "POST", &replay, None).await.ok();
    let request = receiver.next().await;
    assert_verified(&request);
    assert_eq!((&request["answer"], &request["body"]), (&json!("200"), &dead["payload"]));
    cluster.finish().await;
}

/// A power cut between the first attempt and the second, and between notice and first attempt: nothing is lost.
#[tokio::test]
async fn a_gateway_that_is_killed_between_attempts_goes_on_where_it_was() {
    // What a dead gateway held is free after this long.
    let lease = "timeout_ms = 1000\nlease_margin_ms = 500\n";
    let (mut cluster, _folder) =
        cluster(&format!("{OPEN}{lease}retry_delays_ms = [3000, 10, 10, 10]\n")).await;
    let mut receiver = Receiver::start().await;
    receiver.trust(&[SECRET]).await;
    subscribe(&cluster, &receiver.url("/hook?answers=500,200")).await;
    raise(&cluster, "25.00").await;
    let first = receiver.next().await;
    cluster.stop(Signal::Kill).await;
    cluster.restart().await;
    let second = receiver.next().await;
    assert_verified(&second);
    assert_eq!(second["body"], first["body"]);
    only_delivery(&cluster, "delivered").await;

    for (number, low_balance) in ["26.00", "27.00", "28.00"].into_iter().enumerate() {
        raise(&cluster, low_balance).await;
        cluster.stop(Signal::Kill).await;
        cluster.restart().await;
        eventually("the event is delivered", async || {
            match deliveries(&cluster, "state=delivered").await.len() {
                count if count == number + 2 => Ok(()),
                count => Err(format!("{count} are delivered")),
            }
        })
        .await;
    }
    // At least once: an attempt whose outcome was not recorded is made again.
    let mut told = Vec::new();
    while told.last() != Some(&json!("28.00")) {
        told.push(receiver.next().await["body"]["data"]["low_balance"].clone());
    }
    told.dedup();
    assert_eq!(told, ["26.00", "27.00", "28.00"]);
    cluster.finish().await;
}

#[tokio::test]
async fn a_rotated_secret_is_valid_beside_its_successor() {
    let (cluster, _folder) = cluster(OPEN).await;
    let mut receiver = Receiver::start().await;
    let id = subscribe(&cluster, &receiver.url("/hook")).await;
    let rotated = admin(&cluster, "POST", &format!("{WEBHOOKS}/{id}/rotate"), None).await.ok();
    let new = rotated["secret"].as_str().expect("a secret");
    assert!(rotated["former_secret_expires_at"].is_u64(), "{rotated}");
    receiver.trust(&[SECRET, new, "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"]).await;
    raise(&cluster, "25.00").await;
    assert_eq!(receiver.next().await["verified_by"], json!([0, 1]), "either, and no other");
    cluster.finish().await;
}

#[tokio::test]
async fn tls_receivers_are_reached_if_their_authority_is_trusted() {
    let mut receiver = Receiver::start_tls(SECRET).await;
    let open = "allow_private_addresses = true\npoll_interval_ms = 20\nretry_delays_ms = []\n";
    let trusting = format!("{open}ca_file = {:?}\n", Receiver::authority());
    let (trusts, _folder) = cluster(&trusting).await;
    subscribe(&trusts, &receiver.url("/hook")).await;
    raise(&trusts, "25.00").await;
    assert_verified(&receiver.next().await);
    only_delivery(&trusts, "delivered").await;
    trusts.finish().await;

    let (doubts, _folder) = cluster(open).await;
    subscribe(&doubts, &receiver.url("/hook")).await;
    raise(&doubts, "25.00").await;
    let dead = only_delivery(&doubts, "dead").await;
    let error = dead["last_error"].as_str().expect("an error");
    assert!(error.starts_with("the TLS handshake with localhost failed"), "{error}");
    doubts.finish().await;
}

/// What only the gateway can reach, nobody reaches through it.
#[tokio::test]
async fn addresses_that_are_not_public_are_refused() {
    let (cluster, _folder) = cluster("poll_interval_ms = 20\nretry_delays_ms = []\n").await;
    let mut receiver = Receiver::start().await;
    for url in [
        "https://127.0.0.1/hook",
        "https://2130706433/hook",
        "https://[::1]/hook",
        "https://[::ffff:127.0.0.1]/hook",
        "https://10.1.2.3/hook",
        "https://169.254.169.254/latest/meta-data/",
        &receiver.url("/hook"),
        "ftp://hooks.example.com/",
        "https://user:password@hooks.example.com/",
        "not a URL",
    ] {
        let reply = admin(&cluster, "POST", WEBHOOKS, Some(&json!({ "url": url }))).await;
        assert_error(url, &reply, 400, Some("invalid_value"), Some("url"));
    }
    // A name is not an address: what it resolves to is found out, and refused, when it is connected to.
    let url = receiver.url("/hook").replace("http:", "https:");
    let id = subscribe(&cluster, &url).await;
    admin(&cluster, "POST", &format!("{WEBHOOKS}/{id}/test"), None).await.ok();
    let dead = only_delivery(&cluster, "dead").await;
    let error = dead["last_error"].as_str().expect("an error");
    assert!(error.starts_with("refused: localhost resolves to no public address"), "{error}");
    receiver.assert_untouched();
    cluster.finish().await;
}

#[tokio::test]
async fn the_admin_api_names_what_is_wrong() {
    let (cluster, _folder) = cluster(&format!("{OPEN}endpoints_per_org_max = 2\n")).await;
    let request = cluster.request("GET", WEBHOOKS).bearer_auth(&cluster.api_key);
    let reply = cluster.send(request).await;
    assert_error("a project's key", &reply, 403, Some("admin_key_required"), None);
    let reply = cluster.send(cluster.request("GET", WEBHOOKS)).await;
    assert_error("no key", &reply, 401, Some("invalid_api_key"), None);

    let url = "https://hooks.example.com/a";
    for (body, code, param) in [
        (json!({}), "missing_required_parameter", "url"),
        (json!({ "url": 7 }), "invalid_type", "url"),
        (json!({ "url": url, "events": "all" }), "invalid_type", "events"),
        (json!({ "url": url, "events": ["balance.low", 3] }), "invalid_type", "events[1]"),
        (json!({ "url": url, "events": ["balance.low", "balance.high"] }), "invalid_value", "events[1]"),
        (json!({ "url": url, "description": "a\nb" }), "invalid_value", "description"),
        (json!({ "url": url, "secret": "s3cret" }), "invalid_value", "secret"),
        (json!({ "url": url, "secret": "whsec_c2hvcnQ=" }), "invalid_value", "secret"),
    ] {
        let reply = admin(&cluster, "POST", WEBHOOKS, Some(&body)).await;
        assert_error(&body.to_string(), &reply, 400, Some(code), Some(param));
    }
    let id = subscribe(&cluster, url).await;
    subscribe(&cluster, url).await;
    let reply = admin(&cluster, "POST", WEBHOOKS, Some(&json!({ "url": url }))).await;
    assert_error("one too many", &reply, 400, Some("invalid_value"), Some("url"));
    let listed = admin(&cluster, "GET", WEBHOOKS, None).await;
    assert_eq!(listed.ok()["data"].as_array().map(Vec::len), Some(2));
    assert!(!listed.text.contains("whsec_"), "a secret is shown once: {}", listed.text);

    let path = format!("{WEBHOOKS}/{id}");
    let changed =
        json!({ "url": "https://hooks.example.com/b", "description": "B", "events": ["invoice.ready"] });
    let endpoint = admin(&cluster, "POST", &path, Some(&changed)).await.ok();
    for field in ["url", "description", "events"] {
        assert_eq!(endpoint[field], changed[field]);
    }
    let reply = admin(&cluster, "POST", &path, Some(&json!({ "url": "x" }))).await;
    assert_error("a bad change", &reply, 400, Some("invalid_value"), Some("url"));
    assert_eq!(admin(&cluster, "GET", &path, None).await.ok(), endpoint, "and nothing is changed by it");
    assert_eq!(admin(&cluster, "DELETE", &path, None).await.ok()["deleted"], true);
    let reply = admin(&cluster, "GET", &path, None).await;
    assert_error("deleted", &reply, 404, Some("not_found"), None);

    for (query, param) in [("state=lost", "state"), ("limit=0", "limit")] {
        let reply = admin(&cluster, "GET", &format!("{WEBHOOKS}/deliveries?{query}"), None).await;
        assert_error(query, &reply, 400, Some("invalid_value"), Some(param));
    }
    for (body, code) in [
        (json!({}), "missing_required_parameter"),
        (json!({ "low_balance": 5 }), "invalid_type"),
        (json!({ "low_balance": "-1" }), "invalid_value"),
        (json!({ "low_balance": "five" }), "invalid_value"),
    ] {
        let reply = admin(&cluster, "POST", "/organization/balance_alert", Some(&body)).await;
        assert_error(&body.to_string(), &reply, 400, Some(code), Some("low_balance"));
    }
    let off =
        admin(&cluster, "POST", "/organization/balance_alert", Some(&json!({ "low_balance": null }))).await;
    assert_eq!(off.ok()["low_balance"], Value::Null);
    cluster.finish().await;
}
