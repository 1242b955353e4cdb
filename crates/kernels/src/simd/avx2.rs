//! AVX2: two halves of eight rows.

use std::arch::x86_64::*;

use super::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// Two of a register.
type Two<T> = (T, T);

/// Does one thing to both halves. A macro and not a closure: a closure that is not inlined could not hold intrinsics.
macro_rules! both {
    (|$x:ident| $body:expr, $of:expr) => {{
        let of = $of;
        let first = {
            let $x = of.0;
            $body
        };
        let second = {
            let $x = of.1;
            $body
        };
        (first, second)
    }};
}

/// Four activations in every row.
#[inline(always)]
unsafe fn four(a: *const i8) -> __m256i {
    _mm256_set1_epi32(a.cast::<i32>().read_unaligned())
}

#[inline(always)]
unsafe fn pair(pair: [i16; 2]) -> __m256i {
    _mm256_set1_epi32(i32::from(pair[0]) & 0xffff | i32::from(pair[1]) << 16)
}

/// Rows of two 16-bit numbers, as rows of the first twice and of the second twice.
#[inline(always)]
unsafe fn split(rows: __m256i) -> Two<__m256i> {
    let first = _mm256_set_epi8(
        13, 12, 13, 12, 9, 8, 9, 8, 5, 4, 5, 4, 1, 0, 1, 0, 13, 12, 13, 12, 9, 8, 9, 8, 5, 4, 5, 4, 1, 0, 1, 0,
    );
    let second = _mm256_set_epi8(
        15, 14, 15, 14, 11, 10, 11, 10, 7, 6, 7, 6, 3, 2, 3, 2, 15, 14, 15, 14, 11, 10, 11, 10, 7, 6, 7, 6, 3, 2, 3, 2,
    );
    (_mm256_shuffle_epi8(rows, first), _mm256_shuffle_epi8(rows, second))
}

#[inline(always)]
unsafe fn sixteen(from: *const u8) -> __m128i {
    _mm_loadu_si128(from.cast())
}

