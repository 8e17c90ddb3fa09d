//! What chat clients send and read, by example.

use serde_json::json;
use sluice_billing::{Money, ServiceTier};

use super::*;
use crate::complete::{Answer, Finish, FinishReason, ToolCall, Usage};
use crate::request::{Format, ToolChoice};

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
    refused(json!({ "stream_options": { "include_cost": "yes" } }), kind, "stream_options.include_cost");
    refused(json!({ "user": 5 }), kind, "user");
    refused(json!({ "service_tier": 5 }), kind, "service_tier");
    refused(json!({ "service_tier": "batch" }), value, "service_tier");
    refused(json!({ "logit_bias": [] }), kind, "logit_bias");
    refused(json!({ "logit_bias": { "a": 1 } }), value, "logit_bias");
    refused(json!({ "logit_bias": { "5": 101 } }), value, "logit_bias");
    refused(json!({ "presence_penalty": 2.5 }), value, "presence_penalty");
    refused(json!({ "frequency_penalty": "x" }), kind, "frequency_penalty");
    refused(json!({ "repetition_penalty": 0 }), value, "repetition_penalty");
    refused(json!({ "min_p": 1.1 }), value, "min_p");
    refused(json!({ "min_tokens": -1 }), value, "min_tokens");
    refused(json!({ "ignore_eos": 1 }), kind, "ignore_eos");
    refused(json!({ "stop_token_ids": ["a"] }), value, "stop_token_ids");
    refused(json!({ "top_logprobs": 3 }), value, "top_logprobs");
    refused(json!({ "logprobs": true, "top_logprobs": 21 }), value, "top_logprobs");
    refused(json!({ "logprobs": 3 }), kind, "logprobs");
}

#[test]
fn formats_and_tools_at_fault_are_named() {
    let (value, kind, missing) = ("invalid_value", "invalid_type", "missing_required_parameter");
    let format = |format: Value| json!({ "response_format": format });
    refused(format(json!("json")), kind, "response_format");
    refused(format(json!({})), missing, "response_format.type");
    refused(format(json!({ "type": "xml" })), "unsupported_value", "response_format.type");
    refused(format(json!({ "type": "json_schema" })), missing, "response_format.json_schema");
    let schema =
        |schema: Value| json!({ "response_format": { "type": "json_schema", "json_schema": schema } });
    refused(schema(json!({ "schema": {} })), missing, "response_format.json_schema.name");
    refused(schema(json!({ "name": "a b", "schema": {} })), value, "response_format.json_schema.name");
    refused(schema(json!({ "name": "a" })), missing, "response_format.json_schema.schema");
    refused(schema(json!({ "name": "a", "schema": [] })), kind, "response_format.json_schema.schema");

    let tool = |function: Value| json!({ "tools": [{ "type": "function", "function": function }] });
    refused(json!({ "tools": [{ "type": "custom" }] }), "unsupported_value", "tools[0].type");
    refused(json!({ "tools": [{ "type": "function" }] }), missing, "tools[0].function");
    refused(tool(json!({})), missing, "tools[0].function.name");
    refused(tool(json!({ "name": "a b" })), value, "tools[0].function.name");
    refused(tool(json!({ "name": "a", "parameters": "x" })), kind, "tools[0].function.parameters");
    refused(json!({ "tool_choice": "required" }), value, "tool_choice");
    refused(json!({ "tool_choice": "maybe" }), value, "tool_choice");
    let mut named = tool(json!({ "name": "a" }));
    named["tool_choice"] = json!({ "type": "function", "function": { "name": "b" } });
    refused(named.clone(), value, "tool_choice.function.name");
    named["tool_choice"] = json!("auto");
    named["response_format"] = json!({ "type": "json_object" });
    refused(named, "unsupported_value", "response_format");
    let call =
        json!([{ "role": "assistant", "content": null, "tool_calls": [{ "function": { "name": "a" } }] }]);
    refused(json!({ "messages": call }), missing, "messages[0].tool_calls[0].function.arguments");
    refused(json!({ "messages": [{ "role": "tool", "content": "x" }] }), missing, "messages[0].tool_call_id");
}

