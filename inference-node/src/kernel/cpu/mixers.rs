//! Lightning and softmax attention of one head on the block grid.

use super::rows::{Divide, ExpLess, Multiply, Scale, Take};
use super::simd::{Vector, exp};
use super::tile::{Block, TILE_ROWS};
use super::{Routine, rows};
use crate::state::{BLOCK_TOKENS, Page};

/// One head of lightning attention over the rows of one sequence, in order.
pub(super) struct LightningHead<'a> {
    pub head_dim: usize,
    /// `exp(-slope t)`, t ascending and descending (see [`crate::kernel::Decay`]).
    pub powers: &'a [f32],
    pub reversed: &'a [f32],
    /// `[d, d]`, `[d, BLOCK_TOKENS]`, `[BLOCK_TOKENS, d]`: this head's part of the layer's state.
    pub state: &'a mut [f32],
    pub keys: &'a mut [f32],
    pub values: &'a mut [f32],
    pub position: usize,
    /// First row's `{q, k, v}` of this head, and the floats from one row to the next.
    pub qkv: &'a [f32],
    pub qkv_stride: usize,
    /// First row's output of this head; this routine alone writes it.
    pub out: *mut f32,
    pub out_stride: usize,
    pub rows: usize,
}

// SAFETY: `out` is the only field that is not Send by itself; it names memory that this value alone writes.
unsafe impl Send for LightningHead<'_> {}

pub(super) struct LightningTask<'a, 'b> {
    pub head: &'a mut LightningHead<'b>,
    /// `[max(d, BLOCK_TOKENS), BLOCK_TOKENS]`
    pub scratch: &'a mut [f32],
}

impl Routine for LightningTask<'_, '_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let LightningTask { head, scratch } = self;
        let mut row = 0;
        while row < head.rows {
            let open = (head.position + row) % BLOCK_TOKENS;
            let count = (BLOCK_TOKENS - open).min(head.rows - row);
            // SAFETY: the rows exist and end at or before their block does.
            unsafe { head.within_block::<V>(row, open, count, scratch) };
            if open + count == BLOCK_TOKENS {
                // SAFETY: V's features are present.
                unsafe { head.fold::<V>(scratch) };
            }
            row += count;
        }
    }
}

