//! What chat clients send and read, by example.

use serde_json::json;

use super::*;
use crate::complete::{Answer, Finish, FinishReason, Usage};

fn body(change: Value) -> Value {
    let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] });
    for (name, value) in change.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

#[track_caller]
fn refused(change: Value, code: &str, param: &str) {
    let error = parse(&body(change.clone())).map(|(request, _)| request).expect_err("it is refused");
    assert_eq!((error.code(), error.param().unwrap_or("-")), (code, param), "for {change}");
    assert!(error.to_string().contains(param.split(['[', '.']).next().expect("a part")), "{error}");
}

fn accepted(change: Value) -> (CompletionRequest, StreamOptions) {
    parse(&body(change.clone())).unwrap_or_else(|error| panic!("{change}: {error}"))
}

#[test]
fn fields_at_fault_are_named() {
    let (value, kind, missing) = ("invalid_value", "invalid_type", "missing_required_parameter");
    refused(json!({ "model": null }), missing, "model");
    refused(json!({ "model": 5 }), kind, "model");
    refused(json!({ "messages": null }), missing, "messages");
    refused(json!({ "messages": [] }), value, "messages");
    refused(json!({ "messages": "hi" }), kind, "messages");
    refused(json!({ "messages": ["hi"] }), kind, "messages[0]");
    refused(json!({ "messages": [{ "content": "x" }] }), missing, "messages[0].role");
    refused(json!({ "messages": [{ "role": "king", "content": "x" }] }), value, "messages[0].role");
    refused(json!({ "messages": [{ "role": "user" }] }), missing, "messages[0].content");
    refused(json!({ "messages": [{ "role": "user", "content": 5 }] }), kind, "messages[0].content");
    refused(json!({ "messages": [{ "role": "user", "content": [] }] }), value, "messages[0].content");
    let part = json!([{ "role": "user", "content": [{ "type": "text" }] }]);
    refused(json!({ "messages": part }), missing, "messages[0].content[0].text");
    refused(json!({ "temperature": -0.1 }), value, "temperature");
    refused(json!({ "temperature": "hot" }), kind, "temperature");
    refused(json!({ "top_p": 1.01 }), value, "top_p");
    refused(json!({ "top_k": -5 }), value, "top_k");
    refused(json!({ "max_tokens": 0 }), value, "max_tokens");
    refused(json!({ "max_tokens": 1.5 }), kind, "max_tokens");
    refused(json!({ "max_tokens": u64::MAX }), value, "max_tokens");
    refused(json!({ "max_completion_tokens": -1 }), value, "max_completion_tokens");
    refused(json!({ "n": 0 }), value, "n");
    refused(json!({ "seed": "x" }), kind, "seed");
    refused(json!({ "stop": "" }), value, "stop");
    refused(json!({ "stop": ["a", ""] }), value, "stop");
    refused(json!({ "stop": ["a", "b", "c", "d", "e"] }), value, "stop");
    refused(json!({ "stop": [5] }), kind, "stop");
    refused(json!({ "stream": "yes" }), kind, "stream");
    refused(json!({ "stream_options": "x" }), kind, "stream_options");
    refused(json!({ "stream_options": { "include_usage": 1 } }), kind, "stream_options.include_usage");
    refused(json!({ "user": 5 }), kind, "user");
    refused(json!({ "logit_bias": [] }), kind, "logit_bias");
}

#[test]
fn what_is_not_done_is_refused() {
    let (parameter, value) = ("unsupported_parameter", "unsupported_value");
    refused(json!({ "n": 2 }), value, "n");
    refused(json!({ "logprobs": true }), parameter, "logprobs");
    refused(json!({ "top_logprobs": 3 }), parameter, "top_logprobs");
    refused(json!({ "tools": [{ "type": "function" }] }), parameter, "tools");
    refused(json!({ "tool_choice": "required" }), value, "tool_choice");
    refused(json!({ "response_format": { "type": "json_object" } }), value, "response_format.type");
    refused(json!({ "logit_bias": { "5": 1 } }), parameter, "logit_bias");
    refused(json!({ "presence_penalty": 0.5 }), parameter, "presence_penalty");
    refused(json!({ "modalities": ["text", "audio"] }), value, "modalities");
    refused(json!({ "audio": { "voice": "x" } }), parameter, "audio");
    refused(json!({ "messages": [{ "role": "tool", "content": "x" }] }), value, "messages[0].role");
    let image =
        json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "data:," } }] }]);
    refused(json!({ "messages": image }), value, "messages[0].content[0].type");
}

