//! Each operation as its definition says, in f64: the yardstick for the fast kernels. It keeps the same state in the same layout.

use super::matrix::INT8_MAX;
use super::{AttentionSpan, Decay, Dtype, Group, Heads, Kernel, LightningSpan, Matrix, Pick, Rotations};
use crate::config::Residual;
use crate::state::BLOCK_TOKENS;

#[derive(Default)]
pub struct Reference;

impl Kernel for Reference {
    fn matmul(&mut self, x: &[f32], w: &Matrix, y: &mut [f32]) {
        for (x, y) in x.chunks_exact(w.columns()).zip(y.chunks_exact_mut(w.rows())) {
            let x = as_seen(x, w.dtype());
            for (row, y) in y.iter_mut().enumerate() {
                *y = (0..w.columns()).map(|k| x[k] * f64::from(w.weight(row, k))).sum::<f64>() as f32;
            }
        }
    }

    fn matmul_grouped(&mut self, mut x: &[f32], groups: &[Group<'_>], mut y: &mut [f32]) {
        for group in groups {
            let (group_x, rest_x) = x.split_at(group.rows * group.matrix.columns());
            let (group_y, rest_y) = std::mem::take(&mut y).split_at_mut(group.rows * group.matrix.rows());
            self.matmul(group_x, group.matrix, group_y);
            (x, y) = (rest_x, rest_y);
        }
    }

    fn rms_norm(&mut self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        for (x, y) in x.chunks_exact(weight.len()).zip(y.chunks_exact_mut(weight.len())) {
            let scale = inverse_rms(x, eps);
            (0..x.len()).for_each(|i| y[i] = (f64::from(x[i]) * scale * f64::from(weight[i])) as f32);
        }
    }

    fn gated_rms_norm(&mut self, gate: &[f32], weight: &[f32], eps: f32, x: &mut [f32]) {
        for (x, gate) in x.chunks_exact_mut(weight.len()).zip(gate.chunks_exact(weight.len())) {
            let scale = inverse_rms(x, eps);
            for i in 0..x.len() {
                x[i] = (f64::from(x[i]) * scale * f64::from(weight[i]) * sigmoid(f64::from(gate[i]))) as f32;
            }
        }
    }

    fn silu(&mut self, x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x = silu(f64::from(*x)) as f32);
    }

    fn swiglu(&mut self, gate_up: &[f32], width: usize, y: &mut [f32]) {
        for (row, y) in gate_up.chunks_exact(2 * width).zip(y.chunks_exact_mut(width)) {
            (0..width).for_each(|i| y[i] = (silu(f64::from(row[i])) * f64::from(row[width + i])) as f32);
        }
    }

    fn add_residual(&mut self, residual: &[f32], weights: Residual, branch: &mut [f32]) {
        let (alpha, beta) = (f64::from(weights.alpha), f64::from(weights.beta));
        for (branch, &residual) in branch.iter_mut().zip(residual) {
            *branch = (alpha * f64::from(residual) + beta * f64::from(*branch)) as f32;
        }
    }

