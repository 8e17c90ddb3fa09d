//! Receipts: every wire hands one over, and whoever holds it can check it alone.

use serde_json::{Value, json};
use sluice_tests::{
    Cluster, ClusterOptions, Price, Reply, Signal, Transcript, pico_of, pytest, random_model, run_to_end,
};

const QUESTION: &str = "Tell me a short story about a river.";
const JWKS_PATH: &str = "//.well-known/sluice/jwks.json";

/// A receipt as it was handed over, and what was said beside it.
struct Handed {
    wire: &'static str,
    receipt: String,
    cost_usd: String,
    /// (prompt, completion) tokens, where the wire told them.
    usage: Option<(u64, u64)>,
}

fn of_headers(wire: &'static str, reply: &Reply) -> Handed {
    let header = |name| reply.header(name).unwrap_or_else(|| panic!("{wire}: no {name}")).to_owned();
    let (receipt, cost_usd) = (header("x-sluice-receipt"), header("x-sluice-cost-usd"));
    Handed { wire, receipt, cost_usd, usage: Some(reply.usage()) }
}

/// The last chunk alone has it.
fn of_frames(wire: &'static str, frames: &[Value], usage: Option<(u64, u64)>) -> Handed {
    let (last, others) = frames.split_last().expect("frames");
    assert!(others.iter().all(|frame| frame["sluice"].get("receipt").is_none()), "{wire}: {others:?}");
    let text =
        |name: &str| last["sluice"][name].as_str().unwrap_or_else(|| panic!("{wire}: {last}")).to_owned();
    Handed { wire, receipt: text("receipt"), cost_usd: text("cost_usd"), usage }
}

/// A stream that did not ask for its usage.
async fn stream_without_usage(cluster: &Cluster, path: &str, mut body: Value) -> Vec<Value> {
    body["stream"] = json!(true);
    let text = cluster.post(path, &cluster.api_key, &body).await.text;
    let frames: Vec<_> = text.split("\n\n").filter(|frame| !frame.is_empty()).collect();
    let (done, frames) = frames.split_last().expect("frames");
    assert_eq!(*done, "data: [DONE]");
    frames.iter().map(|frame| serde_json::from_str(&frame["data: ".len()..]).expect("JSON")).collect()
}

async fn receipts_of_every_wire(cluster: &Cluster) -> Vec<Handed> {
    let chat = cluster.question(QUESTION, 12);
    let text = json!({ "model": cluster.model, "prompt": "The river", "temperature": 0, "max_tokens": 12 });
    let mut handed = Vec::new();
    handed.push(of_headers("chat", &cluster.chat(&chat).await));
    handed.push(of_headers("text", &cluster.post("/completions", &cluster.api_key, &text).await));
    let Transcript { frames, usage, .. } = cluster.stream_chat(&chat).await;
    handed.push(of_frames("chat, streamed, with usage", &frames, usage));
    for (wire, path, body) in
        [("chat, streamed", "/chat/completions", &chat), ("text, streamed", "/completions", &text)]
    {
        let frames = stream_without_usage(cluster, path, body.clone()).await;
        let last = frames.last().expect("frames");
        assert!(last["choices"][0]["finish_reason"].is_string(), "{wire}: {last}");
        handed.push(of_frames(wire, &frames, None));
    }
    let (answer, trailers) = cluster.grpc_answer(&cluster.api_key, &chat).await;
    let (messages, of_stream) = cluster.grpc_messages(&cluster.api_key, &chat).await;
    let last = messages.last().expect("messages").usage.clone();
    for (wire, usage, trailers) in [("gRPC", answer.usage, trailers), ("gRPC, streamed", last, of_stream)] {
        let usage = usage.expect("usage");
        let text =
            |name| trailers.get(name).unwrap_or_else(|| panic!("{wire}: no {name}")).to_str().expect("ASCII");
        assert_eq!(usage.cost_usd, text("x-sluice-cost-usd"));
        let (receipt, cost_usd) = (text("x-sluice-receipt").to_owned(), usage.cost_usd);
        let usage = Some((usage.prompt_tokens, usage.completion_tokens));
        handed.push(Handed { wire, receipt, cost_usd, usage });
    }
    handed
}

/// `sluice receipt verify`: whether it succeeded, and what it printed.
async fn verify(receipt: &str, args: &[&str]) -> (bool, Value, String) {
    let output = run_to_end("sluice", [&["receipt", "verify", "--json", receipt], args].concat()).await;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let said = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {stderr}"));
    (output.status.success(), said, stderr)
}