#[test]
fn what_asks_for_nothing_is_accepted() {
    accepted(json!({ "n": 1, "tools": [], "tool_choice": "none", "logprobs": false, "logit_bias": {} }));
    accepted(
        json!({ "frequency_penalty": 0, "presence_penalty": 0.0, "response_format": { "type": "text" } }),
    );
    accepted(json!({ "a_field_of_next_year": { "deep": [1, 2] }, "modalities": ["text"], "stop": [] }));
    let (request, options) = accepted(json!({
        "temperature": null, "top_p": null, "top_k": null, "n": null, "stop": null, "seed": null, "tools": null,
        "stream": null, "stream_options": null, "user": null, "max_tokens": null,
    }));
    assert_eq!(request.sampling, crate::request::Sampling::default());
    assert_eq!((request.output_tokens_max, options), (None, StreamOptions::default()));
}

#[test]
fn values_arrive() {
    let parts = json!([
        { "role": "developer", "content": "be brief", "name": "ops" },
        { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
        { "role": "assistant", "content": null, "tool_calls": [] },
    ]);
    let (request, options) = accepted(json!({
        "messages": parts, "max_tokens": 9, "max_completion_tokens": 7.0, "temperature": 0, "seed": -1,
        "stop": "x", "user": "u", "stream": true, "stream_options": { "include_usage": true },
    }));
    let Prompt::Chat(messages) = &request.prompt else { panic!("a chat prompt") };
    let got: Vec<_> =
        messages.as_slice().iter().map(|m| (m.role, m.content.as_str(), m.name.as_str())).collect();
    assert_eq!(got, [(Role::System, "be brief", "ops"), (Role::User, "ab", ""), (Role::Assistant, "", "")]);
    assert_eq!(request.output_tokens_max.map(|limit| limit.get()), Some(7));
    assert_eq!(request.sampling.seed, Some(u64::MAX));
    assert_eq!(request.stop.as_slice(), ["x"]);
    assert_eq!(options, StreamOptions { stream: true, include_usage: true });
}

fn head() -> Head {
    Head { id: "chatcmpl-1".into(), created: 7, model: "m".into(), system_fingerprint: "fp_0".into() }
}

fn finish(reason: FinishReason) -> Finish {
    Finish { reason, usage: Usage { prompt_tokens: 3, cached_prompt_tokens: 1, completion_tokens: 2 } }
}

#[track_caller]
fn streamed(include_usage: bool, events: Vec<Result<Event, ApiError>>, expect: &[&str]) {
    let mut chunks = ChatChunks::new(head(), include_usage);
    let mut out = Vec::new();
    for event in events {
        out.extend_from_slice(&sse::frames(&mut chunks, event));
    }
    let head = r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","#;
    let expect: String =
        expect.iter().map(|frame| format!("data: {}\n\n", frame.replace('@', head))).collect();
    assert_eq!(String::from_utf8(out).expect("UTF-8"), expect);
}

#[test]
fn frames_of_a_stream() {
    streamed(
        false,
        vec![
            Ok(Event::Text("Hé".into())),
            Ok(Event::Text(String::new())),
            Ok(Event::Text("\n\"".into())),
            Ok(Event::Finished(finish(FinishReason::Stop))),
        ],
        &[
            r#"@"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{"content":"Hé"},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{"content":"\n\""},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}"#,
            "[DONE]",
        ],
    );
}

#[test]
fn frames_with_usage_and_an_ended_budget() {
    streamed(
        true,
        vec![Ok(Event::Finished(finish(FinishReason::Budget)))],
        &[
            r#"@"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}"#,
            r#"@"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null,"sluice":{"finish_reason":"budget"}}"#,
            r#"@"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":1}}}"#,
            "[DONE]",
        ],
    );
}

#[test]
fn a_failure_is_a_frame_and_then_the_end() {
    streamed(
        false,
        vec![Ok(Event::Text("a".into())), Err(ApiError::internal("secret"))],
        &[
            r#"@"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}]}"#,
            r#"{"error":{"message":"something failed on our side","type":"server_error","param":null,"code":"server_error"}}"#,
            "[DONE]",
        ],
    );
}

#[test]
fn a_whole_answer() {
    let answer = Answer { text: "Hi".into(), finish: finish(FinishReason::Length) };
    let expect = json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 7, "model": "m",
        "choices": [{
            "index": 0, "message": { "role": "assistant", "content": "Hi", "refusal": null },
            "logprobs": null, "finish_reason": "length",
        }],
        "usage": {
            "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
            "prompt_tokens_details": { "cached_tokens": 1 },
        },
        "system_fingerprint": "fp_0",
    });
    assert_eq!(whole(&head(), &answer), expect);
}
