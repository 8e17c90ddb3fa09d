//! What shapes an output: numbers of the sampler and constraints, from the contract to types that are valid.

use super::invalid;
use crate::constraint::{Constraint, Refused, ToolCalls, ToolChoice};
use crate::sampler::{Sampling, Settings};
use sluice_proto::node::v1 as proto;
use sluice_proto::node::v1::constraint::Kind;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// When to come back to a node on which grammars queue up.
const GRAMMARS_BUSY_RETRY: Duration = Duration::from_secs(1);

pub(super) fn sampling(sampling: proto::Sampling, vocabulary_size: u32) -> Result<Sampling, Status> {
    let sampling = Sampling::try_from(Settings {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        frequency_penalty: sampling.frequency_penalty,
        presence_penalty: sampling.presence_penalty,
        logit_bias: sampling.logit_bias.into_iter().collect(),
        seed: sampling.seed,
    })
    .map_err(|error| invalid(&format!("sampling.{}", error.field()), &error.to_string()))?;
    let foreign = sampling.biased_ids().find(|&id| id >= vocabulary_size);
    match foreign {
        None => Ok(sampling),
        Some(id) => {
            let reason = format!("biases the token {id}; the vocabulary has ids below {vocabulary_size}");
            Err(invalid("sampling.logit_bias", &reason))
        }
    }
}

/// `None` where there is none.
pub(super) fn constraint(constraint: Option<&proto::Constraint>) -> Result<Option<Constraint>, Status> {
    let Some(constraint) = constraint else { return Ok(None) };
    let Some(kind) = &constraint.kind else {
        return Err(invalid(
            "constraint",
            "must be one of json_schema, json_object, regex, lark, tool_calls",
        ));
    };
    Ok(Some(match kind {
        Kind::JsonSchema(schema) => Constraint::JsonSchema(schema.clone()),
        Kind::JsonObject(proto::JsonObject {}) => Constraint::JsonObject,
        Kind::Regex(pattern) => Constraint::Regex(pattern.clone()),
        Kind::Lark(grammar) => Constraint::Lark(grammar.clone()),
        Kind::ToolCalls(calls) => Constraint::ToolCalls(tool_calls(calls)?),
    }))
}

/// Where a constraint came from, in the contract.
pub(super) fn constraint_field(constraint: Option<&proto::Constraint>) -> &'static str {
    match constraint.and_then(|constraint| constraint.kind.as_ref()) {
        Some(Kind::JsonSchema(_)) => "constraint.json_schema",
        Some(Kind::JsonObject(_)) => "constraint.json_object",
        Some(Kind::Regex(_)) => "constraint.regex",
        Some(Kind::Lark(_)) => "constraint.lark",
        Some(Kind::ToolCalls(_)) => "constraint.tool_calls.tools_json",
        None => "constraint",
    }
}

fn tool_calls(calls: &proto::ToolCalls) -> Result<ToolCalls, Status> {
    let choice = match proto::ToolChoice::try_from(calls.choice) {
        Ok(proto::ToolChoice::Unspecified | proto::ToolChoice::Auto) => ToolChoice::Auto,
        Ok(proto::ToolChoice::Required) => ToolChoice::Required,
        Ok(proto::ToolChoice::Named) => ToolChoice::Named(calls.tool_name.clone()),
        Err(_) => {
            return Err(invalid("constraint.tool_calls.choice", "is not one of the ToolChoice values"));
        }
    };
    if !calls.tool_name.is_empty() && !matches!(choice, ToolChoice::Named(_)) {
        return Err(invalid("constraint.tool_calls.tool_name", "goes with TOOL_CHOICE_NAMED only"));
    }
    Ok(ToolCalls { tools_json: calls.tools_json.clone(), choice, single: calls.single })
}

pub(super) fn not_compiled(refused: Refused) -> Status {
    match refused {
        Refused::Invalid { field, reason } => invalid(&field, &reason),
        Refused::Busy => {
            let details = ErrorDetails::with_retry_info(Some(GRAMMARS_BUSY_RETRY));
            Status::with_error_details(Code::ResourceExhausted, refused.to_string(), details)
        }
    }
}