#[tokio::test]
async fn a_receipt_of_every_wire_agrees_with_keys_prices_ledger_and_answer() {
    let cluster = Cluster::start().await;
    let price = cluster.price().await;
    let handed = receipts_of_every_wire(&cluster).await;
    assert_eq!(handed.len(), 7);
    cluster.settled().await;
    let data_dir = cluster.data_dir();
    let prices = data_dir.join("prices.toml");
    let (data_dir, prices) = (data_dir.to_str().expect("UTF-8"), prices.to_str().expect("UTF-8"));
    let jwks = cluster.url(JWKS_PATH);
    let mut requests = Vec::new();
    for Handed { wire, receipt, cost_usd, usage } in handed {
        let args = ["--jwks", &jwks, "--prices", prices, "--data-dir", data_dir];
        let (good, said, stderr) = verify(&receipt, &args).await;
        assert!(good && said["valid"] == true, "{wire}: {said} {stderr}");
        let checks = said["checks"].as_array().expect("checks");
        let names: Vec<_> = checks.iter().map(|check| (&check["check"], &check["outcome"])).collect();
        let holds = json!("holds");
        let expected = [json!("signature"), json!("prices"), json!("ledger")];
        assert_eq!(names, expected.iter().map(|name| (name, &holds)).collect::<Vec<_>>(), "{wire}");

        let stated = &said["receipt"];
        let count =
            |class: &str| stated["quantities"][class].as_u64().unwrap_or_else(|| panic!("{wire}: {stated}"));
        let (input, cached, output) =
            (count("input_tokens"), count("cached_input_tokens"), count("output_tokens"));
        assert!(usage.is_none_or(|usage| usage == (input + cached, output)), "{wire}: {usage:?}, {stated}");
        assert_eq!(pico_of(&stated["cost"]), price.of_classes(input, cached, output), "{wire}");
        assert_eq!(stated["cost"], json!(cost_usd), "{wire}");
        assert_eq!((&stated["model"], &stated["currency"]), (&json!(cluster.model), &json!("USD")));
        requests.push(stated["request_id"].as_str().expect("an id").to_owned());
    }
    requests.sort_unstable();
    requests.dedup();
    assert_eq!(requests.len(), 7, "each request has a receipt of its own");

    // Beside the server, its own folder has the keys: nothing else need be named. And people read it too.
    let (receipt, id) = {
        let reply = cluster.chat(&cluster.question(QUESTION, 3)).await;
        (of_headers("chat", &reply).receipt, reply.header("x-request-id").expect("an id").to_owned())
    };
    cluster.settled().await;
    let output = cluster.cli_output(&["receipt", "verify", &receipt]).await;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && printed.starts_with("holds    signature"), "{printed}");
    assert!(printed.contains(&id) && printed.contains("quantities.output_tokens"), "{printed}");
    cluster.finish().await;
}

#[tokio::test]
async fn what_is_not_our_receipt_is_refused_with_the_reason() {
    let (cluster, other) = (Cluster::start().await, Cluster::start().await);
    let receipt = of_headers("chat", &cluster.chat(&cluster.question(QUESTION, 3)).await).receipt;
    let foreign = of_headers("chat", &other.chat(&other.question(QUESTION, 3)).await).receipt;
    cluster.settled().await;
    let jwks = cluster.url(JWKS_PATH);
    let check = async |receipt: &str, args: &[&str], reason: &str| {
        let (good, said, stderr) = verify(receipt, &[&["--jwks", &jwks], args].concat()).await;
        assert!(!good && said["valid"] == false, "{reason}: {said}");
        assert!(stderr.contains(reason), "{reason}: {stderr}");
        let failed =
            said["checks"].as_array().into_iter().flatten().filter(|check| check["outcome"] == "failed");
        assert_eq!(failed.count(), 1, "{said}");
    };
    let parts: Vec<&str> = receipt.split('.').collect();
    let others: Vec<&str> = foreign.split('.').collect();
    check(&foreign, &[], "which is not among those given").await;
    check(&format!("{}.{}.{}", parts[0], others[1], parts[2]), &[], "the signature does not fit").await;
    check(&format!("{}.{}.{}", parts[0], parts[1], others[2]), &[], "the signature does not fit").await;
    check(&format!("{receipt}="), &[], "base64url").await;
    check(&format!("{}.{}.", parts[0], parts[1]), &[], "the signature does not fit").await;
    // {"alg":"none"}
    check(&format!("eyJhbGciOiJub25lIn0.{}.", parts[1]), &[], "algorithm \"none\"").await;
    check(&"A".repeat(9000), &[], "longer than").await;

    let book = std::fs::read_to_string(cluster.data_dir().join("prices.toml")).expect("the prices");
    let dearer = cluster.data_dir().join("dearer.toml");
    std::fs::write(&dearer, book.replace("2.20", "2.21")).expect("write");
    check(&receipt, &["--prices", dearer.to_str().expect("UTF-8")], "but the receipt names").await;
    let elsewhere = other.data_dir();
    check(&receipt, &["--data-dir", elsewhere.to_str().expect("UTF-8")], "no bill of this request").await;
    cluster.finish().await;
    other.finish().await;
}

