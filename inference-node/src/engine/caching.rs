//! The prefix cache in the life of a sequence: what it waits for, what it starts from, what it leaves.
//!
//! ```text
//! arrives --> is a longer prefix on its way?  yes: held, for a bounded time   (read from disk, or computed by another sequence)
//!             no, or it came:                 queued --> admitted: starts from the deepest checkpoint in memory
//! computes --> at each stop of its plan: a checkpoint         ends --> parked, where it stands
//! ```
//!
//! So of many sequences with one prompt that arrive together the first computes it, and the others start where it has come to.
//! A sequence is held only for one that is queued or runs, and that one is never held: nobody waits in a circle.

use super::{Engine, Sequence};
use crate::scheduler::{Arrival, QueueFull, SequenceId};
use crate::state::chain::{Chain, Key};
use crate::state::index::Place;
use crate::state::prefixes::PrefixCache;
use crate::state::{BLOCK_TOKENS, StateCache};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

pub(super) struct Caching {
    pub prefixes: PrefixCache,
    holds: BTreeMap<SequenceId, Hold>,
    /// Checkpoints that a queued or running sequence is going to make.
    planned: HashMap<Key, SequenceId>,
}

/// Why a sequence is not in the queue yet.
struct Hold {
    key: Key,
    until: Instant,
}

/// What a sequence has to do with the cache.
#[derive(Default)]
pub(super) struct Prefix {
    pub chain: Chain,
    /// Where it makes checkpoints, ascending.
    pub stops: Arc<[usize]>,
    /// Tokens that it did not have to compute.
    pub restored: usize,
    /// The deepest checkpoint that it made or started from.
    last: Option<Key>,
    /// The disk is asked once.
    asked_disk: bool,
}

impl Prefix {
    pub fn new(chain: Chain, stops: Vec<usize>) -> Prefix {
        Prefix { chain, stops: stops.into(), ..Prefix::default() }
    }
}

impl Caching {
    pub fn new(prefixes: PrefixCache) -> Caching {
        Caching { prefixes, holds: BTreeMap::new(), planned: HashMap::new() }
    }

    /// Sequences that are held: they count as waiting.
    pub fn held(&self) -> usize {
        self.holds.len()
    }

    /// When somebody has waited long enough.
    pub fn alarm(&self) -> Option<Instant> {
        self.holds.values().map(|hold| hold.until).min()
    }

    /// Puts the deepest checkpoint into a slot that was just acquired; answers with the tokens it stands for.
    pub fn start(&mut self, sequence: &mut Sequence, cache: &mut StateCache, now: Instant) -> usize {
        let slot = sequence.slot.as_ref().expect("an admitted sequence has a slot");
        let prefix = &mut sequence.prefix;
        // The last token is computed in any case: the next is sampled from its logits.
        let place = self.prefixes.deepest(&prefix.chain, &sequence.tokens, sequence.tokens.len() - 1);
        let Some(place) = place else { return 0 };
        assert!(place.position < sequence.tokens.len(), "a token is left to compute");
        let checkpoint = self.prefixes.get(place.key, now).expect("the index names what is in memory");
        cache.start_from(slot, &checkpoint);
        (prefix.restored, prefix.last) = (place.position, Some(place.key));
        sequence.computed = place.position;
        place.position
    }
}

impl Engine {
    /// What a new sequence has to do with the cache; `chain` names the blocks of its prompt, empty where nothing is cached.
    pub(super) fn prefix(&self, mut chain: Chain, tokens: &[u32]) -> Prefix {
        chain.extend(tokens);
        if chain.key(0).is_none() {
            return Prefix::default();
        }
        // Control tokens stand for no text; the end of a sequence may be an ordinary one.
        let is_control = |id| self.tokenizer.bytes(id).is_empty() || self.end_of_sequence.contains(&id);
        let stops = self.caching.prefixes.limits().placement.of(tokens, is_control);
        Prefix::new(chain, stops)
    }

    /// Queues a new sequence, or holds it for a checkpoint that is worth the wait.
    pub(super) fn place(&mut self, id: SequenceId) -> Result<(), QueueFull> {
        let waiting = self.scheduler.waiting() + self.caching.held();
        if waiting >= self.limits.waiting_max {
            return Err(QueueFull { waiting });
        }
        if self.hold(id, Instant::now() + self.caching.prefixes.limits().wait) {
            return Ok(());
        }
        self.queue(id)
    }

