//! Sixteen lanes of floats, sixteen rows of integer dot products: what each set of instructions must offer.
//!
//! Kernels are generic over [`Simd`] and are inlined whole into one function a level that enables its instructions
//! (`levels!`). Every operation acts lane by lane and rounds as IEEE 754 says, so the levels agree bit by bit.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// Lanes of a float vector; rows of a tile of weights.
pub(crate) const LANES: usize = 16;

/// One level's operations.
///
/// # Safety
/// Every method may use instructions of its level: the caller has checked that the machine has them, and is itself
/// inlined into a function that enables them. Pointers are valid for what the method says it touches, unaligned.
pub(crate) trait Simd: Copy {
    /// Sixteen floats.
    type F: Copy;
    /// Sixteen 32-bit integers.
    type I: Copy;
    /// Sixteen rows of four bytes, the next four inputs of a tile.
    type B: Copy;
    /// Running dot products of small unsigned weights, one a row, before their block's scale.
    type D: Copy;
    /// Sixteen rows' scales, each as the level needs it to scale a [`Simd::D`].
    type S: Copy;
    /// Signed weights made ready for [`Simd::dot_signed`].
    type W: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    /// Reads 16 floats.
    unsafe fn load(from: *const f32) -> Self::F;
    /// Writes 16 floats.
    unsafe fn store(to: *mut f32, x: Self::F);
    /// Reads 16 halves.
    unsafe fn load_half(from: *const u16) -> Self::F;
    /// Writes 16 halves, rounded to the nearest, even on a tie.
    unsafe fn store_half(to: *mut u16, x: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a > b ? a : b`.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// The nearest whole number, even on a tie. `|x|` is below 2^30.
    unsafe fn round(x: Self::F) -> Self::F;
    /// Two to the power of a whole number from -126 to 127.
    unsafe fn exp2(whole: Self::F) -> Self::F;
    /// Keeps the first `count` lanes; `other` in the rest.
    unsafe fn keep(x: Self::F, count: usize, other: Self::F) -> Self::F;
    /// Without the sign.
    unsafe fn abs(x: Self::F) -> Self::F;
    /// Writes the lanes, whole numbers from -127 to 127, as 16 bytes.
    unsafe fn store_bytes(to: *mut i8, x: Self::F);

    unsafe fn zero_int() -> Self::I;
    unsafe fn to_float(x: Self::I) -> Self::F;
    /// `x - n`, in each lane.
    unsafe fn sub_int(x: Self::I, n: i32) -> Self::I;
    /// `a - 32 * b`.
    unsafe fn sub_32_times(a: Self::I, b: Self::I) -> Self::I;

    /// Reads 64 bytes.
    unsafe fn load_bytes(from: *const u8) -> Self::B;
    /// The low four bits of each byte.
    unsafe fn low(x: Self::B) -> Self::B;
    /// The high four bits of each byte.
    unsafe fn high(x: Self::B) -> Self::B;
    /// `x | ((bits >> 2 * G) & 3) << 4`, a byte at a time.
    unsafe fn with_top<const G: usize>(x: Self::B, bits: Self::B) -> Self::B;

    unsafe fn zero_dot() -> Self::D;
    /// Adds each row's four products of weights (0 to 63) with the four activations at `a` (-127 to 127). A [`Simd::D`]
    /// takes eight of these when the weights are below 16, two otherwise.
    unsafe fn dot(sum: Self::D, weights: Self::B, a: *const i8) -> Self::D;
    /// Adds each row's dot product times its scale.
    unsafe fn fold(sum: Self::I, dots: Self::D, scales: Self::S) -> Self::I;
    /// Reads sixteen rows of two unsigned scales (0 to 63), for two neighbouring blocks.
    unsafe fn scales(from: *const u8) -> (Self::S, Self::S);
    /// The same for signed scales.
    unsafe fn signed_scales(from: *const i8) -> (Self::S, Self::S);
    /// Adds, a row, the products of its two unsigned numbers at `from` with `pair`.
    unsafe fn pair_dot(sum: Self::I, from: *const u8, pair: [i16; 2]) -> Self::I;
    /// The same for signed numbers.
    unsafe fn signed_pair_dot(sum: Self::I, from: *const i8, pair: [i16; 2]) -> Self::I;

    unsafe fn signed(weights: Self::B) -> Self::W;
    /// Adds each row's four products of signed weights with the four activations at `a`.
    unsafe fn dot_signed(sum: Self::I, weights: Self::W, a: *const i8) -> Self::I;
    /// Takes away what [`Simd::dot_signed`] added beyond the products, for activations that sum to `total`.
    unsafe fn finish_signed(sum: Self::I, total: i32) -> Self::I;
}

/// Adds sixteen numbers: lane with lane 8 further, then 4, 2, 1.
pub(crate) fn tree(x: &[f32; LANES]) -> f32 {
    let mut x = *x;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            x[i] += x[i + half];
        }
    }
    x[0]
}

#[inline(always)]
pub(crate) unsafe fn sum<S: Simd>(x: S::F) -> f32 {
    let mut lanes = [0f32; LANES];
    S::store(lanes.as_mut_ptr(), x);
    tree(&lanes)
}

/// The first lane, of a vector whose lanes are one number.
#[inline(always)]
pub(crate) unsafe fn first<S: Simd>(x: S::F) -> f32 {
    let mut lanes = [0f32; LANES];
    S::store(lanes.as_mut_ptr(), x);
    lanes[0]
}

/// Reads `count` floats, at most sixteen; zeros in the rest.
#[inline(always)]
pub(crate) unsafe fn load_part<S: Simd>(from: *const f32, count: usize) -> S::F {
    let mut lanes = [0f32; LANES];
    std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
    S::load(lanes.as_ptr())
}

/// Writes the first `count` lanes.
#[inline(always)]
pub(crate) unsafe fn store_part<S: Simd>(to: *mut f32, x: S::F, count: usize) {
    let mut lanes = [0f32; LANES];
    S::store(lanes.as_mut_ptr(), x);
    std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
}

#[inline(always)]
pub(crate) unsafe fn largest<S: Simd>(x: S::F) -> f32 {
    let mut lanes = [0f32; LANES];
    S::store(lanes.as_mut_ptr(), x);
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = if lanes[i] > lanes[i + half] { lanes[i] } else { lanes[i + half] };
        }
    }
    lanes[0]
}

/// Least and greatest argument of [`exp`] that is not held to the bound: the result stays a normal number.
const EXP_MIN: f32 = -87.0;
const EXP_MAX: f32 = 88.0;

/// e to the power of each lane, arguments held to -87 to 88: within 2 units in the last place.
///
/// Cody and Waite's reduction with a polynomial of degree 6 (coefficients 1/k!), each step fused.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    let x = S::min(S::max(x, S::splat(EXP_MIN)), S::splat(EXP_MAX));
    let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
    let r = S::fma(n, S::splat(-355.0 / 512.0), x);
    let r = S::fma(n, S::splat(2.121_944_4e-4), r);
    let mut p = S::splat(1.0 / 720.0);
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = S::fma(p, r, S::splat(c));
    }
    S::mul(p, S::exp2(n))
}

/// Makes `$name(level, arguments)`: the generic `$body`, compiled for each level.
macro_rules! levels {
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident$(<$(const $c:ident: $ct:ty),*>)?($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? = $body:ident) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name$(<$(const $c: $ct),*>)?(level: $crate::Level, $($arg: $type),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2$(<$(const $c: $ct),*>)?($($arg: $type),*) $(-> $out)? {
                $body::<$crate::simd::Avx2 $($(, $c)*)?>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512$(<$(const $c: $ct),*>)?($($arg: $type),*) $(-> $out)? {
                $body::<$crate::simd::Avx512 $($(, $c)*)?>($($arg),*)
            }
            match level {
                #[cfg(target_arch = "x86_64")]
                $crate::Level::Avx2 => avx2$(::<$($c),*>)?($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::Level::Avx512 => avx512$(::<$($c),*>)?($($arg),*),
                _ => $body::<$crate::simd::Portable $($(, $c)*)?>($($arg),*),
            }
        }
    };
}
pub(crate) use levels;
