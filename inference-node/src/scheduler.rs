//! Which tokens does the next step compute? Pure: no clock, no async, no I/O; queues and budgets in, a batch out.
//!
//! A sequence knows tokens (its prompt, then what it sampled) and has computed some of them. Each step computes a
//! stretch of what is left. A stretch that reaches the end of the known tokens yields one more, so it needs a grant;
//! without one the last known token stays uncomputed. Decoding is the case of one token left.
//!
//! ```text
//!   enqueue --> waiting --admit--> running --schedule--> [decode: 1 token each][prefill: chunks on the block grid]
//!   (bounded)   a queue a flow    (slots)                 at most step_tokens_max together
//! ```
//!
//! Fairness is by virtual token counters (arXiv 2401.00588). A *flow* is a tenant's work of one priority; its counter
//! runs with each token computed for it, more slowly for a higher priority; the flow that is behind goes first. So
//! priority is a weight, not a rank: batch work gets slow and never stops. An idle flow earns no credit: when it comes
//! back it starts with the flow that is furthest behind. Endless newcomers could so hold back a flow for ever;
//! therefore every eighth choice goes by age instead.
//!
//! Invariants, tested by simulation: a batch never exceeds its budget nor a sequence its grant, no sequence starves,
//! each token is computed once and in order.

use std::collections::{BTreeMap, VecDeque};
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
    fn cost(self) -> u64 {
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
    pub waiting_max: usize,
    /// Tokens computed in one step. More than `slots`, so that decoding leaves room for prefill.
    pub step_tokens_max: usize,
    /// The model's grid of blocks; chunks end on it where they can.
    pub block_tokens: usize,
}

/// A sequence as it arrives.
#[derive(Debug, Clone)]
pub struct Arrival {
    pub id: SequenceId,
    pub tenant: Arc<str>,
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

/// What one step computes for one sequence: its known tokens `from..from + tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    pub id: SequenceId,
    pub from: usize,
    pub tokens: usize,
    /// They reach the end of what is known: a token is to be sampled.
    pub samples: bool,
}

pub struct Scheduler {
    limits: SchedulerLimits,
    sequences: BTreeMap<SequenceId, Sequence>,
    flows: BTreeMap<FlowKey, Flow>,
    running: usize,
    /// Choices made, to tell whose turn it is: see [`AGE_TURN`].
    admissions: u64,
    prefills: u64,
    /// Scratch: who may prefill, in order.
    candidates: Vec<(u64, SequenceId)>,
}

type FlowKey = (Arc<str>, Priority);

struct Sequence {
    flow: FlowKey,
    running: bool,
    known: usize,
    computed: usize,
    output: u64,
    granted: u64,
    stops: Arc<[usize]>,
}

#[derive(Default)]
struct Flow {
    counter: u64,
    waiting: VecDeque<SequenceId>,
    running: usize,
    /// Known tokens of its running sequences that are not computed: work it was promised by admission.
    promised: u64,
}

/// An output token weighs more than a prompt token: it is computed in a step of its own.
const OUTPUT_TOKEN_COST: u64 = 2;
/// One choice in so many goes to the sequence that came first, whatever its flow has used.
const AGE_TURN: u64 = 8;
/// Flows without work whose counters are kept. Forgetting one is a small gift to its tenant.
const IDLE_FLOWS_MAX: usize = 1024;

impl Sequence {
    fn left(&self) -> usize {
        self.known - self.computed
    }

    /// Tokens that may be computed now: without a grant, not the last.
    fn allowed(&self) -> usize {
        if self.output < self.granted { self.left() } else { self.left() - 1 }
    }

    /// Tokens up to the next place where work must end.
    fn until_stop(&self) -> usize {
        let next = self.stops.partition_point(|&stop| stop <= self.computed);
        self.stops.get(next).map_or(usize::MAX, |stop| stop - self.computed)
    }
}

impl Flow {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running == 0
    }
}

impl Scheduler {
    pub fn new(limits: SchedulerLimits) -> Scheduler {
        assert!(limits.slots > 0 && limits.block_tokens > 0, "a scheduler has slots and a grid");
        assert!(limits.step_tokens_max > limits.slots, "decoding leaves room for prefill");
        Scheduler {
            limits,
            sequences: BTreeMap::new(),
            flows: BTreeMap::new(),
            running: 0,
            admissions: 0,
            prefills: 0,
            candidates: Vec::new(),
        }
    }

    pub fn waiting(&self) -> usize {
        self.sequences.len() - self.running
    }

    pub fn running(&self) -> usize {
        self.running
    }

    /// Prompt tokens not yet computed, of all sequences.
    pub fn prompt_tokens_pending(&self) -> u64 {
        let left = self.sequences.values().map(|s| if s.left() > 1 || !s.running { s.left() } else { 0 });
        left.sum::<usize>() as u64
    }

    /// Puts a sequence at the end of its flow's queue.
    pub fn enqueue(&mut self, arrival: Arrival) -> Result<(), QueueFull> {
        debug_assert!(arrival.known_tokens > 0, "a prompt has at least one token");
        if self.waiting() >= self.limits.waiting_max {
            return Err(QueueFull { waiting: self.waiting() });
        }
        let key = (arrival.tenant, arrival.priority);
        let start = self.forget_idle_flows();
        let flow = self.flows.entry(key.clone()).or_default();
        if flow.is_idle() {
            flow.counter = flow.counter.max(start);
        }
        flow.waiting.push_back(arrival.id);
        let sequence = Sequence {
            flow: key,
            running: false,
            known: arrival.known_tokens,
            computed: 0,
            output: arrival.output_tokens,
            granted: arrival.granted_tokens,
            stops: arrival.stops,
        };
        let before = self.sequences.insert(arrival.id, sequence);
        debug_assert!(before.is_none(), "ids are unique");
        Ok(())
    }