#[test]
fn formats_and_tools_arrive() {
    let (request, _) = accepted(json!({ "response_format": { "type": "json_schema", "json_schema": {
        "name": "a", "strict": true, "schema": { "type": "object" },
    } } }));
    assert_eq!(request.shape.format, Format::JsonSchema(r#"{"type":"object"}"#.into()));
    let tools = json!([{ "type": "function", "function": { "name": "a" } }]);
    let (request, _) = accepted(json!({ "tools": tools, "parallel_tool_calls": false }));
    let declared = request.shape.tools.expect("tools");
    assert_eq!((declared.choice, declared.parallel), (ToolChoice::Auto, false));
    assert_eq!(declared.declared_json, tools.to_string());
    let named = json!({ "type": "function", "function": { "name": "a" } });
    let (request, _) = accepted(json!({ "tools": tools, "tool_choice": named }));
    assert_eq!(request.shape.tools.map(|tools| tools.choice), Some(ToolChoice::Named("a".into())));
    let none = json!({ "tools": tools, "tool_choice": "none", "response_format": { "type": "json_object" } });
    let (request, _) = accepted(none);
    assert_eq!((request.shape.tools, request.shape.format), (None, Format::JsonObject));

    let (request, _) = accepted(json!({
        "logprobs": true, "top_logprobs": 2, "min_tokens": 4, "ignore_eos": true, "stop_token_ids": [7],
        "logit_bias": { "50": -100 }, "min_p": 0.1, "frequency_penalty": -1, "repetition_penalty": 1.5,
    }));
    let (shape, sampling) = (request.shape, request.sampling);
    assert_eq!((shape.top_logprobs, shape.output_tokens_min, shape.stop_ids), (Some(2), 4, vec![7]));
    assert!(shape.ignore_end_of_sequence);
    assert_eq!((sampling.logit_bias.as_slice(), sampling.min_p), (&[(50, -100.0)][..], 0.1));
    assert_eq!((sampling.frequency_penalty.get(), sampling.repetition_penalty.get()), (-1.0, 1.5));
}

#[test]
fn what_is_not_done_is_refused() {
    let (parameter, value) = ("unsupported_parameter", "unsupported_value");
    refused(json!({ "n": 2 }), value, "n");
    refused(json!({ "modalities": ["text", "audio"] }), value, "modalities");
    refused(json!({ "audio": { "voice": "x" } }), parameter, "audio");
    refused(json!({ "messages": [{ "role": "function", "content": "x" }] }), value, "messages[0].role");
    refused(json!({ "functions": [{ "name": "x" }] }), parameter, "functions");
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
    assert_eq!(options, StreamOptions { stream: true, include_usage: true, include_cost: false });
}

#[test]
fn service_tiers_have_openais_names() {
    for (asked, tier, told) in [
        (json!(null), ServiceTier::Default, "default"),
        (json!("auto"), ServiceTier::Default, "default"),
        (json!("default"), ServiceTier::Default, "default"),
        (json!("flex"), ServiceTier::Batch, "flex"),
        (json!("priority"), ServiceTier::Priority, "priority"),
    ] {
        let (request, _) = accepted(json!({ "service_tier": asked }));
        assert_eq!((request.service_tier, openai::service_tier_name(request.service_tier)), (tier, told));
    }
}

fn head() -> Head {
    let (id, model, system_fingerprint) = ("chatcmpl-1".into(), "m".into(), "fp_0".into());
    Head { id, created: 7, model, service_tier: "flex", system_fingerprint }
}

fn text(text: &str) -> Event {
    Event::Delta(complete::Delta::text(text))
}

fn finish(reason: FinishReason) -> Finish {
    let usage = Usage { prompt_tokens: 3, cached_prompt_tokens: 1, completion_tokens: 2 };
    Finish { reason, usage, cost: Money::from_pico(7_500_000), receipt: "a.b.c".into() }
}

#[track_caller]
fn streamed(include_usage: bool, events: Vec<Result<Event, ApiError>>, expect: &[&str]) {
    let mut chunks = ChatChunks::new(head(), include_usage);
    let mut out = Vec::new();
    for event in events {
        out.extend_from_slice(&sse::frames(&mut chunks, event));
    }
    let head = r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m","service_tier":"flex","system_fingerprint":"fp_0","#;
    let expect: String =
        expect.iter().map(|frame| format!("data: {}\n\n", frame.replace('@', head))).collect();
    assert_eq!(String::from_utf8(out).expect("UTF-8"), expect);
}

#[test]
fn frames_of_a_stream() {
    streamed(
        false,
        vec![Ok(text("Hé")), Ok(text("")), Ok(text("\n\"")), Ok(Event::Finished(finish(FinishReason::Stop)))],
        &[
            r#"@"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{"content":"Hé"},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{"content":"\n\""},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"sluice":{"cost_usd":"0.0000075","receipt":"a.b.c"}}"#,
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
            r#"@"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":1}},"sluice":{"cost_usd":"0.0000075","receipt":"a.b.c"}}"#,
            "[DONE]",
        ],
    );
}

#[test]
fn frames_with_the_cost_so_far_and_a_budget_that_ended_without_usage() {
    let delta = |text: &str, pico| {
        let cost_so_far = Some(Money::from_pico(pico));
        Ok(Event::Delta(complete::Delta { cost_so_far, ..complete::Delta::text(text) }))
    };
    streamed(
        false,
        vec![delta("a", 5_000_000), delta("b", 6_000_000), Ok(Event::Finished(finish(FinishReason::Budget)))],
        &[
            r#"@"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}],"sluice":{"cost_usd_so_far":"0.000005"}}"#,
            r#"@"choices":[{"index":0,"delta":{"content":"b"},"logprobs":null,"finish_reason":null}],"sluice":{"cost_usd_so_far":"0.000006"}}"#,
            r#"@"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"sluice":{"finish_reason":"budget","cost_usd":"0.0000075","receipt":"a.b.c"}}"#,
            "[DONE]",
        ],
    );
}

#[test]
fn a_failure_is_a_frame_and_then_the_end() {
    streamed(
        false,
        vec![Ok(text("a")), Err(ApiError::internal("secret"))],
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
    let answer = Answer {
        text: "Hi".into(),
        logprobs: vec![],
        tool_calls: vec![],
        finish: finish(FinishReason::Length),
    };
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
        "service_tier": "flex", "system_fingerprint": "fp_0",
    });
    assert_eq!(whole(&head(), &answer), expect);
}

fn call(index: u32, name: &str, arguments: &str) -> ToolCallDelta {
    ToolCallDelta { index, name: name.into(), arguments: arguments.into() }
}

#[test]
fn frames_of_tool_calls() {
    let calls = |tool_calls| Ok(Event::Delta(complete::Delta { tool_calls, ..complete::Delta::default() }));
    streamed(
        false,
        vec![
            Ok(text("")),
            calls(vec![call(0, "a", "{")]),
            calls(vec![call(0, "", "}"), call(1, "b", "")]),
            Ok(Event::Finished(finish(FinishReason::Stop))),
        ],
        &[
            r#"@"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"call_100","type":"function","function":{"name":"a","arguments":"{"}}]},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"}"}},{"index":1,"id":"call_101","type":"function","function":{"name":"b","arguments":""}}]},"logprobs":null,"finish_reason":null}]}"#,
            r#"@"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"tool_calls"}],"sluice":{"cost_usd":"0.0000075","receipt":"a.b.c"}}"#,
            "[DONE]",
        ],
    );
}

#[test]
fn a_whole_answer_of_tool_calls() {
    let answer = Answer {
        text: String::new(),
        logprobs: vec![],
        tool_calls: vec![ToolCall { name: "a".into(), arguments: "{}".into() }],
        finish: finish(FinishReason::Stop),
    };
    let choice = &whole(&head(), &answer)["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    let call =
        json!({ "id": "call_100", "type": "function", "function": { "name": "a", "arguments": "{}" } });
    assert_eq!(
        choice["message"],
        json!({ "role": "assistant", "content": null, "refusal": null, "tool_calls": [call] })
    );
    let cut = Answer { finish: finish(FinishReason::Length), ..answer };
    assert_eq!(whole(&head(), &cut)["choices"][0]["finish_reason"], "length");
}
