//! Vectors of f32 for three instruction sets behind one trait; everything above is written once and instantiated inside functions
//! that enable the features.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::dot::{Dot, F32, WidenedBf16, WidenedInt8};
#[cfg(target_arch = "x86_64")]
use super::dot::{NativeBf16, NativeInt8};
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
    /// i32 lanes.
    type Ints: Copy;
    type F32: Dot<V = Self>;
    type Bf16: Dot<V = Self>;
    type Int8: Dot<V = Self>;

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
    /// Pairs of bf16, widened: those in the low halves, then those in the high halves. `from` is valid for `LANES` words.
    unsafe fn load_bf16_pairs(from: *const u32) -> (Self, Self);
    unsafe fn splat_ints(value: i32) -> Self::Ints;
    unsafe fn load_ints(from: *const i32) -> Self::Ints;
    unsafe fn from_ints(ints: Self::Ints) -> Self;
    /// `sum + the products of four int8 a lane`; `left` is pairs of i16 for bytes (0, 2) and (1, 3) of `right`.
    unsafe fn add_int8_quads(
        left: (Self::Ints, Self::Ints),
        right: Self::Ints,
        sum: Self::Ints,
    ) -> Self::Ints;
    /// The block's multiplication. One compiled copy an instruction set, since its tiles are most of the kernel's code.
    unsafe fn multiply(block: Block);
}

/// Asks for a cache line that will be read soon. The address need not be valid.
#[inline(always)]
pub(super) fn prefetch(at: *const u32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch of any address has no effect that a program could see.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
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
    type Ints = [i32; 8];
    type F32 = F32<Self>;
    type Bf16 = WidenedBf16<Self>;
    type Int8 = WidenedInt8<Self>;

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
    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u32) -> (Self, Self) {
        // SAFETY: the caller's contract.
        let words = unsafe { from.cast::<[u32; 8]>().read_unaligned() };
        let widen = |half: fn(u32) -> u32| Portable(words.map(|word| f32::from_bits(half(word))));
        (widen(|word| word << 16), widen(|word| word & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn splat_ints(value: i32) -> [i32; 8] {
        [value; 8]
    }
    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> [i32; 8] {
        // SAFETY: the caller's contract.
        unsafe { from.cast::<[i32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn from_ints(ints: [i32; 8]) -> Self {
        Portable(ints.map(|int| int as f32))
    }
    #[inline(always)]
    unsafe fn add_int8_quads(left: ([i32; 8], [i32; 8]), right: [i32; 8], sum: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|lane| {
            let bytes = right[lane].to_le_bytes().map(|byte| i32::from(byte as i8));
            let [even, odd] = [left.0[lane], left.1[lane]].map(|pair| [i32::from(pair as i16), pair >> 16]);
            let products =
                (even[0] * bytes[0] + even[1] * bytes[2]) + (odd[0] * bytes[1] + odd[1] * bytes[3]);
            sum[lane].wrapping_add(products)
        })
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
     $add:ident, $sub:ident, $mul:ident, $div:ident, $min:ident, $max:ident, $fma:ident, $round:expr, $exp2:expr,
     $ints:ty, $bf16:ty, $int8:ty, $splat_i:ident, $load_i:ident, $as_f:ident, $convert:ident, $shl32:ident, $and:ident, $shl16:ident,
     $sar16:ident, $madd:ident, $add_i:ident) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name($register);

        impl From<$register> for $name {
            #[inline(always)]
            fn from(register: $register) -> Self {
                $name(register)
            }
        }

        // SAFETY (every block below): the trait's contract gives the CPU feature and, for load and store, a valid pointer; none of
        // these intrinsics needs alignment.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Vector for $name {
            const LANES: usize = $lanes;
            const ACCUMULATORS: usize = $accumulators;
            type Ints = $ints;
            type F32 = F32<Self>;
            type Bf16 = $bf16;
            type Int8 = $int8;

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
            unsafe fn load_bf16_pairs(from: *const u32) -> (Self, Self) {
                unsafe {
                    let words = $load_i(from.cast());
                    let high = $and(words, $splat_i(0xffff_0000_u32 as i32));
                    ($name($as_f($shl32::<16>(words))), $name($as_f(high)))
                }
            }
            #[inline(always)]
            unsafe fn splat_ints(value: i32) -> $ints {
                unsafe { $splat_i(value) }
            }
            #[inline(always)]
            unsafe fn load_ints(from: *const i32) -> $ints {
                unsafe { $load_i(from.cast()) }
            }
            #[inline(always)]
            unsafe fn from_ints(ints: $ints) -> Self {
                $name(unsafe { $convert(ints) })
            }
            #[inline(always)]
            unsafe fn add_int8_quads(left: ($ints, $ints), right: $ints, sum: $ints) -> $ints {
                unsafe {
                    let even = $madd(left.0, $sar16::<8>($shl16::<8>(right)));
                    $add_i(sum, $add_i(even, $madd(left.1, $sar16::<8>(right))))
                }
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
    ))),
    __m256i,
    WidenedBf16<Self>,
    WidenedInt8<Self>,
    _mm256_set1_epi32,
    _mm256_loadu_si256,
    _mm256_castsi256_ps,
    _mm256_cvtepi32_ps,
    _mm256_slli_epi32,
    _mm256_and_si256,
    _mm256_slli_epi16,
    _mm256_srai_epi16,
    _mm256_madd_epi16,
    _mm256_add_epi32
);

#[cfg(target_arch = "x86_64")]
macro_rules! avx512_vector {
    ($name:ident, $features:literal, $bf16:ident, $int8:ident) => {
        x86_vector!(
            $name,
            $features,
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
            ))),
            __m512i,
            $bf16<Self>,
            $int8<Self>,
            _mm512_set1_epi32,
            _mm512_loadu_si512,
            _mm512_castsi512_ps,
            _mm512_cvtepi32_ps,
            _mm512_slli_epi32,
            _mm512_and_si512,
            _mm512_slli_epi16,
            _mm512_srai_epi16,
            _mm512_madd_epi16,
            _mm512_add_epi32
        );
    };
}

#[cfg(target_arch = "x86_64")]
avx512_vector!(Avx512, "avx512f,avx512bw,avx2,fma", WidenedBf16, WidenedInt8);

// The same with instructions for products of bf16 and of int8.
#[cfg(target_arch = "x86_64")]
avx512_vector!(Avx512Dot, "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni,avx2,fma", NativeBf16, NativeInt8);
