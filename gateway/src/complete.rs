//! One completion: from a valid request to a stream of events, whatever dialect asked and whatever dialect answers.
//!
//! ```text
//! start ─▶ tokenize ─▶ fits the context? ─▶ billing.admit ─▶ relay ─▶ events ─▶ dialect
//!          └──────────── in a tracked task that outlives the caller's future ────────┘
//! ```
//! The caller gets a [`Completion`] once there is something to answer: a first event, or the reason why there is
//! none. From then on failures are events of the stream.

use std::{sync::Arc, time::Instant};

use sluice_billing::{
    AccountId, AdmitRequest, Hold, Media, Money, PinnedPrices, RequestId, ServiceTier, UsageEvent,
};
use sluice_proto::node::v1::{
    ChatMessage, ChatPrompt, Constraint, JsonObject, ModelDescription, Priority, Start, TokenLogprobs,
    ToolCallDelta, ToolCalls, ToolChoice as NodeToolChoice, constraint::Kind, tokenize_request::Input,
};
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use tracing::Instrument;
use uuid::Uuid;

use crate::{
    app::App,
    auth::Principal,
    error::{ApiError, Fault, RETRY_AFTER},
    node_client::NodeClient,
    relay,
    request::{CompletionRequest, Format, Prompt, Shape, Temperature, ToolChoice, Tools, TopP},
};

/// What a request costs a node, for routing, beyond its prompt: nobody knows how long an answer will be.
const OUTPUT_TOKENS_EXPECTED: u64 = 256;

/// Who asked, when, and how the answer is handed over.
#[derive(Clone)]
pub struct Caller {
    pub request_id: Uuid,
    pub principal: Arc<Principal>,
    pub received: Instant,
    /// The caller gives up at this time: so does the node.
    pub deadline: Option<Instant>,
    pub delivery: Delivery,
}

/// Whether the caller sees tokens as they come, and so owes for them if the rest fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    Streamed,
    Whole,
}

/// What happens to an answer, in order: any number of deltas, then `Finished`, or an error in its place.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Delta(Delta),
    /// The answer is complete and its bill durable.
    Finished(Finish),
}

/// What was generated since the last event.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// Whole UTF-8 characters; may be empty.
    pub text: String,
    /// Where they were asked for: one for each token, which may be ahead of the text.
    pub logprobs: Vec<TokenLogprobs>,
    /// Pieces of calls, by index. The first of a call has its name.
    pub tool_calls: Vec<ToolCallDelta>,
    /// Where it was asked for: what the request would be billed if it ended here.
    pub cost_so_far: Option<Money>,
}

impl Delta {
    pub fn text(text: impl Into<String>) -> Delta {
        Delta { text: text.into(), ..Delta::default() }
    }

    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.logprobs.is_empty() && self.tool_calls.is_empty()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    pub reason: FinishReason,
    pub usage: Usage,
    /// What was billed.
    pub cost: Money,
    /// The bill, signed for the caller to keep.
    pub receipt: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    Stop,
    Length,
    /// The account's credit ended at exactly this token.
    Budget,
}

/// What was billed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The whole prompt, cached tokens included.
    pub prompt_tokens: u64,
    pub cached_prompt_tokens: u64,
    pub completion_tokens: u64,
}

impl Usage {
    pub fn of(bill: &UsageEvent) -> Usage {
        let billed = bill.quantities;
        Usage {
            prompt_tokens: billed.input_tokens + billed.cached_input_tokens,
            cached_prompt_tokens: billed.cached_input_tokens,
            completion_tokens: billed.output_tokens,
        }
    }
}

/// The caller's end of the stream: bounded, and closed when the caller is gone.
pub type Events = mpsc::Sender<Result<Event, ApiError>>;

/// An answer that has begun.
pub struct Completion {
    pub request_id: Uuid,
    pub model: Arc<ModelDescription>,
    pub created_s: i64,
    pub service_tier: ServiceTier,
    first: Option<Event>,
    events: mpsc::Receiver<Result<Event, ApiError>>,
    ended: bool,
}