    /// Holds a sequence if a prefix longer than any in memory is to come. Whether it did.
    fn hold(&mut self, id: SequenceId, until: Instant) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        let Caching { prefixes, planned, holds } = &mut self.caching;
        let (prefix, tokens) = (&mut sequence.prefix, &sequence.tokens);
        let at_most = tokens.len() - 1;
        let in_memory = prefixes.deepest(&prefix.chain, tokens, at_most).map_or(0, |place| place.position);
        if !prefix.asked_disk
            && let Some(place) = prefixes.deepest_on_disk(&prefix.chain, tokens, in_memory, at_most)
            && prefixes.load(place)
        {
            prefix.asked_disk = true;
            holds.insert(id, Hold { key: place.key, until });
            return true;
        }
        let priority = sequence.priority;
        let blocks = (in_memory / BLOCK_TOKENS + 1..=at_most / BLOCK_TOKENS).rev();
        let mut keys = blocks.filter_map(|blocks| sequence.prefix.chain.key(blocks));
        let coming = keys.find_map(|key| Some((key, *planned.get(&key)?)));
        let Some((key, maker)) = coming else { return false };
        // Nobody waits for one that waits behind it.
        let is_ahead = self
            .sequences
            .get(&maker)
            .is_some_and(|maker| maker.slot.is_some() || maker.priority >= priority);
        if is_ahead {
            self.caching.holds.insert(id, Hold { key, until });
        }
        is_ahead
    }

    /// Hands a sequence to the scheduler, and announces the checkpoints that it will make.
    fn queue(&mut self, id: SequenceId) -> Result<(), QueueFull> {
        let sequence = &self.sequences[&id];
        self.scheduler.enqueue(Arrival {
            id,
            tenant: sequence.tenant.clone(),
            weight: sequence.tenant_weight,
            priority: sequence.priority,
            known_tokens: sequence.tokens.len(),
            output_tokens: sequence.output_tokens() as u64,
            granted_tokens: sequence.granted_tokens,
            stops: sequence.prefix.stops.clone(),
        })?;
        for &stop in sequence.prefix.stops.iter() {
            if let Some(key) = sequence.prefix.chain.key(stop / BLOCK_TOKENS) {
                self.caching.planned.entry(key).or_insert(id);
            }
        }
        Ok(())
    }

    /// Takes in what came from the disk, and lets go whoever has waited long enough.
    pub(super) fn release_held(&mut self, now: Instant) {
        for key in self.caching.prefixes.read_reports(now) {
            self.reconsider(|hold| hold.key == key);
        }
        if self.caching.alarm().is_some_and(|until| until <= now) {
            self.reconsider(|hold| hold.until <= now);
        }
    }

    /// Those that were held for something that came, or will not come: they queue, or wait for the next best thing.
    fn reconsider(&mut self, concerned: impl Fn(&Hold) -> bool) {
        let concerned = self.caching.holds.iter().filter(|(_, hold)| concerned(hold));
        let concerned: Vec<(SequenceId, Key, Instant)> =
            concerned.map(|(&id, hold)| (id, hold.key, hold.until)).collect();
        let now = Instant::now();
        for (id, key, until) in concerned {
            self.caching.holds.remove(&id);
            if until > now && self.hold(id, until) {
                continue;
            }
            if self.queue(id).is_err() {
                // It had a place among those that wait, and keeps it until the queue has room again.
                self.caching.holds.insert(id, Hold { key, until: now });
            }
        }
    }

    /// Lets admitted sequences start where a checkpoint stands.
    pub(super) fn restored(&mut self, admitted: Vec<(SequenceId, usize)>) {
        for (id, tokens) in admitted {
            let counter =
                if tokens > 0 { &self.odometer.cache_hits_total } else { &self.odometer.cache_misses_total };
            counter.fetch_add(1, Ordering::Relaxed);
            if tokens > 0 {
                self.odometer.cached_tokens_total.fetch_add(tokens as u64, Ordering::Relaxed);
                self.will_not_make(id, tokens);
            }
        }
    }

    /// After a step: copies the state of whoever has come to a stop.
    pub(super) fn keep_checkpoints(&mut self) {
        let now = Instant::now();
        let mut made = Vec::new();
        for work in &self.batch {
            let sequence = self.sequences.get_mut(&work.id).expect("a scheduled sequence is known");
            let position = work.from + work.tokens;
            let Sequence { prefix, tokens, slot, .. } = sequence;
            if prefix.stops.binary_search(&position).is_err() {
                continue;
            }
            let Some(place) = Place::of(&prefix.chain, tokens, position) else { continue };
            let slot = slot.as_ref().expect("a sequence that was computed has a slot");
            let cache = &mut self.cache;
            self.caching.prefixes.insert(place, prefix.last, now, || cache.checkpoint(slot, place.base));
            prefix.last = Some(place.key);
            made.push(place.key);
        }
        for key in made {
            self.caching.planned.remove(&key);
            self.reconsider(|hold| hold.key == key);
        }
    }

    /// A sequence ends: what it has computed is kept, the open block included, for whoever continues it.
    pub(super) fn park(&mut self, sequence: &mut Sequence) {
        let Sequence { prefix, tokens, slot: Some(slot), .. } = sequence else { return };
        let position = self.cache.position(slot);
        if position < BLOCK_TOKENS {
            return;
        }
        prefix.chain.extend(&tokens[..position]);
        let Some(place) = Place::of(&prefix.chain, tokens, position) else { return };
        let cache = &mut self.cache;
        self.caching.prefixes.park(place, prefix.last, Instant::now(), || cache.checkpoint(slot, place.base));
    }

    /// A sequence has left: nobody waits for it any more, nor it for anybody.
    pub(super) fn forget(&mut self, id: SequenceId, prefix: &Prefix) {
        self.caching.holds.remove(&id);
        self.withdraw(id, prefix.stops.iter().map(|stop| prefix.chain.key(stop / BLOCK_TOKENS)).collect());
    }

    /// It starts behind these stops.
    fn will_not_make(&mut self, id: SequenceId, up_to: usize) {
        let prefix = &self.sequences[&id].prefix;
        let passed = prefix.stops.iter().filter(|&&stop| stop <= up_to);
        let keys = passed.map(|stop| prefix.chain.key(stop / BLOCK_TOKENS)).collect();
        self.withdraw(id, keys);
    }

    fn withdraw(&mut self, id: SequenceId, keys: Vec<Option<Key>>) {
        for key in keys.into_iter().flatten() {
            if self.caching.planned.get(&key) == Some(&id) {
                self.caching.planned.remove(&key);
                self.reconsider(|hold| hold.key == key);
            }
        }
    }
}
