//! Operations on single rows: norms, activations, routing, rotation. Each is one [`Routine`].

use super::simd::{Vector, exp, sigmoid};
use super::{Pick, Routine};
use crate::config::Residual;

/// `out[i] = f(a[i], b[i])`; `out` may be `a` or `b`.
///
/// # Safety
/// All three are valid for `len` elements; V's features are present.
#[inline(always)]
pub(super) unsafe fn zip<V: Vector>(
    out: *mut f32,
    a: *const f32,
    b: *const f32,
    len: usize,
    f: impl Fn(V, V) -> V,
) {
    let whole = len - len % V::LANES;
    let mut i = 0;
    // SAFETY: i + LANES <= len in the loop; the rest goes through buffers as long as the widest register.
    unsafe {
        while i < whole {
            f(V::load(a.add(i)), V::load(b.add(i))).store(out.add(i));
            i += V::LANES;
        }
        if whole < len {
            let (mut left, mut right) = ([0.0; 16], [0.0; 16]);
            for lane in 0..len - whole {
                left[lane] = *a.add(whole + lane);
                right[lane] = *b.add(whole + lane);
            }
            f(V::load(left.as_ptr()), V::load(right.as_ptr())).store(left.as_mut_ptr());
            for lane in 0..len - whole {
                *out.add(whole + lane) = left[lane];
            }
        }
    }
}

/// The sum of `f(a[i], b[i])`: one partial sum a lane, then the lanes in order. The order depends on the length alone.
///
/// # Safety
/// As for [`zip`].
#[inline(always)]
pub(super) unsafe fn sum<V: Vector>(a: &[f32], b: &[f32], f: impl Fn(V, V) -> V) -> f32 {
    let whole = a.len() - a.len() % V::LANES;
    let mut lanes = [0.0; 16];
    // SAFETY: i + LANES <= len in the loop; `lanes` is as long as the widest register.
    unsafe {
        let mut sums = V::splat(0.0);
        let mut i = 0;
        while i < whole {
            sums = sums.add(f(V::load(a.as_ptr().add(i)), V::load(b.as_ptr().add(i))));
            i += V::LANES;
        }
        if whole < a.len() {
            let (mut left, mut right) = ([0.0; 16], [0.0; 16]);
            left[..a.len() - whole].copy_from_slice(&a[whole..]);
            right[..a.len() - whole].copy_from_slice(&b[whole..]);
            sums = sums.add(f(V::load(left.as_ptr()), V::load(right.as_ptr())));
        }
        sums.store(lanes.as_mut_ptr());
    }
    lanes[..V::LANES].iter().sum()
}

/// # Safety
/// As for [`zip`].
#[inline(always)]
unsafe fn inverse_rms<V: Vector>(x: &[f32], eps: f32) -> f32 {
    // SAFETY: slices of equal length.
    let squares = unsafe { sum::<V>(x, x, |a, b| a.mul(b)) };
    1.0 / (squares / x.len() as f32 + eps).sqrt()
}

pub(super) struct RmsNorm<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub eps: f32,
    pub y: &'a mut [f32],
}

impl Routine for RmsNorm<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let width = self.weight.len();
        for (x, y) in self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width)) {
            // SAFETY: all slices are `width` long.
            unsafe {
                let scale = V::splat(inverse_rms::<V>(x, self.eps));
                zip::<V>(y.as_mut_ptr(), x.as_ptr(), self.weight.as_ptr(), width, |x, w| x.mul(scale).mul(w));
            }
        }
    }
}

pub(super) struct GatedRmsNorm<'a> {
    pub gate: &'a [f32],
    pub weight: &'a [f32],
    pub eps: f32,
    pub x: &'a mut [f32],
}

impl Routine for GatedRmsNorm<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let width = self.weight.len();
        for (gate, x) in self.gate.chunks_exact(width).zip(self.x.chunks_exact_mut(width)) {
            // SAFETY: all slices are `width` long.
            unsafe {
                let scale = V::splat(inverse_rms::<V>(x, self.eps));
                let (x, gate) = (x.as_mut_ptr(), gate.as_ptr());
                zip::<V>(x, x, self.weight.as_ptr(), width, |x, w| x.mul(scale).mul(w));
                zip::<V>(x, x, gate, width, |x, gate| x.mul(sigmoid(gate)));
            }
        }
    }
}

pub(super) struct Silu<'a>(pub &'a mut [f32]);

impl Routine for Silu<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let x = self.0.as_mut_ptr();
        // SAFETY: one slice, in place.
        unsafe { zip::<V>(x, x, x, self.0.len(), |x, _| x.mul(sigmoid(x))) }
    }
}

pub(super) struct SwiGlu<'a> {
    pub gate_up: &'a [f32],
    pub width: usize,
    pub y: &'a mut [f32],
}