/// An answer that is complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub text: String,
    pub logprobs: Vec<TokenLogprobs>,
    pub tool_calls: Vec<ToolCall>,
    pub finish: Finish,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCall {
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// Starts a completion and waits for its first event.
///
/// # Cancel safety
/// Dropped, the request counts as hung up: the node stops, and what was generated is settled.
pub async fn start(
    app: &Arc<App>,
    caller: Caller,
    request: CompletionRequest,
) -> Result<Completion, ApiError> {
    let model = app.nodes.model(request.model.as_str())?;
    let (sender, mut events) = mpsc::channel(app.limits.events_buffered_max.max(1));
    let (request_id, service_tier) = (caller.request_id, request.service_tier);
    let work = run(app.clone(), caller, model.clone(), request, sender);
    app.tracker.spawn(work.instrument(tracing::Span::current()));
    let first = events.recv().await.unwrap_or_else(|| Err(relay_died()))?;
    let created_s = OffsetDateTime::now_utc().unix_timestamp();
    Ok(Completion { request_id, model, created_s, service_tier, first: Some(first), events, ended: false })
}

impl Completion {
    /// The next event; `None` after `Finished` or an error. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Event, ApiError>> {
        if self.ended {
            return None;
        }
        let event = match self.first.take() {
            Some(first) => Ok(first),
            None => self.events.recv().await.unwrap_or_else(|| Err(relay_died())),
        };
        self.ended = !matches!(event, Ok(Event::Delta(_)));
        Some(event)
    }

    /// Waits for the whole answer.
    pub async fn whole(&mut self) -> Result<Answer, ApiError> {
        let (mut text, mut logprobs, mut tool_calls) = (String::new(), Vec::new(), Vec::new());
        while let Some(event) = self.next().await {
            match event? {
                Event::Delta(delta) => {
                    text.push_str(&delta.text);
                    logprobs.extend(delta.logprobs);
                    delta.tool_calls.into_iter().for_each(|piece| join(&mut tool_calls, piece));
                }
                Event::Finished(finish) => return Ok(Answer { text, logprobs, tool_calls, finish }),
            }
        }
        Err(relay_died())
    }
}

/// Pieces of a call follow each other, and calls count from 0.
fn join(calls: &mut Vec<ToolCall>, piece: ToolCallDelta) {
    let index = piece.index as usize;
    if index == calls.len() {
        calls.push(ToolCall::default());
    }
    if let Some(call) = calls.get_mut(index) {
        call.name.push_str(&piece.name);
        call.arguments.push_str(&piece.arguments);
    }
}

/// A relay that panicked dropped its end of the channel; its hold expires by itself.
fn relay_died() -> ApiError {
    ApiError::internal("the relay ended without an answer")
}

/// The tracked task. Whatever comes of it, the caller is told once.
async fn run(
    app: Arc<App>,
    caller: Caller,
    model: Arc<ModelDescription>,
    request: CompletionRequest,
    events: Events,
) {
    let name = model.name.clone();
    let outcome = match admit(&app, &caller, &model, request, &events).await {
        Ok(Some(admitted)) => relay::run(&app, &caller, admitted, &events).await,
        Ok(None) => return app.metrics.completed(&name, "cancelled"),
        Err(error) => Err(error),
    };
    let last = match outcome {
        Ok(Some(finish)) => Ok(Event::Finished(finish)),
        Ok(None) => return app.metrics.completed(&name, "cancelled"),
        Err(error) => Err(error),
    };
    app.metrics.completed(
        &name,
        match &last {
            Ok(_) => "finished",
            Err(error) => error.code(),
        },
    );
    if let Err(error) = &last {
        error.log();
    }
    tokio::select! {
        sent = events.send(last) => drop(sent),
        () = tokio::time::sleep(relay::client_idle_max(&app)) => {}
        () = app.cut.cancelled() => {}
    }
}

