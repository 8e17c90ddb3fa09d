//! From an empty folder to a streamed, billed answer, with the client that everybody has: curl.

use serde_json::{Value, json};
use sluice_tests::{Cluster, Signal, Transcript, eventually};

const QUESTION: &str = "Tell me a short story about a river.";

/// `curl -i` output: status, header lines, body.
fn split_response(printed: &str) -> (u16, Vec<String>, String) {
    let (head, body) = printed.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {printed}"));
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
    let headers = lines.map(str::to_lowercase).collect();
    (status.unwrap_or_else(|| panic!("no status: {head}")), headers, body.to_owned())
}

/// The keys of a JSON object in the order they were written.
fn keys_of(value: &Value) -> Vec<&str> {
    value.as_object().unwrap_or_else(|| panic!("no object: {value}")).keys().map(String::as_str).collect()
}

async fn curl_chat(cluster: &Cluster, flags: &[&str], body: &Value) -> String {
    let (url, body) = (cluster.url("/chat/completions"), body.to_string());
    let authorization = format!("Authorization: Bearer {}", cluster.api_key);
    let json = "Content-Type: application/json";
    cluster.curl(&[flags, &[&url, "-H", &authorization, "-H", json, "-d", &body]].concat()).await
}

#[tokio::test]
async fn curl_receives_an_answer() {
    let cluster = Cluster::start().await;
    let printed = curl_chat(&cluster, &["-i"], &cluster.question(QUESTION, 24)).await;
    let (status, headers, body) = split_response(&printed);
    assert_eq!(status, 200, "{printed}");
    assert!(headers.iter().any(|line| line.starts_with("content-type: application/json")), "{headers:?}");
    assert!(headers.iter().any(|line| line.starts_with("x-request-id: ") && line.len() > 20), "{headers:?}");

    let body: Value = serde_json::from_str(&body).expect("the body is JSON");
    for key in ["id", "object", "created", "model", "choices", "usage"] {
        assert!(body.get(key).is_some(), "no {key}: {body}");
    }
    assert!(body["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")), "{body}");
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], json!(cluster.model));
    let [choice] = &body["choices"].as_array().expect("choices")[..] else { panic!("one choice: {body}") };
    assert_eq!((&choice["index"], &choice["message"]["role"]), (&json!(0), &json!("assistant")));
    assert!(choice["message"]["content"].as_str().is_some_and(|text| !text.trim().is_empty()), "{body}");
    assert!(choice["message"].get("tool_calls").is_none(), "absent, rather than empty: {body}");
    assert!(["stop", "length"].contains(&choice["finish_reason"].as_str().expect("a reason")), "{body}");
    cluster.finish().await;
}

#[tokio::test]
async fn curl_receives_the_same_answer_as_a_stream() {
    let cluster = Cluster::start().await;
    let whole = cluster.chat(&cluster.question(QUESTION, 24)).await;

    let mut body = cluster.question(QUESTION, 24);
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    let printed = curl_chat(&cluster, &["-i", "-N"], &body).await;
    let (status, headers, events) = split_response(&printed);
    assert_eq!(status, 200, "{printed}");
    assert!(headers.iter().any(|line| line.starts_with("content-type: text/event-stream")), "{headers:?}");
    assert!(headers.iter().any(|line| line.starts_with("x-request-id: ")), "{headers:?}");

    // The whole stream is `data:` lines and blank lines, and ends with [DONE].
    let mut frames: Vec<&str> = events.trim_end().split("\n\n").collect();
    assert_eq!(frames.pop(), Some("data: [DONE]"), "{events}");
    let frames: Vec<Value> = frames
        .iter()
        .map(|frame| frame.strip_prefix("data: ").unwrap_or_else(|| panic!("no data frame: {frame:?}")))
        .map(|data| serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}")))
        .collect();
    let (first, last) = (&frames[0], &frames[frames.len() - 1]);
    for key in ["id", "object", "created", "model", "choices"] {
        assert!(keys_of(first).contains(&key), "no {key}: {first}");
    }
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    assert!(first["choices"][0].get("finish_reason").is_some_and(Value::is_null), "{first}");
    assert_eq!(last["choices"], json!([]));
    for frame in &frames[..frames.len() - 1] {
        assert!(frame.get("usage").is_some_and(Value::is_null), "usage is null until its chunk: {frame}");
    }

    let streamed = Transcript::of(frames);
    assert_eq!(streamed.content, whole.content());
    assert_eq!(streamed.usage(), whole.usage());
    assert_eq!(streamed.finish_reason.as_deref(), whole.ok()["choices"][0]["finish_reason"].as_str());
    cluster.finish().await;
}

