//! Who gets a slot, and who has to give one up?
//!
//! Sequences enter in the order of their flows' counters. When the first in order finds no room, a running one may be
//! *suspended*: its state moves out of the slot as it is, and moves back later. Who, for whom:
//!
//! - whoever yields (no grant for longer than the engine's patience) goes first, for anybody;
//! - for a flow that is *behind* (it could compute `preempt_lag_tokens` more and still be behind), a sequence of the
//!   flow furthest in front;
//! - for a higher priority, a sequence of a lower one whose flow is not behind.
//!
//! So priorities decide within the lag, fairness beyond it, and the two never undo each other. Nobody is suspended for
//! want of a grant alone, within `preempt_after_tokens` of entering, for its own flow, or in vain: only if the room
//! that its leaving makes suffices.

use super::{Entry, Flow, Place, Priority, Scheduler, SequenceId, flow::Virtual};
use std::cmp::Reverse;

/// The memory that sequences run in. The scheduler decides who enters and leaves; this knows whether they fit.
pub trait Room {
    /// Takes memory for a sequence that waited, or takes back a suspended one. Answers with the tokens that its state
    /// holds, or with `None` while there is no room.
    fn enter(&mut self, id: SequenceId) -> Option<usize>;

    /// Whether `id` could enter after the running sequences `leaving` were suspended, and those could be kept.
    fn could_enter(&self, id: SequenceId, leaving: &[SequenceId]) -> bool;

    /// Moves a running sequence's state out of its slot, to be kept until it enters again.
    fn suspend(&mut self, id: SequenceId);
}

/// The first in a flow's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Head {
    committed: Virtual,
    id: SequenceId,
    priority: Priority,
}

impl Scheduler {
    /// Moves sequences into slots, suspending others where that is due. The first in order that cannot enter ends the
    /// round, lest small sequences overtake a large one for ever; only a higher priority, in place of a lower one, still
    /// may.
    pub fn admit(&mut self, room: &mut impl Room) {
        self.clock.advance(self.flows.values_mut());
        while self.admit_one(room) {}
    }

    fn admit_one(&mut self, room: &mut impl Room) -> bool {
        let mut heads = std::mem::take(&mut self.heads);
        heads.clear();
        heads.extend(self.flows.iter().filter_map(|((_, priority), flow)| {
            let &(_, id) = flow.queue.first()?;
            Some(Head { committed: flow.committed(), id, priority: *priority })
        }));
        heads.sort_unstable();
        let mut blocked: Option<Priority> = None;
        let entered = heads.iter().any(|head| {
            let entered = match blocked {
                None => self.enter(head.id, room) || self.preempt_for(head, false, room),
                Some(priority) => head.priority > priority && self.preempt_for(head, true, room),
            };
            blocked = blocked.max(Some(head.priority));
            entered
        });
        self.heads = heads;
        entered
    }

    fn enter(&mut self, id: SequenceId, room: &mut impl Room) -> bool {
        if self.running >= self.limits.slots {
            return false;
        }
        let Some(held) = room.enter(id) else { return false };
        let sequence = self.sequences.get_mut(&id).expect("a queued sequence is known");
        let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
        flow.queue.remove(&(sequence.place.entry(), id));
        debug_assert!(held < sequence.known, "a token is left to compute");
        debug_assert!(sequence.place == Place::Waiting || held == sequence.computed, "restored as it was");
        sequence.computed = held;
        sequence.place = Place::Running;
        sequence.stint_tokens = 0;
        flow.running += 1;
        flow.promised += sequence.left() as u64;
        self.running += 1;
        true
    }

    /// Suspends whom it takes to let `head` enter, if that suffices.
    fn preempt_for(&mut self, head: &Head, overtaking: bool, room: &mut impl Room) -> bool {
        let Some(leaving) = self.victims(head, overtaking, room) else { return false };
        for &id in &leaving {
            room.suspend(id);
            self.leave(id);
            self.preemptions += 1;
        }
        self.enter(head.id, room)
    }

    /// As few as suffice, the most dispensable first; none if all of them would not.
    fn victims(&self, head: &Head, overtaking: bool, room: &impl Room) -> Option<Vec<SequenceId>> {
        let mut ranked: Vec<_> = self
            .sequences
            .iter()
            .filter(|(_, sequence)| sequence.place == Place::Running)
            .filter(|(_, sequence)| self.gives_way(sequence, head, overtaking))
            .map(|(&id, sequence)| {
                let flow = &self.flows[&sequence.flow];
                (!sequence.yields, sequence.flow.1, Reverse(flow.effective(&self.clock)), Reverse(id))
            })
            .collect();
        ranked.sort_unstable();
        let mut ranked = ranked.into_iter().map(|(.., Reverse(id))| id);
        // Who overtakes takes another's place, never the room that gathers for the one before it.
        let mut leaving = if overtaking { vec![ranked.next()?] } else { Vec::new() };
        while !room.could_enter(head.id, &leaving) {
            leaving.push(ranked.next()?);
        }
        // The last one made it fit; of those before it, some may not have been needed.
        for index in (0..leaving.len().saturating_sub(1)).rev() {
            let spared = leaving.remove(index);
            if !room.could_enter(head.id, &leaving) {
                leaving.insert(index, spared);
            }
        }
        Some(leaving)
    }

    fn gives_way(&self, victim: &super::Sequence, head: &Head, overtaking: bool) -> bool {
        let higher = head.priority > victim.flow.1;
        if victim.yields {
            return higher || !overtaking;
        }
        let waits = &self.flows[&self.sequences[&head.id].flow];
        let runs = &self.flows[&victim.flow];
        if std::ptr::eq(waits, runs) || victim.stint_tokens < self.limits.preempt_after_tokens {
            return false;
        }
        let (waits_at, runs_at) = (head.committed, runs.effective(&self.clock));
        let is_behind = |flow: &Flow, at: Virtual, other: Virtual| at + self.lag(flow) < other;
        higher && !is_behind(runs, runs_at, waits_at) || !overtaking && is_behind(waits, waits_at, runs_at)
    }

    fn lag(&self, flow: &Flow) -> Virtual {
        Virtual::from(self.limits.preempt_lag_tokens) * flow.token_cost
    }

    /// Takes a running sequence out of its slot; it queues for another as soon as it can use one.
    fn leave(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is known");
        let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
        if sequence.allowed() > 0 {
            flow.lift(&self.clock);
            flow.queue.insert((Entry::Return, id));
        }
        flow.running -= 1;
        flow.promised -= sequence.left() as u64;
        self.running -= 1;
        sequence.place = Place::Suspended;
        sequence.yields = false;
    }
}
