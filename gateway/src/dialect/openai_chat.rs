//! `POST /v1/chat/completions`.
//!
//! ```text
//! data: {..."delta":{"role":"assistant","content":""},"finish_reason":null}
//! data: {..."delta":{"content":"Hello"},"finish_reason":null}
//! data: {..."delta":{"tool_calls":[{"index":0,"id":..,"type":"function","function":{..}}]},"finish_reason":null}
//! data: {..."delta":{},"finish_reason":"stop"}
//! data: {..."choices":[],"usage":{...}}          with stream_options.include_usage; the last has "sluice":{"receipt":..}
//! data: [DONE]
//! ```

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::Value;
use sluice_proto::node::v1::ToolCallDelta;

use super::{
    body::read_json,
    fields::{Fields, wrong_type},
    openai::{self, StreamOptions, UsageBody},
    openai_logprobs::ChatLogprobs,
    openai_shape,
    sse::{self, Codec, Frames},
};
use crate::{
    app::App,
    auth::Principal,
    complete::{self, Completion, Delivery, Event, Finish, FinishReason},
    error::{ApiError, Fault},
    request::{self, CompletionRequest, EndUser, Message, Messages, Prompt, Role, Shape},
    stack::Arrival,
};

pub async fn create(
    State(app): State<Arc<App>>,
    Extension(arrival): Extension<Arrival>,
    Extension(principal): Extension<Arc<Principal>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read_json(request, &app.limits).await?;
    let (request, options) = parse(&body)?;
    drop(body);
    let delivery = if options.stream { Delivery::Streamed } else { Delivery::Whole };
    let mut completion = complete::start(&app, arrival.caller(principal, delivery, None), request).await?;
    let head = Head::of(&completion);
    if options.stream {
        return Ok(sse::response(completion, ChatChunks::new(head, options.include_usage)));
    }
    let answer = completion.whole().await?;
    let mut response = Json(whole(&head, &answer)).into_response();
    openai::mark(&answer.finish, &mut response);
    Ok(response)
}

fn parse(body: &Value) -> Result<(CompletionRequest, StreamOptions), ApiError> {
    let body = Fields::of(body, "")?;
    let model = openai::model(&body)?;
    let messages = messages(&body)?;
    refuse_unsupported(&body)?;
    let (format, tools) = (openai_shape::format(&body)?, openai_shape::tools(&body)?);
    openai_shape::refuse_format_beside_tools(&body, &format, tools.as_ref())?;
    let top_logprobs = openai_shape::top_logprobs(&body)?;
    let options = openai::stream_options(&body)?;
    let request = CompletionRequest {
        model,
        prompt: Prompt::Chat(messages),
        output_tokens_max: output_tokens_max(&body)?,
        sampling: openai::sampling(&body)?,
        shape: Shape { format, tools, top_logprobs, ..openai::shape(&body)? },
        stop: openai::stop(&body)?,
        service_tier: openai::service_tier(&body)?,
        user: openai::user(&body)?,
        cost_so_far: options.stream && options.include_cost,
    };
    Ok((request, options))
}

/// `max_completion_tokens`, or its older name; given both, the smaller.
fn output_tokens_max(body: &Fields<'_>) -> Result<Option<std::num::NonZeroU32>, ApiError> {
    let mut limit = None;
    for name in ["max_completion_tokens", "max_tokens"] {
        if let Some(value) = body.integer(name)? {
            let value = body.check(name, request::output_tokens_max(value))?;
            limit = Some(limit.map_or(value, |other: std::num::NonZeroU32| other.min(value)));
        }
    }
    Ok(limit)
}

fn messages(body: &Fields<'_>) -> Result<Messages, ApiError> {
    body.required("messages")?;
    let values = body.array("messages")?.unwrap_or_default();
    let messages =
        values.iter().enumerate().map(|(index, value)| message(value, index)).collect::<Result<_, _>>()?;
    body.check("messages", Messages::new(messages))
}