/// A request whose tokens are counted and whose money is held.
pub struct Admitted {
    pub hold: Hold,
    /// For a caller that wants to know the cost so far.
    pub prices: Option<PinnedPrices>,
    pub start: Start,
    /// What it weighs on a node.
    pub tokens: u64,
}

/// `None`: the caller went away.
async fn admit(
    app: &App,
    caller: &Caller,
    model: &ModelDescription,
    request: CompletionRequest,
    events: &Events,
) -> Result<Option<Admitted>, ApiError> {
    let param = prompt_param(&request.prompt);
    let prompt_ids = tokio::select! {
        ids = tokenize(app, model, request.prompt, request.shape.tools.as_ref()) => ids?,
        () = events.closed() => return Ok(None),
        () = app.cut.cancelled() => return Err(ApiError::Draining { retry_after: RETRY_AFTER }),
    };
    let wanted = request.output_tokens_max.map(|limit| u64::from(limit.get()));
    let output_tokens_max = room_for_output(param, prompt_ids.len() as u64, wanted, model)?;
    let shape = request.shape;
    if u64::from(shape.output_tokens_min) > output_tokens_max {
        let message = format!("must be at most the {output_tokens_max} tokens that the answer may have");
        return Err(ApiError::field(Fault::Value, "min_tokens", message));
    }
    let principal = &caller.principal;
    let input_tokens = prompt_ids.len() as u64;
    let hold = app
        .billing
        .admit(AdmitRequest {
            request_id: RequestId::new(caller.request_id),
            account: AccountId::new(principal.account_id.as_str()),
            org: principal.org_id.clone(),
            project: principal.project_id.clone(),
            api_key: principal.key_id.clone(),
            user: request.user.as_str().to_owned(),
            model: model.name.clone(),
            service_tier: request.service_tier,
            input_tokens,
            output_tokens_max,
            media_max: Media::default(),
            admitted_at: OffsetDateTime::now_utc(),
        })
        .await?;
    let sampling = request.sampling;
    let defaults = model.sampling_defaults.unwrap_or_default();
    let start = Start {
        request_id: caller.request_id.to_string(),
        model: model.name.clone(),
        prompt_ids,
        output_tokens_max: u32::try_from(output_tokens_max).expect("it fits the context, which is a u32"),
        sampling: Some(sluice_proto::node::v1::Sampling {
            temperature: sampling.temperature.map_or(defaults.temperature.unwrap_or(1.0), Temperature::get),
            top_p: sampling.top_p.map_or(defaults.top_p.unwrap_or(1.0), TopP::get),
            top_k: sampling.top_k.or(defaults.top_k).unwrap_or(0),
            // The second half of a UUIDv7 is random. Every attempt has the same, so another node gives the same tokens.
            seed: sampling.seed.unwrap_or(caller.request_id.as_u64_pair().1),
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty.get(),
            frequency_penalty: sampling.frequency_penalty.get(),
            presence_penalty: sampling.presence_penalty.get(),
            logit_bias: sampling.logit_bias.as_slice().iter().copied().collect(),
        }),
        stop_strings: request.stop.as_slice().to_vec(),
        // Each key is a flow of its own: one that floods the node does not hold up its siblings.
        tenant: format!("{}/{}", principal.account_id, principal.key_id),
        priority: priority(request.service_tier).into(),
        output_tokens_min: shape.output_tokens_min,
        ignore_end_of_sequence: shape.ignore_end_of_sequence,
        top_logprobs: shape.top_logprobs,
        constraint: constraint(&shape),
        stop_ids: shape.stop_ids,
        ..Start::default()
    };
    let prices = request.cost_so_far.then(|| hold.prices());
    let tokens = input_tokens + output_tokens_max.min(OUTPUT_TOKENS_EXPECTED);
    Ok(Some(Admitted { hold, prices, start, tokens }))
}

/// Who pays for another tier is served by it.
fn priority(tier: ServiceTier) -> Priority {
    match tier {
        ServiceTier::Batch => Priority::Batch,
        ServiceTier::Default => Priority::Normal,
        ServiceTier::Priority => Priority::High,
    }
}

