//! Multiplying one word of encoded weights a lane: f32, bf16 pairs or int8 quads, on each instruction set.
//!
//! Activations are encoded once a matrix product into words of their own ([`Dot::encode`]), in whatever form the instruction wants them.
//! Whatever the form, the numbers multiplied are the same: bf16 activations are rounded to nearest even, int8 ones
//! to `x / scale` with `scale = max |x| / 127` of the row.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::simd::Vector;
use crate::kernel::matrix::INT8_MAX;

/// # Safety
/// As for [`Vector`]: the CPU has the features of `V`, and pointers are valid for what a method says.
pub(super) trait Dot: Copy {
    /// f32 lanes of one register.
    type V: Vector;
    type Sum: Copy;
    type Left: Copy;
    type Right: Copy;
    /// Words of encoded activations that meet one word of weights.
    const WORDS: usize;
    /// Registers that one register of weights becomes.
    const RIGHT_REGISTERS: usize;

    unsafe fn zero() -> Self::Sum;
    /// The activations of one step, in every lane. Reads `WORDS` words.
    unsafe fn left(from: *const u32) -> Self::Left;
    /// One word of weights a lane.
    unsafe fn right(from: *const u32) -> Self::Right;
    unsafe fn step(left: Self::Left, right: Self::Right, sum: Self::Sum) -> Self::Sum;
    /// The f32 result. `scales` and `sums` are those of the lanes' outputs and are read for int8 alone.
    unsafe fn finish(sum: Self::Sum, row_scale: f32, scales: *const f32, sums: *const i32) -> Self::V;
    /// Encodes one row of activations into `k` inputs' words, zeros to the end of the last; returns the row's scale.
    unsafe fn encode(x: &[f32], to: &mut [u32]) -> f32;
}

#[derive(Clone, Copy)]
pub(super) struct F32<V>(PhantomData<V>);

