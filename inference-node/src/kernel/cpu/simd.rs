//! Vectors of f32 for three instruction sets behind one trait; everything above is written once and instantiated inside functions
//! that enable the features.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::tile::Block;

/// Register operations. Every method is elementwise with one rounding a step, so a result depends on neither the lane nor the
/// number of lanes.
///
/// # Safety
/// The methods may only run on a CPU with the implementation's features ([`super::Isa::detect`] decides once), and pointers must
/// be valid for `LANES` elements.
pub(super) trait Vector: Copy {
    const LANES: usize;
    /// Accumulators of one tile that fit the register file beside its operands.
    const ACCUMULATORS: usize;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    unsafe fn min(self, other: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    /// `self * factor + addend`, as this instruction set rounds it.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The nearest whole number, ties to even.
    unsafe fn round(self) -> Self;
    /// `2^self` for a whole `self` in -126..=127.
    unsafe fn exp2_whole(self) -> Self;
    /// `mul_add` of single numbers, rounded as the vector form.
    unsafe fn mul_add_scalar(a: f32, b: f32, c: f32) -> f32;
    /// The block's multiplication. One compiled copy an instruction set, since its tiles are most of the kernel's code.
    unsafe fn multiply(block: Block);
}

/// `e^x` with a relative error under 2 ulp; below -87.3 it is flushed to about 1e-38, above 88.3 it saturates.
/// Cody-Waite reduction by ln 2 in two parts, then the polynomial of degree 6 of Cephes' `expf`.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(super) unsafe fn exp<V: Vector>(x: V) -> V {
    // SAFETY: the caller's contract.
    unsafe {
        let x = x.max(V::splat(-87.336_54)).min(V::splat(88.02));
        let whole = x.mul(V::splat(std::f32::consts::LOG2_E)).round();
        let r = whole.mul_add(V::splat(-0.693_359_4), x);
        let r = whole.mul_add(V::splat(2.121_944_4e-4), r);
        let mut p = V::splat(1.987_569_1e-4);
        for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = p.mul_add(r, V::splat(coefficient));
        }
        p.mul_add(r.mul(r), r).add(V::splat(1.0)).mul(whole.exp2_whole())
    }
}

/// `1 / (1 + e^-x)`
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(super) unsafe fn sigmoid<V: Vector>(x: V) -> V {
    // SAFETY: the caller's contract.
    unsafe {
        let one = V::splat(1.0);
        one.div(one.add(exp(V::splat(0.0).sub(x))))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Portable(std::array::from_fn(|lane| f(self.0[lane], other.0[lane])))
    }
}

impl Vector for Portable {
    const LANES: usize = 8;
    const ACCUMULATORS: usize = 6;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Portable([value; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's contract; reads need no alignment.
        Portable(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's contract; writes need no alignment.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, f32::min)
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, f32::max)
    }
    /// Two roundings: a fused one is a library call where the hardware has none.
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        self.zip(factor, |a, b| a * b).zip(addend, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Portable(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    unsafe fn exp2_whole(self) -> Self {
        Portable(self.0.map(|whole| f32::from_bits(((whole as i32 + 127) as u32) << 23)))
    }
    #[inline(always)]
    unsafe fn mul_add_scalar(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    #[inline(never)]
    unsafe fn multiply(block: Block) {
        // SAFETY: the caller's contract.
        unsafe { block.tiles::<Portable>() }
    }
}

/// Implements [`Vector`] by one intrinsic a method.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_vector {
    ($name:ident, $features:literal, $register:ty, $lanes:literal, $accumulators:literal, $splat:ident, $load:ident, $store:ident,
     $add:ident, $sub:ident, $mul:ident, $div:ident, $min:ident, $max:ident, $fma:ident, $round:expr, $exp2:expr) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name($register);

        // SAFETY (every block below): the trait's contract gives the CPU feature and, for load and store, a valid pointer; none of
        // these intrinsics needs alignment.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Vector for $name {
            const LANES: usize = $lanes;
            const ACCUMULATORS: usize = $accumulators;

            #[inline(always)]
            unsafe fn splat(value: f32) -> Self {
                $name(unsafe { $splat(value) })
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                $name(unsafe { $load(from) })
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                unsafe { $store(to, self.0) }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                $name(unsafe { $add(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn sub(self, other: Self) -> Self {
                $name(unsafe { $sub(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn mul(self, other: Self) -> Self {
                $name(unsafe { $mul(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn div(self, other: Self) -> Self {
                $name(unsafe { $div(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn min(self, other: Self) -> Self {
                $name(unsafe { $min(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn max(self, other: Self) -> Self {
                $name(unsafe { $max(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
                $name(unsafe { $fma(self.0, factor.0, addend.0) })
            }
            #[inline(always)]
            unsafe fn round(self) -> Self {
                $name(unsafe { $round(self.0) })
            }
            #[inline(always)]
            unsafe fn exp2_whole(self) -> Self {
                $name(unsafe { $exp2(self.0) })
            }
            #[inline(always)]
            unsafe fn mul_add_scalar(a: f32, b: f32, c: f32) -> f32 {
                a.mul_add(b, c)
            }
            #[inline(always)]
            unsafe fn multiply(block: Block) {
                #[inline(never)]
                #[target_feature(enable = $features)]
                unsafe fn tiles(block: Block) {
                    unsafe { block.tiles::<$name>() }
                }
                unsafe { tiles(block) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
x86_vector!(
    Avx2,
    "avx2,fma",
    __m256,
    8,
    12,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_div_ps,
    _mm256_min_ps,
    _mm256_max_ps,
    _mm256_fmadd_ps,
    _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>,
    |x| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
        _mm256_cvtps_epi32(x),
        _mm256_set1_epi32(127)
    )))
);

#[cfg(target_arch = "x86_64")]
x86_vector!(
    Avx512,
    "avx512f,avx2,fma",
    __m512,
    16,
    24,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_div_ps,
    _mm512_min_ps,
    _mm512_max_ps,
    _mm512_fmadd_ps,
    _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>,
    |x| _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
        _mm512_cvtps_epi32(x),
        _mm512_set1_epi32(127)
    )))
);