#[tokio::test]
async fn a_stream_without_include_usage_has_no_usage_anywhere() {
    let cluster = Cluster::start().await;
    for options in [None, Some(json!({})), Some(json!({ "include_usage": false })), Some(Value::Null)] {
        let mut body = cluster.question(QUESTION, 4);
        body["stream"] = json!(true);
        if let Some(options) = &options {
            body["stream_options"] = options.clone();
        }
        let events = curl_chat(&cluster, &["-N"], &body).await;
        assert!(events.ends_with("data: [DONE]\n\n"), "{options:?}: {events}");
        assert!(!events.contains("\"usage\""), "{options:?}: {events}");
        assert!(!events.contains("\"choices\":[]"), "{options:?}: {events}");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn text_completions_whole_and_streamed() {
    let cluster = Cluster::start().await;
    let body = json!({ "model": cluster.model, "prompt": "The river", "temperature": 0, "max_tokens": 16 });
    let whole = cluster.post("/completions", &cluster.api_key, &body).await;
    let answer = whole.ok();
    assert_eq!(answer["object"], "text_completion");
    let text = answer["choices"][0]["text"].as_str().expect("text");
    assert!(!text.is_empty());

    let stream = cluster.stream("/completions", &cluster.api_key, &body).await.map_err(|reply| reply.text);
    let streamed = stream.expect("a stream").finish().await;
    assert_eq!(streamed.content, text);
    assert_eq!(streamed.usage(), whole.usage());
    assert_eq!(streamed.frames[0]["object"], "text_completion");
    cluster.finish().await;
}

#[tokio::test]
async fn models_health_and_metrics() {
    let cluster = Cluster::start().await;
    let models = cluster.get("/models").await.ok();
    assert_eq!(models["object"], "list");
    let model = &models["data"][0];
    assert_eq!((&model["id"], &model["object"]), (&json!(cluster.model), &json!("model")));
    assert!(model["created"].as_i64().is_some_and(|at| at > 0) && model["owned_by"].is_string(), "{model}");
    assert_eq!(cluster.get(&format!("/models/{}", cluster.model)).await.ok(), *model);

    // For load balancers and Prometheus, which have no key.
    let health = cluster.send(cluster.request("GET", "//health")).await;
    assert_eq!(health.status, 200, "{}", health.text);
    let before = cluster.metrics().await.node_output_tokens();
    let (_, completion) = cluster.chat(&cluster.question(QUESTION, 8)).await.usage();
    eventually("the node's odometer is scraped", async || {
        match cluster.metrics().await.node_output_tokens() - before {
            counted if counted == completion => Ok(()),
            counted => Err(format!("{counted} tokens counted, {completion} answered")),
        }
    })
    .await;
    cluster.finish().await;
}

#[tokio::test]
async fn request_ids_are_unique() {
    let cluster = Cluster::start().await;
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..3 {
        let reply = cluster.chat(&cluster.question(QUESTION, 1)).await;
        assert_eq!(reply.status, 200);
        assert!(seen.insert(reply.header("x-request-id").expect("an id").to_owned()));
    }
    cluster.finish().await;
}

/// What clients were told they used, what the ledger says they used, and what `sluice usage` prints are one number.
#[tokio::test]
async fn usage_is_the_sum_of_what_was_answered() {
    let mut cluster = Cluster::start().await;
    let before = cluster.balance_pico().await;
    let (mut prompt, mut completion, mut requests) = (0, 0, 0);
    for tokens_max in [1, 5, 24] {
        let whole = cluster.chat(&cluster.question(QUESTION, tokens_max)).await.usage();
        let streamed = cluster.stream_chat(&cluster.question(QUESTION, tokens_max)).await.usage();
        for used in [whole, streamed] {
            prompt += used.0;
            completion += used.1;
            requests += 1;
        }
    }
    // A refused request is not a billed one.
    assert_eq!(cluster.chat(&cluster.question(QUESTION, 0)).await.status, 400);

    cluster.settled().await;
    cluster.stop(Signal::Terminate).await;
    let total = cluster.usage(&[]).await;
    assert_eq!((total.prompt_tokens(), total.output_tokens, total.requests), (prompt, completion, requests));
    assert_eq!(before - cluster.balance_pico().await, total.cost_pico, "the balance fell by what usage says");
    let cost = cluster.price().await.of_classes(total.input_tokens, total.cached_input_tokens, completion);
    assert_eq!(total.cost_pico, cost, "cost is tokens times price");
    for by in ["key", "model", "day", "project", "key,model,day"] {
        assert_eq!(cluster.usage(&["--by", by]).await, total, "the groups by {by} sum to the total");
    }
    cluster.finish().await;
}
