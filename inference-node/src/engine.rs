//! The engine: one thread that owns the model's state and computes for everybody.
//!
//! ```text
//!            submit (bounded)                    step = take arrivals, read mailboxes, admit (and suspend),
//!   client -------------------> engine thread          schedule, run the model, sample, deliver
//!      ^   grants, cancel           |
//!      +------- Mailbox <-----------+            nothing in a step waits for a client
//! ```
//!
//! The file is long because the step is one owner's work, read from top to bottom: what it hands out has modules of its own ([`mailbox`],
//! `caching`, `pace`, `room`, `sequence`).
//!
//! Clients reach it through an [`EngineHandle`]; each sequence has a [`Mailbox`] for what follows. Dropping an
//! [`Answer`] cancels its sequence before the next step.

mod caching;
pub mod mailbox;
mod pace;
mod room;
mod sequence;

use self::caching::Caching;
use self::mailbox::{Delivery, Ending, Grant, Mailbox, Outlet};
use self::pace::Pace;
use self::room::CacheRoom;
use self::sequence::Sequence;
use crate::constraint::{Masks, Plan};
use crate::model::{Cost, Logits, Model, Runner, Span};
use crate::sampler::{Sampler, Sampling};
use crate::scheduler::{Priority, Scheduler, SchedulerLimits, SequenceId, Work};
use crate::state::chain::{Chain, Identity};
use crate::state::disk::{Flusher, FolderError};
use crate::state::prefixes::{PrefixCache, PrefixLimits};
use crate::state::{BLOCK_TOKENS, CacheLimits, StateCache};
use crate::tokenizer::Tokenizer;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

#[derive(Debug, Clone)]
pub struct EngineLimits {
    pub threads: usize,
    pub slots: usize,
    pub waiting_max: usize,
    pub step_tokens_max: usize,
    pub cache_tokens: usize,
    /// How long a sequence is kept without a grant.
    pub grant_idle: Duration,
    pub prefixes: PrefixLimits,
    /// How long it keeps its slot from others meanwhile.
    pub grant_patience: Duration,
    pub suspended_bytes_max: u64,
    pub preempt_after_tokens: u64,
    pub preempt_lag_tokens: u64,
    /// How long a step that computes a prompt too may take, in steps that only decode.
    pub mixed_step_ratio: f64,
    /// Threads that compute the masks of constrained sequences beside the step.
    pub mask_threads: usize,
}

/// A sequence to generate. Valid by construction: see [`crate::service`].
#[derive(Debug, Clone)]
pub struct Submission {
    /// At least one; all in the vocabulary.
    pub prompt_ids: Vec<u32>,
    /// Output generated elsewhere.
    pub resume_ids: Vec<u32>,
    /// At least one; with the prompt at most the model's context.
    pub output_tokens_max: usize,
    pub grant: Grant,
    pub sampling: Sampling,
    /// Stop ids, stop strings and the end of sequence count after these. At most `output_tokens_max`.
    pub output_tokens_min: usize,
    /// Log-probabilities are told, with those of this many likeliest tokens.
    pub top_logprobs: Option<usize>,
    /// Has `resume_ids` behind it.
    pub constraint: Option<Plan>,
    /// None is empty.
    pub stop_strings: Arc<[String]>,
    pub stop_ids: Vec<u32>,
    pub ignore_end_of_sequence: bool,
    pub tenant: Arc<str>,
    /// The tenant's share against that of others; at least 1.
    pub tenant_weight: u32,
    pub priority: Priority,
    pub deadline: Option<Instant>,
}

impl Submission {
    /// Greedy, granted in full, and ended by nothing but the model; the rest is up to the caller.
    pub fn new(prompt_ids: Vec<u32>, output_tokens_max: usize) -> Submission {
        Submission {
            prompt_ids,
            resume_ids: Vec::new(),
            output_tokens_max,
            grant: Grant { output_tokens: output_tokens_max as u64, is_final: true },
            sampling: Sampling::greedy(),
            output_tokens_min: 0,
            top_logprobs: None,
            constraint: None,
            stop_strings: Arc::new([]),
            stop_ids: Vec::new(),
            ignore_end_of_sequence: false,
            tenant: "".into(),
            tenant_weight: 1,
            priority: Priority::Normal,
            deadline: None,
        }
    }
}

