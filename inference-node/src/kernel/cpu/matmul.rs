//! Activations against a packed weight matrix: the operation that a forward pass spends its time in.
//!
//! ```text
//!            panel: 32 outputs          A tile is up to 12 rows by 2 registers. Every element of y is one chain of steps over
//!          k  |w w w w ...|             the words of k in ascending order, whatever tile, task or batch it falls in: that is
//!   x [m,k] --+-> y[m, 32]              the promise of one result. int8 sums are exact in any order.
//! ```

use std::ops::Range;

use super::Routine;
use super::dot::Dot;
use super::simd::{Vector, prefetch};
use crate::kernel::matrix::{Dtype, Matrix, PANEL};

/// Rows of the tallest tile, and of a strip of activations.
pub(super) const STRIP: usize = 12;
/// Registers of weights in one tile.
const WIDE: usize = 2;
/// Steps ahead of its use that a panel is fetched: a few KiB, beyond what the hardware's own prefetcher keeps in flight.
const PREFETCH_STEPS: usize = 24;
/// Steps between two looks at the loop's end.
const UNROLL: usize = 4;
/// Words of a cache line.
const LINE_WORDS: usize = 16;

/// Encodes a strip of at most [`STRIP`] rows of activations for matrices of `dtype`: `[words of k][rows]`, so that a tile walks memory
/// forwards in both operands.
pub(super) struct EncodeStrip<'a> {
    pub dtype: Dtype,
    /// `[rows, columns]`
    pub x: &'a [f32],
    pub rows: usize,
    /// `[rows * words of a row]`
    pub words: &'a mut [u32],
    /// `[rows]`
    pub scales: &'a mut [f32],
    /// At least the words of a row.
    pub scratch: &'a mut [u32],
}

impl Routine for EncodeStrip<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: V's features are present.
        unsafe {
            match self.dtype {
                Dtype::F32 => self.interleave::<V::F32>(),
                Dtype::Bf16 => self.interleave::<V::Bf16>(),
                Dtype::Int8 => self.interleave::<V::Int8>(),
            }
        }
    }
}

impl EncodeStrip<'_> {
    /// # Safety
    /// D's features are present.
    #[inline(always)]
    unsafe fn interleave<D: Dot>(self) {
        let (columns, stride) = (self.x.len() / self.rows, self.words.len() / self.rows);
        if self.rows == 1 {
            // SAFETY: D's features are present.
            self.scales[0] = unsafe { D::encode(self.x, self.words) };
            return;
        }
        for (row, x) in self.x.chunks_exact(columns).enumerate() {
            let encoded = &mut self.scratch[..stride];
            // SAFETY: D's features are present.
            self.scales[row] = unsafe { D::encode(x, encoded) };
            let steps = self.words.chunks_exact_mut(self.rows * D::WORDS);
            for (step, from) in steps.zip(encoded.chunks_exact(D::WORDS)) {
                step[row * D::WORDS..][..D::WORDS].copy_from_slice(from);
            }
        }
    }
}

/// Some rows against some panels of one matrix.
///
/// The creator guarantees that `y` is `[rows, matrix.rows()]` and that nobody else touches the columns of `panels` in it.
pub(super) struct MatrixTask<'a> {
    pub matrix: &'a Matrix,
    /// Strips of encoded activations, each full but the last.
    pub words: &'a [u32],
    /// `[rows]`
    pub row_scales: &'a [f32],
    pub y: *mut f32,
    pub rows: usize,
    pub panels: Range<usize>,
}

impl Routine for MatrixTask<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: V's features are present; the creator's guarantee.
        unsafe {
            match self.matrix.dtype() {
                Dtype::F32 => self.multiply::<V::F32>(),
                Dtype::Bf16 => self.multiply::<V::Bf16>(),
                Dtype::Int8 => self.multiply::<V::Int8>(),
            }
        }
    }
}

