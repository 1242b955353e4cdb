//! AVX-512 with VNNI: sixteen rows in one register.

use std::arch::x86_64::*;

use super::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

#[inline(always)]
unsafe fn four(a: *const i8) -> __m512i {
    _mm512_set1_epi32(a.cast::<i32>().read_unaligned())
}

#[inline(always)]
unsafe fn pair(pair: [i16; 2]) -> __m512i {
    _mm512_set1_epi32(i32::from(pair[0]) & 0xffff | i32::from(pair[1]) << 16)
}

#[inline(always)]
unsafe fn half_register(from: *const u8) -> __m256i {
    _mm256_loadu_si256(from.cast())
}

/// Rows of two 16-bit numbers, as rows of the first and of the second, in 32 bits with their sign.
#[inline(always)]
unsafe fn split(rows: __m512i) -> (__m512i, __m512i) {
    (_mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(rows)), _mm512_srai_epi32::<16>(rows))
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type D = __m512i;
    type S = __m512i;
    /// The weights plus 128.
    type W = __m512i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        _mm512_loadu_ps(from)
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: __m512) {
        _mm512_storeu_ps(to, x);
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> __m512 {
        _mm512_cvtph_ps(half_register(from.cast()))
    }
    #[inline(always)]
    unsafe fn store_half(to: *mut u16, x: __m512) {
        _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(x));
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn round(x: __m512) -> __m512 {
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
    }
    #[inline(always)]
    unsafe fn exp2(whole: __m512) -> __m512 {
        let biased = _mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127));
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
    }
    #[inline(always)]
    unsafe fn keep(x: __m512, count: usize, other: __m512) -> __m512 {
        let mask = ((1u32 << count.min(16)) - 1) as u16;
        _mm512_mask_blend_ps(mask, other, x)
    }
    #[inline(always)]
    unsafe fn abs(x: __m512) -> __m512 {
        _mm512_abs_ps(x)
    }
    #[inline(always)]
    unsafe fn store_bytes(to: *mut i8, x: __m512) {
        _mm_storeu_si128(to.cast(), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
    }

    #[inline(always)]
    unsafe fn zero_int() -> __m512i {
        _mm512_setzero_si512()
    }
    #[inline(always)]
    unsafe fn to_float(x: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(x)
    }
    #[inline(always)]
    unsafe fn sub_int(x: __m512i, n: i32) -> __m512i {
        _mm512_sub_epi32(x, _mm512_set1_epi32(n))
    }
    #[inline(always)]
    unsafe fn sub_32_times(a: __m512i, b: __m512i) -> __m512i {
        _mm512_sub_epi32(a, _mm512_slli_epi32::<5>(b))
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m512i {
        _mm512_loadu_si512(from.cast())
    }
    #[inline(always)]
    unsafe fn low(x: __m512i) -> __m512i {
        _mm512_and_si512(x, _mm512_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn high(x: __m512i) -> __m512i {
        _mm512_and_si512(_mm512_srli_epi16::<4>(x), _mm512_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn with_top<const G: usize>(x: __m512i, bits: __m512i) -> __m512i {
        let moved = match G {
            0 => _mm512_slli_epi16::<4>(bits),
            1 => _mm512_slli_epi16::<2>(bits),
            2 => bits,
            _ => _mm512_srli_epi16::<2>(bits),
        };
        _mm512_or_si512(x, _mm512_and_si512(moved, _mm512_set1_epi8(0x30)))
    }

    #[inline(always)]
    unsafe fn zero_dot() -> __m512i {
        _mm512_setzero_si512()
    }
    #[inline(always)]
    unsafe fn dot(sum: __m512i, weights: __m512i, a: *const i8) -> __m512i {
        _mm512_dpbusd_epi32(sum, weights, four(a))
    }
    #[inline(always)]
    unsafe fn fold(sum: __m512i, dots: __m512i, scales: __m512i) -> __m512i {
        _mm512_add_epi32(sum, _mm512_mullo_epi32(dots, scales))
    }
    #[inline(always)]
    unsafe fn scales(from: *const u8) -> (__m512i, __m512i) {
        split(_mm512_cvtepu8_epi16(half_register(from)))
    }
    #[inline(always)]
    unsafe fn signed_scales(from: *const i8) -> (__m512i, __m512i) {
        split(_mm512_cvtepi8_epi16(half_register(from.cast())))
    }
    #[inline(always)]
    unsafe fn pair_dot(sum: __m512i, from: *const u8, numbers: [i16; 2]) -> __m512i {
        let rows = _mm512_cvtepu8_epi16(half_register(from));
        _mm512_add_epi32(sum, _mm512_madd_epi16(rows, pair(numbers)))
    }
    #[inline(always)]
    unsafe fn signed_pair_dot(sum: __m512i, from: *const i8, numbers: [i16; 2]) -> __m512i {
        let rows = _mm512_cvtepi8_epi16(half_register(from.cast()));
        _mm512_add_epi32(sum, _mm512_madd_epi16(rows, pair(numbers)))
    }

    #[inline(always)]
    unsafe fn signed(weights: __m512i) -> __m512i {
        _mm512_xor_si512(weights, _mm512_set1_epi8(-128))
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: __m512i, weights: __m512i, a: *const i8) -> __m512i {
        _mm512_dpbusd_epi32(sum, weights, four(a))
    }
    #[inline(always)]
    unsafe fn finish_signed(sum: __m512i, total: i32) -> __m512i {
        Self::sub_int(sum, 128 * total)
    }
}