/// Why a submission was not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    #[error("the node is full: {waiting} sequences wait")]
    QueueFull { waiting: usize, retry_after: Duration },
    #[error("prompt and output_tokens_max need room for {tokens} tokens, more than this node has in all")]
    TooLarge { tokens: usize },
    #[error("the engine has stopped")]
    Stopped,
}

/// Where every token was counted once, since the start. And how things stand now.
#[derive(Debug, Default)]
pub struct Odometer {
    pub sequences_running: AtomicU64,
    pub sequences_waiting: AtomicU64,
    pub prompt_tokens_pending: AtomicU64,
    pub prompt_tokens_total: AtomicU64,
    pub cached_tokens_total: AtomicU64,
    pub output_tokens_total: AtomicU64,
    pub steps_total: AtomicU64,
    pub preemptions_total: AtomicU64,
    /// How long an arrival would wait for its turn.
    pub expected_wait_ms: AtomicU64,
    /// Sequences that started from a checkpoint, and that did not.
    pub cache_hits_total: AtomicU64,
    pub cache_misses_total: AtomicU64,
    /// Checkpoints that left memory for want of room.
    pub cache_evictions_total: AtomicU64,
    /// Bytes of checkpoints, and of running sequences with what is kept for the next ones.
    pub cache_ram_bytes: AtomicU64,
    pub cache_disk_bytes: AtomicU64,
    pub state_bytes: AtomicU64,
    /// The least that the steps had to move and compute: see [`Cost`].
    pub weight_bytes_total: AtomicU64,
    pub state_bytes_total: AtomicU64,
    pub multiply_adds_total: AtomicU64,
}

impl Odometer {
    pub fn cost(&self) -> Cost {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Cost {
            weight_bytes: read(&self.weight_bytes_total),
            state_bytes: read(&self.state_bytes_total),
            multiply_adds: read(&self.multiply_adds_total),
        }
    }
}

/// Why an engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the engine thread cannot start: {0}")]
    Thread(std::io::Error),
    #[error("--cache-dir")]
    CacheDir(#[from] FolderError),
}

/// The way to a running engine. The engine stops when the last one is dropped.
#[derive(Clone)]
pub struct EngineHandle(Arc<Door>);

struct Door {
    /// Taken when the door closes.
    submissions: Option<SyncSender<Submitted>>,
    thread: JoinHandle<()>,
    odometer: Arc<Odometer>,
    /// `None` where nothing is cached.
    identity: Option<Identity>,
    flusher: Flusher,
}

struct Submitted {
    submission: Submission,
    /// Names the blocks of the prompt: hashed by whoever sends it, not by the engine.
    chain: Chain,
    mailbox: Arc<Mailbox>,
    taken: oneshot::Sender<Result<(), Refusal>>,
}

impl EngineHandle {
    /// Submits a sequence and waits until the engine has taken or refused it: a step, at most.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the sequence.
    pub async fn submit(&self, submission: Submission) -> Result<Answer, Refusal> {
        let mailbox = Arc::new(Mailbox::new(submission.grant));
        let answer = Answer { remote: Remote { mailbox: mailbox.clone(), door: self.0.clone() } };
        let (taken, outcome) = oneshot::channel();
        let submissions = self.0.submissions.as_ref().expect("the door is open while a handle exists");
        let root = self.0.identity.as_ref().map(|identity| identity.root(&submission.tenant));
        let chain = root.map(|root| Chain::new(root, &submission.prompt_ids)).unwrap_or_default();
        submissions.try_send(Submitted { submission, chain, mailbox, taken }).map_err(
            |error| match error {
                TrySendError::Full(_) => Refusal::QueueFull {
                    waiting: self.odometer().sequences_waiting.load(Ordering::Relaxed) as usize,
                    retry_after: retry_after(Duration::from_millis(
                        self.odometer().expected_wait_ms.load(Ordering::Relaxed),
                    )),
                },
                TrySendError::Disconnected(_) => Refusal::Stopped,
            },
        )?;
        self.0.wake();
        outcome.await.unwrap_or(Err(Refusal::Stopped))?;
        Ok(answer)
    }