/// Tools that may be called and a format of the text do not go together: dialects refuse that.
fn constraint(shape: &Shape) -> Option<Constraint> {
    let kind = match (&shape.tools, &shape.format) {
        (Some(tools), _) => {
            let (choice, tool_name) = match &tools.choice {
                ToolChoice::Auto => (NodeToolChoice::Auto, ""),
                ToolChoice::Required => (NodeToolChoice::Required, ""),
                ToolChoice::Named(name) => (NodeToolChoice::Named, name.as_str()),
            };
            Kind::ToolCalls(ToolCalls {
                tools_json: tools.declared_json.clone(),
                choice: choice.into(),
                tool_name: tool_name.to_owned(),
                single: !tools.parallel,
            })
        }
        (None, Format::Text) => return None,
        (None, Format::JsonObject) => Kind::JsonObject(JsonObject {}),
        (None, Format::JsonSchema(schema)) => Kind::JsonSchema(schema.clone()),
    };
    Some(Constraint { kind: Some(kind) })
}

async fn tokenize(
    app: &App,
    model: &ModelDescription,
    prompt: Prompt,
    tools: Option<&Tools>,
) -> Result<Vec<u32>, ApiError> {
    let param = prompt_param(&prompt);
    let input = match prompt {
        Prompt::Tokens(ids) => {
            let Some(foreign) = ids.iter().find(|&&id| id >= model.vocabulary_size) else { return Ok(ids) };
            let message =
                format!("holds the token {foreign}; this model's vocabulary has {}", model.vocabulary_size);
            return Err(ApiError::field(Fault::Value, param, message));
        }
        Prompt::Text(text) => Input::Text(text),
        Prompt::Chat(messages) => {
            let message = |message: &crate::request::Message| ChatMessage {
                role: message.role.as_str().to_owned(),
                content: message.content.clone(),
                name: message.name.clone(),
                tool_call_id: message.tool_call_id.clone(),
                tool_calls_json: message.tool_calls_json.clone(),
            };
            let messages = messages.as_slice().iter().map(message).collect();
            let tools_json = tools.map_or_else(String::new, |tools| tools.declared_json.clone());
            Input::Chat(ChatPrompt { messages, tools_json })
        }
    };
    let mut tried = Vec::new();
    let mut failure = None;
    while tried.len() < app.limits.attempts_max.max(1) {
        let assignment = match app.nodes.assign(&model.name, 0, &tried) {
            Ok(assignment) => assignment,
            Err(unroutable) => return Err(failure.unwrap_or(unroutable)),
        };
        let node = assignment.node().clone();
        match node.tokenize(&model.name, input.clone()).await {
            Ok(ids) => return Ok(ids),
            Err(status) => match node_failure(&node, status, &model.name, param) {
                Failure::Final(error) => return Err(error),
                Failure::Elsewhere(error) => failure = Some(error),
            },
        }
        tried.push(node);
    }
    Err(failure.expect("the loop ran at least once"))
}

/// What a node's refusal means for the request.
pub enum Failure {
    /// Another node would say the same.
    Final(ApiError),
    Elsewhere(ApiError),
}

/// Reads a node's status; a node that is not there is marked down.
pub fn node_failure(node: &NodeClient, status: Status, model: &str, param: &'static str) -> Failure {
    let details = status.get_error_details();
    let model = || model.to_owned();
    match status.code() {
        Code::InvalidArgument => {
            let violation = details.bad_request().and_then(|request| request.field_violations.first());
            let (field, reason) = match violation {
                Some(violation) => (violation.field.as_str(), violation.description.clone()),
                None => ("", status.message().to_owned()),
            };
            Failure::Final(ApiError::field(Fault::Value, wire_field(field, param), reason))
        }
        Code::ResourceExhausted => {
            let wait = details.retry_info().and_then(|info| info.retry_delay).unwrap_or(RETRY_AFTER);
            Failure::Elsewhere(ApiError::NodesBusy { model: model(), retry_after: wait })
        }
        Code::NotFound => {
            Failure::Elsewhere(ApiError::NodesDown { model: model(), retry_after: RETRY_AFTER })
        }
        Code::DeadlineExceeded => Failure::Final(ApiError::DeadlineExceeded),
        _ => {
            node.mark_down(&status);
            Failure::Elsewhere(ApiError::NodeFailed { source: status.into(), retry_after: RETRY_AFTER })
        }
    }
}

