//! The scheduler's view of the state cache: who fits, who enters, who leaves.

use super::caching::Caching;
use super::sequence::Sequence;
use crate::scheduler::{Room, SequenceId};
use crate::state::{Slot, StateCache};
use std::collections::BTreeMap;
use std::time::Instant;

pub(super) struct CacheRoom<'a> {
    pub sequences: &'a mut BTreeMap<SequenceId, Sequence>,
    pub cache: &'a mut StateCache,
    pub caching: &'a mut Caching,
    /// Who came in for the first time, and the tokens it started from.
    pub admitted: Vec<(SequenceId, usize)>,
}

impl Room for CacheRoom<'_> {
    fn enter(&mut self, id: SequenceId) -> Option<usize> {
        let sequence = self.sequences.get_mut(&id).expect("a queued sequence is known");
        let slot = match sequence.suspended.take() {
            None => {
                sequence.slot = Some(self.cache.acquire(sequence.tokens_max())?);
                let held = self.caching.start(sequence, self.cache, Instant::now());
                self.admitted.push((id, held));
                return Some(held);
            }
            Some(suspended) => match self.cache.restore(suspended) {
                Ok(slot) => slot,
                Err(suspended) => {
                    sequence.suspended = Some(suspended);
                    return None;
                }
            },
        };
        let held = self.cache.position(&slot);
        sequence.slot = Some(slot);
        Some(held)
    }

    fn could_enter(&self, id: SequenceId, leaving: &[SequenceId]) -> bool {
        let slot_of = |id: &SequenceId| -> &Slot {
            self.sequences[id].slot.as_ref().expect("only a running sequence can leave")
        };
        let leaving: Vec<&Slot> = leaving.iter().map(slot_of).collect();
        let sequence = &self.sequences[&id];
        match &sequence.suspended {
            None => self.cache.could_acquire(sequence.tokens_max(), &leaving),
            Some(suspended) => self.cache.could_restore(suspended, &leaving),
        }
    }

    fn suspend(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is known");
        let slot = sequence.slot.take().expect("a running sequence has a slot");
        sequence.suspended = Some(self.cache.suspend(slot));
    }
}
