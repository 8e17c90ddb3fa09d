//! What the two OpenAI endpoints have in common: parameters, the refusals of what is not done, usage.

use http::{HeaderValue, Response};
use serde::Serialize;
use serde_json::Value;
use sluice_billing::{Money, ServiceTier};

use super::{fields::Fields, openai_shape};
use crate::{
    complete::{Delta, Finish, FinishReason, Usage},
    error::{ApiError, Fault},
    receipts,
    request::{
        self, EndUser, ModelName, Penalty, RepetitionPenalty, Sampling, Shape, StopStrings, Temperature, TopP,
    },
};

/// How the answer is to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    pub stream: bool,
    pub include_usage: bool,
    /// Ours: each chunk says what the request has cost so far.
    pub include_cost: bool,
}

pub fn stream_options(body: &Fields<'_>) -> Result<StreamOptions, ApiError> {
    let stream = body.boolean("stream")?.unwrap_or(false);
    let Some(options) = body.object("stream_options")? else {
        return Ok(StreamOptions { stream, ..StreamOptions::default() });
    };
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    let include_cost = options.boolean("include_cost")?.unwrap_or(false);
    Ok(StreamOptions { stream, include_usage, include_cost })
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
    let min_p = body.number("min_p")?.map(request::min_p).transpose();
    let penalty = |name: &str| {
        let penalty = body.number(name)?.map(Penalty::new).transpose();
        Ok::<_, ApiError>(body.check(name, penalty)?.unwrap_or_default())
    };
    let repetition = body.number("repetition_penalty")?.map(RepetitionPenalty::new).transpose();
    Ok(Sampling {
        temperature: body.check("temperature", temperature)?,
        top_p: body.check("top_p", top_p)?,
        top_k: body.check("top_k", top_k)?,
        // Any integer is a seed: negative ones by their bits.
        seed: match body.get("seed").and_then(Value::as_u64) {
            Some(seed) => Some(seed),
            None => body.integer("seed")?.map(|seed| seed as u64),
        },
        min_p: body.check("min_p", min_p)?.unwrap_or(0.0),
        repetition_penalty: body.check("repetition_penalty", repetition)?.unwrap_or_default(),
        frequency_penalty: penalty("frequency_penalty")?,
        presence_penalty: penalty("presence_penalty")?,
        logit_bias: openai_shape::logit_bias(body)?,
    })
}

/// What both endpoints have of an answer's shape: the extensions of other engines.
pub fn shape(body: &Fields<'_>) -> Result<Shape, ApiError> {
    let least = body.integer("min_tokens")?.map(request::output_tokens_min).transpose();
    Ok(Shape {
        output_tokens_min: body.check("min_tokens", least)?.unwrap_or(0),
        ignore_end_of_sequence: body.boolean("ignore_eos")?.unwrap_or(false),
        stop_ids: openai_shape::stop_ids(body)?,
        ..Shape::default()
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

/// OpenAI's names: flexible requests are billed as batches, and nobody's `auto` is more than the default.
pub fn service_tier(body: &Fields<'_>) -> Result<ServiceTier, ApiError> {
    match body.string("service_tier")? {
        None | Some("auto" | "default") => Ok(ServiceTier::Default),
        Some("flex") => Ok(ServiceTier::Batch),
        Some("priority") => Ok(ServiceTier::Priority),
        Some(_) => {
            let message = "must be one of auto, default, flex and priority";
            Err(ApiError::field(Fault::Value, body.path("service_tier"), message))
        }
    }
}

/// The tier that served a request, as its answer tells it.
pub fn service_tier_name(tier: ServiceTier) -> &'static str {
    match tier {
        ServiceTier::Default => "default",
        ServiceTier::Batch => "flex",
        ServiceTier::Priority => "priority",
    }
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
    Ok(())
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

/// Our own field beside OpenAI's, `sluice`, which clients that do not know it pass over.
///
/// ```text
/// every chunk, if asked by include_cost   {"cost_usd_so_far":"0.000012"}
/// the one with the finish reason          {"finish_reason":"budget"}        if `length` was the account's credit
/// the last one                            {"cost_usd":"0.0000786","receipt":"eyJhbGciOi.."}
/// ```
#[derive(Clone, Debug, Default, Serialize)]
pub struct Extension<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_usd_so_far: Option<Money>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_usd: Option<Money>,
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<&'a str>,
}

impl<'a> Extension<'a> {
    pub fn of_delta(delta: &Delta) -> Option<Extension<'a>> {
        let cost_usd_so_far = Some(delta.cost_so_far?);
        Some(Extension { cost_usd_so_far, ..Extension::default() })
    }

    /// What goes with the finish reason, if more chunks follow.
    pub fn of_reason(finish: &Finish) -> Option<Extension<'a>> {
        let is_budget = finish.reason == FinishReason::Budget;
        is_budget.then(|| Extension { finish_reason: Some("budget"), ..Extension::default() })
    }

    /// What goes with the usage, in a chunk after the one with the finish reason.
    pub fn of_bill(finish: &'a Finish) -> Option<Extension<'a>> {
        let (cost_usd, receipt) = (Some(finish.cost), Some(finish.receipt.as_str()));
        Some(Extension { cost_usd, receipt, ..Extension::default() })
    }

    /// What goes with a finish reason that nothing follows.
    pub fn of_end(finish: &'a Finish) -> Option<Extension<'a>> {
        let finish_reason = Extension::of_reason(finish).and_then(|extension| extension.finish_reason);
        Some(Extension { finish_reason, ..Extension::of_bill(finish)? })
    }
}

/// The same for whole answers, as headers.
pub fn mark<B>(finish: &Finish, response: &mut Response<B>) {
    let headers = response.headers_mut();
    if finish.reason == FinishReason::Budget {
        headers.insert("x-sluice-finish-reason", HeaderValue::from_static("budget"));
    }
    headers.extend(receipts::headers(finish));
}

/// Tells two sets of weights behind one model name apart.
pub fn system_fingerprint(content_hash: &str) -> String {
    format!("fp_{}", content_hash.get(..12).unwrap_or(content_hash))
}
