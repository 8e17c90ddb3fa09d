//! What a sequence remembers: lightning states and softmax pages, on one fixed grid of blocks.
//!
//! ```text
//! position   0 ........ 63 | 64 ....... 127 | 128 .. 150
//! lightning  folded into one state per head | open block: k, v of 128..=150
//! softmax    page 0        | page 1         | page 2 (filling)
//! ```
//!
//! The grid starts at position 0 and never moves, so a token's result does not depend on how its prompt was cut. The cache owns the
//! memory of every sequence; a forward pass borrows it by taking the [`Sequence`] out of its slot and putting it back.
//!
//! What one sequence computed another may continue from: a [`checkpoint`] is a copy of what changes and references to the pages
//! that are full. [`prefixes`] keeps checkpoints by the tokens they stand for ([`chain`]), [`disk`] those that memory has no room for.

pub mod chain;
pub(crate) mod checkpoint;
pub mod disk;
pub(crate) mod index;
pub mod placement;
pub mod prefixes;

use self::chain::Key;
use self::checkpoint::{Checkpoint, Segment};
use crate::config::{LayerKind, ModelConfig};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Tokens of one block of the grid. Independent of the block a checkpoint was trained with: the recurrence is exact for any.
pub const BLOCK_TOKENS: usize = 64;

#[derive(Clone, Copy, Debug)]
pub struct CacheLimits {
    /// Sequences that may hold state at a time.
    pub slots: usize,
    /// Tokens of softmax keys and values over all slots, rounded up to whole pages a sequence. A model without softmax layers
    /// keeps none, so that this does not limit it.
    pub tokens: usize,
}

/// The right to one sequence's state. Give it back with [`StateCache::release`].
#[must_use = "a slot that is dropped is lost to the cache: release it"]
#[derive(Debug)]
pub struct Slot {
    index: usize,
}

/// A sequence's state out of its slot. Give it back with [`StateCache::restore`] or [`StateCache::discard`].
#[must_use = "what is dropped stays counted as suspended: discard it"]
pub struct Suspended {
    sequence: Sequence,
    pages_reserved: usize,
    bytes: u64,
}

/// State of all sequences, bounded by [`CacheLimits`]; memory is taken when a slot or page is first used and kept for reuse.
pub struct StateCache {
    shape: StateShape,
    limits: CacheLimits,
    slots: Vec<SlotState>,
    free_slots: Vec<usize>,
    free_pages: Vec<Page>,
    pages_reserved: usize,
    /// Pages that sequences hold, shared ones counted for each.
    pages_held: usize,
    suspended_bytes: u64,
    suspended_bytes_max: u64,
}

/// What one sequence needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StateShape {
    linear_layers: usize,
    softmax_layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

#[derive(Default)]
struct SlotState {
    pages_reserved: usize,
    sequence: Option<Sequence>,
}

/// The state of one sequence, owned by whoever advances it.
pub(crate) struct Sequence {
    pub position: usize,
    /// One a lightning layer, in layer order.
    pub linear: Vec<LightningState>,
    /// One a block of the grid, up to the block that `position` is in.
    pub pages: Vec<Page>,
    /// The first of `pages`, as far as a checkpoint has named them.
    pub base: Option<Arc<Segment>>,
}

/// A lightning layer's memory. All heads, head-major.
pub struct LightningState {
    /// `[heads, d_k, d_v]` f32, d_v fastest: the recurrence at the start of the open block. A block is folded in by the pass that
    /// computes its last token, so on the grid this is all there is to know.
    pub state: Vec<f32>,
    /// `[heads, d_k, BLOCK_TOKENS]` f32: keys of the open block, transposed.
    pub keys: Vec<f32>,
    /// `[heads, BLOCK_TOKENS, d_v]` f32: values of the open block.
    pub values: Vec<f32>,
}

/// Keys and values of one block of tokens in every softmax layer:
/// `[softmax layers, kv_heads, {keys [d, BLOCK_TOKENS], values [BLOCK_TOKENS, d]}]` f32. Shared by reference once it is full.
#[derive(Clone)]
pub struct Page(pub PageFloats);

