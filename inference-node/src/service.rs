//! `sluice.node.v1.NodeService`: the node's contract over gRPC.
//!
//! Everything is checked here, once: a [`Submission`] that leaves this module cannot fail in the engine. Errors carry
//! google.rpc details: BadRequest names the field, RetryInfo the wait.

mod shape;

use self::shape::{constraint, not_compiled, sampling};
use crate::chat_template::{ChatTemplate, Conversation};
use crate::constraint::{Grammars, ToolFormat};
use crate::detokenizer::Detokenizer;
use crate::engine::mailbox::{Delivery, Ending, Grant, Usage};
use crate::engine::{Answer, EngineHandle, Refusal, Remote, Submission};
use crate::sampler::{TOP_LOGPROBS_MAX, TokenLogprobs};
use crate::scheduler::Priority;
use crate::tokenizer::Tokenizer;
use crate::tool_calls::{Reading, ToolCallDelta, ToolCallReader};
use futures::stream::BoxStream;
use sluice_proto::node::v1 as proto;
use sluice_proto::node::v1::constraint::Kind;
use sluice_proto::node::v1::generate_request::Command;
use sluice_proto::node::v1::generate_response::Event;
use sluice_proto::node::v1::node_service_server::NodeService;
use sluice_proto::node::v1::tokenize_request::Input;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

#[derive(Debug, Clone)]
pub struct ServiceLimits {
    pub slots: usize,
    pub waiting_max: usize,
    pub tokenize_bytes_max: usize,
    /// Long texts tokenized at the same time.
    pub tokenize_threads: usize,
}

/// Texts up to this long are tokenized in place: it takes well under a millisecond.
const TOKENIZE_INLINE_BYTES_MAX: usize = 4 << 10;
const STOP_STRINGS_MAX: usize = 16;
const STOP_STRING_BYTES_MAX: usize = 1 << 10;
const STOP_IDS_MAX: usize = 64;
const TENANT_BYTES_MAX: usize = 256;
const TENANT_WEIGHT_MAX: u32 = 1000;
/// How long a stream may stay open without a `start`.
const START_WAIT_MAX: Duration = Duration::from_secs(10);
/// Streams beside the sequences that run or wait: Tokenize, GetLoad, health.
const SIDE_STREAMS: usize = 256;

#[derive(Clone)]
pub struct Service(Arc<Inner>);

struct Inner {
    engine: EngineHandle,
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    grammars: Grammars,
    tool_format: Option<ToolFormat>,
    models: [proto::ModelDescription; 1],
    limits: ServiceLimits,
    node_id: String,
    tokenizing: Arc<Semaphore>,
    draining: AtomicBool,
    /// One token for each sequence whose client has not read the end.
    sequences: TaskTracker,
}

impl Service {
    pub fn new(
        engine: EngineHandle,
        tokenizer: Arc<Tokenizer>,
        template: Option<ChatTemplate>,
        grammars: Grammars,
        model: proto::ModelDescription,
        limits: ServiceLimits,
    ) -> Service {
        let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Service(Arc::new(Inner {
            engine,
            tokenizer,
            tool_format: template.as_ref().and_then(ChatTemplate::tool_format),
            template,
            grammars,
            models: [model],
            tokenizing: Arc::new(Semaphore::new(limits.tokenize_threads)),
            limits,
            node_id: format!("{:x}-{:x}", started.as_nanos(), std::process::id()),
            draining: AtomicBool::new(false),
            sequences: TaskTracker::new(),
        }))
    }

    pub fn models(&self) -> &[proto::ModelDescription] {
        &self.0.models
    }

    pub fn engine(&self) -> &EngineHandle {
        &self.0.engine
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.0.tokenizer
    }

