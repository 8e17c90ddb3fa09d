//! Operations on single rows: norms, activations, routing, rotation. Each is one [`Routine`].

use super::simd::{Vector, exp, sigmoid};
use super::{Pick, Routine};
use crate::config::Residual;

/// One elementwise step: `a` and `b` are elements, `s` is one number for the whole call. A type rather than a closure, because only
/// `#[inline(always)]` functions are sure to be compiled with the features of the routine they end up in.
pub(super) trait Step {
    /// # Safety
    /// The CPU has V's features.
    unsafe fn step<V: Vector>(a: V, b: V, s: V) -> V;
}

macro_rules! steps {
    ($($name:ident($a:ident, $b:ident, $s:ident) = $result:expr;)*) => {$(
        pub(super) struct $name;

        impl Step for $name {
            #[inline(always)]
            unsafe fn step<V: Vector>($a: V, $b: V, $s: V) -> V {
                // SAFETY: the caller's contract.
                #[allow(unused_unsafe, reason = "a step may have nothing to compute")]
                unsafe {
                    $result
                }
            }
        }
    )*};
}

steps! {
    Scale(a, _b, s) = a.mul(s);
    Divide(a, _b, s) = a.div(s);
    Multiply(a, b, _s) = a.mul(b);
    ScaledMultiply(a, b, s) = a.mul(s).mul(b);
    Take(a, _b, _s) = a;
    ExpLess(a, _b, s) = exp(a.sub(s));
    SiluOf(a, _b, _s) = a.mul(sigmoid(a));
    SiluTimes(a, b, _s) = a.mul(sigmoid(a)).mul(b);
    TimesSigmoid(a, b, _s) = a.mul(sigmoid(b));
    AddScaled(a, b, s) = b.mul_add(s, a);
}

/// `out[i] = step(a[i], b[i], s)`; `out` may be `a` or `b`.
///
/// # Safety
/// All three are valid for `len` elements; the CPU has V's features.
#[inline(always)]
pub(super) unsafe fn zip<V: Vector, S: Step>(
    out: *mut f32,
    a: *const f32,
    b: *const f32,
    s: f32,
    len: usize,
) {
    let whole = len - len % V::LANES;
    let mut i = 0;
    // SAFETY: i + LANES <= len in the loop; the rest goes through buffers as long as the widest register.
    unsafe {
        let s = V::splat(s);
        while i < whole {
            S::step(V::load(a.wrapping_add(i)), V::load(b.wrapping_add(i)), s).store(out.wrapping_add(i));
            i += V::LANES;
        }
        if whole < len {
            let (mut left, mut right) = ([0.0; 16], [0.0; 16]);
            for lane in 0..len - whole {
                left[lane] = *a.add(whole + lane);
                right[lane] = *b.add(whole + lane);
            }
            S::step(V::load(left.as_ptr()), V::load(right.as_ptr()), s).store(left.as_mut_ptr());
            for lane in 0..len - whole {
                *out.add(whole + lane) = left[lane];
            }
        }
    }
}

/// The sum of `step(a[i], b[i], _)`: one partial sum a lane, then the lanes in order. The order depends on the length alone.
///
/// # Safety
/// `b` is as long as `a`; the CPU has V's features.
#[inline(always)]
pub(super) unsafe fn sum<V: Vector, S: Step>(a: &[f32], b: &[f32]) -> f32 {
    let whole = a.len() - a.len() % V::LANES;
    let mut lanes = [0.0; 16];
    // SAFETY: i + LANES <= len in the loop; `lanes` is as long as the widest register.
    unsafe {
        let zero = V::splat(0.0);
        let mut sums = zero;
        let mut i = 0;
        while i < whole {
            let (a, b) = (a.as_ptr().wrapping_add(i), b.as_ptr().wrapping_add(i));
            sums = sums.add(S::step(V::load(a), V::load(b), zero));
            i += V::LANES;
        }
        if whole < a.len() {
            let (mut left, mut right) = ([0.0; 16], [0.0; 16]);
            left[..a.len() - whole].copy_from_slice(&a[whole..]);
            right[..a.len() - whole].copy_from_slice(&b[whole..]);
            sums = sums.add(S::step(V::load(left.as_ptr()), V::load(right.as_ptr()), zero));
        }
        sums.store(lanes.as_mut_ptr());
    }
    lanes[..V::LANES].iter().sum()
}

/// The largest of whole registers of numbers.
///
/// # Safety
/// The CPU has V's features, and the length is a multiple of its lanes.
#[inline(always)]
pub(super) unsafe fn largest<V: Vector>(x: &[f32]) -> f32 {
    let mut lanes = [f32::MIN; 16];
    // SAFETY: each chunk is a register long; `lanes` is as long as the widest.
    unsafe {
        let mut largest = V::splat(f32::MIN);
        for chunk in x.chunks_exact(V::LANES) {
            largest = largest.max(V::load(chunk.as_ptr()));
        }
        largest.store(lanes.as_mut_ptr());
    }
    lanes.into_iter().fold(f32::MIN, f32::max)
}

/// # Safety
/// As for [`zip`].
#[inline(always)]
unsafe fn inverse_rms<V: Vector>(x: &[f32], eps: f32) -> f32 {
    // SAFETY: slices of equal length.
    let squares = unsafe { sum::<V, Multiply>(x, x) };
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
                let scale = inverse_rms::<V>(x, self.eps);
                zip::<V, ScaledMultiply>(y.as_mut_ptr(), x.as_ptr(), self.weight.as_ptr(), scale, width);
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
                let scale = inverse_rms::<V>(x, self.eps);
                let (x, gate) = (x.as_mut_ptr(), gate.as_ptr());
                zip::<V, ScaledMultiply>(x, x, self.weight.as_ptr(), scale, width);
                zip::<V, TimesSigmoid>(x, x, gate, 0.0, width);
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
        unsafe { zip::<V, SiluOf>(x, x, x, 0.0, self.0.len()) }
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
                zip::<V, SiluTimes>(y.as_mut_ptr(), gate.as_ptr(), up.as_ptr(), 0.0, width);
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
        let (branch, residual) = (self.branch.as_mut_ptr(), self.residual.as_ptr());
        // SAFETY: both slices have the same length.
        unsafe {
            zip::<V, Scale>(branch, branch, branch, self.weights.beta, self.branch.len());
            zip::<V, AddScaled>(branch, branch, residual, self.weights.alpha, self.branch.len());
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
                let at = logits.as_ptr();
                zip::<V, ExpLess>(shares.as_mut_ptr(), at, at, largest, self.experts);
                sum::<V, Take>(shares, shares)
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
                    let y = y.as_mut_ptr();
                    zip::<V, AddScaled>(y, y, expert.as_ptr(), pick.weight, width);
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
                let mut share = [0.0; 16];
                sigmoid(V::splat(sum::<V, Multiply>(x, self.coefficient))).store(share.as_mut_ptr());
                let y = y.as_mut_ptr();
                zip::<V, Scale>(y, y, y, 1.0 - share[0], width);
                zip::<V, AddScaled>(y, y, shared.as_ptr(), share[0], width);
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