    pub fn odometer(&self) -> &Odometer {
        &self.0.odometer
    }

    /// Waits until what ended sequences left is on disk, where there is a disk tier.
    ///
    /// # Cancel safety
    /// It is written all the same.
    pub async fn flush_cache(&self) {
        self.0.flusher.flush().await;
    }

    /// Whether the engine thread still runs. It ends before its handles only by a bug.
    pub fn is_alive(&self) -> bool {
        !self.0.thread.is_finished()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.submissions = None;
        self.wake();
    }
}

impl Door {
    fn wake(&self) {
        self.thread.thread().unpark();
    }
}

/// What a sequence says. Dropped, it cancels the sequence.
#[must_use]
pub struct Answer {
    remote: Remote,
}

impl Answer {
    /// Waits for what was generated since the last call. `None` after the ending.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Delivery> {
        self.remote.mailbox.take().await
    }

    pub fn remote(&self) -> Remote {
        self.remote.clone()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.remote.cancel();
    }
}

/// Grants to a sequence, or cancels it.
#[derive(Clone)]
pub struct Remote {
    mailbox: Arc<Mailbox>,
    door: Arc<Door>,
}

impl Remote {
    pub fn raise_grant(&self, grant: Grant) {
        self.mailbox.raise_grant(grant);
        self.door.wake();
    }

    pub fn refuse_further_grants(&self) {
        self.mailbox.refuse_further_grants();
        self.door.wake();
    }

    pub fn cancel(&self) {
        self.mailbox.cancel();
        self.door.wake();
    }
}

/// Only reserved; a page is used when it is touched.
const ENGINE_STACK_BYTES: usize = 64 << 20;
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Starts the engine thread.
pub fn start(
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    end_of_sequence: Vec<u32>,
    limits: EngineLimits,
) -> Result<EngineHandle, EngineError> {
    let (submissions, arrivals) = sync_channel(limits.slots + limits.waiting_max);
    let odometer = Arc::new(Odometer::default());
    let masks = Masks::start(limits.mask_threads, limits.slots).map_err(EngineError::Thread)?;
    let scheduler = Scheduler::new(SchedulerLimits {
        slots: limits.slots,
        waiting_max: limits.waiting_max,
        step_tokens_max: limits.step_tokens_max,
        block_tokens: BLOCK_TOKENS,
        preempt_after_tokens: limits.preempt_after_tokens,
        preempt_lag_tokens: limits.preempt_lag_tokens,
    });
    let cache_limits = CacheLimits { slots: limits.slots, tokens: limits.cache_tokens };
    let cache =
        StateCache::new(model.config(), cache_limits).with_suspended_bytes_max(limits.suspended_bytes_max);
    let identity = Identity {
        model: model.content_hash().to_owned(),
        kernel: model.kernel_name().to_owned(),
        dtype: model.dtype().name().to_owned(),
    };
    let prefixes = PrefixCache::start(limits.prefixes.clone(), identity.clone(), cache.shape())?;
    let flusher = prefixes.flusher();
    let identity = (limits.prefixes.ram_bytes > 0).then_some(identity);
    let engine = Engine {
        cache,
        caching: Caching::new(prefixes),
        pace: Pace::new(model.config(), model.active_parameters(), limits.mixed_step_ratio),
        vocab_size: model.config().vocab_size,
        runner: Runner::new(model, limits.threads),
        limits,
        tokenizer,
        end_of_sequence,
        arrivals,
        door_is_open: true,
        scheduler,
        sampler: Sampler::default(),
        masks,
        sequences: BTreeMap::new(),
        next_id: 0,
        odometer: odometer.clone(),
        batch: Vec::new(),
        endings: Vec::new(),
        text: String::new(),
    };
    // It follows grammars, which may be deep.
    let thread = std::thread::Builder::new().name("engine".to_owned()).stack_size(ENGINE_STACK_BYTES);
    let thread = thread.spawn(move || engine.run()).map_err(EngineError::Thread)?;
    Ok(EngineHandle(Arc::new(Door { submissions: Some(submissions), thread, odometer, identity, flusher })))
}