    pub fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::SeqCst)
    }

    pub fn refuse_new(&self) {
        self.0.draining.store(true, Ordering::SeqCst);
        self.0.sequences.close();
    }

    /// After [`Service::refuse_new`]: resolves when no sequence is left.
    pub async fn drained(&self) {
        self.0.sequences.wait().await;
    }

    pub fn streams_max(&self) -> u32 {
        let streams = 2 * (self.0.limits.slots + self.0.limits.waiting_max) + SIDE_STREAMS;
        u32::try_from(streams).unwrap_or(u32::MAX)
    }

    fn check_model(&self, name: &str) -> Result<(), Status> {
        let serves = &self.0.models[0].name;
        if name == serves {
            return Ok(());
        }
        Err(Status::not_found(format!("this node serves the model {serves:?}, not {name:?}")))
    }

    /// A prompt's ids, as the contract's Tokenize gives them. Blocks for as long as the text is.
    pub fn encode(&self, input: Input) -> Result<Vec<u32>, Status> {
        let inner = &*self.0;
        let refused = |error: crate::tokenizer::EncodeError| invalid("text", &error.to_string());
        match input {
            Input::Text(text) => inner.tokenizer.encode_text(&text).map_err(refused),
            Input::Chat(chat) => {
                let Some(template) = &inner.template else {
                    let name = &inner.models[0].name;
                    let message = format!(
                        "the model {name:?} has no chat template: send text, or put chat_template.jinja beside its \
                         config.json"
                    );
                    return Err(invalid("chat", &message));
                };
                let rendered = Conversation::try_from(chat)
                    .and_then(|conversation| template.render(&conversation, inner.tokenizer.controls()))
                    .map_err(|error| invalid(&format!("chat.{}", error.field), &error.reason))?;
                inner.tokenizer.encode_rendered(&rendered).map_err(refused)
            }
        }
    }

    /// What Generate submits to the engine, checked and with its constraint compiled.
    pub async fn submission(
        &self,
        start: proto::Start,
        deadline: Option<Instant>,
    ) -> Result<Submission, Status> {
        let constraint = constraint(start.constraint.as_ref())?;
        let mut submission = self.unconstrained(start, deadline)?;
        if let Some(constraint) = constraint {
            let plan = self.0.grammars.plan(constraint, submission.resume_ids.clone()).await;
            submission.constraint = Some(plan.map_err(not_compiled)?);
        }
        Ok(submission)
    }

    fn unconstrained(&self, start: proto::Start, deadline: Option<Instant>) -> Result<Submission, Status> {
        self.check_model(&start.model)?;
        let model = &self.0.models[0];
        check_ids("prompt_ids", &start.prompt_ids, model.vocabulary_size)?;
        check_ids("resume_ids", &start.resume_ids, model.vocabulary_size)?;
        check_ids("stop_ids", &start.stop_ids, model.vocabulary_size)?;
        check_stops(&start)?;
        let context = model.context_tokens_max as usize;
        let prompt = start.prompt_ids.len();
        if prompt == 0 {
            return Err(invalid("prompt_ids", "must hold at least one token"));
        }
        if prompt >= context {
            let reason =
                format!("holds {prompt} tokens; the context of {context} must have room for output too");
            return Err(invalid("prompt_ids", &reason));
        }
        let output_tokens_max = (start.output_tokens_max as usize).min(context - prompt);
        if output_tokens_max == 0 {
            return Err(invalid("output_tokens_max", "must be at least 1"));
        }
        if start.resume_ids.len() > output_tokens_max {
            return Err(invalid(
                "resume_ids",
                &format!("holds more than the {output_tokens_max} output tokens allowed"),
            ));
        }
        if start.tenant.len() > TENANT_BYTES_MAX {
            return Err(invalid("tenant", &format!("is longer than {TENANT_BYTES_MAX} bytes")));
        }
        if start.tenant_weight > TENANT_WEIGHT_MAX {
            return Err(invalid("tenant_weight", &format!("must be at most {TENANT_WEIGHT_MAX}")));
        }
        let output_tokens_min = start.output_tokens_min as usize;
        if output_tokens_min > output_tokens_max {
            let reason = format!("is more than the {output_tokens_max} output tokens allowed");
            return Err(invalid("output_tokens_min", &reason));
        }
        if start.top_logprobs.is_some_and(|top| top > TOP_LOGPROBS_MAX) {
            return Err(invalid("top_logprobs", &format!("must be at most {TOP_LOGPROBS_MAX}")));
        }
        let sampling = sampling(start.sampling.unwrap_or_default(), model.vocabulary_size)?;
        let priority = match proto::Priority::try_from(start.priority) {
            Ok(proto::Priority::Batch) => Priority::Batch,
            Ok(proto::Priority::Unspecified | proto::Priority::Normal) => Priority::Normal,
            Ok(proto::Priority::High) => Priority::High,
            Err(_) => return Err(invalid("priority", "is not one of the Priority values")),
        };
        Ok(Submission {
            resume_ids: start.resume_ids,
            output_tokens_min,
            top_logprobs: start.top_logprobs.map(|top| top as usize),
            grant: start.grant.map_or(Grant { output_tokens: 0, is_final: false }, grant),
            sampling,
            stop_strings: start.stop_strings.into(),
            stop_ids: start.stop_ids,
            ignore_end_of_sequence: start.ignore_end_of_sequence,
            tenant: start.tenant.into(),
            tenant_weight: start.tenant_weight.max(1),
            priority,
            deadline,
            ..Submission::new(start.prompt_ids, output_tokens_max)
        })
    }

    /// Reads tool calls out of what follows `resume_ids`, if `start` asks for calls.
    fn tool_calls(&self, start: &proto::Start) -> Option<ToolCallReader> {
        let asked = start.constraint.as_ref().and_then(|constraint| constraint.kind.as_ref());
        if !matches!(asked, Some(Kind::ToolCalls(_))) {
            return None;
        }
        let mut reader = ToolCallReader::new(self.0.tool_format?);
        if !start.stop_strings.is_empty() {
            reader = reader.with_whole_calls();
        }
        let mut detokenizer = Detokenizer::new(start.stop_strings.clone().into());
        let mut sent = String::new();
        for (index, &id) in start.resume_ids.iter().enumerate() {
            let bytes = self.0.tokenizer.bytes(id);
            if index < start.output_tokens_min as usize {
                detokenizer.push_unwatched(bytes, &mut sent);
            } else {
                detokenizer.push(bytes, &mut sent);
            }
        }
        reader.push(&sent);
        Some(reader)
    }
}