/// A slice of f32 to whoever reads or writes. Writing to a page that others hold would first make a copy; no pass does, because
/// the page it fills is its own.
#[derive(Clone)]
pub struct PageFloats(Arc<Vec<f32>>);

impl Page {
    pub fn zeroed(floats: usize) -> Page {
        Page::of(vec![0.0; floats])
    }

    pub fn of(floats: Vec<f32>) -> Page {
        Page(PageFloats(Arc::new(floats)))
    }

    pub fn bytes(&self) -> u64 {
        size_of_val(&self.0[..]) as u64
    }

    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0.0) > 1
    }
}

impl Deref for PageFloats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for PageFloats {
    fn deref_mut(&mut self) -> &mut [f32] {
        Arc::make_mut(&mut self.0).as_mut_slice()
    }
}

impl std::fmt::Debug for Suspended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Suspended {{ position: {}, bytes: {} }}", self.sequence.position, self.bytes)
    }
}

impl StateCache {
    pub fn new(config: &ModelConfig, limits: CacheLimits) -> StateCache {
        StateCache {
            shape: StateShape::new(config),
            limits,
            slots: Vec::new(),
            free_slots: Vec::new(),
            free_pages: Vec::new(),
            pages_reserved: 0,
            pages_held: 0,
            suspended_bytes: 0,
            suspended_bytes_max: 0,
        }
    }

    /// Lets suspended sequences hold memory beside that of the slots; without it nobody can be suspended.
    pub fn with_suspended_bytes_max(self, suspended_bytes_max: u64) -> StateCache {
        StateCache { suspended_bytes_max, ..self }
    }

    /// Room for a sequence of up to `tokens_max` tokens, or `None` while there is none.
    pub fn acquire(&mut self, tokens_max: usize) -> Option<Slot> {
        let index = self.reserve(self.shape.pages_for(tokens_max))?;
        match &mut self.slots[index].sequence {
            Some(sequence) => sequence.clear(),
            empty => *empty = Some(Sequence::new(self.shape)),
        }
        Some(Slot { index })
    }

    fn reserve(&mut self, pages: usize) -> Option<usize> {
        if self.pages_reserved + pages > self.pages_max() {
            return None;
        }
        let index = match self.free_slots.pop() {
            Some(index) => index,
            None if self.slots.len() < self.limits.slots => {
                self.slots.push(SlotState::default());
                self.slots.len() - 1
            }
            None => return None,
        };
        self.pages_reserved += pages;
        self.slots[index].pages_reserved = pages;
        Some(index)
    }

    /// Moves a sequence's state out, so that its slot and pages are free for others. Nothing is copied.
    pub fn suspend(&mut self, slot: Slot) -> Suspended {
        let bytes = self.held_bytes(&slot);
        let state = &mut self.slots[slot.index];
        let pages_reserved = std::mem::take(&mut state.pages_reserved);
        let sequence = state.sequence.take().expect("a slot is suspended between forward passes");
        self.pages_held -= sequence.pages.len();
        self.pages_reserved -= pages_reserved;
        self.suspended_bytes += bytes;
        self.free_slots.push(slot.index);
        Suspended { sequence, pages_reserved, bytes }
    }

    /// Moves the state back into a slot, with the room it had; gives it back while there is none.
    pub fn restore(&mut self, suspended: Suspended) -> Result<Slot, Suspended> {
        let Some(index) = self.reserve(suspended.pages_reserved) else { return Err(suspended) };
        self.suspended_bytes -= suspended.bytes;
        self.pages_held += suspended.sequence.pages.len();
        self.slots[index].sequence = Some(suspended.sequence);
        // Its pages come on top of those made while it was away.
        self.trim();
        Ok(Slot { index })
    }

    pub fn discard(&mut self, suspended: Suspended) {
        self.suspended_bytes -= suspended.bytes;
    }

    /// Whether a new sequence of `tokens_max` could enter, once those in `leaving` were suspended.
    pub fn could_acquire(&self, tokens_max: usize, leaving: &[&Slot]) -> bool {
        self.could_reserve(self.shape.pages_for(tokens_max), 0, leaving)
    }

    /// Whether `suspended` could enter, once those in `leaving` were suspended instead.
    pub fn could_restore(&self, suspended: &Suspended, leaving: &[&Slot]) -> bool {
        self.could_reserve(suspended.pages_reserved, suspended.bytes, leaving)
    }

