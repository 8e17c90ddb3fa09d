//! Everything a client can get wrong has the right status, the envelope with its four keys, and names the field.

use serde_json::{Value, json};
use sluice_tests::{Cluster, assert_error, eventually};

/// One line of a table: what is wrong, the request's change, and status, code and param of the refusal.
type Case = (&'static str, Value, u16, &'static str, Option<&'static str>);

/// The question with some fields replaced; a field set to `"<absent>"` is removed.
fn changed(cluster: &Cluster, change: &Value) -> Value {
    let mut body = cluster.question("Hello", 4);
    for (field, value) in change.as_object().expect("a change is an object") {
        match value == "<absent>" {
            true => drop(body.as_object_mut().expect("an object").remove(field)),
            false => body[field] = value.clone(),
        }
    }
    body
}

#[tokio::test]
async fn fields_out_of_range_or_of_the_wrong_type_are_named() {
    let cluster = Cluster::start().await;
    let (value, kind, missing) = ("invalid_value", "invalid_type", "missing_required_parameter");
    let user = |content: Value| json!([{ "role": "user", "content": content }]);
    let cases: Vec<Case> = vec![
        ("no model", json!({ "model": "<absent>" }), 400, missing, Some("model")),
        ("model of the wrong type", json!({ "model": 5 }), 400, kind, Some("model")),
        ("model null", json!({ "model": null }), 400, missing, Some("model")),
        ("no messages", json!({ "messages": "<absent>" }), 400, missing, Some("messages")),
        ("empty messages", json!({ "messages": [] }), 400, value, Some("messages")),
        ("messages a string", json!({ "messages": "Hello" }), 400, kind, Some("messages")),
        ("a message a string", json!({ "messages": ["Hello"] }), 400, kind, Some("messages[0]")),
        ("no role", json!({ "messages": [{ "content": "x" }] }), 400, missing, Some("messages[0].role")),
        (
            "unknown role",
            json!({ "messages": [{ "role": "king", "content": "x" }] }),
            400,
            value,
            Some("messages[0].role"),
        ),
        ("content a number", json!({ "messages": user(json!(5)) }), 400, kind, Some("messages[0].content")),
        ("temperature negative", json!({ "temperature": -0.1 }), 400, value, Some("temperature")),
        ("temperature too high", json!({ "temperature": 2.1 }), 400, value, Some("temperature")),
        ("temperature a string", json!({ "temperature": "hot" }), 400, kind, Some("temperature")),
        ("top_p negative", json!({ "top_p": -1 }), 400, value, Some("top_p")),
        ("top_p over one", json!({ "top_p": 1.01 }), 400, value, Some("top_p")),
        ("top_k negative", json!({ "top_k": -5 }), 400, value, Some("top_k")),
        ("max_tokens zero", json!({ "max_tokens": 0 }), 400, value, Some("max_tokens")),
        ("max_tokens negative", json!({ "max_tokens": -1 }), 400, value, Some("max_tokens")),
        ("max_tokens enormous", json!({ "max_tokens": 1u64 << 40 }), 400, value, Some("max_tokens")),
        ("max_tokens a fraction", json!({ "max_tokens": 1.5 }), 400, kind, Some("max_tokens")),
        ("max_tokens a string", json!({ "max_tokens": "4" }), 400, kind, Some("max_tokens")),
        (
            "max_completion_tokens negative",
            json!({ "max_completion_tokens": -1 }),
            400,
            value,
            Some("max_completion_tokens"),
        ),
        ("n zero", json!({ "n": 0 }), 400, value, Some("n")),
        ("n negative", json!({ "n": -1 }), 400, value, Some("n")),
        ("seed a string", json!({ "seed": "x" }), 400, kind, Some("seed")),
        ("stop empty", json!({ "stop": "" }), 400, value, Some("stop")),
        ("stop holds an empty one", json!({ "stop": ["a", ""] }), 400, value, Some("stop")),
        ("five stops", json!({ "stop": ["a", "b", "c", "d", "e"] }), 400, value, Some("stop")),
        ("stop a number", json!({ "stop": 5 }), 400, kind, Some("stop")),
        ("stream a string", json!({ "stream": "yes" }), 400, kind, Some("stream")),
        (
            "stream_options a string",
            json!({ "stream": true, "stream_options": "x" }),
            400,
            kind,
            Some("stream_options"),
        ),
        ("user a number", json!({ "user": 5 }), 400, kind, Some("user")),
    ];
    for (case, change, status, code, param) in cases {
        let reply = cluster.chat(&changed(&cluster, &change)).await;
        let message = assert_error(case, &reply, status, Some(code), param);
        let field = param.expect("each case is about a field").split('[').next().expect("a first part");
        assert!(message.contains(field), "{case}: the message names the field: {message}");
    }
    cluster.finish().await;
}

/// What is not done yet is refused, never silently dropped; what asks for nothing is accepted.
#[tokio::test]
async fn unsupported_requests_are_refused_not_dropped() {
    let cluster = Cluster::start().await;
    let tool =
        json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } }]);
    let schema =
        json!({ "type": "json_schema", "json_schema": { "name": "s", "schema": { "type": "object" } } });
    let image =
        json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "data:," } }] }]);
    for (change, param) in [
        (json!({ "n": 2 }), "n"),
        (json!({ "tools": tool, "response_format": schema }), "response_format"),
        (json!({ "tools": [{ "type": "custom", "custom": { "name": "c" } }] }), "tools"),
        (json!({ "functions": [{ "name": "f" }] }), "functions"),
        (json!({ "response_format": { "type": "grammar" } }), "response_format"),
        (json!({ "messages": image }), "messages"),
    ] {
        let reply = cluster.chat(&changed(&cluster, &change)).await;
        assert_eq!(reply.status, 400, "{change}: {}", reply.text);
        let error = &reply.json()["error"];
        let code = error["code"].as_str().unwrap_or_default();
        assert!(["unsupported_parameter", "unsupported_value"].contains(&code), "{change}: {error}");
        assert!(error["param"].as_str().is_some_and(|at| at.starts_with(param)), "{change}: {error}");
    }
    for change in [
        json!({ "n": 1, "tools": [], "tool_choice": "none", "logprobs": false, "logit_bias": {} }),
        json!({ "frequency_penalty": 0, "presence_penalty": 0.0, "response_format": { "type": "text" } }),
        json!({ "temperature": null, "top_p": null, "top_k": null, "n": null, "stop": null, "seed": null, "tools": null }),
        json!({ "logprobs": null, "response_format": null, "stream": null, "stream_options": null, "user": null }),
        json!({ "temperature": 0.0, "seed": 0, "stop": [], "metadata": { "a": "b" }, "store": false }),
        json!({ "a_field_of_next_year": { "deep": [1, 2] } }),
    ] {
        cluster.chat(&changed(&cluster, &change)).await.ok();
    }
    cluster.finish().await;
}