fn message(value: &Value, index: usize) -> Result<Message, ApiError> {
    let fields = Fields::of(value, format!("messages[{index}]"))?;
    fields.required("role")?;
    let role = match fields.string("role")?.unwrap_or_default() {
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" => Role::Tool,
        "function" => return Err(fields.unsupported_value("role", "its successor 'tool' is")),
        _ => {
            let message = "must be one of system, developer, user, assistant and tool";
            return Err(ApiError::field(Fault::Value, fields.path("role"), message));
        }
    };
    for name in ["function_call", "audio"] {
        if fields.get(name).is_some() {
            return Err(fields.unsupported(name));
        }
    }
    let content = match fields.get("content") {
        // An answer without text: what our own answers look like when the first token ended them.
        None if role == Role::Assistant => String::new(),
        None => return Err(ApiError::field(Fault::Missing, fields.path("content"), "is required")),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => text_of_parts(&fields, parts)?,
        Some(other) => return Err(fields.wrong_type("content", "a string or a list of parts", other)),
    };
    let name = fields.string("name")?.unwrap_or_default();
    let name = fields.check("name", EndUser::new(name.to_owned()))?.as_str().to_owned();
    let tool_calls_json = match role {
        Role::Assistant => tool_calls(&fields)?,
        _ => String::new(),
    };
    let tool_call_id = match role {
        Role::Tool => {
            fields.required("tool_call_id")?;
            fields.string("tool_call_id")?.unwrap_or_default().to_owned()
        }
        _ => String::new(),
    };
    Ok(Message { role, content, tool_calls_json, tool_call_id, name })
}

/// What an assistant called earlier, as it stands; templates read it.
fn tool_calls(message: &Fields<'_>) -> Result<String, ApiError> {
    let calls = message.array("tool_calls")?.unwrap_or_default();
    for (index, call) in calls.iter().enumerate() {
        let call = Fields::of(call, message.path(&format!("tool_calls[{index}]")))?;
        call.required("function")?;
        let function = call.object("function")?.expect("it is there");
        for name in ["name", "arguments"] {
            function.required(name)?;
            function.string(name)?;
        }
    }
    Ok(if calls.is_empty() { String::new() } else { Value::from(calls.to_vec()).to_string() })
}

/// Text parts, one after another, as chat templates print them.
fn text_of_parts(message: &Fields<'_>, parts: &[Value]) -> Result<String, ApiError> {
    let mut text = String::new();
    for (index, part) in parts.iter().enumerate() {
        let part = Fields::of(part, message.path(&format!("content[{index}]")))?;
        part.required("type")?;
        match part.string("type")?.unwrap_or_default() {
            "text" => {
                part.required("text")?;
                text.push_str(part.string("text")?.unwrap_or_default());
            }
            _ => return Err(part.unsupported_value("type", "only 'text' is")),
        }
    }
    match parts.is_empty() {
        true => Err(ApiError::field(Fault::Value, message.path("content"), "must hold at least one part")),
        false => Ok(text),
    }
}

/// Everything that asks for what this version does not do. Never dropped in silence: a client that wanted it must know.
fn refuse_unsupported(body: &Fields<'_>) -> Result<(), ApiError> {
    openai::refuse_unsupported(body)?;
    if body.array("functions")?.is_some_and(|list| !list.is_empty()) {
        return Err(body.unsupported("functions"));
    }
    match body.get("function_call") {
        None => {}
        Some(Value::String(choice)) if choice == "none" || choice == "auto" => {}
        Some(_) => return Err(body.unsupported_value("function_call", "only 'none' and 'auto' are")),
    }
    if let Some(modalities) = body.array("modalities")?
        && let Some(other) = modalities.iter().find(|modality| modality.as_str() != Some("text"))
    {
        return match other.is_string() {
            true => Err(body.unsupported_value("modalities", "only 'text' is")),
            false => Err(wrong_type(body.path("modalities"), "a list of strings", other)),
        };
    }
    for name in ["audio", "prediction", "web_search_options"] {
        if body.get(name).is_some() {
            return Err(body.unsupported(name));
        }
    }
    Ok(())
}

/// What every chunk of an answer repeats.
#[derive(Clone, Debug)]
struct Head {
    id: String,
    created: i64,
    model: String,
    service_tier: &'static str,
    system_fingerprint: String,
}

impl Head {
    fn of(completion: &Completion) -> Head {
        Head {
            id: format!("chatcmpl-{}", completion.request_id.simple()),
            created: completion.created_s,
            model: completion.model.name.clone(),
            service_tier: openai::service_tier_name(completion.service_tier),
            system_fingerprint: openai::system_fingerprint(&completion.model.content_hash),
        }
    }

    /// Of the answer's call `index`: the same for whoever asks again.
    fn call_id(&self, index: u32) -> String {
        format!("call_{}{index:02}", self.id.trim_start_matches("chatcmpl-"))
    }
}