/// What the caller calls a field of the node's contract.
fn wire_field(field: &str, prompt_param: &str) -> String {
    let field = field.strip_prefix("chat.").or(field.strip_prefix("sampling.")).unwrap_or(field);
    match field.split('[').next() {
        Some("output_tokens_max") => "max_tokens".to_owned(),
        Some("output_tokens_min") => "min_tokens".to_owned(),
        Some("stop_strings") => "stop".to_owned(),
        Some("stop_ids") => field.replacen("stop_ids", "stop_token_ids", 1),
        Some("tools_json") => "tools".to_owned(),
        Some("constraint.tool_calls.tools_json") => {
            field.replacen("constraint.tool_calls.tools_json", "tools", 1)
        }
        Some("constraint.tool_calls") => "tools".to_owned(),
        Some("constraint.tool_calls.tool_name") => "tool_choice".to_owned(),
        Some("constraint.json_schema") => "response_format.json_schema.schema".to_owned(),
        Some("constraint" | "constraint.json_object") => "response_format".to_owned(),
        Some(
            "messages" | "temperature" | "top_p" | "top_k" | "min_p" | "seed" | "logit_bias" | "top_logprobs"
            | "repetition_penalty" | "frequency_penalty" | "presence_penalty",
        ) => field.to_owned(),
        _ => prompt_param.to_owned(),
    }
}

fn prompt_param(prompt: &Prompt) -> &'static str {
    match prompt {
        Prompt::Chat(_) => "messages",
        Prompt::Text(_) | Prompt::Tokens(_) => "prompt",
    }
}

/// How long the answer may become: what was wanted, or what the context leaves.
fn room_for_output(
    param: &'static str,
    prompt_tokens: u64,
    wanted: Option<u64>,
    model: &ModelDescription,
) -> Result<u64, ApiError> {
    let context_tokens_max = u64::from(model.context_tokens_max);
    let room = context_tokens_max.saturating_sub(prompt_tokens);
    let output_tokens = wanted.unwrap_or(room).max(1);
    if output_tokens > room {
        return Err(ApiError::ContextLengthExceeded {
            param,
            prompt_tokens,
            output_tokens,
            context_tokens_max,
        });
    }
    Ok(output_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prompt_tokens: u64, wanted: Option<u64>, expect: Option<u64>) {
        let model = ModelDescription { context_tokens_max: 100, ..ModelDescription::default() };
        assert_eq!(room_for_output("messages", prompt_tokens, wanted, &model).ok(), expect);
    }

    #[test]
    fn prompt_and_answer_share_the_context() {
        check(40, None, Some(60));
        check(40, Some(60), Some(60));
        check(40, Some(61), None);
        check(99, None, Some(1));
        check(100, None, None);
        check(u64::MAX, Some(1), None);
    }

    #[test]
    fn a_nodes_field_gets_the_name_its_caller_knows() {
        for (field, expect) in [
            ("chat.messages[3].role", "messages[3].role"),
            ("text", "prompt"),
            ("prompt_ids[7]", "prompt"),
            ("output_tokens_max", "max_tokens"),
            ("sampling.top_p", "top_p"),
            ("stop_strings[0]", "stop"),
            ("sampling.logit_bias", "logit_bias"),
            ("constraint.json_schema", "response_format.json_schema.schema"),
            ("constraint.tool_calls.tools_json[2].function.parameters", "tools[2].function.parameters"),
            ("constraint.tool_calls.tool_name", "tool_choice"),
            ("", "prompt"),
        ] {
            assert_eq!(wire_field(field, "prompt"), expect);
        }
    }
}
