//! What the two OpenAI endpoints have in common: parameters, the refusals of what is not done, usage.

use http::{HeaderValue, Response};
use serde::Serialize;
use serde_json::Value;

use super::fields::Fields;
use crate::{
    complete::{Finish, FinishReason, Usage},
    error::ApiError,
    request::{self, EndUser, ModelName, Sampling, StopStrings, Temperature, TopP},
};

/// How the answer is to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    pub stream: bool,
    pub include_usage: bool,
}

pub fn stream_options(body: &Fields<'_>) -> Result<StreamOptions, ApiError> {
    let stream = body.boolean("stream")?.unwrap_or(false);
    let include_usage = match body.object("stream_options")? {
        Some(options) => options.boolean("include_usage")?.unwrap_or(false),
        None => false,
    };
    Ok(StreamOptions { stream, include_usage })
}

pub fn model(body: &Fields<'_>) -> Result<ModelName, ApiError> {
    body.required("model")?;
    let name = body.string("model")?.unwrap_or_default();
    body.check("model", ModelName::new(name.to_owned()))
}

pub fn sampling(body: &Fields<'_>) -> Result<Sampling, ApiError> {
    let temperature = body.number("temperature")?.map(Temperature::new).transpose();
    let top_p = body.number("top_p")?.map(TopP::new).transpose();
    let top_k = body.integer("top_k")?.map(request::top_k).transpose();
    Ok(Sampling {
        temperature: body.check("temperature", temperature)?,
        top_p: body.check("top_p", top_p)?,
        top_k: body.check("top_k", top_k)?,
        // Any integer is a seed: negative ones by their bits.
        seed: match body.get("seed").and_then(Value::as_u64) {
            Some(seed) => Some(seed),
            None => body.integer("seed")?.map(|seed| seed as u64),
        },
    })
}

/// A string, or a list of strings.
pub fn stop(body: &Fields<'_>) -> Result<StopStrings, ApiError> {
    let strings = match body.get("stop") {
        None => Vec::new(),
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(many)) => many
            .iter()
            .map(|value| value.as_str().map(str::to_owned))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| body.wrong_type("stop", "a list of strings", &Value::Array(many.clone())))?,
        Some(other) => return Err(body.wrong_type("stop", "a string or a list of strings", other)),
    };
    body.check("stop", StopStrings::new(strings))
}

pub fn user(body: &Fields<'_>) -> Result<EndUser, ApiError> {
    let user = body.string("user")?.unwrap_or_default();
    body.check("user", EndUser::new(user.to_owned()))
}

/// Refuses what both endpoints know and this version does not do; a value that asks for nothing is accepted.
pub fn refuse_unsupported(body: &Fields<'_>) -> Result<(), ApiError> {
    for name in ["n", "best_of"] {
        match body.integer(name)? {
            None | Some(1) => {}
            Some(..=0) => return body.check(name, Err(request::at_least_one())),
            Some(_) => return Err(body.unsupported_value(name, "only 1 is")),
        }
    }
    for (name, neutral) in
        [("frequency_penalty", 0.0), ("presence_penalty", 0.0), ("repetition_penalty", 1.0), ("min_p", 0.0)]
    {
        if body.number(name)?.is_some_and(|value| value != neutral) {
            return Err(body.unsupported(name));
        }
    }
    let biased = match body.get("logit_bias") {
        None => false,
        Some(Value::Object(bias)) => !bias.is_empty(),
        Some(other) => return Err(body.wrong_type("logit_bias", "an object", other)),
    };
    match biased {
        true => Err(body.unsupported("logit_bias")),
        false => Ok(()),
    }
}

/// `usage`, as both endpoints print it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct UsageBody {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptDetails {
    cached_tokens: u64,
}

impl From<Usage> for UsageBody {
    fn from(usage: Usage) -> UsageBody {
        UsageBody {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: usage.cached_prompt_tokens },
        }
    }
}

/// OpenAI knows no budget that ends an answer; `length` is what its clients understand.
pub fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length | FinishReason::Budget => "length",
    }
}

/// Our own field beside OpenAI's: says that `length` was the account's credit.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Extension {
    finish_reason: &'static str,
}

pub fn extension(finish: &Finish) -> Option<Extension> {
    (finish.reason == FinishReason::Budget).then_some(Extension { finish_reason: "budget" })
}

/// The same for whole answers, as a header: `x-sluice-finish-reason: budget`.
pub fn mark_budget<B>(finish: &Finish, response: &mut Response<B>) {
    if finish.reason == FinishReason::Budget {
        response.headers_mut().insert("x-sluice-finish-reason", HeaderValue::from_static("budget"));
    }
}

/// Tells two sets of weights behind one model name apart.
pub fn system_fingerprint(content_hash: &str) -> String {
    format!("fp_{}", content_hash.get(..12).unwrap_or(content_hash))
}
