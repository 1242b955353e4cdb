//! Plain arrays: the definition that the other levels are tested against.

use half::f16;

use super::{LANES, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

type Floats = [f32; LANES];
type Ints = [i32; LANES];

#[inline(always)]
fn zip(a: Floats, b: Floats, f: impl Fn(f32, f32) -> f32) -> Floats {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn pair_dot<T: Copy + Into<i32>>(sum: Ints, from: *const T, pair: [i16; 2]) -> Ints {
    // SAFETY: the caller gives 16 rows of two numbers.
    let at = |i: usize| unsafe { (*from.add(i)).into() };
    std::array::from_fn(|i| sum[i] + at(2 * i) * i32::from(pair[0]) + at(2 * i + 1) * i32::from(pair[1]))
}

impl Simd for Portable {
    type F = Floats;
    type I = Ints;
    type B = [u8; 64];
    type D = Ints;
    type S = Ints;
    type W = [u8; 64];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Floats {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Floats {
        from.cast::<Floats>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Floats) {
        to.cast::<Floats>().write_unaligned(x);
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> Floats {
        from.cast::<[u16; LANES]>().read_unaligned().map(|bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn store_half(to: *mut u16, x: Floats) {
        to.cast::<[u16; LANES]>().write_unaligned(x.map(|x| f16::from_f32(x).to_bits()));
    }
    #[inline(always)]
    unsafe fn add(a: Floats, b: Floats) -> Floats {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Floats, b: Floats) -> Floats {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Floats, b: Floats) -> Floats {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Floats, b: Floats) -> Floats {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Floats, b: Floats, c: Floats) -> Floats {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: Floats, b: Floats) -> Floats {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Floats, b: Floats) -> Floats {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(x: Floats) -> Floats {
        x.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn exp2(whole: Floats) -> Floats {
        whole.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn keep(x: Floats, count: usize, other: Floats) -> Floats {
        std::array::from_fn(|i| if i < count { x[i] } else { other[i] })
    }
    #[inline(always)]
    unsafe fn abs(x: Floats) -> Floats {
        x.map(f32::abs)
    }
    #[inline(always)]
    unsafe fn store_bytes(to: *mut i8, x: Floats) {
        to.cast::<[i8; LANES]>().write_unaligned(x.map(|x| x as i8));
    }

    #[inline(always)]
    unsafe fn zero_int() -> Ints {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn to_float(x: Ints) -> Floats {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn sub_int(x: Ints, n: i32) -> Ints {
        x.map(|x| x - n)
    }
    #[inline(always)]
    unsafe fn sub_32_times(a: Ints, b: Ints) -> Ints {
        std::array::from_fn(|i| a[i] - 32 * b[i])
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> [u8; 64] {
        from.cast::<[u8; 64]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn low(x: [u8; 64]) -> [u8; 64] {
        x.map(|x| x & 15)
    }
    #[inline(always)]
    unsafe fn high(x: [u8; 64]) -> [u8; 64] {
        x.map(|x| x >> 4)
    }
    #[inline(always)]
    unsafe fn with_top<const G: usize>(x: [u8; 64], bits: [u8; 64]) -> [u8; 64] {
        std::array::from_fn(|i| x[i] | ((bits[i] >> (2 * G)) & 3) << 4)
    }

    #[inline(always)]
    unsafe fn zero_dot() -> Ints {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn dot(sum: Ints, weights: [u8; 64], a: *const i8) -> Ints {
        let a = a.cast::<[i8; 4]>().read_unaligned();
        std::array::from_fn(|row| {
            (0..4).fold(sum[row], |sum, i| sum + i32::from(weights[4 * row + i]) * i32::from(a[i]))
        })
    }
    #[inline(always)]
    unsafe fn fold(sum: Ints, dots: Ints, scales: Ints) -> Ints {
        std::array::from_fn(|i| sum[i] + dots[i] * scales[i])
    }
    #[inline(always)]
    unsafe fn scales(from: *const u8) -> (Ints, Ints) {
        let all = from.cast::<[u8; 32]>().read_unaligned();
        (std::array::from_fn(|i| all[2 * i].into()), std::array::from_fn(|i| all[2 * i + 1].into()))
    }
    #[inline(always)]
    unsafe fn signed_scales(from: *const i8) -> (Ints, Ints) {
        let all = from.cast::<[i8; 32]>().read_unaligned();
        (std::array::from_fn(|i| all[2 * i].into()), std::array::from_fn(|i| all[2 * i + 1].into()))
    }
    #[inline(always)]
    unsafe fn pair_dot(sum: Ints, from: *const u8, pair: [i16; 2]) -> Ints {
        pair_dot(sum, from, pair)
    }
    #[inline(always)]
    unsafe fn signed_pair_dot(sum: Ints, from: *const i8, pair: [i16; 2]) -> Ints {
        pair_dot(sum, from, pair)
    }

    #[inline(always)]
    unsafe fn signed(weights: [u8; 64]) -> [u8; 64] {
        weights
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: Ints, weights: [u8; 64], a: *const i8) -> Ints {
        let a = a.cast::<[i8; 4]>().read_unaligned();
        std::array::from_fn(|row| {
            (0..4).fold(sum[row], |sum, i| sum + i32::from(weights[4 * row + i] as i8) * i32::from(a[i]))
        })
    }
    #[inline(always)]
    unsafe fn finish_signed(sum: Ints, _total: i32) -> Ints {
        sum
    }
}
