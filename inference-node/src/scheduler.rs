//! Which tokens does the next step compute? Pure: no clock, no async, no I/O; queues and budgets in, a batch out.
//!
//! A sequence knows tokens (its prompt, then what it sampled) and has computed some of them. Each step computes a
//! stretch of what is left. A stretch that reaches the end of the known tokens yields one more, so it needs a grant;
//! without one the last known token stays uncomputed. Decoding is the case of one token left.
//!
//! ```text
//!   enqueue --> waiting --admit--> running --schedule--> [decode: 1 token each][prefill: chunks on the block grid]
//!   (bounded)   a queue a flow    (slots)                 at most step_tokens_max together
//!                  ^                 |
//!                  +--- suspended <--+  preempted, its state kept as it is
//! ```
//!
//! Fairness is by weighted virtual token counters (see [`flow`]). A *flow* is a tenant's work of one priority; the flow that
//! is behind goes first: into a slot (see [`admission`]) and, with its prompts, into a step (see [`step`]). A priority is a
//! weight first, so that batch work gets slow and never stops; it also decides who has to give up a slot for whom.
//!
//! Invariants, tested by simulation: a batch never exceeds its budget, a sequence its grant or memory its limit; each token
//! is computed once and in order, whatever is suspended in between; no sequence starves; and of two flows that always
//! want more, neither gets further in front than the lag, what is computed before a victim may be taken, and one step.

mod admission;
mod flow;
mod step;

pub use self::admission::Room;
pub use self::step::{Ahead, Work};

use self::flow::{Clock, Entry, Flow, Virtual};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Numbered by arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    Batch,
    Normal,
    High,
}

impl Priority {
    /// How fast a flow's counter runs.
    fn cost(self) -> Virtual {
        match self {
            Priority::Batch => 16,
            Priority::Normal => 4,
            Priority::High => 1,
        }
    }
}

#[derive(Debug, Clone)]
pub struct SchedulerLimits {
    /// Sequences that run at the same time.
    pub slots: usize,
    /// Sequences without a slot at which an arrival is refused.
    pub waiting_max: usize,
    /// Tokens computed in one step. More than `slots`, so that decoding leaves room for prefill.
    pub step_tokens_max: usize,
    /// The model's grid of blocks; chunks end on it where they can.
    pub block_tokens: usize,
    /// Tokens that a sequence computes in a slot before it can be suspended for others; at least one.
    pub preempt_after_tokens: u64,
    /// How far a flow gets behind, in its own tokens, before others are suspended for it.
    pub preempt_lag_tokens: u64,
}

/// A sequence as it arrives.
#[derive(Debug, Clone)]
pub struct Arrival {
    pub id: SequenceId,
    pub tenant: Arc<str>,
    /// The tenant's share against that of others; the latest arrival's counts.
    pub weight: u32,
    pub priority: Priority,
    /// Tokens to compute before the first one can be sampled.
    pub known_tokens: usize,
    /// Of them, how many are output already.
    pub output_tokens: u64,
    /// Output tokens it may have in total.
    pub granted_tokens: u64,
    /// Positions, ascending, at which a stretch of work must end: a checkpoint is made there.
    pub stops: Arc<[usize]>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the waiting queue is full: {waiting} sequences wait")]
pub struct QueueFull {
    pub waiting: usize,
}

pub struct Scheduler {
    limits: SchedulerLimits,
    sequences: BTreeMap<SequenceId, Sequence>,
    flows: BTreeMap<FlowKey, Flow>,
    clock: Clock,
    running: usize,
    preemptions: u64,
    /// Scratch: who may prefill, in order; and who may enter.
    candidates: Vec<(Virtual, SequenceId)>,
    heads: Vec<admission::Head>,
}

type FlowKey = (Arc<str>, Priority);

struct Sequence {
    flow: FlowKey,
    place: Place,
    known: usize,
    computed: usize,
    output: u64,
    granted: u64,
    stops: Arc<[usize]>,
    /// Tokens computed since it entered its slot.
    stint_tokens: u64,
    /// It has been without a grant for so long that others may have its slot.
    yields: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Waiting,
    Running,
    Suspended,
}

/// An output token weighs more than a prompt token: it is computed in a step of its own.
const OUTPUT_TOKEN_COST: u64 = 2;
/// Flows without work whose counters are kept. Forgetting one is a small gift to its tenant.
const IDLE_FLOWS_MAX: usize = 1024;

impl Place {
    fn entry(self) -> Entry {
        if self == Place::Suspended { Entry::Return } else { Entry::First }
    }
}

impl Sequence {
    fn left(&self) -> usize {
        self.known - self.computed
    }

    /// Tokens that may be computed now: without a grant, not the last.
    fn allowed(&self) -> usize {
        if self.output < self.granted { self.left() } else { self.left().saturating_sub(1) }
    }

