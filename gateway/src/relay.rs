//! Who owns a stream until it is settled: one relay a request, in a tracked task, from the admitted request to the
//! durable bill.
//!
//! It grants the node tokens only as far as the hold covers them and only as fast as the client takes them, so one
//! number is both the hard spending cap and the back-pressure:
//!
//! ```text
//! grant = min(tokens handed to the client + window, tokens the hold covers)
//! ```
//! A node that fails before it has answered is replaced by another. A client that goes away cancels the node, and
//! pays for what the node says it had generated. The caller gets its last event only after the bill is durable.

use std::{
    future::pending,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use sluice_billing::{
    FinishReason as Billed, Hold, Media, Money, Outcome, PinnedPrices, Quantities, UsageEvent, VoidCause,
};
use sluice_proto::node::v1::{
    FinishReason as NodeReason, Grant, Start, Usage as Counted, generate_response::Event as NodeEvent,
};
use tokio::{
    sync::mpsc::Permit,
    time::{sleep, sleep_until, timeout},
};
use tonic::Status;

use crate::{
    app::{App, Limits},
    complete::{
        Admitted, Caller, Delivery, Delta, Event, Events, Failure, Finish, FinishReason, Usage, node_failure,
    },
    error::{ApiError, RETRY_AFTER},
    node_client::{NodeClient, Sequence},
};

/// How long a caller may take nothing before it is given up on.
pub fn client_idle_max(app: &App) -> Duration {
    Duration::from_millis(app.limits.client_idle_ms_max)
}

/// Runs an admitted request to its end. `None`: the caller is gone, and has been billed.
///
/// # Cancel safety
/// Not cancel safe: it owns the hold. It runs in the task tracker and is never dropped.
pub async fn run(
    app: &App,
    caller: &Caller,
    admitted: Admitted,
    events: &Events,
) -> Result<Option<Finish>, ApiError> {
    let Admitted { hold, prices, start, tokens } = admitted;
    let purse = Purse::new(hold);
    let mut relay = Relay {
        app,
        caller,
        client: Client { app, caller, events },
        start,
        purse,
        prices,
        granted: Grant::default(),
        counted: Counted::default(),
        node: String::new(),
        first_token: None,
        last_token: None,
    };
    let ended = relay.generate(tokens).await;
    relay.close(ended).await
}

struct Relay<'a> {
    app: &'a App,
    caller: &'a Caller,
    client: Client<'a>,
    start: Start,
    purse: Purse,
    /// Where the caller wants to know the cost so far.
    prices: Option<PinnedPrices>,
    /// What the node was last granted.
    granted: Grant,
    /// What the node last said it used.
    counted: Counted,
    node: String,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// How generation ended.
enum Ended {
    ByNode(NodeReason),
    /// The caller hung up.
    Gone,
    /// We ended it, for this reason.
    ByUs(ApiError),
    /// The node failed.
    Failed(ApiError),
}

impl Relay<'_> {
    fn limits(&self) -> &Limits {
        &self.app.limits
    }

    /// Generates on one node, or, as long as nothing has been answered, on the next.
    async fn generate(&mut self, tokens: u64) -> Ended {
        let mut tried: Vec<Arc<NodeClient>> = Vec::new();
        let mut failure = None;
        while tried.len() < self.limits().attempts_max.max(1) {
            let assignment = match self.app.nodes.assign(&self.start.model, tokens, &tried) {
                Ok(assignment) => assignment,
                Err(unroutable) => return Ended::Failed(failure.unwrap_or(unroutable)),
            };
            let node = assignment.node().clone();
            self.node = node.name().to_owned();
            self.counted = Counted::default();
            match self.attempt(&node).await {
                Ok(ended) => return ended,
                Err(status) => match node_failure(&node, status, &self.start.model, "prompt") {
                    Failure::Elsewhere(error) if self.first_token.is_none() => {
                        tracing::info!(node = node.name(), "trying another node");
                        failure = Some(error);
                    }
                    Failure::Elsewhere(error) | Failure::Final(error) => return Ended::Failed(error),
                },
            }
            tried.push(node);
        }
        Ended::Failed(failure.expect("the loop ran at least once"))
    }

    /// One node's part. `Err`: the node refused or failed.
    async fn attempt(&mut self, node: &NodeClient) -> Result<Ended, Status> {
        self.granted = self.next_grant();
        let start = Start { grant: Some(self.granted), ..self.start.clone() };
        let silence_max = Duration::from_millis(self.limits().node_silence_ms_max);
        let client = self.client;
        let opening = timeout(silence_max, node.generate(start));
        tokio::pin!(opening);
        let ended = tokio::select! {
            biased;
            () = client.events.closed() => Ended::Gone,
            error = client.interrupted() => Ended::ByUs(error),
            opened = &mut opening => {
                let late = |_| Status::unavailable("the node did not take the request in time");
                let mut sequence = opened.map_err(late)??;
                let ended = self.follow(&mut sequence).await?;
                if matches!(ended, Ended::Gone | Ended::ByUs(_)) {
                    self.stop(&mut sequence).await;
                }
                return Ok(ended);
            }
        };
        // The request is on its way: the node may compute some of it before it can be told to stop.
        let wait = Duration::from_millis(self.limits().cancel_wait_ms_max);
        if let Ok(Ok(Ok(mut sequence))) = timeout(wait, opening).await {
            self.stop(&mut sequence).await;
        }
        Ok(ended)
    }

    /// Hands on what the node says, until it ends or must be ended.
    async fn follow(&mut self, sequence: &mut Sequence) -> Result<Ended, Status> {
        let silence_max = Duration::from_millis(self.limits().node_silence_ms_max);
        let client = self.client;
        loop {
            let room = match client.room().await {
                Ok(room) => room,
                Err(ended) => return Ok(ended),
            };
            let frame = loop {
                tokio::select! {
                    biased;
                    () = client.events.closed() => return Ok(Ended::Gone),
                    error = client.interrupted() => return Ok(Ended::ByUs(error)),
                    () = self.purse.grown() => {}
                    frame = timeout(silence_max, sequence.next()) => {
                        break frame.map_err(|_| Status::unavailable("the node fell silent"))??;
                    }
                }
                self.raise_grant(sequence);
            };
            if let Some(counted) = frame.usage {
                self.counted = counted;
            }
            match frame.event {
                Some(NodeEvent::Delta(delta)) => {
                    let first = self.first_token.is_none();
                    self.note_token();
                    let delta = Delta {
                        text: delta.text,
                        logprobs: delta.logprobs,
                        tool_calls: delta.tool_calls,
                        cost_so_far: self.cost_so_far(),
                    };
                    // An empty one still tells a caller that waits for the first token that it has come.
                    if first || !delta.is_empty() {
                        room.send(Ok(Event::Delta(delta)));
                    }
                }
                Some(NodeEvent::Finished(finished)) => return Ok(Ended::ByNode(finished.reason())),
                Some(NodeEvent::Started(_)) | None => {}
            }
            self.raise_grant(sequence);
        }
    }

    fn cost_so_far(&self) -> Option<Money> {
        let Counted { input_tokens, cached_input_tokens, output_tokens } = self.counted;
        let counted =
            Quantities { input_tokens, cached_input_tokens, output_tokens, ..Quantities::default() };
        self.prices.as_ref()?.cost_of(counted, self.purse.covered)
    }

    fn note_token(&mut self) {
        let now = Instant::now();
        let metrics = &self.app.metrics;
        match self.last_token {
            None => metrics.time_to_first_token(&self.start.model, now - self.caller.received),
            Some(last) => metrics.time_between_tokens(&self.start.model, now - last),
        }
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
    }

    /// How far the node may go now.
    fn next_grant(&self) -> Grant {
        let covered = self.purse.covered;
        let output_tokens =
            (self.counted.output_tokens + self.limits().grant_window_tokens.max(1)).min(covered);
        // At the request's own limit the node ends by itself.
        let at_budget = self.purse.is_final && covered < u64::from(self.start.output_tokens_max);
        Grant { output_tokens, is_final: at_budget && output_tokens == covered }
    }

    /// Raises the grant once half a window is used, and has the hold grow before it limits the grant.
    fn raise_grant(&mut self, sequence: &Sequence) {
        let window = self.limits().grant_window_tokens.max(1);
        let step = self.limits().hold_step_tokens.max(window);
        if self.purse.covered < self.counted.output_tokens + 2 * window {
            self.purse.grow(step);
        }
        let next = self.next_grant();
        let worth_saying = next.output_tokens >= self.granted.output_tokens + window.div_ceil(2)
            || (next.output_tokens > self.granted.output_tokens && next.output_tokens == self.purse.covered)
            || (next.is_final && !self.granted.is_final);
        if worth_saying && sequence.grant(next) {
            self.granted = next;
        }
    }

    /// Cancels the node's work and learns what it came to; of a node that does not say, the last it said counts.
    async fn stop(&mut self, sequence: &mut Sequence) {
        let wait = Duration::from_millis(self.limits().cancel_wait_ms_max);
        let ending = async {
            sequence.cancel().await;
            while let Ok(frame) = sequence.next().await {
                if let Some(counted) = frame.usage {
                    self.counted = counted;
                }
                if matches!(frame.event, Some(NodeEvent::Finished(_))) {
                    return;
                }
            }
        };
        if timeout(wait, ending).await.is_err() {
            tracing::warn!(
                node = self.node,
                "a cancelled node did not say what it used; its last word counts"
            );
        }
    }

    /// Ends the hold, then says what the caller is to be told.
    async fn close(self, ended: Ended) -> Result<Option<Finish>, ApiError> {
        match ended {
            Ended::ByNode(NodeReason::Stop) => self.finish(Billed::Stop, FinishReason::Stop).await,
            Ended::ByNode(NodeReason::Length) => self.finish(Billed::Length, FinishReason::Length).await,
            Ended::ByNode(NodeReason::GrantExhausted) => {
                self.finish(Billed::Budget, FinishReason::Budget).await
            }
            Ended::ByNode(NodeReason::GrantTimeout) => self.give_up(ApiError::ClientTooSlow).await,
            Ended::ByNode(NodeReason::Deadline) => self.give_up(ApiError::DeadlineExceeded).await,
            Ended::ByNode(NodeReason::Cancelled | NodeReason::Unspecified) => {
                let source = "the node ended the sequence without being asked to".into();
                self.fail(ApiError::NodeFailed { source, retry_after: RETRY_AFTER }).await
            }
            Ended::Gone => self.pay_for_used().await.map(|()| None),
            Ended::ByUs(error) => self.give_up(error).await,
            // The request's own fault, found while it was computed: a format that no token can follow.
            Ended::Failed(error @ ApiError::Field { .. }) => self.give_up(error).await,
            Ended::Failed(error) => self.fail(error).await,
        }
    }

    async fn finish(self, billed: Billed, reason: FinishReason) -> Result<Option<Finish>, ApiError> {
        let app = self.app;
        let bill = self.settle(billed).await?;
        // Some 30 us, after an fsync that took far longer: not worth a thread of its own.
        let receipt = app.receipts.sign(&bill);
        Ok(Some(Finish { reason, usage: Usage::of(&bill), cost: bill.cost, receipt }))
    }

    /// Bills what was computed for a caller that gets no more of it.
    async fn pay_for_used(self) -> Result<(), ApiError> {
        let Counted { input_tokens, cached_input_tokens, output_tokens } = self.counted;
        if input_tokens + cached_input_tokens + output_tokens == 0 {
            self.void(VoidCause::ClientGone).await;
            return Ok(());
        }
        self.settle(Billed::Cancelled).await.map(drop)
    }

    async fn give_up(self, error: ApiError) -> Result<Option<Finish>, ApiError> {
        self.pay_for_used().await?;
        Err(error)
    }

    /// What was handed over is paid for; an answer that was to come whole never came.
    async fn fail(self, error: ApiError) -> Result<Option<Finish>, ApiError> {
        if self.first_token.is_some() && self.caller.delivery == Delivery::Streamed {
            self.settle(Billed::Error).await?;
        } else {
            self.void(VoidCause::NodeFailed).await;
        }
        Err(error)
    }

    async fn void(self, cause: VoidCause) {
        self.app.metrics.wasted(&self.start.model, &self.counted);
        self.purse.into_hold().await.void(cause).await;
    }

    /// The bill, which is durable.
    async fn settle(self, finish_reason: Billed) -> Result<UsageEvent, ApiError> {
        let since = |instant: Instant| (instant - self.caller.received).as_millis() as u64;
        let outcome = Outcome {
            input_tokens: self.counted.input_tokens,
            cached_input_tokens: self.counted.cached_input_tokens,
            output_tokens: self.counted.output_tokens,
            // Nodes count reasoning as output.
            reasoning_tokens: 0,
            media: Media::default(),
            finish_reason,
            node: self.node,
            time_to_first_token_ms: self.first_token.map(since),
            duration_ms: since(Instant::now()),
        };
        let bill = self.purse.into_hold().await.settle(outcome).await.map_err(|error| {
            ApiError::BillingUnavailable { source: Some(error.into()), retry_after: RETRY_AFTER }
        })?;
        let usage = Usage::of(&bill);
        self.app.metrics.tokens(&self.start.model, &usage);
        tracing::info!(
            model = self.start.model,
            node = bill.node,
            finish_reason = finish_reason.as_str(),
            prompt_tokens = usage.prompt_tokens,
            cached_prompt_tokens = usage.cached_prompt_tokens,
            completion_tokens = usage.completion_tokens,
            time_to_first_token_ms = bill.time_to_first_token_ms,
            duration_ms = bill.duration_ms,
            "settled"
        );
        Ok(bill)
    }
}