impl LightningHead<'_> {
    /// Stores k and v of `count` rows from offset `open` of the open block on, then for each row, at offset i,
    /// `o_i = exp(-s (i + 1)) q_i S + sum over j <= i of exp(-s (i - j)) (q_i . k_j) v_j`.
    ///
    /// # Safety
    /// V's features are present, `row + count <= rows` and `open + count <= BLOCK_TOKENS`.
    #[inline(always)]
    unsafe fn within_block<V: Vector>(&mut self, row: usize, open: usize, count: usize, scratch: &mut [f32]) {
        let d = self.head_dim;
        for i in 0..count {
            let kv = &self.qkv[(row + i) * self.qkv_stride + d..][..2 * d];
            let (k, v) = kv.split_at(d);
            for (key, &k) in self.keys.iter_mut().skip(open + i).step_by(BLOCK_TOKENS).zip(k) {
                *key = k;
            }
            self.values[(open + i) * d..][..d].copy_from_slice(v);
        }
        let scores = &mut scratch[..count * BLOCK_TOKENS];
        // Whole registers of scores: those past a token's own are not used.
        let columns = (open + count).next_multiple_of(V::LANES);
        // SAFETY: q has `count` rows of d, the state d x d, keys d x BLOCK_TOKENS, values at least open + count rows of d, scores
        // rows of BLOCK_TOKENS >= columns; `out` is this routine's own rows of d (struct contract).
        unsafe {
            let out = self.out.add(row * self.out_stride);
            let from_state = Block {
                a: self.qkv.as_ptr().add(row * self.qkv_stride),
                a_stride: self.qkv_stride,
                b: self.state.as_ptr(),
                b_stride: d,
                c: out,
                c_stride: self.out_stride,
                m: count,
                n: d,
                k: d,
                accumulate: false,
            };
            V::multiply(from_state);
            V::multiply(Block {
                b: self.keys.as_ptr(),
                b_stride: BLOCK_TOKENS,
                c: scores.as_mut_ptr(),
                c_stride: BLOCK_TOKENS,
                n: columns,
                ..from_state
            });
            for i in 0..count {
                let out = out.add(i * self.out_stride);
                rows::zip::<V, Scale>(out, out, out, self.powers[open + i + 1], d);
                let decay = &self.reversed[BLOCK_TOKENS - 1 - (open + i)..];
                let scores = scores.as_mut_ptr().add(i * BLOCK_TOKENS);
                rows::zip::<V, Multiply>(scores, scores, decay.as_ptr(), 0.0, open + i + 1);
            }
            self.add_values::<V>(out, scores, open, count);
        }
    }

    /// `out_i += scores_i[..=i] values[..=i]`. The rows of a tile share the tokens up to the first one's own; each goes on alone from
    /// there. So every element is the same chain over j whatever the number of rows.
    ///
    /// # Safety
    /// As for [`LightningHead::within_block`]; `scores` has `count` rows of BLOCK_TOKENS.
    #[inline(always)]
    unsafe fn add_values<V: Vector>(&self, out: *mut f32, scores: &[f32], open: usize, count: usize) {
        let d = self.head_dim;
        for first in (0..count).step_by(TILE_ROWS) {
            let tile = TILE_ROWS.min(count - first);
            // SAFETY: rows first..first + tile exist, and values up to open + count.
            unsafe {
                let shared = Block {
                    a: scores.as_ptr().add(first * BLOCK_TOKENS),
                    a_stride: BLOCK_TOKENS,
                    b: self.values.as_ptr(),
                    b_stride: d,
                    c: out.add(first * self.out_stride),
                    c_stride: self.out_stride,
                    m: tile,
                    n: d,
                    k: open + first + 1,
                    accumulate: true,
                };
                V::multiply(shared);
                for i in 1..tile {
                    V::multiply(Block {
                        a: shared.a.add(i * BLOCK_TOKENS + shared.k),
                        b: shared.b.add(shared.k * d),
                        c: shared.c.add(i * self.out_stride),
                        m: 1,
                        k: i,
                        ..shared
                    });
                }
            }
        }
    }

    /// `S = exp(-s m) S + sum over j of exp(-s (m - 1 - j)) k_j^T v_j` for the m = BLOCK_TOKENS tokens of the full block.
    ///
    /// # Safety
    /// V's features are present.
    #[inline(always)]
    unsafe fn fold<V: Vector>(&mut self, scratch: &mut [f32]) {
        let d = self.head_dim;
        let faded_keys = &mut scratch[..d * BLOCK_TOKENS];
        // SAFETY: keys and faded keys are [d, BLOCK_TOKENS], the state [d, d], values [BLOCK_TOKENS, d].
        unsafe {
            for (faded, keys) in
                faded_keys.chunks_exact_mut(BLOCK_TOKENS).zip(self.keys.chunks_exact(BLOCK_TOKENS))
            {
                let (faded, keys) = (faded.as_mut_ptr(), keys.as_ptr());
                rows::zip::<V, Multiply>(faded, keys, self.reversed.as_ptr(), 0.0, BLOCK_TOKENS);
            }
            let state = self.state.as_mut_ptr();
            rows::zip::<V, Scale>(state, state, state, self.powers[BLOCK_TOKENS], d * d);
            let update = Block {
                a: faded_keys.as_ptr(),
                a_stride: BLOCK_TOKENS,
                b: self.values.as_ptr(),
                b_stride: d,
                c: state,
                c_stride: d,
                m: d,
                n: d,
                k: BLOCK_TOKENS,
                accumulate: true,
            };
            V::multiply(update);
        }
    }
}

/// The query heads that share one key-value head, for a few consecutive rows of one sequence.
pub(super) struct AttentionGroup<'a> {
    pub head_dim: usize,
    /// Query heads in the group.
    pub heads: usize,
    pub pages: &'a [Page],
    /// Where this layer's and key-value head's `{keys [d, BLOCK_TOKENS], values [BLOCK_TOKENS, d]}` start in a page.
    pub page_offset: usize,
    /// Position of the first row.
    pub position: usize,
    pub rows: usize,
    /// First row's queries of the group (`[heads, d]` a row), and the floats from one row to the next.
    pub q: &'a [f32],
    pub q_stride: usize,
    /// First row's output of the group; this routine alone writes it.
    pub out: *mut f32,
    pub out_stride: usize,
    /// `[rows * heads, 2 d + BLOCK_TOKENS + 2]`
    pub scratch: &'a mut [f32],
}

/// Working memory of [`AttentionGroup`], one line a (row, head).
struct Online<'a> {
    /// Scaled queries, `[lines, d]`.
    q: &'a mut [f32],
    /// Weighted values so far, `[lines, d]`.
    sum: &'a mut [f32],
    /// `[lines, BLOCK_TOKENS]`
    scores: &'a mut [f32],
    /// Largest score and total weight so far, `[lines]`.
    largest: &'a mut [f32],
    weight: &'a mut [f32],
}

