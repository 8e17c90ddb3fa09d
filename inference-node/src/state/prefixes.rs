//! The prefix cache: checkpoints in memory by the tokens they stand for, and the disk tier behind them.
//!
//! ```text
//! deepest(tokens) --> in memory: start_from it        insert --> memory --evicted--> disk (if there is one)
//!                 --> on disk: load, it comes later   park   --> memory and disk
//! ```
//!
//! Owned by the engine thread; nothing in here waits. What leaves first is worth least: tokens that it alone would save, over its
//! bytes and its age.

use super::StateShape;
use super::chain::{Chain, Identity, Key};
use super::checkpoint::{Checkpoint, Segment};
use super::disk::{Disk, DiskLimits, Flusher, FolderError, News, Report, Store};
use super::index::{Index, Place};
use super::placement::Placement;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Debug, Clone)]
pub struct PrefixLimits {
    /// Bytes of checkpoints in memory, those that wait to be written included; 0 turns caching off.
    pub ram_bytes: u64,
    /// `None`: memory only.
    pub disk: Option<DiskLimits>,
    pub placement: Placement,
    /// How long a sequence waits for a checkpoint that another is about to make, or that is read from disk.
    pub wait: Duration,
}

/// How things stand, and what happened since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixStats {
    pub ram_bytes: u64,
    pub disk_bytes: u64,
    /// Checkpoints that left memory for want of room.
    pub evictions: u64,
}

pub(crate) struct PrefixCache {
    limits: PrefixLimits,
    entries: HashMap<Key, Entry>,
    index: Index,
    disk: Option<DiskTier>,
    stats: PrefixStats,
}

struct Entry {
    place: Place,
    checkpoint: Arc<Checkpoint>,
    /// The checkpoint before it in its sequence.
    parent: Option<Key>,
    used: Instant,
}

/// The engine's view of the disk.
struct DiskTier {
    disk: Disk,
    index: Index,
    stored: HashSet<Key>,
    /// Ordered and not yet answered.
    loading: HashSet<Key>,
    storing: HashMap<Key, u64>,
    storing_bytes: u64,
}

/// Evictions make a little more room than was needed, so that not each insertion has to rank all entries.
const SPARE: u64 = 32;
/// The part of memory that may wait to be written.
const WRITING: u64 = 8;

/// What a checkpoint is worth. Only the order of two values means something.
pub(crate) fn value(saved_tokens: usize, age: Duration, bytes: u64) -> f64 {
    saved_tokens as f64 / ((1.0 + age.as_secs_f64()) * bytes.max(1) as f64)
}

impl PrefixCache {
    pub fn start(
        limits: PrefixLimits,
        identity: Identity,
        shape: StateShape,
    ) -> Result<PrefixCache, FolderError> {
        let mut stats = PrefixStats::default();
        let disk = match limits.disk.as_ref().filter(|_| limits.ram_bytes > 0) {
            None => None,
            Some(disk_limits) => {
                let (disk, places, bytes) = Disk::start(disk_limits, identity, shape)?;
                stats.disk_bytes = bytes;
                Some(DiskTier::new(disk, places))
            }
        };
        Ok(PrefixCache { limits, entries: HashMap::new(), index: Index::default(), disk, stats })
    }

    pub fn limits(&self) -> &PrefixLimits {
        &self.limits
    }

    pub fn stats(&self) -> PrefixStats {
        self.stats
    }

    /// The calling thread is unparked when the disk has news.
    pub fn wake_me(&self) {
        self.disk.iter().for_each(|tier| tier.disk.wake_me());
    }

    pub fn flusher(&self) -> Flusher {
        Disk::flusher(self.disk.as_ref().map(|tier| &tier.disk))
    }

    /// The deepest checkpoint in memory of at most `at_most` of these tokens.
    pub fn deepest(&self, chain: &Chain, tokens: &[u32], at_most: usize) -> Option<Place> {
        self.index.deepest(chain, tokens, 0, at_most)
    }

    pub fn get(&mut self, key: Key, now: Instant) -> Option<Arc<Checkpoint>> {
        let entry = self.entries.get_mut(&key)?;
        entry.used = now;
        Some(entry.checkpoint.clone())
    }

    /// Keeps what `make` copies, unless it is there already.
    pub fn insert(
        &mut self,
        place: Place,
        parent: Option<Key>,
        now: Instant,
        make: impl FnOnce() -> Checkpoint,
    ) {
        if self.get(place.key, now).is_none() {
            self.keep(place, Arc::new(make()), parent, now);
        }
    }

    /// As [`PrefixCache::insert`], and onto the disk: the sequence has ended, and may go on after a restart.
    pub fn park(
        &mut self,
        place: Place,
        parent: Option<Key>,
        now: Instant,
        make: impl FnOnce() -> Checkpoint,
    ) {
        let checkpoint = self.get(place.key, now).unwrap_or_else(|| Arc::new(make()));
        self.store(place, parent, checkpoint.clone());
        self.keep(place, checkpoint, parent, now);
    }

    /// The deepest checkpoint on disk of more than `above` and at most `at_most` of these tokens.
    pub fn deepest_on_disk(
        &self,
        chain: &Chain,
        tokens: &[u32],
        above: usize,
        at_most: usize,
    ) -> Option<Place> {
        self.disk.as_ref()?.index.deepest(chain, tokens, above, at_most)
    }