#[tonic::async_trait]
impl NodeService for Service {
    async fn describe(
        &self,
        _: Request<proto::DescribeRequest>,
    ) -> Result<Response<proto::DescribeResponse>, Status> {
        Ok(Response::new(proto::DescribeResponse {
            node_id: self.0.node_id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            models: self.0.models.to_vec(),
        }))
    }

    async fn get_load(
        &self,
        _: Request<proto::GetLoadRequest>,
    ) -> Result<Response<proto::GetLoadResponse>, Status> {
        if !self.0.engine.is_alive() {
            return Err(refused(Refusal::Stopped));
        }
        let odometer = self.0.engine.odometer();
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(proto::GetLoadResponse {
            sequences_running: small(read(&odometer.sequences_running)),
            sequences_waiting: small(read(&odometer.sequences_waiting)),
            slots_total: small(self.0.limits.slots as u64),
            waiting_max: small(self.0.limits.waiting_max as u64),
            prompt_tokens_pending: read(&odometer.prompt_tokens_pending),
            draining: self.is_draining(),
            prompt_tokens_total: read(&odometer.prompt_tokens_total),
            cached_tokens_total: read(&odometer.cached_tokens_total),
            output_tokens_total: read(&odometer.output_tokens_total),
            steps_total: read(&odometer.steps_total),
            cache_hits_total: read(&odometer.cache_hits_total),
            cache_misses_total: read(&odometer.cache_misses_total),
            cache_evictions_total: read(&odometer.cache_evictions_total),
            cache_ram_bytes: read(&odometer.cache_ram_bytes),
            cache_disk_bytes: read(&odometer.cache_disk_bytes),
            state_bytes: read(&odometer.state_bytes),
        }))
    }

    async fn tokenize(
        &self,
        request: Request<proto::TokenizeRequest>,
    ) -> Result<Response<proto::TokenizeResponse>, Status> {
        let request = request.into_inner();
        self.check_model(&request.model)?;
        let input = request.input.ok_or_else(|| invalid("input", "must be chat or text"))?;
        let (bytes, bytes_max) = (text_bytes(&input), self.0.limits.tokenize_bytes_max);
        if bytes > bytes_max {
            return Err(invalid(
                "input",
                &format!("holds {bytes} bytes of text; at most {bytes_max} are taken"),
            ));
        }
        if bytes <= TOKENIZE_INLINE_BYTES_MAX {
            return Ok(Response::new(proto::TokenizeResponse { ids: self.encode(input)? }));
        }
        let permit = self.0.tokenizing.clone().acquire_owned().await.expect("the semaphore is never closed");
        let service = self.clone();
        let encoding = tokio::task::spawn_blocking(move || {
            let ids = service.encode(input);
            drop(permit);
            ids
        });
        let ids = encoding.await.map_err(|error| {
            tracing::error!(%error, "the tokenizer panicked");
            Status::internal("the tokenizer failed on this text")
        })??;
        Ok(Response::new(proto::TokenizeResponse { ids }))
    }

    type GenerateStream = BoxStream<'static, Result<proto::GenerateResponse, Status>>;

    /// # Cancel safety
    /// Dropped at any point, by a client that is gone, it cancels the sequence.
    async fn generate(
        &self,
        request: Request<Streaming<proto::GenerateRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        // Counted before the check, so that a drain either sees the sequence or refuses it.
        let counted = self.0.sequences.token();
        if self.is_draining() {
            return Err(Status::unavailable("the node is draining; send the request to another"));
        }
        let deadline = deadline(request.metadata())?;
        let mut requests = request.into_inner();
        let start = tokio::time::timeout(START_WAIT_MAX, requests.message())
            .await
            .map_err(|_| Status::deadline_exceeded("the first request, start, did not come"))??;
        let Some(Command::Start(start)) = start.and_then(|request| request.command) else {
            return Err(invalid("start", "must be the first request of the stream"));
        };
        let request_id = start.request_id.clone();
        let tool_calls = self.tool_calls(&start);
        let constraint_field = shape::constraint_field(start.constraint.as_ref());
        let answer = self.0.engine.submit(self.submission(start, deadline).await?).await.map_err(refused)?;
        let hung_up = CancellationToken::new();
        tokio::spawn(obey(requests, answer.remote(), hung_up.clone()));
        let reply = Reply {
            answer,
            tokenizer: self.0.tokenizer.clone(),
            tool_calls,
            frames: VecDeque::new(),
            sequence_number: 0,
            started: false,
            request_id,
            constraint_field,
            _counted: counted,
            _hung_up: hung_up.drop_guard(),
        };
        let stream = futures::stream::unfold(reply, |mut reply| async { Some((reply.next().await?, reply)) });
        Ok(Response::new(Box::pin(stream)))
    }
}