fn whole(head: &Head, answer: &complete::Answer) -> Value {
    let called = !answer.tool_calls.is_empty();
    let content = (!called || !answer.text.is_empty()).then_some(&answer.text);
    let mut message = serde_json::json!({ "role": "assistant", "content": content, "refusal": null });
    if called {
        let calls = answer.tool_calls.iter().zip(0..).map(|(call, index)| {
            let function = serde_json::json!({ "name": call.name, "arguments": call.arguments });
            serde_json::json!({ "id": head.call_id(index), "type": "function", "function": function })
        });
        message["tool_calls"] = calls.collect();
    }
    let mut body = serde_json::json!({
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [{
            "index": 0,
            "message": message,
            "logprobs": ChatLogprobs::of(&answer.logprobs),
            "finish_reason": finish_reason(&answer.finish, called),
        }],
        "usage": UsageBody::from(answer.finish.usage),
        "service_tier": head.service_tier,
        "system_fingerprint": head.system_fingerprint,
    });
    if let Some(extension) = openai::Extension::of_reason(&answer.finish) {
        body["sluice"] = serde_json::json!(extension);
    }
    body
}

fn finish_reason(finish: &Finish, called: bool) -> &'static str {
    match finish.reason {
        FinishReason::Stop if called => "tool_calls",
        reason => openai::finish_reason(reason),
    }
}

/// Writes the chunks of one stream.
struct ChatChunks {
    head: Head,
    include_usage: bool,
    begun: bool,
    /// A call of a tool has begun.
    called: bool,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    service_tier: &'static str,
    system_fingerprint: &'a str,
    choices: Vec<Choice<'a>>,
    /// Outer absent: not asked for. Inner absent: null until its own chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sluice: Option<openai::Extension<'a>>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallDelta<'a>>,
}

/// The first of a call says what it is; later ones append to its arguments.
#[derive(Serialize)]
struct CallDelta<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl ChatChunks {
    fn new(head: Head, include_usage: bool) -> ChatChunks {
        ChatChunks { head, include_usage, begun: false, called: false }
    }

    fn chunk<'a>(&'a self, choices: Vec<Choice<'a>>) -> Chunk<'a> {
        Chunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            service_tier: self.head.service_tier,
            system_fingerprint: &self.head.system_fingerprint,
            choices,
            usage: self.include_usage.then_some(None),
            sluice: None,
        }
    }

    fn delta<'a>(&'a self, delta: Delta<'a>, finish_reason: Option<&'static str>) -> Chunk<'a> {
        self.chunk(vec![Choice { index: 0, delta, logprobs: None, finish_reason }])
    }

    fn generated<'a>(&'a self, delta: &'a complete::Delta) -> Chunk<'a> {
        let call = |call: &'a ToolCallDelta| {
            let first = !call.name.is_empty();
            CallDelta {
                index: call.index,
                id: first.then(|| self.head.call_id(call.index)),
                kind: first.then_some("function"),
                function: FunctionDelta {
                    name: first.then_some(call.name.as_str()),
                    arguments: &call.arguments,
                },
            }
        };
        let text = !delta.text.is_empty() || delta.tool_calls.is_empty();
        let written = Delta {
            content: text.then_some(delta.text.as_str()),
            tool_calls: delta.tool_calls.iter().map(call).collect(),
            ..Delta::default()
        };
        let logprobs = ChatLogprobs::of(&delta.logprobs);
        let choice = Choice { index: 0, delta: written, logprobs, finish_reason: None };
        Chunk { sluice: openai::Extension::of_delta(delta), ..self.chunk(vec![choice]) }
    }
}

impl Codec for ChatChunks {
    fn encode(&mut self, event: Event, frames: &mut Frames) {
        if !self.begun {
            let opening = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
            frames.push(&self.delta(opening, None));
            self.begun = true;
        }
        match event {
            Event::Delta(delta) if delta.is_empty() => {}
            Event::Delta(delta) => {
                self.called |= !delta.tool_calls.is_empty();
                frames.push(&self.generated(&delta));
            }
            Event::Finished(finish) => {
                let reason = finish_reason(&finish, self.called);
                let last = self.delta(Delta::default(), Some(reason));
                if !self.include_usage {
                    return frames.push(&Chunk { sluice: openai::Extension::of_end(&finish), ..last });
                }
                frames.push(&Chunk { sluice: openai::Extension::of_reason(&finish), ..last });
                let (usage, sluice) = (finish.usage.into(), openai::Extension::of_bill(&finish));
                frames.push(&Chunk { usage: Some(Some(usage)), sluice, ..self.chunk(vec![]) });
            }
        }
    }
}

#[cfg(test)]
#[path = "openai_chat_tests.rs"]
mod tests;
