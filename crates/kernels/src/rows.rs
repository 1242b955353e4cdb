//! Operations on single rows: norms, the gated activation, rotary positions.

use crate::pool::Disjoint;
use crate::simd::{LANES, Simd, exp, levels, load_part, store_part, sum};
use crate::{Level, Pool};

/// Calls `$full(i)` for each whole vector of `$n` numbers, and `$rest(i, count)` for what is left.
macro_rules! vectors {
    ($n:expr, |$i:ident| $full:expr, |$j:ident, $count:ident| $rest:expr) => {
        let whole = $n / LANES * LANES;
        for $i in (0..whole).step_by(LANES) {
            $full;
        }
        if whole < $n {
            let ($j, $count) = (whole, $n - whole);
            $rest;
        }
    };
}

/// RMS norm: `x / sqrt(mean(x^2) + epsilon) * weight`, the mean over virtual lanes. `out` may be `x`.
#[inline(always)]
pub(crate) unsafe fn norm_row<S: Simd>(x: *const f32, weight: *const f32, epsilon: f32, out: *mut f32, n: usize) {
    let mut squares = S::splat(0.0);
    vectors!(
        n,
        |i| {
            let x = S::load(x.add(i));
            squares = S::fma(x, x, squares);
        },
        |i, count| {
            let x = load_part::<S>(x.add(i), count);
            squares = S::fma(x, x, squares);
        }
    );
    let scale = S::splat(1.0 / (sum::<S>(squares) / n as f32 + epsilon).sqrt());
    vectors!(
        n,
        |i| S::store(out.add(i), S::mul(S::mul(S::load(x.add(i)), scale), S::load(weight.add(i)))),
        |i, count| {
            let normed = S::mul(load_part::<S>(x.add(i), count), scale);
            store_part::<S>(out.add(i), S::mul(normed, load_part::<S>(weight.add(i), count)), count);
        }
    );
}

/// `gate / (1 + exp(-gate)) * up`.
#[inline(always)]
pub(crate) unsafe fn gate_row<S: Simd>(gate: *const f32, up: *const f32, out: *mut f32, n: usize) {
    #[inline(always)]
    unsafe fn gated<S: Simd>(gate: S::F, up: S::F) -> S::F {
        let e = exp::<S>(S::sub(S::splat(0.0), gate));
        S::mul(S::div(gate, S::add(S::splat(1.0), e)), up)
    }
    vectors!(n, |i| S::store(out.add(i), gated::<S>(S::load(gate.add(i)), S::load(up.add(i)))), |i, count| {
        let mixed = gated::<S>(load_part::<S>(gate.add(i), count), load_part::<S>(up.add(i), count));
        store_part::<S>(out.add(i), mixed, count);
    });
}

levels! {
    unsafe fn norm(x: *const f32, weight: *const f32, epsilon: f32, out: *mut f32, n: usize) = norm_row
}

/// What is done to each head before attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// Numbers of a head.
    pub head_dim: usize,
    /// An RMS norm of each head by itself: weight `[head_dim]` and epsilon.
    pub norm: Option<(&'a [f32], f32)>,
    /// Angles of each token: cosines and sines `[tokens, head_dim / 2]`.
    pub cos: &'a [f32],
    /// See `cos`.
    pub sin: &'a [f32],
    /// Pairs are `(i, i + head_dim / 2)`; otherwise `(2 i, 2 i + 1)`.
    pub halves: bool,
}

/// Tokens of a task of [`place`].
const TOKENS: usize = 8;

/// Norms and rotates all heads of `x [tokens, heads, head_dim]` in place.
///
/// # Panics
/// When lengths don't fit.
pub fn place(level: Level, pool: &mut Pool, x: &mut [f32], heads: &Heads<'_>) {
    let level = level.checked();
    let half = heads.head_dim / 2;
    assert!(half > 0 && heads.head_dim.is_multiple_of(2) && heads.cos.len() == heads.sin.len(), "pairs of numbers");
    let tokens = heads.cos.len() / half;
    if tokens == 0 {
        return;
    }
    let width = x.len() / tokens;
    assert!(heads.cos.len() == tokens * half && x.len() == tokens * width, "angles for each token");
    assert!(width.is_multiple_of(heads.head_dim), "whole heads");
    assert!(heads.norm.is_none_or(|(weight, _)| weight.len() == heads.head_dim), "the norm's weight");
    let all = Disjoint(x.as_mut_ptr());
    pool.run(tokens.div_ceil(TOKENS), &|task, _| {
        let Disjoint(all) = &all;
        for token in task * TOKENS..tokens.min((task + 1) * TOKENS) {
            // SAFETY: tokens are disjoint, and inside `x`.
            let row = unsafe { std::slice::from_raw_parts_mut(all.add(token * width), width) };
            let (cos, sin) = (&heads.cos[token * half..][..half], &heads.sin[token * half..][..half]);
            for head in row.chunks_exact_mut(heads.head_dim) {
                if let Some((weight, epsilon)) = heads.norm {
                    let at = head.as_mut_ptr();
                    // SAFETY: the level was checked; the norm reads each number before it writes it.
                    unsafe { norm(level, at, weight.as_ptr(), epsilon, at, head.len()) }
                }
                rotate(head, cos, sin, heads.halves);
            }
        }
    });
}

/// Rotates one head: `a' = a cos - b sin`, `b' = b cos + a sin`, each product rounded.
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], halves: bool) {
    let turn = |a: &mut f32, b: &mut f32, cos: f32, sin: f32| {
        let (x, y) = (*a, *b);
        (*a, *b) = (x * cos - y * sin, y * cos + x * sin);
    };
    let angles = cos.iter().zip(sin);
    if halves {
        let (first, second) = head.split_at_mut(cos.len());
        first.iter_mut().zip(second).zip(angles).for_each(|((a, b), (cos, sin))| turn(a, b, *cos, *sin));
    } else {
        let pairs = head.as_chunks_mut::<2>().0;
        pairs.iter_mut().zip(angles).for_each(|([a, b], (cos, sin))| turn(a, b, *cos, *sin));
    }
}