    fn could_reserve(&self, pages: usize, bytes_returned: u64, leaving: &[&Slot]) -> bool {
        let taken_slots = self.slots.len() - self.free_slots.len() - leaving.len();
        let pages_left: usize = leaving.iter().map(|slot| self.slots[slot.index].pages_reserved).sum();
        let bytes_left: u64 = leaving.iter().map(|slot| self.held_bytes(slot)).sum();
        taken_slots < self.limits.slots
            && self.pages_reserved - pages_left + pages <= self.pages_max()
            && self.suspended_bytes - bytes_returned + bytes_left <= self.suspended_bytes_max
    }

    fn held_bytes(&self, slot: &Slot) -> u64 {
        let sequence = self.slots[slot.index].sequence.as_ref();
        let pages = sequence.expect("a slot is read between forward passes").pages.len();
        self.shape.sequence_bytes() + (pages * BLOCK_TOKENS) as u64 * self.shape.token_bytes()
    }

    pub fn release(&mut self, slot: Slot) {
        let state = &mut self.slots[slot.index];
        self.pages_reserved -= std::mem::take(&mut state.pages_reserved);
        let sequence = state.sequence.as_mut().expect("a slot is released between forward passes");
        sequence.base = None;
        self.pages_held -= sequence.pages.len();
        // Those that checkpoints share live on there.
        self.free_pages.extend(sequence.pages.drain(..).filter(|page| !page.is_shared()));
        self.free_slots.push(slot.index);
        self.trim();
    }

    /// Tokens already in the state.
    pub fn position(&self, slot: &Slot) -> usize {
        self.slots[slot.index].sequence.as_ref().expect("a slot is read between forward passes").position
    }

    /// Copies what changes of a sequence's memory and shares its full pages. `key` names its whole blocks.
    pub(crate) fn checkpoint(&mut self, slot: &Slot, key: Key) -> Checkpoint {
        let sequence =
            self.slots[slot.index].sequence.as_mut().expect("a slot is read between forward passes");
        let named = sequence.base.as_ref().map_or(0, |base| base.blocks.end);
        let blocks = (sequence.position / BLOCK_TOKENS).min(sequence.pages.len());
        if named < blocks {
            let pages = sequence.pages[named..blocks].to_vec();
            sequence.base = Some(Segment::new(key, named..blocks, pages, sequence.base.take()));
        }
        Checkpoint::of(sequence, &self.shape, sequence.base.clone())
    }

    /// Lets a sequence that has computed nothing start where a checkpoint stands, within the tokens it was acquired for.
    pub(crate) fn start_from(&mut self, slot: &Slot, checkpoint: &Checkpoint) {
        let state = &mut self.slots[slot.index];
        let sequence = state.sequence.as_mut().expect("a slot is written between forward passes");
        assert!(sequence.position == 0 && sequence.pages.is_empty(), "a sequence starts once");
        assert!(
            self.shape.pages_for(checkpoint.position) <= state.pages_reserved,
            "a sequence stays within the tokens it was acquired for"
        );
        let (free_pages, floats) = (&mut self.free_pages, self.shape.page_floats());
        checkpoint
            .write_to(sequence, &self.shape, || free_pages.pop().unwrap_or_else(|| Page::zeroed(floats)));
        sequence.base = checkpoint.pages.clone();
        self.pages_held += sequence.pages.len();
        self.trim();
    }

    /// Bytes of all sequences' memory, that kept for reuse included. At most what the limits imply, whatever was shared.
    pub fn bytes(&self) -> u64 {
        let pages = (self.pages_held + self.free_pages.len()) * self.shape.page_floats() * size_of::<f32>();
        self.slots.len() as u64 * self.shape.sequence_bytes() + pages as u64
    }

    pub(crate) fn shape(&self) -> StateShape {
        self.shape
    }

    /// Whether [`StateCache::acquire`] could ever succeed, with the cache empty.
    pub fn fits(&self, tokens_max: usize) -> bool {
        self.limits.slots > 0 && self.shape.pages_for(tokens_max) <= self.pages_max()
    }

