//! Who is behind? Weighted virtual token counters (arXiv 2401.00588), and the clock at which newcomers start.
//!
//! A flow's counter is its *virtual time*: tokens computed for it, divided by its weight. The one that is behind goes
//! first, so flows that always want something advance together, and each gets tokens in proportion to its weight.
//!
//! ```text
//!   virtual time -->     A |=======>            in front: goes last
//!                        B |====>               behind: goes first
//!                    clock |------>             share-weighted mean of A and B: where C starts
//! ```
//!
//! Where a newcomer starts decides everything: too early, and endless newcomers hold the old ones back for ever; too
//! late, and the old ones hold back the newcomer. The clock advances by the service given to the flows that want more,
//! divided by the sum of their shares, which is how fast those flows advance on the average; and it stays between the
//! one furthest behind and the one furthest in front. So whoever waits is passed by the clock after a bounded service,
//! and from then on no newcomer can get before it.

use super::{Priority, SequenceId};
use std::collections::BTreeSet;

/// Service in proportion to weight. Wide enough never to overflow: 2^80 tokens of the most expensive kind.
pub(super) type Virtual = u128;

/// Virtual time of one token of a flow of weight 1 at the highest priority, so that heavier ones cost whole numbers.
const TOKEN: Virtual = 1 << 20;
/// A flow's share is this over what its tokens cost.
const SHARE: Virtual = 1 << 64;

#[derive(Default)]
pub(super) struct Flow {
    pub counter: Virtual,
    /// Virtual time of one token.
    pub token_cost: Virtual,
    /// Those without a slot that could use one, in the order in which they get it.
    pub queue: BTreeSet<(Entry, SequenceId)>,
    pub running: usize,
    /// All of its sequences, wherever they stand.
    pub members: usize,
    /// Known tokens of its running sequences that are not computed: work it was promised by admission.
    pub promised: u64,
    /// Whether it was backlogged when the clock last advanced.
    moves_clock: bool,
}

/// Who was suspended goes before who never ran: it waits longer, and holds memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Entry {
    Return,
    First,
}

impl Flow {
    pub fn set_weight(&mut self, priority: Priority, weight: u32) {
        self.token_cost = (priority.cost() * TOKEN / Virtual::from(weight.max(1))).max(1);
    }

    pub fn is_idle(&self) -> bool {
        self.members == 0
    }

    /// Whether it wants more than it gets: somebody waits for a slot or computes a prompt. Decoding gets all it can use.
    pub fn is_backlogged(&self) -> bool {
        !self.queue.is_empty() || self.promised > self.running as u64
    }

    /// Its counter once what was promised is computed.
    pub fn committed(&self) -> Virtual {
        self.counter + Virtual::from(self.promised) * self.token_cost
    }

    /// A flow that begins to want more has earned no credit while it did not.
    pub fn lift(&mut self, clock: &Clock) {
        self.counter = self.effective(clock);
    }

    pub fn effective(&self, clock: &Clock) -> Virtual {
        if self.is_backlogged() { self.counter } else { self.counter.max(clock.now) }
    }

    pub fn charge(&mut self, clock: &mut Clock, tokens: u64) {
        self.counter += Virtual::from(tokens) * self.token_cost;
        if self.moves_clock {
            clock.service += Virtual::from(tokens);
        }
    }
}

#[derive(Default)]
pub(super) struct Clock {
    pub now: Virtual,
    /// Tokens computed for backlogged flows since it last advanced.
    service: Virtual,
}

impl Clock {
    /// Once a step, between batches.
    pub fn advance<'a>(&mut self, flows: impl Iterator<Item = &'a mut Flow>) {
        let service = std::mem::take(&mut self.service);
        let (mut shares, mut present) = (0, 0);
        let mut range: Option<(Virtual, Virtual)> = None;
        for flow in flows {
            flow.moves_clock = flow.is_backlogged();
            if flow.moves_clock {
                shares += SHARE / flow.token_cost;
                let (behind, ahead) = range.unwrap_or((flow.counter, flow.counter));
                range = Some((behind.min(flow.counter), ahead.max(flow.counter)));
            } else if !flow.is_idle() {
                present = present.max(flow.counter);
            }
        }
        self.now = match range {
            Some((behind, ahead)) => (self.now + service * SHARE / shares).clamp(behind, ahead),
            // Nobody goes short of what the others use: it is nobody's debt.
            None => self.now.max(present),
        };
    }
}