    fn route(&mut self, logits: &[f32], experts: usize, k: usize, picks: &mut [Pick]) {
        for (logits, picks) in logits.chunks_exact(experts).zip(picks.chunks_exact_mut(k)) {
            let weight = |expert: usize| (f64::from(logits[expert]) - f64::from(logits[0])).exp();
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)));
            let total: f64 = order[..k].iter().map(|&expert| weight(expert)).sum();
            for (pick, &expert) in picks.iter_mut().zip(&order) {
                *pick = Pick { expert: expert as u32, weight: (weight(expert) / total) as f32 };
            }
        }
    }

    fn combine(&mut self, x: &[f32], picks: &[Pick], places: &[u32], k: usize, y: &mut [f32]) {
        let width = y.len() / (picks.len() / k).max(1);
        let rows = picks.chunks_exact(k).zip(places.chunks_exact(k));
        for ((picks, places), y) in rows.zip(y.chunks_exact_mut(width)) {
            for (i, y) in y.iter_mut().enumerate() {
                let value = |place: u32| f64::from(x[place as usize * width + i]);
                *y = picks
                    .iter()
                    .zip(places)
                    .map(|(pick, &place)| f64::from(pick.weight) * value(place))
                    .sum::<f64>() as f32;
            }
        }
    }

    fn blend_shared(&mut self, x: &[f32], coefficient: &[f32], shared: &[f32], y: &mut [f32]) {
        let width = coefficient.len();
        let rows = x.chunks_exact(width).zip(shared.chunks_exact(width));
        for ((x, shared), y) in rows.zip(y.chunks_exact_mut(width)) {
            let share = sigmoid(x.iter().zip(coefficient).map(|(&x, &c)| f64::from(x) * f64::from(c)).sum());
            (0..width)
                .for_each(|i| y[i] = ((1.0 - share) * f64::from(y[i]) + share * f64::from(shared[i])) as f32);
        }
    }

    fn rotate(&mut self, x: &mut [f32], heads: usize, head_dim: usize, rotations: &Rotations) {
        let half = rotations.rotary_dim / 2;
        let rows = rotations.cos.len() / half;
        let width = x.len() / rows.max(1);
        for (row, x) in x.chunks_exact_mut(width).enumerate() {
            for head in x.chunks_exact_mut(head_dim).take(heads) {
                for i in 0..half {
                    let (cos, sin) =
                        (f64::from(rotations.cos[row * half + i]), f64::from(rotations.sin[row * half + i]));
                    let (a, b) = (f64::from(head[i]), f64::from(head[half + i]));
                    head[i] = (a * cos - b * sin) as f32;
                    head[half + i] = (b * cos + a * sin) as f32;
                }
            }
        }
    }

    fn lightning(
        &mut self,
        shape: Heads,
        decay: &Decay,
        spans: &mut [LightningSpan<'_>],
        qkv: &[f32],
        out: &mut [f32],
    ) {
        let (heads, d) = (shape.heads, shape.head_dim);
        let mut rows = qkv.chunks_exact(heads * 3 * d).zip(out.chunks_exact_mut(heads * d));
        for span in spans {
            for (i, (qkv, out)) in rows.by_ref().take(span.rows).enumerate() {
                for head in 0..heads {
                    let [q, k, v] = [0, 1, 2].map(|part| &qkv[(head * 3 + part) * d..][..d]);
                    lightning_token(
                        span,
                        (span.position + i) % BLOCK_TOKENS,
                        head,
                        decay.powers(head),
                        [q, k, v],
                        &mut out[head * d..][..d],
                    );
                }
            }
        }
    }

    fn attention(&mut self, shape: Heads, spans: &mut [AttentionSpan<'_>], qkv: &[f32], out: &mut [f32]) {
        let Heads { heads, kv_heads, head_dim: d } = shape;
        let mut rows = qkv.chunks_exact((heads + 2 * kv_heads) * d).zip(out.chunks_exact_mut(heads * d));
        for span in spans {
            for (i, (qkv, out)) in rows.by_ref().take(span.rows).enumerate() {
                let position = span.position + i;
                for kv_head in 0..kv_heads {
                    for x in 0..d {
                        *key(span, kv_head, d, position, x) = qkv[(heads + kv_head) * d + x];
                        *value(span, kv_head, d, position, x) = qkv[(heads + kv_heads + kv_head) * d + x];
                    }
                }
                for head in 0..heads {
                    let q = &qkv[head * d..][..d];
                    attend(span, head / (heads / kv_heads), position, q, &mut out[head * d..][..d]);
                }
            }
        }
    }
}

/// A row of activations as weights of `dtype` meet it.
fn as_seen(x: &[f32], dtype: Dtype) -> Vec<f64> {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let round = |&x: &f32| match dtype {
        Dtype::F32 => f64::from(x),
        Dtype::Bf16 => half::bf16::from_f32(x).to_f64(),
        Dtype::Int8 if largest == 0.0 => 0.0,
        Dtype::Int8 => {
            f64::from((x * (INT8_MAX / largest)).round_ties_even()) * f64::from(largest / INT8_MAX)
        }
    };
    x.iter().map(round).collect()
}

fn lightning_token(
    span: &mut LightningSpan<'_>,
    open: usize,
    head: usize,
    powers: &[f32],
    [q, k, v]: [&[f32]; 3],
    out: &mut [f32],
) {
    let d = q.len();
    let power = |steps: usize| f64::from(powers[steps]);
    let state = &mut span.state.state[head * d * d..][..d * d];
    let keys = &mut span.state.keys[head * d * BLOCK_TOKENS..][..d * BLOCK_TOKENS];
    let values = &mut span.state.values[head * d * BLOCK_TOKENS..][..d * BLOCK_TOKENS];
    (0..d).for_each(|x| keys[x * BLOCK_TOKENS + open] = k[x]);
    values[open * d..][..d].copy_from_slice(v);
    for (y, out) in out.iter_mut().enumerate() {
        let mut sum =
            power(open + 1) * (0..d).map(|x| f64::from(q[x]) * f64::from(state[x * d + y])).sum::<f64>();
        for j in 0..=open {
            let score: f64 = (0..d).map(|x| f64::from(q[x]) * f64::from(keys[x * BLOCK_TOKENS + j])).sum();
            sum += power(open - j) * score * f64::from(values[j * d + y]);
        }
        *out = sum as f32;
    }
    if open + 1 == BLOCK_TOKENS {
        for x in 0..d {
            for y in 0..d {
                let update = (0..BLOCK_TOKENS).map(|j| {
                    power(BLOCK_TOKENS - 1 - j)
                        * f64::from(keys[x * BLOCK_TOKENS + j])
                        * f64::from(values[j * d + y])
                });
                state[x * d + y] =
                    (power(BLOCK_TOKENS) * f64::from(state[x * d + y]) + update.sum::<f64>()) as f32;
            }
        }
    }
}

fn key<'a>(
    span: &'a mut AttentionSpan<'_>,
    kv_head: usize,
    d: usize,
    position: usize,
    x: usize,
) -> &'a mut f32 {
    let head = span.offset + kv_head * 2 * d * BLOCK_TOKENS;
    &mut span.pages[position / BLOCK_TOKENS].0[head + x * BLOCK_TOKENS + position % BLOCK_TOKENS]
}

