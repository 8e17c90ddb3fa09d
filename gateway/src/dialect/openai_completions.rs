//! `POST /v1/completions`: the older endpoint, which continues a text as it stands.

use std::{num::NonZeroU32, sync::Arc};

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::Value;

use super::{
    body::read_json,
    fields::Fields,
    openai::{self, StreamOptions, UsageBody},
    openai_logprobs::{TextLogprobs, TextOffset},
    sse::{self, Codec, Frames},
};
use crate::{
    app::App,
    auth::Principal,
    complete::{self, Completion, Delivery, Event},
    error::{ApiError, Fault},
    request::{self, CompletionRequest, Prompt, Shape},
    stack::Arrival,
};

/// What OpenAI documents for a request that names no `max_tokens`.
const OUTPUT_TOKENS_DEFAULT: NonZeroU32 = NonZeroU32::new(16).expect("16 is not 0");
/// Most log-probabilities of this endpoint, as OpenAI documents it.
const LOGPROBS_MAX: u32 = 5;

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
    let chunks = TextChunks::new(&completion, options.include_usage);
    if options.stream {
        return Ok(sse::response(completion, chunks));
    }
    let answer = completion.whole().await?;
    let reason = openai::finish_reason(answer.finish.reason);
    let logprobs = TextLogprobs::of(&answer.logprobs, &mut TextOffset::default());
    let mut response = Json(TextCompletion {
        usage: Some(Some(answer.finish.usage.into())),
        sluice: openai::Extension::of_reason(&answer.finish),
        ..chunks.chunk(vec![Choice::new(&answer.text, logprobs, Some(reason))])
    })
    .into_response();
    openai::mark(&answer.finish, &mut response);
    Ok(response)
}

fn parse(body: &Value) -> Result<(CompletionRequest, StreamOptions), ApiError> {
    let body = Fields::of(body, "")?;
    let model = openai::model(&body)?;
    let prompt = prompt(&body)?;
    openai::refuse_unsupported(&body)?;
    if body.boolean("echo")? == Some(true) {
        return Err(body.unsupported("echo"));
    }
    if body.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(body.unsupported("suffix"));
    }
    for name in ["response_format", "tools"] {
        if body.get(name).is_some() {
            return Err(body.unsupported(name));
        }
    }
    let logprobs =
        body.integer("logprobs")?.map(|count| request::top_logprobs(count, LOGPROBS_MAX)).transpose();
    let options = openai::stream_options(&body)?;
    let limit = body.integer("max_tokens")?.map(request::output_tokens_max).transpose();
    let request = CompletionRequest {
        model,
        prompt,
        output_tokens_max: Some(body.check("max_tokens", limit)?.unwrap_or(OUTPUT_TOKENS_DEFAULT)),
        sampling: openai::sampling(&body)?,
        shape: Shape { top_logprobs: body.check("logprobs", logprobs)?, ..openai::shape(&body)? },
        stop: openai::stop(&body)?,
        service_tier: openai::service_tier(&body)?,
        user: openai::user(&body)?,
        cost_so_far: options.stream && options.include_cost,
    };
    Ok((request, options))
}

/// A string, token ids, or a list with one of either.
fn prompt(body: &Fields<'_>) -> Result<Prompt, ApiError> {
    let value = body.required("prompt")?;
    let value = match value {
        Value::Array(list) if matches!(list.first(), Some(Value::String(_) | Value::Array(_))) => {
            if list.len() > 1 {
                return Err(body.unsupported_value("prompt", "one prompt a request is"));
            }
            &list[0]
        }
        other => other,
    };
    match value {
        Value::String(text) => body.check("prompt", Prompt::text(text.clone())),
        Value::Array(ids) => {
            let ids = ids.iter().map(token_id).collect::<Option<Vec<_>>>().ok_or_else(|| {
                let message = "must be a string or a list of token ids, each a whole number from 0";
                ApiError::field(Fault::Value, "prompt", message)
            })?;
            body.check("prompt", Prompt::tokens(ids))
        }
        other => Err(body.wrong_type("prompt", "a string or a list of token ids", other)),
    }
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// Writes the chunks of one stream; a whole answer is one chunk with everything in it.
struct TextChunks {
    id: String,
    created: i64,
    model: String,
    service_tier: &'static str,
    system_fingerprint: String,
    include_usage: bool,
    offset: TextOffset,
}

#[derive(Serialize)]
struct TextCompletion<'a> {
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
    text: &'a str,
    index: u32,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
}

impl<'a> Choice<'a> {
    fn new(text: &'a str, logprobs: Option<TextLogprobs>, finish_reason: Option<&'static str>) -> Choice<'a> {
        Choice { text, index: 0, logprobs, finish_reason }
    }
}

impl TextChunks {
    fn new(completion: &Completion, include_usage: bool) -> TextChunks {
        TextChunks {
            id: format!("cmpl-{}", completion.request_id.simple()),
            created: completion.created_s,
            model: completion.model.name.clone(),
            service_tier: openai::service_tier_name(completion.service_tier),
            system_fingerprint: openai::system_fingerprint(&completion.model.content_hash),
            include_usage,
            offset: TextOffset::default(),
        }
    }

    fn chunk<'a>(&'a self, choices: Vec<Choice<'a>>) -> TextCompletion<'a> {
        TextCompletion {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            service_tier: self.service_tier,
            system_fingerprint: &self.system_fingerprint,
            choices,
            usage: self.include_usage.then_some(None),
            sluice: None,
        }
    }
}

