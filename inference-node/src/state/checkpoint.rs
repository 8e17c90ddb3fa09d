//! A sequence's memory at one position, to be continued from by others.
//!
//! ```text
//! checkpoint at 150   state: lightning states at 128, then keys and values of 128..150 in every layer (one copy)
//!                     pages: segment 64..128 --> segment 0..64          (full pages, shared with whoever holds them)
//! ```
//!
//! A page that is full never changes, so sharing it costs a reference. What does change (the lightning states, the open block) is
//! copied once.

use super::chain::Key;
use super::{BLOCK_TOKENS, LightningState, Page, Sequence, StateShape};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(crate) struct Checkpoint {
    pub position: usize,
    /// [`StateShape::checkpoint_floats`] of them, packed: every lightning layer's state; then, off the grid, the open block's keys
    /// and values in every lightning layer and in every softmax layer.
    pub state: Vec<f32>,
    /// Whole blocks up to `position`; `None` for none, or a model without softmax layers.
    pub pages: Option<Arc<Segment>>,
}

/// Full pages of consecutive blocks, after those of its parent.
pub(crate) struct Segment {
    /// Names the blocks up to its end.
    pub key: Key,
    pub blocks: Range<usize>,
    pub pages: Vec<Page>,
    pub parent: Option<Arc<Segment>>,
    /// Checkpoints and segments of the cache that need it; kept by [`Segment::hold`].
    holders: AtomicUsize,
}

impl Checkpoint {
    pub fn state_bytes(&self) -> u64 {
        (self.state.len() * size_of::<f32>()) as u64
    }

    /// Copies what changes of a sequence. `pages` are its full pages.
    pub(super) fn of(sequence: &Sequence, shape: &StateShape, pages: Option<Arc<Segment>>) -> Checkpoint {
        let open = sequence.position % BLOCK_TOKENS;
        let mut state = Vec::with_capacity(shape.checkpoint_floats(sequence.position));
        sequence.linear.iter().for_each(|layer| state.extend_from_slice(&layer.state));
        if open > 0 {
            for LightningState { keys, values, .. } in &sequence.linear {
                let heads = keys.chunks_exact(shape.head_dim * BLOCK_TOKENS);
                heads
                    .zip(values.chunks_exact(shape.head_dim * BLOCK_TOKENS))
                    .for_each(|(keys, values)| pack(keys, values, open, &mut state));
            }
            if shape.softmax_layers > 0 {
                let page = &sequence.pages[sequence.position / BLOCK_TOKENS].0;
                let heads = page.chunks_exact(2 * shape.head_dim * BLOCK_TOKENS);
                heads.map(|head| head.split_at(head.len() / 2)).for_each(|(keys, values)| {
                    pack(keys, values, open, &mut state);
                });
            }
        }
        debug_assert_eq!(state.len(), shape.checkpoint_floats(sequence.position));
        Checkpoint { position: sequence.position, state, pages }
    }

    /// Puts it into a sequence that has no pages yet. `open_page` makes the page of the open block.
    pub(super) fn write_to(
        &self,
        sequence: &mut Sequence,
        shape: &StateShape,
        open_page: impl FnOnce() -> Page,
    ) {
        assert_eq!(self.state.len(), shape.checkpoint_floats(self.position), "a checkpoint is of this model");
        let open = self.position % BLOCK_TOKENS;
        let mut rest = &self.state[..];
        for layer in &mut sequence.linear {
            let (state, after) = rest.split_at(layer.state.len());
            layer.state.copy_from_slice(state);
            rest = after;
        }
        sequence.pages.extend(Segment::pages_of(self.pages.as_ref()));
        if open > 0 {
            for LightningState { keys, values, .. } in &mut sequence.linear {
                let heads = keys.chunks_exact_mut(shape.head_dim * BLOCK_TOKENS);
                heads
                    .zip(values.chunks_exact_mut(shape.head_dim * BLOCK_TOKENS))
                    .for_each(|(keys, values)| unpack(&mut rest, open, keys, values));
            }
            if shape.softmax_layers > 0 {
                let mut page = open_page();
                let heads = page.0.chunks_exact_mut(2 * shape.head_dim * BLOCK_TOKENS);
                heads.map(|head| head.split_at_mut(head.len() / 2)).for_each(|(keys, values)| {
                    unpack(&mut rest, open, keys, values);
                });
                sequence.pages.push(page);
            }
        }
        sequence.position = self.position;
    }
}