impl Simd for Avx2 {
    type F = Two<__m256>;
    type I = Two<__m256i>;
    type B = Two<__m256i>;
    type D = Two<__m256i>;
    type S = Two<__m256i>;
    /// The weights, and their magnitudes.
    type W = Two<Two<__m256i>>;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        let x = _mm256_set1_ps(x);
        (x, x)
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8)))
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::F) {
        _mm256_storeu_ps(to, x.0);
        _mm256_storeu_ps(to.add(8), x.1);
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> Self::F {
        (_mm256_cvtph_ps(sixteen(from.cast())), _mm256_cvtph_ps(sixteen(from.add(8).cast())))
    }
    #[inline(always)]
    unsafe fn store_half(to: *mut u16, x: Self::F) {
        let halves = both!(|x| _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(x), x);
        _mm_storeu_si128(to.cast(), halves.0);
        _mm_storeu_si128(to.add(8).cast(), halves.1);
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        (_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1))
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        (_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn round(x: Self::F) -> Self::F {
        both!(|x| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x), x)
    }
    #[inline(always)]
    unsafe fn exp2(whole: Self::F) -> Self::F {
        both!(
            |n| {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            },
            whole
        )
    }
    #[inline(always)]
    unsafe fn keep(x: Self::F, count: usize, other: Self::F) -> Self::F {
        let count = _mm256_set1_epi32(count.min(16) as i32);
        let first = _mm256_cmpgt_epi32(count, _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
        let second = _mm256_cmpgt_epi32(count, _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8));
        (
            _mm256_blendv_ps(other.0, x.0, _mm256_castsi256_ps(first)),
            _mm256_blendv_ps(other.1, x.1, _mm256_castsi256_ps(second)),
        )
    }
    #[inline(always)]
    unsafe fn abs(x: Self::F) -> Self::F {
        both!(|x| _mm256_andnot_ps(_mm256_set1_ps(-0.0), x), x)
    }
    #[inline(always)]
    unsafe fn store_bytes(to: *mut i8, x: Self::F) {
        let words = both!(|x| _mm256_cvtps_epi32(x), x);
        // Packing works on 128-bit halves; the permutation puts them in order again.
        let packed = _mm256_packs_epi32(words.0, words.1);
        let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
        let bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256::<1>(ordered));
        _mm_storeu_si128(to.cast(), bytes);
    }

    #[inline(always)]
    unsafe fn zero_int() -> Self::I {
        (_mm256_setzero_si256(), _mm256_setzero_si256())
    }
    #[inline(always)]
    unsafe fn to_float(x: Self::I) -> Self::F {
        both!(|x| _mm256_cvtepi32_ps(x), x)
    }
    #[inline(always)]
    unsafe fn sub_int(x: Self::I, n: i32) -> Self::I {
        both!(|x| _mm256_sub_epi32(x, _mm256_set1_epi32(n)), x)
    }
    #[inline(always)]
    unsafe fn sub_32_times(a: Self::I, b: Self::I) -> Self::I {
        (_mm256_sub_epi32(a.0, _mm256_slli_epi32::<5>(b.0)), _mm256_sub_epi32(a.1, _mm256_slli_epi32::<5>(b.1)))
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast()))
    }
    #[inline(always)]
    unsafe fn low(x: Self::B) -> Self::B {
        both!(|x| _mm256_and_si256(x, _mm256_set1_epi8(15)), x)
    }
    #[inline(always)]
    unsafe fn high(x: Self::B) -> Self::B {
        both!(|x| _mm256_and_si256(_mm256_srli_epi16::<4>(x), _mm256_set1_epi8(15)), x)
    }
    #[inline(always)]
    unsafe fn with_top<const G: usize>(x: Self::B, bits: Self::B) -> Self::B {
        let top = both!(
            |bits| {
                let moved = match G {
                    0 => _mm256_slli_epi16::<4>(bits),
                    1 => _mm256_slli_epi16::<2>(bits),
                    2 => bits,
                    _ => _mm256_srli_epi16::<2>(bits),
                };
                _mm256_and_si256(moved, _mm256_set1_epi8(0x30))
            },
            bits
        );
        (_mm256_or_si256(x.0, top.0), _mm256_or_si256(x.1, top.1))
    }

    #[inline(always)]
    unsafe fn zero_dot() -> Self::D {
        Self::zero_int()
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::D, weights: Self::B, a: *const i8) -> Self::D {
        // Sums of products stay in 16 bits for as many as the trait allows: 8 * 2 * 15 * 127, 2 * 2 * 63 * 127.
        let a = four(a);
        (
            _mm256_add_epi16(sum.0, _mm256_maddubs_epi16(weights.0, a)),
            _mm256_add_epi16(sum.1, _mm256_maddubs_epi16(weights.1, a)),
        )
    }
    #[inline(always)]
    unsafe fn fold(sum: Self::I, dots: Self::D, scales: Self::S) -> Self::I {
        (
            _mm256_add_epi32(sum.0, _mm256_madd_epi16(dots.0, scales.0)),
            _mm256_add_epi32(sum.1, _mm256_madd_epi16(dots.1, scales.1)),
        )
    }
    #[inline(always)]
    unsafe fn scales(from: *const u8) -> (Self::S, Self::S) {
        let a = split(_mm256_cvtepu8_epi16(sixteen(from)));
        let b = split(_mm256_cvtepu8_epi16(sixteen(from.add(16))));
        ((a.0, b.0), (a.1, b.1))
    }
    #[inline(always)]
    unsafe fn signed_scales(from: *const i8) -> (Self::S, Self::S) {
        let a = split(_mm256_cvtepi8_epi16(sixteen(from.cast())));
        let b = split(_mm256_cvtepi8_epi16(sixteen(from.add(16).cast())));
        ((a.0, b.0), (a.1, b.1))
    }
    #[inline(always)]
    unsafe fn pair_dot(sum: Self::I, from: *const u8, numbers: [i16; 2]) -> Self::I {
        let numbers = pair(numbers);
        let rows = (_mm256_cvtepu8_epi16(sixteen(from)), _mm256_cvtepu8_epi16(sixteen(from.add(16))));
        let products = both!(|rows| _mm256_madd_epi16(rows, numbers), rows);
        (_mm256_add_epi32(sum.0, products.0), _mm256_add_epi32(sum.1, products.1))
    }
    #[inline(always)]
    unsafe fn signed_pair_dot(sum: Self::I, from: *const i8, numbers: [i16; 2]) -> Self::I {
        let numbers = pair(numbers);
        let rows = (_mm256_cvtepi8_epi16(sixteen(from.cast())), _mm256_cvtepi8_epi16(sixteen(from.add(16).cast())));
        let products = both!(|rows| _mm256_madd_epi16(rows, numbers), rows);
        (_mm256_add_epi32(sum.0, products.0), _mm256_add_epi32(sum.1, products.1))
    }

    #[inline(always)]
    unsafe fn signed(weights: Self::B) -> Self::W {
        (weights, both!(|x| _mm256_abs_epi8(x), weights))
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: Self::I, weights: Self::W, a: *const i8) -> Self::I {
        let a = four(a);
        let (signed, magnitudes) = weights;
        // At most 2 * 128 * 127: a pair fits 16 bits.
        let pairs = (
            _mm256_maddubs_epi16(magnitudes.0, _mm256_sign_epi8(a, signed.0)),
            _mm256_maddubs_epi16(magnitudes.1, _mm256_sign_epi8(a, signed.1)),
        );
        let fours = both!(|pairs| _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), pairs);
        (_mm256_add_epi32(sum.0, fours.0), _mm256_add_epi32(sum.1, fours.1))
    }
    #[inline(always)]
    unsafe fn finish_signed(sum: Self::I, _total: i32) -> Self::I {
        sum
    }
}