impl Codec for TextChunks {
    fn encode(&mut self, event: Event, frames: &mut Frames) {
        match event {
            Event::Delta(delta) if delta.is_empty() => {}
            Event::Delta(delta) => {
                let logprobs = TextLogprobs::of(&delta.logprobs, &mut self.offset);
                let sluice = openai::Extension::of_delta(&delta);
                let choice = Choice::new(&delta.text, logprobs, None);
                frames.push(&TextCompletion { sluice, ..self.chunk(vec![choice]) });
            }
            Event::Finished(finish) => {
                let last =
                    self.chunk(vec![Choice::new("", None, Some(openai::finish_reason(finish.reason)))]);
                if !self.include_usage {
                    return frames
                        .push(&TextCompletion { sluice: openai::Extension::of_end(&finish), ..last });
                }
                frames.push(&TextCompletion { sluice: openai::Extension::of_reason(&finish), ..last });
                let (usage, sluice) = (finish.usage.into(), openai::Extension::of_bill(&finish));
                frames.push(&TextCompletion { usage: Some(Some(usage)), sluice, ..self.chunk(vec![]) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use sluice_billing::Money;

    use super::*;
    use crate::complete::{Delta, Finish, FinishReason, Usage};

    fn check(change: Value, expect: Result<Prompt, &str>) {
        let mut body = json!({ "model": "m", "prompt": "p" });
        for (name, value) in change.as_object().expect("an object") {
            body[name] = value.clone();
        }
        let got = parse(&body).map(|(request, _)| request.prompt);
        let got = got.map_err(|error| format!("{} {}", error.code(), error.param().unwrap_or("-")));
        assert_eq!(got, expect.map_err(str::to_owned), "for {change}");
    }

    #[test]
    fn a_prompt_is_one_text_or_one_list_of_ids() {
        check(json!({}), Ok(Prompt::Text("p".into())));
        check(json!({ "prompt": ["q"] }), Ok(Prompt::Text("q".into())));
        check(json!({ "prompt": [1, 2] }), Ok(Prompt::Tokens(vec![1, 2])));
        check(json!({ "prompt": [[3]] }), Ok(Prompt::Tokens(vec![3])));
        check(json!({ "prompt": null }), Err("missing_required_parameter prompt"));
        check(json!({ "prompt": "" }), Err("invalid_value prompt"));
        check(json!({ "prompt": [] }), Err("invalid_value prompt"));
        check(json!({ "prompt": [[]] }), Err("invalid_value prompt"));
        check(json!({ "prompt": [-1] }), Err("invalid_value prompt"));
        check(json!({ "prompt": [1, "a"] }), Err("invalid_value prompt"));
        check(json!({ "prompt": 5 }), Err("invalid_type prompt"));
        check(json!({ "prompt": ["a", "b"] }), Err("unsupported_value prompt"));
        check(json!({ "echo": true }), Err("unsupported_parameter echo"));
        check(json!({ "suffix": "x" }), Err("unsupported_parameter suffix"));
        check(json!({ "best_of": 2 }), Err("unsupported_value best_of"));
        check(
            json!({ "logprobs": 5, "logit_bias": { "7": -100 }, "min_tokens": 3 }),
            Ok(Prompt::Text("p".into())),
        );
        check(json!({ "logprobs": 6 }), Err("invalid_value logprobs"));
        check(
            json!({ "response_format": { "type": "json_object" } }),
            Err("unsupported_parameter response_format"),
        );
        check(json!({ "max_tokens": 0 }), Err("invalid_value max_tokens"));
        check(json!({ "echo": false, "suffix": null, "best_of": 1, "n": 1 }), Ok(Prompt::Text("p".into())));
    }

    #[test]
    fn a_stream_reads_as_clients_expect() {
        let mut chunks = TextChunks {
            id: "cmpl-1".into(),
            created: 7,
            model: "m".into(),
            service_tier: "default",
            system_fingerprint: "fp_0".into(),
            include_usage: false,
            offset: TextOffset::default(),
        };
        let usage = Usage { prompt_tokens: 1, cached_prompt_tokens: 0, completion_tokens: 2 };
        let (cost, receipt) = (Money::from_pico(5), "a.b.c".to_owned());
        let finish = Finish { reason: FinishReason::Length, usage, cost, receipt };
        let mut out = String::new();
        for event in [Event::Delta(Delta::default()), Event::Delta(Delta::text("a")), Event::Finished(finish)]
        {
            out.push_str(std::str::from_utf8(&sse::frames(&mut chunks, Ok(event))).expect("UTF-8"));
        }
        let head = r#"data: {"id":"cmpl-1","object":"text_completion","created":7,"model":"m","service_tier":"default","system_fingerprint":"fp_0","#;
        let expect = format!(
            "{head}\"choices\":[{{\"text\":\"a\",\"index\":0,\"logprobs\":null,\"finish_reason\":null}}]}}\n\n\
             {head}\"choices\":[{{\"text\":\"\",\"index\":0,\"logprobs\":null,\"finish_reason\":\"length\"}}],\
             \"sluice\":{{\"cost_usd\":\"0.000000000005\",\"receipt\":\"a.b.c\"}}}}\n\n\
             data: [DONE]\n\n"
        );
        assert_eq!(out, expect);
    }
}