struct Engine {
    limits: EngineLimits,
    vocab_size: usize,
    tokenizer: Arc<Tokenizer>,
    end_of_sequence: Vec<u32>,
    arrivals: Receiver<Submitted>,
    door_is_open: bool,
    scheduler: Scheduler,
    runner: Runner,
    cache: StateCache,
    caching: Caching,
    sampler: Sampler,
    masks: Masks,
    sequences: BTreeMap<SequenceId, Sequence>,
    next_id: u64,
    pace: Pace,
    odometer: Arc<Odometer>,
    /// Scratch, kept between steps.
    batch: Vec<Work>,
    endings: Vec<(SequenceId, Ending)>,
    text: String,
}

impl Engine {
    fn run(mut self) {
        self.caching.prefixes.wake_me();
        while self.door_is_open || !self.sequences.is_empty() {
            let rest = self.step();
            self.publish();
            match rest {
                Rest::None => {}
                Rest::Until(moment) => {
                    std::thread::park_timeout(moment.saturating_duration_since(Instant::now()));
                }
                Rest::UntilCalled => std::thread::park(),
            }
        }
    }

    fn step(&mut self) -> Rest {
        // Whoever cancelled before a newcomer was submitted makes room for it.
        let arrivals = self.receive();
        let now = Instant::now();
        let alarm = self.read_mailboxes(now);
        self.end_sequences();
        self.release_held(now);
        let somebody_arrived = !arrivals.is_empty();
        arrivals.into_iter().for_each(|submitted| self.take(submitted));
        self.admit();
        let prompt_tokens_max = self.pace.prompt_tokens_max(self.scheduler.ahead());
        self.scheduler.schedule(&mut self.batch, prompt_tokens_max);
        if !self.batch.is_empty() {
            let started_at = Instant::now();
            self.compute();
            self.pace.observe(&self.batch, started_at.elapsed());
            return Rest::None;
        }
        match alarm.into_iter().chain(self.caching.alarm()).min() {
            _ if somebody_arrived || !self.door_is_open => Rest::None,
            Some(moment) => Rest::Until(moment),
            None => Rest::UntilCalled,
        }
    }