    /// Tokens up to the next place where work must end.
    fn until_stop(&self) -> usize {
        let next = self.stops.partition_point(|&stop| stop <= self.computed);
        self.stops.get(next).map_or(usize::MAX, |stop| stop - self.computed)
    }

    fn decodes(&self) -> bool {
        self.place == Place::Running && self.left() == 1 && self.allowed() == 1
    }
}

impl Scheduler {
    pub fn new(limits: SchedulerLimits) -> Scheduler {
        assert!(limits.slots > 0 && limits.block_tokens > 0, "a scheduler has slots and a grid");
        assert!(limits.step_tokens_max > limits.slots, "decoding leaves room for prefill");
        assert!(
            limits.preempt_after_tokens > 0,
            "who is suspended has got on, or two could displace each other for ever"
        );
        Scheduler {
            limits,
            sequences: BTreeMap::new(),
            flows: BTreeMap::new(),
            clock: Clock::default(),
            running: 0,
            preemptions: 0,
            candidates: Vec::new(),
            heads: Vec::new(),
        }
    }

    /// Sequences without a slot, suspended ones included.
    pub fn waiting(&self) -> usize {
        self.sequences.len() - self.running
    }

    pub fn running(&self) -> usize {
        self.running
    }

    /// How often a sequence was suspended.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Prompt tokens not yet computed, of all sequences.
    pub fn prompt_tokens_pending(&self) -> u64 {
        let left = self.sequences.values().map(|sequence| match sequence.place {
            Place::Waiting => sequence.left(),
            // The one token left of a sequence that decodes is no prompt.
            Place::Running | Place::Suspended if sequence.left() == 1 => 0,
            Place::Running | Place::Suspended => sequence.left(),
        });
        left.sum::<usize>() as u64
    }

    /// Puts a sequence at the end of its flow's queue.
    pub fn enqueue(&mut self, arrival: Arrival) -> Result<(), QueueFull> {
        debug_assert!(arrival.known_tokens > 0, "a prompt has at least one token");
        if self.waiting() >= self.limits.waiting_max {
            return Err(QueueFull { waiting: self.waiting() });
        }
        self.forget_idle_flows();
        let key = (arrival.tenant, arrival.priority);
        let sequence = Sequence {
            flow: key.clone(),
            place: Place::Waiting,
            known: arrival.known_tokens,
            computed: 0,
            output: arrival.output_tokens,
            granted: arrival.granted_tokens,
            stops: arrival.stops,
            stint_tokens: 0,
            yields: false,
        };
        let flow = self.flows.entry(key).or_default();
        flow.set_weight(arrival.priority, arrival.weight);
        flow.members += 1;
        // One that cannot compute anything needs no slot.
        if sequence.allowed() > 0 {
            flow.lift(&self.clock);
            flow.queue.insert((Entry::First, arrival.id));
        }
        let before = self.sequences.insert(arrival.id, sequence);
        debug_assert!(before.is_none(), "ids are unique");
        Ok(())
    }

    /// The last step sampled a token for `id`, and it goes on.
    pub fn sampled(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("a sampled sequence is known");
        debug_assert!(sequence.left() == 0 && sequence.output < sequence.granted);
        sequence.known += 1;
        sequence.output += 1;
        let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
        flow.charge(&mut self.clock, OUTPUT_TOKEN_COST);
        flow.promised += 1;
    }

    /// Raises what `id` may generate in total; a lower number than before changes nothing.
    pub fn grant(&mut self, id: SequenceId, output_tokens: u64) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let was_stuck = sequence.allowed() == 0;
        sequence.granted = sequence.granted.max(output_tokens);
        if was_stuck && sequence.allowed() > 0 {
            sequence.yields = false;
            if sequence.place != Place::Running {
                let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
                flow.lift(&self.clock);
                flow.queue.insert((sequence.place.entry(), id));
            }
        }
    }

    /// Whether `id` cannot go on without a grant.
    pub fn lacks_grant(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|s| s.left() > 0 && s.allowed() == 0)
    }

    /// `id` has waited long enough for its grant: from now until it gets one, its slot is anybody's who needs it.
    pub fn yields(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.yields = sequence.place == Place::Running && sequence.allowed() == 0;
        }
    }

    /// Forgets a sequence, wherever it stands.
    pub fn remove(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
        flow.members -= 1;
        if sequence.place == Place::Running {
            flow.running -= 1;
            flow.promised -= sequence.left() as u64;
            self.running -= 1;
        } else {
            flow.queue.remove(&(sequence.place.entry(), id));
        }
    }

    /// Drops the counters that need no keeping, because a returning flow would start beyond them anyway.
    fn forget_idle_flows(&mut self) {
        let now = self.clock.now;
        let nobody_is_here = self.sequences.is_empty();
        self.flows.retain(|_, flow| !flow.is_idle() || flow.counter > now && !nobody_is_here);
        if self.flows.len() > IDLE_FLOWS_MAX + self.sequences.len() {
            self.flows.retain(|_, flow| !flow.is_idle());
        }
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