impl<V: Vector> Dot for F32<V> {
    type V = V;
    type Sum = V;
    type Left = V;
    type Right = V;
    const WORDS: usize = 1;
    const RIGHT_REGISTERS: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> V {
        // SAFETY: the caller's contract, here and below.
        unsafe { V::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn left(from: *const u32) -> V {
        // SAFETY: as above.
        unsafe { V::splat(from.cast::<f32>().read()) }
    }
    #[inline(always)]
    unsafe fn right(from: *const u32) -> V {
        // SAFETY: as above.
        unsafe { V::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn step(left: V, right: V, sum: V) -> V {
        // SAFETY: as above.
        unsafe { left.mul_add(right, sum) }
    }
    #[inline(always)]
    unsafe fn finish(sum: V, _: f32, _: *const f32, _: *const i32) -> V {
        sum
    }
    #[inline(always)]
    unsafe fn encode(x: &[f32], to: &mut [u32]) -> f32 {
        to.iter_mut().zip(x).for_each(|(to, x)| *to = x.to_bits());
        1.0
    }
}

/// bf16 without an instruction for it: widened to f32, even inputs first.
#[derive(Clone, Copy)]
pub(super) struct WidenedBf16<V>(PhantomData<V>);

impl<V: Vector> Dot for WidenedBf16<V> {
    type V = V;
    type Sum = V;
    type Left = (V, V);
    type Right = (V, V);
    const WORDS: usize = 2;
    const RIGHT_REGISTERS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> V {
        // SAFETY: the caller's contract, here and below.
        unsafe { V::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn left(from: *const u32) -> (V, V) {
        // SAFETY: as above.
        unsafe { (V::splat(from.cast::<f32>().read()), V::splat(from.cast::<f32>().wrapping_add(1).read())) }
    }
    #[inline(always)]
    unsafe fn right(from: *const u32) -> (V, V) {
        // SAFETY: as above.
        unsafe { V::load_bf16_pairs(from) }
    }
    #[inline(always)]
    unsafe fn step(left: (V, V), right: (V, V), sum: V) -> V {
        // SAFETY: as above.
        unsafe { left.1.mul_add(right.1, left.0.mul_add(right.0, sum)) }
    }
    #[inline(always)]
    unsafe fn finish(sum: V, _: f32, _: *const f32, _: *const i32) -> V {
        sum
    }
    #[inline(always)]
    unsafe fn encode(x: &[f32], to: &mut [u32]) -> f32 {
        to.iter_mut().zip(x).for_each(|(to, x)| *to = u32::from(bf16_bits(*x)) << 16);
        to[x.len()..].fill(0);
        1.0
    }
}

/// int8 by 16-bit multiply-adds: `(a0 w0 + a2 w2) + (a1 w1 + a3 w3)`, exact.
#[derive(Clone, Copy)]
pub(super) struct WidenedInt8<V>(PhantomData<V>);

impl<V: Vector> Dot for WidenedInt8<V> {
    type V = V;
    type Sum = V::Ints;
    type Left = (V::Ints, V::Ints);
    type Right = V::Ints;
    /// `(a0, a2)` and `(a1, a3)` as pairs of i16.
    const WORDS: usize = 2;
    const RIGHT_REGISTERS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> V::Ints {
        // SAFETY: the caller's contract, here and below.
        unsafe { V::splat_ints(0) }
    }
    #[inline(always)]
    unsafe fn left(from: *const u32) -> (V::Ints, V::Ints) {
        // SAFETY: as above.
        unsafe { (V::splat_ints(from.read() as i32), V::splat_ints(from.wrapping_add(1).read() as i32)) }
    }
    #[inline(always)]
    unsafe fn right(from: *const u32) -> V::Ints {
        // SAFETY: as above.
        unsafe { V::load_ints(from.cast()) }
    }
    #[inline(always)]
    unsafe fn step(left: (V::Ints, V::Ints), right: V::Ints, sum: V::Ints) -> V::Ints {
        // SAFETY: as above.
        unsafe { V::add_int8_quads(left, right, sum) }
    }
    #[inline(always)]
    unsafe fn finish(sum: V::Ints, row_scale: f32, scales: *const f32, _: *const i32) -> V {
        // SAFETY: as above.
        unsafe { V::from_ints(sum).mul(V::splat(row_scale)).mul(V::load(scales)) }
    }
    #[inline(always)]
    unsafe fn encode(x: &[f32], to: &mut [u32]) -> f32 {
        let (scale, inverse) = int8_scale(x);
        for (words, x) in to.chunks_exact_mut(2).zip(x.chunks(4)) {
            let mut quad = [0u16; 4];
            quad.iter_mut().zip(x).for_each(|(quad, x)| *quad = int8(*x, inverse) as i16 as u16);
            words[0] = u32::from(quad[0]) | u32::from(quad[2]) << 16;
            words[1] = u32::from(quad[1]) | u32::from(quad[3]) << 16;
        }
        scale
    }
}

/// `vdpbf16ps`: two products a lane and step, even input first, each rounded to f32 as it is added.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct NativeBf16<V>(PhantomData<V>);

#[cfg(target_arch = "x86_64")]
impl<V: Vector + From<__m512>> Dot for NativeBf16<V> {
    type V = V;
    type Sum = __m512;
    type Left = __m512i;
    type Right = __m512i;
    const WORDS: usize = 1;
    const RIGHT_REGISTERS: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller's contract, here and below.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn left(from: *const u32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi32(from.read() as i32) }
    }
    #[inline(always)]
    unsafe fn right(from: *const u32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn step(left: __m512i, right: __m512i, sum: __m512) -> __m512 {
        // SAFETY: as above; both types are 512 bits of any value.
        unsafe {
            let left = std::mem::transmute::<__m512i, __m512bh>(left);
            let right = std::mem::transmute::<__m512i, __m512bh>(right);
            _mm512_dpbf16_ps(sum, left, right)
        }
    }
    #[inline(always)]
    unsafe fn finish(sum: __m512, _: f32, _: *const f32, _: *const i32) -> V {
        sum.into()
    }
    #[inline(always)]
    unsafe fn encode(x: &[f32], to: &mut [u32]) -> f32 {
        let whole = x.len() - x.len() % 32;
        for (words, x) in to.chunks_exact_mut(16).zip(x.chunks_exact(32)) {
            // SAFETY: the features by the caller's contract; 32 floats make 16 words.
            unsafe {
                let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[16..].as_ptr()));
                let pairs = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(words.as_mut_ptr().cast(), pairs);
            }
        }
        for (word, pair) in to[whole / 2..].iter_mut().zip(x[whole..].chunks(2)) {
            let second = pair.get(1).map_or(0, |x| u32::from(bf16_bits(*x)));
            *word = u32::from(bf16_bits(pair[0])) | second << 16;
        }
        1.0
    }
}

/// `vpdpbusd`: four exact products a lane and step. It wants unsigned activations, so 128 is added to each and 128 times the sum of
/// the weights taken off at the end.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct NativeInt8<V>(PhantomData<V>);

#[cfg(target_arch = "x86_64")]
impl<V: Vector + From<__m512>> Dot for NativeInt8<V> {
    type V = V;
    type Sum = __m512i;
    type Left = __m512i;
    type Right = __m512i;
    const WORDS: usize = 1;
    const RIGHT_REGISTERS: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: the caller's contract, here and below.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn left(from: *const u32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi32(from.read() as i32) }
    }
    #[inline(always)]
    unsafe fn right(from: *const u32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn step(left: __m512i, right: __m512i, sum: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(sum, left, right) }
    }
    #[inline(always)]
    unsafe fn finish(sum: __m512i, row_scale: f32, scales: *const f32, sums: *const i32) -> V {
        // SAFETY: as above.
        unsafe {
            let offset = _mm512_slli_epi32::<7>(_mm512_loadu_si512(sums.cast()));
            let exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offset));
            let scaled = _mm512_mul_ps(exact, _mm512_set1_ps(row_scale));
            _mm512_mul_ps(scaled, _mm512_loadu_ps(scales)).into()
        }
    }
    #[inline(always)]
    unsafe fn encode(x: &[f32], to: &mut [u32]) -> f32 {
        let (scale, inverse) = int8_scale(x);
        let whole = x.len() - x.len() % 16;
        for (words, x) in to.chunks_exact_mut(4).zip(x.chunks_exact(16)) {
            // SAFETY: the features by the caller's contract; 16 floats make 4 words.
            unsafe {
                let scaled = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr()), _mm512_set1_ps(inverse));
                let biased = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128));
                _mm_storeu_si128(words.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(biased));
            }
        }
        for (word, x) in to[whole / 4..].iter_mut().zip(x[whole..].chunks(4)) {
            let mut quad = [128; 4];
            quad.iter_mut().zip(x).for_each(|(quad, x)| *quad = (int8(*x, inverse) + 128) as u8);
            *word = u32::from_le_bytes(quad);
        }
        scale
    }
}

/// What 1 stands for in a row, and its inverse. A row of zeros has neither.
#[inline(always)]
fn int8_scale(x: &[f32]) -> (f32, f32) {
    // Sixteen partial maxima, so that the compiler can use registers of any width; a maximum has no order.
    let mut largest = [0.0f32; 16];
    for chunk in x.chunks(16) {
        largest.iter_mut().zip(chunk).for_each(|(largest, x)| {
            let size = x.abs();
            *largest = if size > *largest { size } else { *largest };
        });
    }
    let largest = largest.into_iter().fold(0.0, f32::max);
    if largest > 0.0 { (largest / INT8_MAX, INT8_MAX / largest) } else { (0.0, 0.0) }
}

#[inline(always)]
fn int8(x: f32, inverse: f32) -> i32 {
    (x * inverse).round_ties_even() as i32
}

/// Rounded to nearest even; subnormal numbers become zero, as the instruction has them.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let rounded = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if magnitude > 0x7f80_0000 {
        (bits >> 16) as u16 | 0x40
    } else if magnitude < 0x0080_0000 {
        (bits >> 16) as u16 & 0x8000
    } else {
        rounded
    }
}