    /// As many as wait at the door: no more than it holds.
    fn receive(&mut self) -> Vec<Submitted> {
        let mut arrivals = Vec::new();
        while arrivals.len() < self.limits.slots + self.limits.waiting_max {
            match self.arrivals.try_recv() {
                Ok(submitted) => arrivals.push(submitted),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.door_is_open = false;
                    break;
                }
            }
        }
        arrivals
    }

    fn take(&mut self, submitted: Submitted) {
        let Submitted { submission, chain, mailbox, taken } = submitted;
        // Whoever waits while slots are free is not in the queue that has a limit.
        self.admit();
        let outcome = self.enqueue(submission, chain, Outlet::new(mailbox));
        // A client that no longer listens has cancelled.
        let _ = taken.send(outcome);
    }

    fn enqueue(&mut self, submission: Submission, chain: Chain, outlet: Outlet) -> Result<(), Refusal> {
        let tokens = submission.prompt_ids.len() + submission.output_tokens_max;
        if !self.cache.fits(tokens) {
            return Err(Refusal::TooLarge { tokens });
        }
        // Whoever hung up while waiting at the door costs nobody a step.
        let cancelled = outlet.mailbox().is_cancelled().then_some(Ending::Cancelled);
        let (mut sequence, ended) = Sequence::new(submission, &self.end_of_sequence, outlet, &self.tokenizer);
        if let Some(ending) = ended.or(cancelled) {
            // What text there is was sent by the node that generated it.
            sequence.end_silently(ending);
            return Ok(());
        }
        sequence.prefix = self.prefix(chain, &sequence.tokens);
        let id = SequenceId(self.next_id);
        self.sequences.insert(id, sequence);
        if let Err(full) = self.place(id) {
            self.sequences.remove(&id);
            let retry_after = retry_after(self.expected_wait());
            return Err(Refusal::QueueFull { waiting: full.waiting, retry_after });
        }
        self.next_id += 1;
        Ok(())
    }

    /// Learns who was cancelled or granted more, and whose time is up. Answers with the next moment at which
    /// somebody's will be.
    fn read_mailboxes(&mut self, now: Instant) -> Option<Instant> {
        let mut alarm: Option<Instant> = None;
        let mut wake_at =
            |moment: Instant| alarm = Some(alarm.map_or(moment, |earliest| earliest.min(moment)));
        for (&id, sequence) in &mut self.sequences {
            let mailbox = sequence.outlet().mailbox();
            let (grant, cancelled) = (mailbox.grant(), mailbox.is_cancelled());
            if grant.output_tokens > sequence.granted_tokens {
                sequence.granted_tokens = grant.output_tokens;
                self.scheduler.grant(id, grant.output_tokens);
            }
            if cancelled {
                self.endings.push((id, Ending::Cancelled));
            } else if sequence.deadline.is_some_and(|deadline| is_missed(sequence, deadline, now, &self.pace))
            {
                self.endings.push((id, Ending::Deadline));
            } else if grant.is_final && sequence.output_tokens() as u64 >= grant.output_tokens {
                self.endings.push((id, Ending::GrantExhausted));
            } else if self.scheduler.lacks_grant(id) {
                let idle_since = *sequence.idle_since.get_or_insert(now);
                let (yields_at, given_up_at) =
                    (idle_since + self.limits.grant_patience, idle_since + self.limits.grant_idle);
                if given_up_at <= now {
                    self.endings.push((id, Ending::GrantTimeout));
                } else if yields_at <= now {
                    self.scheduler.yields(id);
                    wake_at(given_up_at);
                } else {
                    wake_at(yields_at.min(given_up_at));
                }
            } else {
                sequence.idle_since = None;
            }
            sequence.deadline.into_iter().for_each(&mut wake_at);
        }
        alarm
    }

    fn end_sequences(&mut self) {
        while let Some((id, ending)) = self.endings.pop() {
            self.retire(id, |sequence| sequence.end(ending));
        }
    }

    /// Takes a sequence out of everything; `end` says its last words.
    fn retire(&mut self, id: SequenceId, end: impl FnOnce(Sequence) -> Option<crate::state::Slot>) {
        let mut sequence = self.sequences.remove(&id).expect("a sequence ends once");
        self.scheduler.remove(id);
        self.forget(id, &sequence.prefix);
        // Before its client learns of the end: whoever then flushes the cache flushes this too.
        self.park(&mut sequence);
        self.pace.ended(sequence.output_tokens());
        if let Some(suspended) = sequence.suspended.take() {
            self.cache.discard(suspended);
        }
        if let Some(slot) = end(sequence) {
            self.cache.release(slot);
        }
    }

    fn admit(&mut self) {
        let mut room = CacheRoom {
            sequences: &mut self.sequences,
            cache: &mut self.cache,
            caching: &mut self.caching,
            admitted: Vec::new(),
        };
        self.scheduler.admit(&mut room);
        let admitted = room.admitted;
        self.restored(admitted);
    }

    /// Runs the batch through the model, then samples.
    fn compute(&mut self) {
        let spans: Vec<Span<'_>> = self.batch.iter().map(|work| span(&self.sequences, work)).collect();
        let logits = self.runner.forward(&mut self.cache, &spans);
        drop(spans);

        let mut rows = logits.chunks_exact(self.vocab_size);
        let (mut prompt_tokens, mut output_tokens) = (0, 0);
        let mut retired = Vec::new();
        for work in &self.batch {
            let sequence = self.sequences.get_mut(&work.id).expect("a scheduled sequence is known");
            let given = sequence.given_tokens();
            prompt_tokens += (work.from + work.tokens).min(given) - work.from.min(given);
            sequence.computed = work.from + work.tokens;
            if !work.samples {
                continue;
            }
            let row = rows.next().expect("the model gives a row of logits for each span that asks");
            let sampled = match sequence.choose(row, &mut self.sampler) {
                Ok(sampled) => sampled,
                Err(ending) => {
                    self.endings.push((work.id, ending));
                    continue;
                }
            };
            output_tokens += 1;
            self.text.clear();
            match sequence.advance(sampled.id, &self.tokenizer, &mut self.text) {
                None => {
                    sequence.outlet().token(sampled, &self.text, sequence.usage());
                    sequence.prepare(&self.masks);
                    self.scheduler.sampled(work.id);
                }
                Some(ending) => retired.push((work.id, sampled, self.text.clone(), ending)),
            }
        }
        self.keep_checkpoints();
        for (id, sampled, text, ending) in retired {
            self.retire(id, |sequence| sequence.end_after(sampled, &text, ending));
        }
        self.end_sequences();
        self.odometer.prompt_tokens_total.fetch_add(prompt_tokens as u64, Ordering::Relaxed);
        self.odometer.output_tokens_total.fetch_add(output_tokens, Ordering::Relaxed);
        self.odometer.steps_total.fetch_add(1, Ordering::Relaxed);
    }

    /// Until an arrival would get its turn: of all the work here, the share of those that must end before.
    fn expected_wait(&self) -> Duration {
        let (waiting, present) = (self.scheduler.waiting(), self.sequences.len());
        if waiting == 0 && self.scheduler.running() < self.limits.slots {
            return Duration::ZERO;
        }
        let left = |sequence: &Sequence| {
            self.pace.output_tokens_left(sequence.output_tokens(), sequence.output_tokens_left_max())
        };
        let output_tokens = self.sequences.values().map(left).sum();
        let all_s = self.pace.seconds_for(self.scheduler.prompt_tokens_pending() as f64, output_tokens);
        let before = (waiting + 1).min(present) as f64 / present as f64;
        Duration::try_from_secs_f64(all_s * before).unwrap_or(RETRY_AFTER_MAX)
    }

    fn publish(&self) {
        let set = |gauge: &AtomicU64, value: u64| gauge.store(value, Ordering::Relaxed);
        set(&self.odometer.sequences_running, self.scheduler.running() as u64);
        set(&self.odometer.sequences_waiting, (self.scheduler.waiting() + self.caching.held()) as u64);
        set(&self.odometer.prompt_tokens_pending, self.scheduler.prompt_tokens_pending());
        let prefixes = self.caching.prefixes.stats();
        set(&self.odometer.cache_evictions_total, prefixes.evictions);
        set(&self.odometer.cache_ram_bytes, prefixes.ram_bytes);
        set(&self.odometer.cache_disk_bytes, prefixes.disk_bytes);
        set(&self.odometer.state_bytes, self.cache.bytes());
        let cost = self.runner.cost();
        set(&self.odometer.weight_bytes_total, cost.weight_bytes);
        set(&self.odometer.state_bytes_total, cost.state_bytes);
        set(&self.odometer.multiply_adds_total, cost.multiply_adds);
        set(&self.odometer.preemptions_total, self.scheduler.preemptions());
        set(&self.odometer.expected_wait_ms, self.expected_wait().as_millis() as u64);
    }
}

/// What to do after a step.
enum Rest {
    None,
    Until(Instant),
    UntilCalled,
}

fn retry_after(wait: Duration) -> Duration {
    wait.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
}

/// Whether a deadline has passed, or will have before a newcomer's first token could be there.
fn is_missed(sequence: &Sequence, deadline: Instant, now: Instant, pace: &Pace) -> bool {
    let left = deadline.saturating_duration_since(now);
    left.is_zero() || sequence.is_new() && pace.is_hopeless(sequence.tokens.len(), left)
}

fn span<'a>(sequences: &'a BTreeMap<SequenceId, Sequence>, work: &Work) -> Span<'a> {
    let sequence = &sequences[&work.id];
    Span {
        slot: sequence.slot.as_ref().expect("a running sequence has a slot"),
        tokens: &sequence.tokens[work.from..work.from + work.tokens],
        logits: if work.samples { Logits::Last } else { Logits::None },
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "engine/caching_tests.rs"]
mod caching_tests;