/// Follows a client's later requests until it, or the answer to it, is gone.
async fn obey(mut requests: Streaming<proto::GenerateRequest>, remote: Remote, hung_up: CancellationToken) {
    loop {
        let request = tokio::select! {
            request = requests.message() => request,
            () = hung_up.cancelled() => return,
        };
        match request.map(|request| request.map(|request| request.command)) {
            Ok(Some(Some(Command::Grant(raised)))) => remote.raise_grant(grant(raised)),
            Ok(Some(Some(Command::Cancel(_)))) => remote.cancel(),
            // A second start, or a command of a later version.
            Ok(Some(Some(Command::Start(_)) | None)) => {}
            // The client has said all it will.
            Ok(None) => return remote.refuse_further_grants(),
            Err(_) => return remote.cancel(),
        }
    }
}

/// The response stream of one sequence.
struct Reply {
    answer: Answer,
    tokenizer: Arc<Tokenizer>,
    tool_calls: Option<ToolCallReader>,
    frames: VecDeque<Result<proto::GenerateResponse, Status>>,
    sequence_number: u64,
    started: bool,
    request_id: String,
    /// What of the request is at fault if its constraint cannot be followed.
    constraint_field: &'static str,
    _counted: TaskTrackerToken,
    _hung_up: DropGuard,
}