    /// Hands the sequence to a forward pass, with pages for `tokens` more tokens.
    pub(crate) fn take(&mut self, slot: &Slot, tokens: usize) -> Sequence {
        let state = &mut self.slots[slot.index];
        let mut sequence = state.sequence.take().expect("a slot is in at most one span of a forward pass");
        let pages = self.shape.pages_for(sequence.position + tokens);
        assert!(pages <= state.pages_reserved, "a sequence stays within the tokens it was acquired for");
        while sequence.pages.len() < pages {
            let page = self.free_pages.pop().unwrap_or_else(|| Page::zeroed(self.shape.page_floats()));
            sequence.pages.push(page);
            self.pages_held += 1;
        }
        sequence
    }

    pub(crate) fn put(&mut self, slot: &Slot, sequence: Sequence) {
        self.slots[slot.index].sequence = Some(sequence);
    }

    fn pages_max(&self) -> usize {
        self.limits.tokens.div_ceil(BLOCK_TOKENS)
    }

    /// Pages that came from a checkpoint may leave more behind than there is room for.
    fn trim(&mut self) {
        self.free_pages.truncate(self.pages_max().saturating_sub(self.pages_held));
    }
}

impl Sequence {
    fn new(shape: StateShape) -> Sequence {
        let lightning = || LightningState {
            state: vec![0.0; shape.heads * shape.head_dim * shape.head_dim],
            keys: vec![0.0; shape.heads * shape.head_dim * BLOCK_TOKENS],
            values: vec![0.0; shape.heads * shape.head_dim * BLOCK_TOKENS],
        };
        let linear = (0..shape.linear_layers).map(|_| lightning()).collect();
        Sequence { position: 0, linear, pages: Vec::new(), base: None }
    }

    /// Back to position 0. Keys, values and pages hold stale numbers that no token before `position` reads.
    fn clear(&mut self) {
        self.position = 0;
        self.linear.iter_mut().for_each(|layer| layer.state.fill(0.0));
    }
}

impl StateShape {
    pub fn new(config: &ModelConfig) -> StateShape {
        StateShape {
            linear_layers: config.layers_of(LayerKind::Linear),
            softmax_layers: config.layers_of(LayerKind::Softmax),
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        }
    }

    /// Bytes that a sequence holds whatever its length.
    pub fn sequence_bytes(&self) -> u64 {
        let floats = self.heads * self.head_dim * (self.head_dim + 2 * BLOCK_TOKENS);
        (self.linear_layers * floats * size_of::<f32>()) as u64
    }

    pub fn token_bytes(&self) -> u64 {
        (self.page_floats() / BLOCK_TOKENS * size_of::<f32>()) as u64
    }

    pub fn page_floats(&self) -> usize {
        self.softmax_layers * self.kv_heads * 2 * self.head_dim * BLOCK_TOKENS
    }

    /// None for a model without softmax layers: a sequence of it holds as much at any length.
    fn pages_for(&self, tokens: usize) -> usize {
        if self.softmax_layers == 0 { 0 } else { tokens.div_ceil(BLOCK_TOKENS) }
    }

    /// Floats of [`Checkpoint::state`]: lightning states, and the open block of every layer.
    pub fn checkpoint_floats(&self, position: usize) -> usize {
        let open = 2 * self.head_dim * (position % BLOCK_TOKENS);
        let lightning = self.linear_layers * self.heads * (self.head_dim * self.head_dim + open);
        lightning + self.softmax_layers * self.kv_heads * open
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const CONFIG: &[u8] = br#"{"model_type": "minimax", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
        "rope_theta": 10000.0, "max_position_embeddings": 10240}"#;

    pub fn shape() -> StateShape {
        StateShape::new(&ModelConfig::parse(CONFIG).expect("valid"))
    }

    fn cache(slots: usize, tokens: usize) -> StateCache {
        StateCache::new(&ModelConfig::parse(CONFIG).expect("valid"), CacheLimits { slots, tokens })
    }