impl Routine for AttentionGroup<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let (d, heads, lines) = (self.head_dim, self.heads, self.rows * self.heads);
        let (q, rest) = self.scratch.split_at_mut(lines * d);
        let (sum, rest) = rest.split_at_mut(lines * d);
        let (scores, rest) = rest.split_at_mut(lines * BLOCK_TOKENS);
        let (largest, rest) = rest.split_at_mut(lines);
        let mut online = Online { q, sum, scores, largest, weight: &mut rest[..lines] };
        let scale = 1.0 / (d as f32).sqrt();
        for row in 0..self.rows {
            let from = &self.q[row * self.q_stride..][..heads * d];
            online.q[row * heads * d..][..heads * d].iter_mut().zip(from).for_each(|(q, &x)| *q = x * scale);
        }
        online.sum.fill(0.0);
        online.largest.fill(f32::MIN);
        online.weight.fill(0.0);
        let block_of = |row: usize| (self.position + row) / BLOCK_TOKENS;
        for (block, page) in self.pages.iter().enumerate().take(block_of(self.rows - 1) + 1) {
            let page = &page.0[self.page_offset..][..2 * d * BLOCK_TOKENS];
            // Rows ascend: those of earlier blocks are done, then those whose own block this is, then those that see all of it.
            let own = (0..self.rows).find(|&row| block_of(row) >= block).unwrap_or(self.rows);
            let later = (own..self.rows).find(|&row| block_of(row) > block).unwrap_or(self.rows);
            // SAFETY: the ranges of lines end at rows * heads, and no more tokens are visited than the block holds.
            unsafe {
                for row in own..later {
                    let visible = (self.position + row) % BLOCK_TOKENS + 1;
                    online.visit::<V>(page, d, row * heads..(row + 1) * heads, visible);
                }
                online.visit::<V>(page, d, later * heads..lines, BLOCK_TOKENS);
            }
        }
        for row in 0..self.rows {
            for line in row * heads..(row + 1) * heads {
                // SAFETY: `out` holds heads * d floats at each row (struct contract).
                unsafe {
                    let out = self.out.add(row * self.out_stride + (line - row * heads) * d);
                    let sum = online.sum[line * d..][..d].as_ptr();
                    rows::zip::<V, Divide>(out, sum, sum, online.weight[line], d);
                }
            }
        }
    }
}

impl Online<'_> {
    /// Lets `lines` attend to the first `visible` tokens of a page.
    ///
    /// # Safety
    /// V's features are present, `lines` exist, `visible <= BLOCK_TOKENS`, and `page` is `[2, d * BLOCK_TOKENS]`.
    #[inline(always)]
    unsafe fn visit<V: Vector>(
        &mut self,
        page: &[f32],
        d: usize,
        lines: std::ops::Range<usize>,
        visible: usize,
    ) {
        if lines.is_empty() {
            return;
        }
        let (keys, values) = page.split_at(d * BLOCK_TOKENS);
        let columns = visible.next_multiple_of(V::LANES);
        // SAFETY: q and sum have `lines` rows of d, scores of BLOCK_TOKENS >= columns; keys are [d, BLOCK_TOKENS], values at least
        // `visible` rows of d.
        unsafe {
            let scores = Block {
                a: self.q.as_ptr().add(lines.start * d),
                a_stride: d,
                b: keys.as_ptr(),
                b_stride: BLOCK_TOKENS,
                c: self.scores.as_mut_ptr().add(lines.start * BLOCK_TOKENS),
                c_stride: BLOCK_TOKENS,
                m: lines.len(),
                n: columns,
                k: d,
                accumulate: false,
            };
            V::multiply(scores);
            for line in lines.clone() {
                self.weigh::<V>(line, d, visible, columns);
            }
            let weighted = Block {
                a: self.scores.as_ptr().add(lines.start * BLOCK_TOKENS),
                a_stride: BLOCK_TOKENS,
                b: values.as_ptr(),
                b_stride: d,
                c: self.sum.as_mut_ptr().add(lines.start * d),
                c_stride: d,
                m: lines.len(),
                n: d,
                k: visible,
                accumulate: true,
            };
            V::multiply(weighted);
        }
    }

    /// Turns a line's scores into weights relative to the largest score so far, fading what was summed before.
    ///
    /// # Safety
    /// As for [`Online::visit`].
    #[inline(always)]
    unsafe fn weigh<V: Vector>(&mut self, line: usize, d: usize, visible: usize, columns: usize) {
        let scores = &mut self.scores[line * BLOCK_TOKENS..][..columns];
        scores[visible..].fill(f32::MIN);
        // SAFETY: in place on this line's slices, `columns` of them whole registers.
        unsafe {
            let largest = rows::largest::<V>(scores).max(self.largest[line]);
            let at = scores.as_mut_ptr();
            rows::zip::<V, ExpLess>(at, at, at, largest, columns);
            scores[visible..].fill(0.0);
            let mut fade = [0.0; 16];
            exp(V::splat(self.largest[line] - largest)).store(fade.as_mut_ptr());
            let weight = rows::sum::<V, Take>(scores, scores);
            self.weight[line] = self.weight[line] * fade[0] + weight;
            let sum = self.sum[line * d..][..d].as_mut_ptr();
            rows::zip::<V, Scale>(sum, sum, sum, fade[0], d);
            self.largest[line] = largest;
        }
    }
}