#[tokio::test]
async fn the_cost_so_far_comes_with_each_piece_when_asked() {
    let cluster = Cluster::start().await;
    let price = cluster.price().await;
    let mut body = cluster.question(QUESTION, 24);
    body["stream_options"] = json!({ "include_cost": true });
    for path in ["/chat/completions", "/completions"] {
        let mut body = body.clone();
        if path == "/completions" {
            body["prompt"] = json!("The river");
        }
        let frames = stream_without_usage(&cluster, path, body).await;
        let costs: Vec<_> = frames
            .iter()
            .map(|frame| &frame["sluice"]["cost_usd_so_far"])
            .filter(|cost| !cost.is_null())
            .collect();
        assert_so_far(
            price,
            costs.into_iter().map(pico_of).collect(),
            &frames.last().expect("frames")["sluice"],
        );
    }
    let (messages, _) = cluster.grpc_messages(&cluster.api_key, &body).await;
    let (last, pieces) = messages.split_last().expect("messages");
    let costs = pieces.iter().map(|message| pico_of(&json!(message.cost_usd_so_far))).collect();
    assert_so_far(price, costs, &json!({ "cost_usd": last.usage.as_ref().expect("usage").cost_usd }));

    let frames = stream_without_usage(&cluster, "/chat/completions", cluster.question(QUESTION, 24)).await;
    assert!(frames.iter().all(|frame| frame["sluice"].get("cost_usd_so_far").is_none()), "nobody asked");
    cluster.finish().await;
}

/// Each is the prompt's cost and that of a whole number of tokens, never less than before, and never more than the bill.
/// How many pieces there are is the node's affair: it may put tokens together.
fn assert_so_far(price: Price, costs: Vec<i64>, end: &Value) {
    let cost = pico_of(&end["cost_usd"]);
    assert!(!costs.is_empty() && costs.is_sorted(), "{costs:?}");
    assert!(
        costs.iter().all(|so_far| *so_far <= cost && (cost - so_far) % price.output_pico == 0),
        "{costs:?}, {cost}"
    );
}

/// A budget that ends an answer ends it with a receipt, which says so: to the last unit of the credit.
#[tokio::test]
async fn an_answer_that_the_budget_ended_has_a_receipt() {
    let options = ClusterOptions { model: Some(random_model().await), ..ClusterOptions::default() };
    let cluster = Cluster::start_with(options).await;
    let price = cluster.price().await;
    let body = cluster.question(QUESTION, 400);
    let mut one = body.clone();
    one["max_tokens"] = json!(1);
    let (prompt, _) = cluster.chat(&one).await.usage();
    let credit = price.of(prompt, 30);
    let customer = cluster.customer("capped", Some(credit)).await;
    let stream =
        cluster.stream("/chat/completions", &customer.key, &body).await.expect("a stream").finish().await;
    let handed = of_frames("chat", &stream.frames, stream.usage);
    assert_eq!((pico_of(&json!(handed.cost_usd)), handed.usage), (credit, Some((prompt, 30))));
    let (good, said, stderr) = verify(&handed.receipt, &["--jwks", &cluster.url(JWKS_PATH)]).await;
    assert!(good, "{stderr}");
    assert_eq!(said["receipt"]["finish_reason"], "budget");
    assert_eq!(said["receipt"]["org"], "org-capped");
    cluster.finish().await;
}

/// Keys outlast a restart; after a change of keys, the old one is still listed and its receipts are still good.
#[tokio::test]
async fn keys_outlast_restarts_and_can_be_changed() {
    let config = tempfile::NamedTempFile::new().expect("a file");
    let place = config.path().to_str().expect("UTF-8").to_owned();
    let args = vec!["--config".to_owned(), place.clone()];
    let mut cluster = Cluster::start_with(ClusterOptions { args, ..ClusterOptions::default() }).await;
    let jwks = async |cluster: &Cluster| cluster.send(cluster.request("GET", JWKS_PATH)).await.ok();
    let first = jwks(&cluster).await;
    assert!(first["keys"][0].get("d").is_none(), "{first}");
    assert_eq!(cluster.cli(&["receipt", "keys"]).await, first, "the command prints what the server serves");
    let receipt = of_headers("chat", &cluster.chat(&cluster.question(QUESTION, 3)).await).receipt;
    cluster.stop(Signal::Kill).await;
    cluster.restart().await;
    assert_eq!(jwks(&cluster).await, first);

    cluster.stop(Signal::Terminate).await;
    std::fs::remove_file(cluster.data_dir().join("receipt-key")).expect("the key");
    let x = first["keys"][0]["x"].as_str().expect("x");
    std::fs::write(&place, format!("[receipts]\nretired_keys = [{x:?}]\n")).expect("write");
    cluster.restart().await;
    let both = jwks(&cluster).await;
    assert_eq!(both["keys"].as_array().map(Vec::len), Some(2), "{both}");
    assert_eq!(both["keys"][1], first["keys"][0]);
    let newer = of_headers("chat", &cluster.chat(&cluster.question(QUESTION, 3)).await).receipt;
    for receipt in [receipt, newer] {
        let (good, said, stderr) = verify(&receipt, &["--jwks", &cluster.url(JWKS_PATH)]).await;
        assert!(good, "{said} {stderr}");
    }
    cluster.finish().await;
}

/// The unmodified openai SDK and gRPC hand receipts on; a JOSE library that is not ours verifies them.
#[tokio::test]
async fn sdk_clients_check_receipts_with_a_library_of_their_own() {
    let cluster = Cluster::start().await;
    pytest(&cluster, "receipt_test.py").await;
    cluster.finish().await;
}