    #[test]
    fn slots_and_pages_are_bounded_and_come_back() {
        let mut cache = cache(2, 4 * BLOCK_TOKENS);
        assert!(cache.fits(4 * BLOCK_TOKENS) && !cache.fits(4 * BLOCK_TOKENS + 1));
        let first = cache.acquire(2 * BLOCK_TOKENS + 1).expect("three pages of four");
        assert!(cache.acquire(BLOCK_TOKENS + 1).is_none(), "one page is left");
        let second = cache.acquire(BLOCK_TOKENS).expect("one page");
        assert!(cache.acquire(0).is_none(), "both slots are taken");
        cache.release(first);
        let third = cache.acquire(3 * BLOCK_TOKENS).expect("the first one's room");
        cache.release(second);
        cache.release(third);
    }

    #[test]
    fn pages_are_taken_when_entered_and_reused() {
        let mut cache = cache(1, 4 * BLOCK_TOKENS);
        let slot = cache.acquire(4 * BLOCK_TOKENS).expect("room");
        let mut sequence = cache.take(&slot, BLOCK_TOKENS + 1);
        assert_eq!(sequence.pages.len(), 2);
        sequence.position = BLOCK_TOKENS + 1;
        sequence.linear[0].state[0] = 1.0;
        cache.put(&slot, sequence);
        assert_eq!(cache.position(&slot), BLOCK_TOKENS + 1);
        cache.release(slot);
        assert_eq!(cache.free_pages.len(), 2);
        let slot = cache.acquire(1).expect("room");
        assert_eq!(cache.position(&slot), 0);
        let sequence = cache.take(&slot, 1);
        assert!(sequence.linear[0].state.iter().all(|&x| x == 0.0), "a new sequence starts from nothing");
        assert_eq!(cache.free_pages.len(), 1);
        cache.put(&slot, sequence);
        cache.release(slot);
    }

    #[test]
    fn a_suspended_sequence_makes_room_and_comes_back_as_it_was() {
        let mut cache = cache(1, 2 * BLOCK_TOKENS);
        let slot = cache.acquire(2 * BLOCK_TOKENS).expect("room");
        let mut sequence = cache.take(&slot, BLOCK_TOKENS + 1);
        sequence.position = BLOCK_TOKENS + 1;
        (sequence.linear[0].state[7], sequence.pages[1].0[3]) = (1.5, 2.5);
        cache.put(&slot, sequence);

        let bytes = cache.shape.sequence_bytes() + 2 * BLOCK_TOKENS as u64 * cache.shape.token_bytes();
        cache.suspended_bytes_max = bytes - 1;
        assert!(!cache.could_acquire(1, &[&slot]), "it could not be kept");
        cache.suspended_bytes_max = bytes;
        assert!(!cache.could_acquire(1, &[]) && cache.could_acquire(1, &[&slot]));
        let suspended = cache.suspend(slot);
        assert_eq!(cache.suspended_bytes, bytes);

        let other = cache.acquire(2 * BLOCK_TOKENS).expect("all of the room");
        let sequence = cache.take(&other, 2 * BLOCK_TOKENS);
        cache.put(&other, sequence);
        let suspended = cache.restore(suspended).expect_err("no slot");
        assert!(!cache.could_restore(&suspended, &[]) && cache.could_restore(&suspended, &[&other]));
        cache.release(other);
        assert!(cache.could_restore(&suspended, &[]));
        let slot = cache.restore(suspended).expect("the other one's room");
        assert_eq!((cache.suspended_bytes, cache.position(&slot)), (0, BLOCK_TOKENS + 1));
        assert!(cache.free_pages.is_empty(), "no more pages are kept than the limit allows");
        let sequence = cache.take(&slot, 1);
        assert_eq!((sequence.linear[0].state[7], sequence.pages[1].0[3]), (1.5, 2.5));
        cache.put(&slot, sequence);

        let suspended = cache.suspend(slot);
        cache.discard(suspended);
        assert_eq!(cache.suspended_bytes, 0);
        let slot = cache.acquire(1).expect("room");
        assert_eq!(cache.position(&slot), 0);
        cache.release(slot);
    }

    #[test]
    fn sizes_are_those_of_the_model() {
        let shape = shape();
        assert_eq!(shape.sequence_bytes(), 4 * 4 * 16 * (16 + 2 * 64));
        assert_eq!(shape.token_bytes(), 2 * 2 * 16 * 4);
    }
}