/// Who waits for the answer, and what may end the wait.
#[derive(Clone, Copy)]
struct Client<'a> {
    app: &'a App,
    caller: &'a Caller,
    events: &'a Events,
}

impl<'a> Client<'a> {
    /// Waits until the client has room for an event.
    async fn room(self) -> Result<Permit<'a, Result<Event, ApiError>>, Ended> {
        tokio::select! {
            biased;
            room = self.events.reserve() => room.map_err(|_| Ended::Gone),
            error = self.interrupted() => Err(Ended::ByUs(error)),
            () = sleep(client_idle_max(self.app)) => Err(Ended::ByUs(ApiError::ClientTooSlow)),
        }
    }

    /// Resolves when the request must end, whatever the node and the client do.
    async fn interrupted(self) -> ApiError {
        let deadline = async {
            match self.caller.deadline {
                Some(deadline) => sleep_until(deadline.into()).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = deadline => ApiError::DeadlineExceeded,
            () = self.app.cut.cancelled() => ApiError::Draining { retry_after: RETRY_AFTER },
        }
    }
}

/// The hold, which grows while the stream goes on.
struct Purse {
    state: PurseState,
    /// Output tokens that are covered now.
    covered: u64,
    /// The account affords no more.
    is_final: bool,
}

enum PurseState {
    Still(Hold),
    Growing(BoxFuture<'static, Hold>),
    /// Only within a call.
    Moving,
}

impl Purse {
    fn new(hold: Hold) -> Purse {
        let (covered, is_final) = (hold.granted_output_tokens(), hold.is_final());
        Purse { state: PurseState::Still(hold), covered, is_final }
    }

    /// Begins to cover `tokens` more, unless that is under way or pointless.
    fn grow(&mut self, tokens: u64) {
        if self.is_final {
            return;
        }
        self.state = match std::mem::replace(&mut self.state, PurseState::Moving) {
            PurseState::Still(mut hold) => {
                let target = self.covered + tokens;
                PurseState::Growing(Box::pin(async move {
                    hold.extend(target).await;
                    hold
                }))
            }
            growing => growing,
        };
    }

    /// Resolves when the hold has grown. Cancel safe: growing goes on at the next call.
    async fn grown(&mut self) {
        let PurseState::Growing(growing) = &mut self.state else { return pending().await };
        let hold = growing.await;
        let covered = hold.granted_output_tokens();
        // What did not grow now will not grow later: the stream ends at a token rather than hang.
        self.is_final = hold.is_final() || covered == self.covered;
        self.covered = covered;
        self.state = PurseState::Still(hold);
    }

    async fn into_hold(self) -> Hold {
        match self.state {
            PurseState::Still(hold) => hold,
            PurseState::Growing(growing) => growing.await,
            PurseState::Moving => unreachable!("no call leaves the purse between two states"),
        }
    }
}