impl MatrixTask<'_> {
    /// # Safety
    /// D's features are present, and the creator's guarantee holds.
    #[inline(always)]
    unsafe fn multiply<D: Dot>(&self) {
        assert_eq!(self.words.len(), self.rows * self.matrix.words_per_row() * D::WORDS);
        let rows_max = const { rows_max(D::V::ACCUMULATORS, D::RIGHT_REGISTERS) };
        for panel in self.panels.clone() {
            for strip in (0..self.rows).step_by(STRIP) {
                let strip = strip..self.rows.min(strip + STRIP);
                for row in strip.clone().step_by(rows_max) {
                    // SAFETY: the rows lie inside the strip.
                    unsafe {
                        match rows_max.min(strip.end - row) {
                            1 => self.rows::<D, 1>(panel, &strip, row),
                            2 => self.rows::<D, 2>(panel, &strip, row),
                            3 => self.rows::<D, 3>(panel, &strip, row),
                            4 => self.rows::<D, 4>(panel, &strip, row),
                            5 => self.rows::<D, 5>(panel, &strip, row),
                            6 => self.rows::<D, 6>(panel, &strip, row),
                            7 => self.rows::<D, 7>(panel, &strip, row),
                            8 => self.rows::<D, 8>(panel, &strip, row),
                            9 => self.rows::<D, 9>(panel, &strip, row),
                            10 => self.rows::<D, 10>(panel, &strip, row),
                            11 => self.rows::<D, 11>(panel, &strip, row),
                            _ => self.rows::<D, STRIP>(panel, &strip, row),
                        }
                    }
                }
            }
        }
    }

    /// `ROWS` rows of a strip against one panel.
    ///
    /// # Safety
    /// As for [`MatrixTask::multiply`], with `row + ROWS <= strip.end`.
    #[inline(always)]
    unsafe fn rows<D: Dot, const ROWS: usize>(&self, panel: usize, strip: &Range<usize>, row: usize) {
        if ROWS > const { rows_max(D::V::ACCUMULATORS, D::RIGHT_REGISTERS) } {
            return;
        }
        let n = self.matrix.rows();
        let first = panel * PANEL;
        let whole = first + PANEL <= n;
        // The last panel may be wider than y: it is computed beside y.
        let mut beside = [0.0; STRIP * PANEL];
        let (y, y_stride) = match whole {
            true => (self.y.wrapping_add(row * n + first), n),
            false => (beside.as_mut_ptr(), PANEL),
        };
        let words = strip.start * self.matrix.words_per_row() + (row - strip.start);
        let tile = Tile {
            left: self.words.as_ptr().wrapping_add(words * D::WORDS),
            left_stride: strip.len() * D::WORDS,
            steps: self.matrix.words_per_row(),
            row_scales: &self.row_scales[row..row + ROWS],
            y_stride,
        };
        for column in (0..PANEL).step_by(WIDE * D::V::LANES) {
            // SAFETY: the tile lies inside the panel, its rows inside the strip, and its results inside y or `beside`.
            unsafe { tile.run::<D, ROWS>(self.matrix, panel, column, y.wrapping_add(column)) };
        }
        if !whole {
            for i in 0..ROWS {
                // SAFETY: n - first columns of y are left in row + i < rows.
                unsafe {
                    let to = self.y.add((row + i) * n + first);
                    std::ptr::copy_nonoverlapping(beside.as_ptr().add(i * PANEL), to, n - first);
                }
            }
        }
    }
}

/// The tallest tile that `accumulators` registers hold, when each register of weights takes up `right_registers`.
const fn rows_max(accumulators: usize, right_registers: usize) -> usize {
    let rows = (accumulators - WIDE * (right_registers - 1)) / WIDE;
    if rows < STRIP { rows } else { STRIP }
}

/// Some rows of one strip on their way through a panel.
struct Tile<'a> {
    /// First row's first word, and the words from one step to the next.
    left: *const u32,
    left_stride: usize,
    steps: usize,
    row_scales: &'a [f32],
    y_stride: usize,
}

impl Tile<'_> {
    /// # Safety
    /// D's features are present, `left` is valid for `steps` steps of ROWS rows, the panel and column exist, and `y` is valid for
    /// ROWS rows of `WIDE * LANES`.
    #[inline(always)]
    unsafe fn run<D: Dot, const ROWS: usize>(
        &self,
        matrix: &Matrix,
        panel: usize,
        column: usize,
        y: *mut f32,
    ) {
        let (mut left, mut right) = (self.left, matrix.panel(panel).as_ptr().wrapping_add(column));
        // SAFETY: the caller's contract. Pointers move by wrapping steps: the loop has no checked arithmetic in any profile.
        unsafe {
            let mut sums = [[D::zero(); WIDE]; ROWS];
            for _ in 0..self.steps / UNROLL {
                for _ in 0..UNROLL {
                    step::<D, ROWS>(left, right, &mut sums);
                    left = left.wrapping_add(self.left_stride);
                    right = right.wrapping_add(PANEL);
                }
            }
            for _ in 0..self.steps % UNROLL {
                step::<D, ROWS>(left, right, &mut sums);
                left = left.wrapping_add(self.left_stride);
                right = right.wrapping_add(PANEL);
            }
            let (scales, weight_sums) = matrix.panel_scales(panel);
            for i in 0..ROWS {
                for j in 0..WIDE {
                    let lanes = j * D::V::LANES;
                    let scales = scales.as_ptr().wrapping_add(column + lanes);
                    let weight_sums = weight_sums.as_ptr().wrapping_add(column + lanes);
                    D::finish(sums[i][j], self.row_scales[i], scales, weight_sums)
                        .store(y.wrapping_add(i * self.y_stride + lanes));
                }
            }
        }
    }
}

/// One word of k for every element of a tile. A function rather than a closure, because only `#[inline(always)]` functions are sure to
/// be compiled with the features of the routine they end up in.
///
/// # Safety
/// D's features are present, `left` is valid for ROWS activations and `right` for WIDE registers of weights.
#[inline(always)]
unsafe fn step<D: Dot, const ROWS: usize>(
    left: *const u32,
    right: *const u32,
    sums: &mut [[D::Sum; WIDE]; ROWS],
) {
    // SAFETY: the caller's contract.
    unsafe {
        for line in (0..WIDE * D::V::LANES).step_by(LINE_WORDS) {
            prefetch(right.wrapping_add(PREFETCH_STEPS * PANEL + line));
        }
        let mut weights = [D::right(right); WIDE];
        for j in 1..WIDE {
            weights[j] = D::right(right.wrapping_add(j * D::V::LANES));
        }
        for i in 0..ROWS {
            let activations = D::left(left.wrapping_add(i * D::WORDS));
            for j in 0..WIDE {
                sums[i][j] = D::step(activations, weights[j], sums[i][j]);
            }
        }
    }
}