    /// Moves waiting sequences into free slots. `has_room` takes memory for one, or says that there is none now; the
    /// first refusal ends the round, lest small sequences overtake a large one for ever.
    pub fn admit(&mut self, mut has_room: impl FnMut(SequenceId) -> bool) {
        while self.running < self.limits.slots {
            let by_age = self.admissions % AGE_TURN == AGE_TURN - 1;
            let heads = self.flows.iter().filter_map(|(key, flow)| {
                let head = *flow.waiting.front()?;
                Some((if by_age { 0 } else { flow.counter + flow.promised * key.1.cost() }, head))
            });
            let Some((_, id)) = heads.min() else { return };
            if !has_room(id) {
                return;
            }
            let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is known");
            let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
            flow.waiting.pop_front();
            flow.running += 1;
            flow.promised += sequence.left() as u64;
            sequence.running = true;
            self.running += 1;
            self.admissions += 1;
        }
    }

    /// An admitted sequence starts with its first `tokens` known from a cache: they are work for nobody. At least one token is
    /// left, because the next is sampled from it.
    pub fn restored(&mut self, id: SequenceId, tokens: usize) {
        let sequence = self.sequences.get_mut(&id).expect("an admitted sequence is known");
        debug_assert!(sequence.running && sequence.computed == 0 && tokens < sequence.known);
        sequence.computed = tokens;
        let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
        flow.promised -= tokens as u64;
    }

    /// Fills `batch` with the next step, and takes it for computed.
    pub fn schedule(&mut self, batch: &mut Vec<Work>) {
        batch.clear();
        self.candidates.clear();
        let mut budget = self.limits.step_tokens_max;
        for (&id, sequence) in self.sequences.iter_mut().filter(|(_, s)| s.running && s.allowed() > 0) {
            let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
            if sequence.left() == 1 {
                batch.push(take(id, sequence, flow, 1));
                budget -= 1;
            } else {
                self.candidates.push((flow.counter, id));
            }
        }
        self.candidates.sort_unstable();
        if self.prefills % AGE_TURN == AGE_TURN - 1
            && let Some(oldest) = (0..self.candidates.len()).min_by_key(|&at| self.candidates[at].1)
        {
            self.candidates[..=oldest].rotate_right(1);
        }
        self.prefills += u64::from(!self.candidates.is_empty());
        for (turn, &(_, id)) in self.candidates.iter().enumerate() {
            let sequence = self.sequences.get_mut(&id).expect("a candidate is known");
            let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
            let tokens = chunk(sequence, budget, self.limits.block_tokens, turn == 0);
            if tokens > 0 {
                batch.push(take(id, sequence, flow, tokens));
                budget -= tokens;
            }
        }
    }

    /// The last step sampled a token for `id`, and it goes on.
    pub fn sampled(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("a sampled sequence is known");
        debug_assert!(sequence.left() == 0 && sequence.output < sequence.granted);
        sequence.known += 1;
        sequence.output += 1;
        let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
        flow.promised += 1;
        flow.counter += OUTPUT_TOKEN_COST * sequence.flow.1.cost();
    }

    /// Raises what `id` may generate in total; a lower number than before changes nothing.
    pub fn grant(&mut self, id: SequenceId, output_tokens: u64) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.granted = sequence.granted.max(output_tokens);
        }
    }

    /// Whether `id` holds a slot and cannot go on without a grant.
    pub fn lacks_grant(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|s| s.running && s.left() > 0 && s.allowed() == 0)
    }

    /// Forgets a sequence, wherever it stands.
    pub fn remove(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
        if sequence.running {
            flow.running -= 1;
            flow.promised -= sequence.left() as u64;
            self.running -= 1;
        } else {
            flow.waiting.retain(|&waiting| waiting != id);
        }
    }

    /// Drops the counters that need no keeping, because a returning flow would start beyond them anyway. Answers with
    /// that start: the counter of the busy flow that is furthest behind.
    fn forget_idle_flows(&mut self) -> u64 {
        let busy = self.flows.values().filter(|flow| !flow.is_idle());
        let Some(start) = busy.map(|flow| flow.counter).min() else {
            self.flows.clear();
            return 0;
        };
        self.flows.retain(|_, flow| !flow.is_idle() || flow.counter > start);
        if self.flows.len() > IDLE_FLOWS_MAX + self.sequences.len() {
            self.flows.retain(|_, flow| !flow.is_idle());
        }
        start
    }
}

fn take(id: SequenceId, sequence: &mut Sequence, flow: &mut Flow, tokens: usize) -> Work {
    let work = Work { id, from: sequence.computed, tokens, samples: tokens == sequence.left() };
    sequence.computed += tokens;
    flow.promised -= tokens as u64;
    flow.counter += tokens as u64 * sequence.flow.1.cost();
    work
}

/// How many tokens of a prompt go into a step with `budget` left. Only the first in turn may end off the grid for want
/// of budget: it must get on, the others can wait for a whole block.
fn chunk(sequence: &Sequence, budget: usize, block: usize, first: bool) -> usize {
    let allowed = sequence.allowed().min(sequence.until_stop());
    if allowed <= budget {
        return allowed;
    }
    let end = sequence.computed + budget;
    let on_grid = end - end % block;
    if on_grid > sequence.computed {
        on_grid - sequence.computed
    } else if first {
        budget
    } else {
        0
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