fn value<'a>(
    span: &'a mut AttentionSpan<'_>,
    kv_head: usize,
    d: usize,
    position: usize,
    x: usize,
) -> &'a mut f32 {
    let head = span.offset + (kv_head * 2 + 1) * d * BLOCK_TOKENS;
    &mut span.pages[position / BLOCK_TOKENS].0[head + position % BLOCK_TOKENS * d + x]
}

fn attend(span: &mut AttentionSpan<'_>, kv_head: usize, position: usize, q: &[f32], out: &mut [f32]) {
    let d = q.len();
    let scores: Vec<f64> = (0..=position)
        .map(|at| {
            let dot: f64 = (0..d).map(|x| f64::from(q[x]) * f64::from(*key(span, kv_head, d, at, x))).sum();
            dot / (d as f64).sqrt()
        })
        .collect();
    let largest = scores.iter().copied().fold(f64::MIN, f64::max);
    let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
    for (x, out) in out.iter_mut().enumerate() {
        let weighted =
            |(at, score): (usize, &f64)| (score - largest).exp() * f64::from(*value(span, kv_head, d, at, x));
        *out = (scores.iter().enumerate().map(weighted).sum::<f64>() / total) as f32;
    }
}

fn inverse_rms(x: &[f32], eps: f32) -> f64 {
    let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}