/// Appends the first `open` tokens of one head's block: `keys` is `[d, BLOCK_TOKENS]`, `values` `[BLOCK_TOKENS, d]`.
fn pack(keys: &[f32], values: &[f32], open: usize, packed: &mut Vec<f32>) {
    keys.chunks_exact(BLOCK_TOKENS).for_each(|row| packed.extend_from_slice(&row[..open]));
    packed.extend_from_slice(&values[..values.len() / BLOCK_TOKENS * open]);
}

/// The reverse of [`pack`]; takes from the front of `packed`.
fn unpack(packed: &mut &[f32], open: usize, keys: &mut [f32], values: &mut [f32]) {
    let mut take = |to: &mut [f32]| {
        let (from, rest) = packed.split_at(to.len());
        to.copy_from_slice(from);
        *packed = rest;
    };
    keys.chunks_exact_mut(BLOCK_TOKENS).for_each(|row| take(&mut row[..open]));
    let values_len = values.len() / BLOCK_TOKENS * open;
    take(&mut values[..values_len]);
}

impl Segment {
    pub fn new(
        key: Key,
        blocks: Range<usize>,
        pages: Vec<Page>,
        parent: Option<Arc<Segment>>,
    ) -> Arc<Segment> {
        debug_assert_eq!(blocks.len(), pages.len());
        debug_assert_eq!(blocks.start, parent.as_ref().map_or(0, |parent| parent.blocks.end));
        Arc::new(Segment { key, blocks, pages, parent, holders: AtomicUsize::new(0) })
    }

    /// From `last` to the first block.
    pub fn chain_of(last: Option<&Arc<Segment>>) -> impl Iterator<Item = &Arc<Segment>> {
        std::iter::successors(last, |segment| segment.parent.as_ref())
    }

    /// All pages up to the end of `last`, in order, by reference.
    fn pages_of(last: Option<&Arc<Segment>>) -> Vec<Page> {
        let segments: Vec<&Arc<Segment>> = Segment::chain_of(last).collect();
        segments.into_iter().rev().flat_map(|segment| segment.pages.iter().cloned()).collect()
    }

    pub fn bytes(&self) -> u64 {
        self.pages.iter().map(|page| page.bytes()).sum()
    }

    /// One more checkpoint needs `last` and what it stands on. Answers with the bytes that nobody needed before.
    pub fn hold(last: Option<&Arc<Segment>>) -> u64 {
        let mut bytes = 0;
        for segment in Segment::chain_of(last) {
            if segment.holders.fetch_add(1, Ordering::Relaxed) > 0 {
                break;
            }
            bytes += segment.bytes();
        }
        bytes
    }

    /// The reverse of [`Segment::hold`]: answers with the bytes that nobody needs any more.
    pub fn let_go(last: Option<&Arc<Segment>>) -> u64 {
        let mut bytes = 0;
        for segment in Segment::chain_of(last) {
            if segment.holders.fetch_sub(1, Ordering::Relaxed) > 1 {
                break;
            }
            bytes += segment.bytes();
        }
        bytes
    }

    /// Whether one checkpoint alone needs it.
    pub fn has_one_holder(&self) -> bool {
        self.holders.load(Ordering::Relaxed) == 1
    }
}

impl Drop for Segment {
    /// One by one: a chain may be longer than a stack is deep.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(mut segment) = next.and_then(Arc::into_inner) {
            next = segment.parent.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::chain::Identity;
    use super::*;

    fn segment(from: usize, to: usize, parent: Option<Arc<Segment>>) -> Arc<Segment> {
        let key = Identity { model: "m".into(), kernel: "k".into(), dtype: "f32".into() }.root("a");
        Segment::new(key, from..to, (from..to).map(|_| Page::zeroed(10)).collect(), parent)
    }

    #[test]
    fn shared_pages_are_counted_once() {
        let trunk = segment(0, 2, None);
        let (left, right) = (segment(2, 3, Some(trunk.clone())), segment(2, 5, Some(trunk.clone())));
        assert_eq!(Segment::hold(Some(&left)), 3 * 40);
        assert_eq!(Segment::hold(Some(&right)), 3 * 40, "the trunk is held already");
        assert_eq!(Segment::hold(Some(&trunk)), 0);
        assert_eq!(Segment::let_go(Some(&left)), 40);
        assert_eq!(Segment::let_go(Some(&trunk)), 0);
        assert_eq!(Segment::let_go(Some(&right)), 5 * 40);
    }

    #[test]
    fn a_very_long_chain_is_dropped() {
        let chain = (0..200_000).fold(None, |parent, block| Some(segment(block, block + 1, parent)));
        drop(chain);
    }
}