    /// Asks for a checkpoint on disk; whether it, or word that it cannot be had, will come.
    pub fn load(&mut self, place: Place) -> bool {
        let Some(tier) = &mut self.disk else { return false };
        if tier.loading.contains(&place.key) {
            return true;
        }
        let ordered = tier.disk.load(place);
        if ordered {
            tier.loading.insert(place.key);
        }
        ordered
    }

    /// Takes in what the disk has done. Answers with the keys whose loading has ended, one way or the other.
    pub fn read_reports(&mut self, now: Instant) -> Vec<Key> {
        let mut loaded = Vec::new();
        while let Some(report) = self.disk.as_ref().and_then(|tier| tier.disk.report()) {
            let Report { news, gone, bytes } = report;
            self.stats.disk_bytes = bytes;
            let tier = self.disk.as_mut().expect("a report came from it");
            match news {
                News::Stored(place) => {
                    tier.finished(place.key);
                    tier.stored.insert(place.key);
                    tier.index.insert(place);
                }
                News::NotStored(place) => tier.finished(place.key),
                News::NotLoaded(place) => {
                    tier.loading.remove(&place.key);
                    tier.forget(place);
                    loaded.push(place.key);
                }
                News::Loaded(place, checkpoint) => {
                    tier.loading.remove(&place.key);
                    loaded.push(place.key);
                    self.keep(place, Arc::new(checkpoint), None, now);
                }
            }
            if let Some(tier) = &mut self.disk {
                gone.into_iter().for_each(|place| tier.forget(place));
            }
        }
        loaded
    }

    fn keep(&mut self, place: Place, checkpoint: Arc<Checkpoint>, parent: Option<Key>, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&place.key) {
            entry.used = now;
            return;
        }
        let bytes = checkpoint.state_bytes() + Segment::hold(checkpoint.pages.as_ref());
        if bytes > self.ram_bytes_max() {
            Segment::let_go(checkpoint.pages.as_ref());
            return;
        }
        self.stats.ram_bytes += bytes;
        self.index.insert(place);
        self.entries.insert(place.key, Entry { place, checkpoint, parent, used: now });
        self.make_room(now);
    }

    fn ram_bytes_max(&self) -> u64 {
        self.limits.ram_bytes - if self.disk.is_some() { self.limits.ram_bytes / WRITING } else { 0 }
    }

    fn make_room(&mut self, now: Instant) {
        let bytes_max = self.ram_bytes_max();
        if self.stats.ram_bytes <= bytes_max {
            return;
        }
        let mut ranked: Vec<(f64, Key)> =
            self.entries.iter().map(|(&key, entry)| (self.value(entry, now), key)).collect();
        ranked.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        for (_, key) in ranked {
            if self.stats.ram_bytes <= bytes_max - bytes_max / SPARE {
                return;
            }
            self.evict(key);
        }
    }

    fn value(&self, entry: &Entry, now: Instant) -> f64 {
        let before = entry.parent.and_then(|parent| self.entries.get(&parent));
        let saved = entry.place.position - before.map_or(0, |entry| entry.place.position);
        let pages = entry.checkpoint.pages.as_ref().filter(|pages| pages.has_one_holder());
        let bytes = entry.checkpoint.state_bytes() + pages.map_or(0, |pages| pages.bytes());
        value(saved, now.saturating_duration_since(entry.used), bytes)
    }

    fn evict(&mut self, key: Key) {
        let entry = self.entries.remove(&key).expect("what is evicted was ranked");
        self.index.remove(entry.place);
        self.stats.ram_bytes -=
            entry.checkpoint.state_bytes() + Segment::let_go(entry.checkpoint.pages.as_ref());
        self.stats.evictions += 1;
        self.store(entry.place, entry.parent, entry.checkpoint);
    }

    /// Orders it to be written, unless it is on disk already or more waits to be written than memory may hold.
    fn store(&mut self, place: Place, parent: Option<Key>, checkpoint: Arc<Checkpoint>) {
        let Some(tier) = &mut self.disk else { return };
        if tier.stored.contains(&place.key) || tier.storing.contains_key(&place.key) {
            return;
        }
        let pages: u64 = Segment::chain_of(checkpoint.pages.as_ref())
            .take_while(|segment| !tier.stored.contains(&segment.key))
            .map(|segment| segment.bytes())
            .sum();
        let bytes = checkpoint.state_bytes() + pages;
        let has_room = tier.storing_bytes + bytes <= self.limits.ram_bytes / WRITING;
        if (has_room || tier.storing.is_empty()) && tier.disk.store(Store { place, parent, checkpoint }) {
            tier.storing.insert(place.key, bytes);
            tier.storing_bytes += bytes;
        }
    }
}

impl DiskTier {
    fn new(disk: Disk, places: Vec<Place>) -> DiskTier {
        let mut index = Index::default();
        let stored = places.iter().map(|place| place.key).collect();
        places.into_iter().for_each(|place| index.insert(place));
        let (loading, storing) = (HashSet::new(), HashMap::new());
        DiskTier { disk, index, stored, loading, storing, storing_bytes: 0 }
    }

    fn finished(&mut self, key: Key) {
        self.storing_bytes -= self.storing.remove(&key).unwrap_or(0);
    }

    fn forget(&mut self, place: Place) {
        self.index.remove(place);
        self.stored.remove(&place.key);
    }
}

#[cfg(test)]
#[path = "prefixes_tests.rs"]
mod tests;