#[tokio::test]
async fn text_completions_refuse_the_same_way() {
    let cluster = Cluster::start().await;
    let body = |change: Value| {
        let mut body = json!({ "model": cluster.model, "prompt": "Hello", "max_tokens": 2 });
        for (field, value) in change.as_object().expect("an object") {
            body[field] = value.clone();
        }
        body
    };
    for (change, status, param) in [
        (json!({ "prompt": "" }), 400, "prompt"),
        (json!({ "prompt": [] }), 400, "prompt"),
        (json!({ "prompt": 5 }), 400, "prompt"),
        (json!({ "prompt": [-1] }), 400, "prompt"),
        (json!({ "prompt": [1_000_000_000u32] }), 400, "prompt"),
        (json!({ "max_tokens": 0 }), 400, "max_tokens"),
        (json!({ "temperature": -1 }), 400, "temperature"),
        (json!({ "echo": true }), 400, "echo"),
        (json!({ "best_of": 3 }), 400, "best_of"),
        (json!({ "model": "no-such-model" }), 404, "model"),
    ] {
        let reply = cluster.post("/completions", &cluster.api_key, &body(change.clone())).await;
        assert_eq!(reply.status, status, "{change}: {}", reply.text);
        let error = &reply.json()["error"];
        assert!(error["param"].as_str().is_some_and(|at| at.starts_with(param)), "{change}: {error}");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn keys() {
    let cluster = Cluster::start().await;
    let body = cluster.question("Hello", 2);
    let bare = || cluster.request("POST", "/chat/completions").json(&body);
    let key = &cluster.api_key;
    for (case, request) in [
        ("no key", bare()),
        ("an unknown key", bare().bearer_auth("sk-sluice-0123456789")),
        ("an empty key", bare().header("authorization", "Bearer ")),
        ("no scheme", bare().header("authorization", key)),
        ("another scheme", bare().basic_auth("me", Some(key))),
        ("a key with a character more", bare().bearer_auth(format!("{key}0"))),
        ("a key with a character less", bare().bearer_auth(&key[..key.len() - 1])),
        ("two keys", bare().header("authorization", "Bearer a").header("authorization", "Bearer b")),
        ("a very long key", bare().bearer_auth("k".repeat(8_000))),
    ] {
        let message = assert_error(case, &cluster.send(request).await, 401, Some("invalid_api_key"), None);
        assert!(!message.contains(key.as_str()), "{case}: a key is never repeated whole: {message}");
    }
    for path in ["/models", "/models/any"] {
        let reply = cluster.send(cluster.request("GET", path)).await;
        assert_error(path, &reply, 401, Some("invalid_api_key"), None);
    }
    let reply = cluster.post("/chat/completions", &cluster.admin_key, &body).await;
    assert_error("an admin key does not call models", &reply, 403, Some("admin_key_not_allowed"), None);

    let log = cluster.log();
    assert!(!log.contains(key.as_str()) && !log.contains(&cluster.admin_key), "no key is logged");
    assert!(!log.contains("Hello"), "no prompt is logged by default");
    cluster.finish().await;
}

#[tokio::test]
async fn keys_are_created_listed_and_revoked() {
    let cluster = Cluster::start().await;
    let made = cluster.cli(&["keys", "create", "--name", "ci"]).await;
    let (id, key) = (made["id"].as_str().expect("an id"), made["key"].as_str().expect("the key, once"));
    let body = cluster.question("Hello", 2);
    cluster.post("/chat/completions", key, &body).await.ok();

    let listed = cluster.cli(&["keys", "list"]).await;
    assert!(!listed.to_string().contains(key), "a list never shows a key");
    let find = |listed: &Value| -> Value {
        let found = listed.as_array().into_iter().flatten().find(|entry| entry["id"] == id);
        found.unwrap_or_else(|| panic!("{id} is listed: {listed}")).clone()
    };
    assert_eq!(find(&listed)["name"], "ci");
    assert!(find(&listed)["revoked_s"].is_null());

    cluster.cli(&["keys", "revoke", id]).await;
    assert!(find(&cluster.cli(&["keys", "list"]).await)["revoked_s"].is_i64());
    let refused = eventually("a running server learns of the revocation", async || {
        match cluster.post("/chat/completions", key, &body).await {
            reply if reply.status == 200 => Err("still accepted".to_owned()),
            reply => Ok(reply),
        }
    })
    .await;
    assert_error("a revoked key", &refused, 401, Some("invalid_api_key"), None);
    cluster.chat(&body).await.ok();

    for args in [&["keys", "revoke", "no-such-id"][..], &["keys", "create", "--project", "no-such-project"]] {
        let output = cluster.cli_output(args).await;
        assert!(!output.status.success(), "{args:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("no-such-"), "{args:?}: {stderr}");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn bodies_that_are_no_request() {
    let cluster = Cluster::start().await;
    let post = |body: Vec<u8>| {
        let request = cluster.request("POST", "/chat/completions").bearer_auth(&cluster.api_key);
        request.header("content-type", "application/json").body(body)
    };
    let question = cluster.question("Hello", 4).to_string();
    let nan = question.replace("\"temperature\":0", "\"temperature\":NaN");
    assert_ne!(nan, question);
    let deep = format!("{{\"messages\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for (case, body) in [
        ("no body", ""),
        ("no JSON", "hello"),
        ("cut off", &question[..question.len() - 3]),
        ("something behind it", &format!("{question}x")),
        ("NaN", &nan),
        ("infinity", &question.replace("\"temperature\":0", "\"temperature\":Infinity")),
        ("absurd nesting", &deep),
        ("single quotes", "{'model': 'x'}"),
    ] {
        assert_error(case, &cluster.send(post(body.into())).await, 400, Some("invalid_json"), None);
    }
    for (case, body) in [("an array", "[]"), ("a string", "\"x\""), ("a number", "1"), ("null", "null")] {
        let reply = cluster.send(post(body.into())).await;
        assert_eq!(reply.status, 400, "{case}: {}", reply.text);
        assert!(
            reply.json()["error"]["message"].as_str().is_some_and(|text| text.contains("object")),
            "{}",
            reply.text
        );
    }
    let huge = question.replace("\"temperature\":0", "\"temperature\":1e400");
    assert_eq!(cluster.send(post(huge.into())).await.status, 400, "a number beyond any float");

    let reply = cluster.chat(&cluster.question(&"x".repeat(10 << 20), 4)).await;
    assert_error("10 MB", &reply, 413, Some("request_too_large"), None);
    cluster.chat(&cluster.question("Hello", 1)).await.ok();
    cluster.finish().await;
}

#[tokio::test]
async fn a_prompt_longer_than_the_context() {
    let cluster = Cluster::start().await;
    for stream in [false, true] {
        let mut body = cluster.question(&"the river and the mill ".repeat(50_000), 4);
        body["stream"] = json!(stream);
        let reply = cluster.chat(&body).await;
        let message =
            assert_error("long prompt", &reply, 400, Some("context_length_exceeded"), Some("messages"));
        assert!(message.chars().any(|digit| digit.is_ascii_digit()), "it says how long: {message}");
    }
    let body = json!({ "model": cluster.model, "prompt": "the river ".repeat(100_000), "max_tokens": 1 });
    let reply = cluster.post("/completions", &cluster.api_key, &body).await;
    assert_error("long text", &reply, 400, Some("context_length_exceeded"), Some("prompt"));
    cluster.finish().await;
}

#[tokio::test]
async fn unknown_models_routes_and_methods() {
    let cluster = Cluster::start().await;
    for stream in [false, true] {
        let reply =
            cluster.chat(&changed(&cluster, &json!({ "model": "no-such-model", "stream": stream }))).await;
        let message = assert_error("model", &reply, 404, Some("model_not_found"), Some("model"));
        assert!(message.contains("no-such-model"), "{message}");
    }
    let reply = cluster.get("/models/no-such-model").await;
    assert_error("model", &reply, 404, Some("model_not_found"), Some("model"));

    for path in ["/nothing", "//", "//v2/chat/completions", "/chat/completions/x"] {
        let reply = cluster.post(path, &cluster.api_key, &json!({})).await;
        assert_error(path, &reply, 404, Some("unknown_url"), None);
    }
    let reply = cluster.get("/chat/completions").await;
    assert_error("GET", &reply, 405, Some("method_not_supported"), None);
    cluster.finish().await;
}

/// Whatever was refused above: nothing is billed, nothing is held.
#[tokio::test]
async fn a_refusal_costs_nothing() {
    let cluster = Cluster::start().await;
    let before = (cluster.balance_pico().await, cluster.metrics().await.node_prompt_tokens());
    for change in [json!({ "model": "x" }), json!({ "messages": [] }), json!({ "max_tokens": -1 })] {
        assert!(cluster.chat(&changed(&cluster, &change)).await.status >= 400);
    }
    cluster.chat(&cluster.question(&"the river and the mill ".repeat(50_000), 4)).await;
    cluster.settled().await;
    assert_eq!((cluster.balance_pico().await, cluster.metrics().await.node_prompt_tokens()), before);
    assert_eq!(cluster.usage(&[]).await.requests, 0);
    cluster.finish().await;
}
