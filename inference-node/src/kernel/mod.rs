//! The arithmetic of a forward pass: about a dozen operations, each with an obvious form and a fast one.
//!
//! ```text
//! model::Runner -> dyn Kernel -> Reference   f64, loops as in the paper
//!                             -> Cpu         packed f32, bf16 or int8 panels; AVX-512, AVX2 or portable, chosen once; own thread pool
//! ```
//!
//! The rule that every implementation keeps: an output element is a function of its own row (and that row's sequence), summed
//! in an order that depends on the length of the sum alone. So batch, chunk and thread count never change a bit. Rows of
//! activations are f32, row-major; `unsafe` lives in this directory only.

mod cpu;
mod matrix;
mod memory;
mod pool;
mod reference;

pub use cpu::{Cpu, Roofline};
pub use matrix::{Dtype, Matrix};
pub use reference::Reference;

use crate::config::Residual;
use crate::state::{BLOCK_TOKENS, LightningState, Page};

/// Consecutive rows that meet the same matrix (the tokens of one expert).
pub struct Group<'a> {
    pub matrix: &'a Matrix,
    pub rows: usize,
}

/// A token's share in one expert.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pick {
    pub expert: u32,
    pub weight: f32,
}

/// Heads of one layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub heads: usize,
    /// Equal to `heads` for lightning attention.
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// Powers of each head's decay. Constant per head in this family; a relative with a decay per token replaces this type.
pub struct Decay {
    /// `exp(-slope * t)` for t from 0 to `BLOCK_TOKENS`: `[heads, BLOCK_TOKENS + 1]` f32.
    powers: Vec<f32>,
    /// The same from `BLOCK_TOKENS - 1` down to 0: `[heads, BLOCK_TOKENS]` f32.
    reversed: Vec<f32>,
}

/// The rows of one sequence in a lightning layer, and the state they continue.
pub struct LightningSpan<'a> {
    pub state: &'a mut LightningState,
    /// Tokens before the first row.
    pub position: usize,
    pub rows: usize,
}

/// The rows of one sequence in a softmax layer, and the pages they extend.
pub struct AttentionSpan<'a> {
    pub pages: &'a mut [Page],
    /// Offset of this layer in every page.
    pub offset: usize,
    pub position: usize,
    pub rows: usize,
}

/// Rotations of each row: `[rows, rotary_dim / 2]` f32.
pub struct Rotations {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    pub rotary_dim: usize,
}

pub trait Kernel: Send {
    /// `y[m, n] = x[m, k] w[n, k]^T`, with x rounded as the matrix's [`Dtype`] says.
    fn matmul(&mut self, x: &[f32], w: &Matrix, y: &mut [f32]);

    /// The same for consecutive groups of rows, each with its own matrix of equal shape.
    fn matmul_grouped(&mut self, x: &[f32], groups: &[Group<'_>], y: &mut [f32]);

    /// `y = weight * x / sqrt(mean(x^2) + eps)` a row of `weight.len()`
    fn rms_norm(&mut self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]);

    /// `x = sigmoid(gate) * rms_norm(x)`: lightning attention's output gate.
    fn gated_rms_norm(&mut self, gate: &[f32], weight: &[f32], eps: f32, x: &mut [f32]);

    fn silu(&mut self, x: &mut [f32]);

    /// `y[m, w] = silu(gate_up[m, ..w]) * gate_up[m, w..]`
    fn swiglu(&mut self, gate_up: &[f32], width: usize, y: &mut [f32]);

    /// `branch = alpha * residual + beta * branch`
    fn add_residual(&mut self, residual: &[f32], weights: Residual, branch: &mut [f32]);

    /// Softmax over the experts of each row, the `k` largest (ties: lower index first), normalised to sum to one.
    fn route(&mut self, logits: &[f32], experts: usize, k: usize, picks: &mut [Pick]);

    /// `y[row] = sum over the row's picks of weight * x[place]`, in the order of the picks. `places` and `picks` are `[rows, k]`.
    fn combine(&mut self, x: &[f32], picks: &[Pick], places: &[u32], k: usize, y: &mut [f32]);

    /// `y = (1 - c) y + c shared`, `c = sigmoid(coefficient . x)` a row
    fn blend_shared(&mut self, x: &[f32], coefficient: &[f32], shared: &[f32], y: &mut [f32]);

    /// Turns the first `rotary_dim` dims of every head: pairs (i, i + rotary_dim / 2).
    fn rotate(&mut self, x: &mut [f32], heads: usize, head_dim: usize, rotations: &Rotations);

    /// Lightning attention in block form; `qkv` is `[rows, heads, {q, k, v}, d]`, `out` `[rows, heads, d]`.
    /// MiniMax-01 (arXiv 2501.08313), algorithm 2, on the fixed grid of [`BLOCK_TOKENS`].
    fn lightning(
        &mut self,
        heads: Heads,
        decay: &Decay,
        spans: &mut [LightningSpan<'_>],
        qkv: &[f32],
        out: &mut [f32],
    );

    /// Causal grouped-query attention, online softmax over pages in order; `qkv` is `[rows, {heads, kv_heads, kv_heads}, d]` with
    /// q and k rotated, `out` `[rows, heads, d]`. Appends keys and values to the pages.
    fn attention(&mut self, heads: Heads, spans: &mut [AttentionSpan<'_>], qkv: &[f32], out: &mut [f32]);
}

impl Decay {
    pub fn new(slopes: &[f64]) -> Decay {
        let powers = |slope: &f64| {
            let slope = *slope;
            (0..=BLOCK_TOKENS).map(move |steps| (-slope * steps as f64).exp() as f32)
        };
        let reversed = |slope: &f64| powers(slope).take(BLOCK_TOKENS).collect::<Vec<_>>().into_iter().rev();
        Decay {
            powers: slopes.iter().flat_map(powers).collect(),
            reversed: slopes.iter().flat_map(reversed).collect(),
        }
    }

    fn powers(&self, head: usize) -> &[f32] {
        &self.powers[head * (BLOCK_TOKENS + 1)..][..=BLOCK_TOKENS]
    }

    fn reversed(&self, head: usize) -> &[f32] {
        &self.reversed[head * BLOCK_TOKENS..][..BLOCK_TOKENS]
    }
}