impl Reply {
    async fn next(&mut self) -> Option<Result<proto::GenerateResponse, Status>> {
        while self.frames.is_empty() {
            let delivery = self.answer.next().await?;
            self.unpack(delivery);
        }
        self.frames.pop_front()
    }

    fn unpack(&mut self, delivery: Delivery) {
        let Delivery { text, ids, logprobs, usage, ending } = delivery;
        let Reading { text, calls } = self.read(text, ending.as_ref());
        if !self.started && !ids.is_empty() {
            self.started = true;
            let before = Usage { output_tokens: usage.output_tokens - ids.len() as u64, ..usage };
            self.frame(Event::Started(proto::Started {}), before);
        }
        if !ids.is_empty() || !text.is_empty() || !calls.is_empty() {
            let logprobs = logprobs.into_iter().map(|token| self.logprobs(token)).collect();
            let tool_calls = calls.into_iter().map(tool_call_delta).collect();
            self.frame(Event::Delta(proto::Delta { text, ids, logprobs, tool_calls }), usage);
        }
        match ending {
            None => {}
            Some(Ending::Broken(reason)) => {
                tracing::error!(request_id = self.request_id, reason, "a sequence broke");
                self.response(None, usage);
                self.frames.push_back(Err(Status::internal("the node failed while it generated")));
            }
            Some(Ending::Constraint(reason)) => {
                self.response(None, usage);
                self.frames.push_back(Err(invalid(self.constraint_field, reason)));
            }
            Some(ending) => self.frame(Event::Finished(finished(ending)), usage),
        }
    }

    /// Takes tool calls out of the text, where the request asked for calls.
    fn read(&mut self, text: String, ending: Option<&Ending>) -> Reading {
        let Some(reader) = &mut self.tool_calls else { return Reading { text, calls: Vec::new() } };
        let mut reading = reader.push(&text);
        match ending {
            None => {}
            // Nobody asked for the part of a call before a stop string.
            Some(Ending::Stop { stop_string: Some(_) }) => reading.text.push_str(&reader.finish().text),
            Some(_) => {
                let Reading { text, calls } = reader.finish();
                reading.text.push_str(&text);
                reading.calls.extend(calls);
            }
        }
        reading
    }

    fn logprobs(&self, token: TokenLogprobs) -> proto::TokenLogprobs {
        let one = |(id, logprob): (u32, f32)| proto::TokenLogprob {
            id,
            logprob,
            bytes: self.tokenizer.bytes(id).to_vec(),
        };
        proto::TokenLogprobs {
            chosen: Some(one((token.id, token.logprob))),
            top: token.top.into_iter().map(one).collect(),
        }
    }

    fn frame(&mut self, event: Event, usage: Usage) {
        self.response(Some(event), usage);
    }

    /// Without an event it says no more than what was computed: before an error, which cannot.
    fn response(&mut self, event: Option<Event>, usage: Usage) {
        let response = proto::GenerateResponse {
            sequence_number: self.sequence_number,
            event,
            usage: Some(proto::Usage {
                input_tokens: usage.input_tokens,
                cached_input_tokens: usage.cached_input_tokens,
                output_tokens: usage.output_tokens,
            }),
        };
        self.sequence_number += 1;
        self.frames.push_back(Ok(response));
    }
}