impl Routine for SwiGlu<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let width = self.width;
        for (row, y) in self.gate_up.chunks_exact(2 * width).zip(self.y.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at(width);
            // SAFETY: all slices are `width` long.
            unsafe {
                zip::<V>(y.as_mut_ptr(), gate.as_ptr(), up.as_ptr(), width, |gate, up| {
                    gate.mul(sigmoid(gate)).mul(up)
                });
            }
        }
    }
}

pub(super) struct AddResidual<'a> {
    pub residual: &'a [f32],
    pub weights: Residual,
    pub branch: &'a mut [f32],
}

impl Routine for AddResidual<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let branch = self.branch.as_mut_ptr();
        // SAFETY: both slices have the same length.
        unsafe {
            let (alpha, beta) = (V::splat(self.weights.alpha), V::splat(self.weights.beta));
            zip::<V>(branch, branch, self.residual.as_ptr(), self.branch.len(), |branch, residual| {
                residual.mul(alpha).add(branch.mul(beta))
            });
        }
    }
}

pub(super) struct Route<'a> {
    pub logits: &'a [f32],
    pub experts: usize,
    pub k: usize,
    pub picks: &'a mut [Pick],
    /// `[experts]`
    pub scratch: &'a mut [f32],
}

impl Routine for Route<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        for (logits, picks) in self.logits.chunks_exact(self.experts).zip(self.picks.chunks_exact_mut(self.k))
        {
            let shares = &mut self.scratch[..self.experts];
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            // SAFETY: both slices are `experts` long.
            let total = unsafe {
                let largest = V::splat(largest);
                zip::<V>(shares.as_mut_ptr(), logits.as_ptr(), logits.as_ptr(), self.experts, |x, _| {
                    exp(x.sub(largest))
                });
                sum::<V>(shares, shares, |a, _| a)
            };
            shares.iter_mut().for_each(|share| *share /= total);
            select(shares, picks);
        }
    }
}

/// The largest shares in descending order, ties by lower index, normalised to sum to one. Uses `shares` up.
fn select(shares: &mut [f32], picks: &mut [Pick]) {
    let mut total = 0.0;
    for pick in picks.iter_mut() {
        let mut best = 0;
        for expert in 1..shares.len() {
            if shares[expert] > shares[best] {
                best = expert;
            }
        }
        *pick = Pick { expert: best as u32, weight: shares[best] };
        total += shares[best];
        shares[best] = -1.0;
    }
    picks.iter_mut().for_each(|pick| pick.weight /= total);
}

pub(super) struct Combine<'a> {
    pub x: &'a [f32],
    pub picks: &'a [Pick],
    pub places: &'a [u32],
    pub k: usize,
    pub width: usize,
    pub y: &'a mut [f32],
}

impl Routine for Combine<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let width = self.width;
        let rows = self.picks.chunks_exact(self.k).zip(self.places.chunks_exact(self.k));
        for ((picks, places), y) in rows.zip(self.y.chunks_exact_mut(width)) {
            y.fill(0.0);
            for (pick, &place) in picks.iter().zip(places) {
                let expert = &self.x[place as usize * width..][..width];
                // SAFETY: both slices are `width` long.
                unsafe {
                    let weight = V::splat(pick.weight);
                    let y = y.as_mut_ptr();
                    zip::<V>(y, y, expert.as_ptr(), width, |y, expert| expert.mul_add(weight, y));
                }
            }
        }
    }
}

pub(super) struct BlendShared<'a> {
    pub x: &'a [f32],
    pub coefficient: &'a [f32],
    pub shared: &'a [f32],
    pub y: &'a mut [f32],
}

impl Routine for BlendShared<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let width = self.coefficient.len();
        let rows = self.x.chunks_exact(width).zip(self.shared.chunks_exact(width));
        for ((x, shared), y) in rows.zip(self.y.chunks_exact_mut(width)) {
            // SAFETY: all slices are `width` long.
            unsafe {
                let share = sigmoid(V::splat(sum::<V>(x, self.coefficient, |x, c| x.mul(c))));
                let rest = V::splat(1.0).sub(share);
                let y = y.as_mut_ptr();
                zip::<V>(y, y, shared.as_ptr(), width, |y, shared| y.mul(rest).add(shared.mul(share)));
            }
        }
    }
}

/// Turns the heads at the front of each row.
pub(super) struct Rotate<'a> {
    pub x: &'a mut [f32],
    pub row_width: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// `[rows, half]`
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub half: usize,
}

impl Routine for Rotate<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let tables = self.cos.chunks_exact(self.half).zip(self.sin.chunks_exact(self.half));
        for (row, (cos, sin)) in self.x.chunks_exact_mut(self.row_width).zip(tables) {
            for head in row.chunks_exact_mut(self.head_dim).take(self.heads) {
                let (first, second) = head.split_at_mut(self.half);
                for i in 0..self.half {
                    let (a, b) = (first[i], second[i]);
                    first[i] = a * cos[i] - b * sin[i];
                    second[i] = b * cos[i] + a * sin[i];
                }
            }
        }
    }
}