fn finished(ending: Ending) -> proto::Finished {
    use proto::FinishReason;
    let mut stop_string = String::new();
    let reason = match ending {
        Ending::Stop { stop_string: matched } => {
            stop_string = matched.unwrap_or_default();
            FinishReason::Stop
        }
        Ending::Length => FinishReason::Length,
        Ending::Cancelled => FinishReason::Cancelled,
        Ending::GrantExhausted => FinishReason::GrantExhausted,
        Ending::GrantTimeout => FinishReason::GrantTimeout,
        Ending::Deadline => FinishReason::Deadline,
        Ending::Broken(_) | Ending::Constraint(_) => FinishReason::Unspecified,
    };
    proto::Finished { reason: reason.into(), stop_string }
}

fn tool_call_delta(delta: ToolCallDelta) -> proto::ToolCallDelta {
    proto::ToolCallDelta { index: delta.index, name: delta.name, arguments: delta.arguments }
}

fn grant(grant: proto::Grant) -> Grant {
    Grant { output_tokens: grant.output_tokens, is_final: grant.is_final }
}

fn text_bytes(input: &Input) -> usize {
    match input {
        Input::Text(text) => text.len(),
        Input::Chat(chat) => {
            let message = |m: &proto::ChatMessage| m.content.len() + m.name.len() + m.tool_calls_json.len();
            chat.messages.iter().map(message).sum::<usize>() + chat.tools_json.len()
        }
    }
}

fn check_ids(field: &str, ids: &[u32], vocabulary_size: u32) -> Result<(), Status> {
    let Some(index) = ids.iter().position(|&id| id >= vocabulary_size) else { return Ok(()) };
    let reason = format!("is {}; the vocabulary has ids below {vocabulary_size}", ids[index]);
    Err(invalid(&format!("{field}[{index}]"), &reason))
}

fn check_stops(start: &proto::Start) -> Result<(), Status> {
    if start.stop_strings.len() > STOP_STRINGS_MAX {
        return Err(invalid("stop_strings", &format!("holds more than {STOP_STRINGS_MAX}")));
    }
    if start.stop_ids.len() > STOP_IDS_MAX {
        return Err(invalid("stop_ids", &format!("holds more than {STOP_IDS_MAX}")));
    }
    for (index, stop) in start.stop_strings.iter().enumerate() {
        if stop.is_empty() || stop.len() > STOP_STRING_BYTES_MAX {
            let reason = format!("must have 1 to {STOP_STRING_BYTES_MAX} bytes");
            return Err(invalid(&format!("stop_strings[{index}]"), &reason));
        }
    }
    Ok(())
}

/// By the `grpc-timeout` header: at most 8 digits and a unit.
fn deadline(metadata: &MetadataMap) -> Result<Option<Instant>, Status> {
    let Some(value) = metadata.get("grpc-timeout") else { return Ok(None) };
    let malformed = || invalid("grpc-timeout", "must be up to 8 digits and one of H, M, S, m, u, n");
    let value = value.to_str().map_err(|_| malformed())?;
    let (digits, unit) = value.split_at_checked(value.len().saturating_sub(1)).ok_or_else(malformed)?;
    if digits.len() > 8 {
        return Err(malformed());
    }
    let amount: u64 = digits.parse().map_err(|_| malformed())?;
    let timeout = match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return Err(malformed()),
    };
    Ok(Instant::now().checked_add(timeout))
}

/// INVALID_ARGUMENT that names the field.
fn invalid(field: &str, reason: &str) -> Status {
    let details = ErrorDetails::with_bad_request_violation(field, reason);
    Status::with_error_details(Code::InvalidArgument, format!("{field}: {reason}"), details)
}

fn refused(refusal: Refusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        Refusal::QueueFull { retry_after, .. } => {
            let details = ErrorDetails::with_retry_info(Some(retry_after));
            Status::with_error_details(Code::ResourceExhausted, message, details)
        }
        Refusal::TooLarge { .. } => invalid("output_tokens_max", &message),
        Refusal::Stopped => Status::unavailable(message),
    }
}
