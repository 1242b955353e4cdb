//! Causal attention over a block store: grouped heads together, softmax as it goes (Milakov and Gimelshein 2018;
//! Dao et al. 2022), positions in fixed partitions.
//!
//! A query's result depends on its own position and its own context alone. A block of 32 positions is one turn:
//! scores over lanes of positions, the dimension ascending; one running maximum, one running sum that takes the
//! block's as a tree; values added position by position. A partition of [`PARTITION`] positions starts anew, and
//! partitions are merged in ascending order, whether one thread had them all or many.

use crate::kv::{BLOCK, KvStore, KvType};
use crate::pool::Disjoint;
use crate::simd::{LANES, Simd, exp, first, largest, levels, store_part, sum};
use crate::{Level, Pool};

/// Positions whose softmax runs as one; always the same positions.
pub const PARTITION: usize = 1024;
/// Tokens of one sequence that a task takes together.
const TOKENS: usize = 16;
/// Queries from which a block is widened to floats once for all.
const WIDEN: usize = 6;

/// One sequence's new tokens.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// Position of the first new token.
    pub start: usize,
    /// New tokens; their keys and values are in the store.
    pub tokens: usize,
    /// Blocks of the positions from 0 to the last new token.
    pub blocks: &'a [u32],
}

/// One task's share, for one KV head.
#[derive(Clone, Copy, Debug)]
struct Unit {
    sequence: usize,
    /// First token of it, in the sequence and in the step.
    first: usize,
    at: usize,
    count: usize,
    /// The only partition it takes, with where its parts begin; else all.
    only: Option<(usize, usize)>,
}

/// Memory of the tasks; kept from step to step.
#[derive(Debug, Default)]
pub struct Scratch {
    units: Vec<Unit>,
    workers: Vec<f32>,
    /// Parts of split sequences: a maximum, a sum, and `[width]` for each query of each unit.
    parts: Vec<f32>,
}

/// What all tasks know.
struct Shared<'a> {
    store: &'a KvStore,
    layer: usize,
    sequences: &'a [Sequence<'a>],
    q: *const f32,
    out: *mut f32,
    parts: *mut f32,
    heads: usize,
    group: usize,
    width: usize,
    scale: f32,
}

/// Writes, for each token of all sequences in order, attention's result `[tokens, heads, head_dim]` of one layer.
///
/// # Panics
/// When lengths or blocks don't fit.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    level: Level,
    pool: &mut Pool,
    scratch: &mut Scratch,
    store: &KvStore,
    layer: usize,
    sequences: &[Sequence<'_>],
    q: &[f32],
    out: &mut [f32],
) {
    let level = level.checked();
    let shape = store.shape();
    let tokens: usize = sequences.iter().map(|sequence| sequence.tokens).sum();
    if tokens == 0 {
        return;
    }
    let heads = q.len() / (tokens * shape.head_dim);
    assert!(heads > 0 && heads.is_multiple_of(shape.kv_heads), "heads in whole groups");
    assert!(q.len() == tokens * heads * shape.head_dim && q.len() == out.len(), "[tokens, heads, head_dim]");
    for sequence in sequences {
        let needed = (sequence.start + sequence.tokens).div_ceil(BLOCK);
        assert!(sequence.blocks.len() >= needed, "blocks of all positions");
        assert!(sequence.blocks.iter().all(|block| (*block as usize) < store.blocks()), "blocks of the store");
    }
    let (group, width) = (heads / shape.kv_heads, shape.width());
    let threads = pool.threads();
    plan(&mut scratch.units, sequences, |units| threads > 1 && units * shape.kv_heads < 4 * threads);
    let each = worker_floats(group, width);
    scratch.workers.resize(each * threads, 0.0);
    let split: usize = scratch.units.iter().filter(|unit| unit.only.is_some()).map(|unit| unit.count).sum();
    scratch.parts.resize(split * heads * (width + 2), 0.0);
    let shared = Shared {
        store,
        layer,
        sequences,
        q: q.as_ptr(),
        out: out.as_mut_ptr(),
        parts: scratch.parts.as_mut_ptr(),
        heads,
        group,
        width,
        scale: 1.0 / (shape.head_dim as f32).sqrt(),
    };
    let (units, workers) = (&scratch.units, scratch.workers.as_mut_ptr());
    let shared = Disjoint((shared, workers));
    pool.run(units.len() * shape.kv_heads, &|task, worker| {
        let Disjoint((shared, workers)) = &shared;
        // SAFETY: each worker has memory of its own; units and heads write different places; all was checked above.
        unsafe {
            unit(level, shared, &units[task / shape.kv_heads], task % shape.kv_heads, workers.add(worker * each))
        };
    });
    let Disjoint((shared, workers)) = &shared;
    for (i, unit) in units.iter().enumerate() {
        // The first part of a split sequence finds its others behind it.
        if unit.only.is_some_and(|(part, _)| part == 0) {
            let parts = units[i..].iter().take_while(|next| next.only.is_some() && next.at == unit.at);
            // SAFETY: no task runs any more.
            unsafe { merge_unit(level, shared, unit, parts.count(), *workers) };
        }
    }
}

/// Lists the units. Few of them are split by partitions, for more tasks: results are the same.
fn plan(units: &mut Vec<Unit>, sequences: &[Sequence<'_>], few: impl Fn(usize) -> bool) {
    units.clear();
    let all: usize = sequences.iter().map(|sequence| sequence.tokens.div_ceil(TOKENS)).sum();
    let (mut at, mut split) = (0, 0);
    for (i, sequence) in sequences.iter().enumerate() {
        for first in (0..sequence.tokens).step_by(TOKENS) {
            let count = TOKENS.min(sequence.tokens - first);
            let unit = Unit { sequence: i, first, at: at + first, count, only: None };
            let parts = (sequence.start + first + count).div_ceil(PARTITION);
            if parts > 1 && few(all) {
                for part in 0..parts {
                    units.push(Unit { only: Some((part, split)), ..unit });
                    split += count;
                }
            } else {
                units.push(unit);
            }
        }
        at += sequence.tokens;
    }
}

/// Floats of a worker: queries, running results and merged results of `[rows][width + 2]`, a block, and weights.
fn worker_floats(group: usize, width: usize) -> usize {
    let rows = TOKENS * group;
    let floats = rows * width + 2 * rows * (width + 2) + 2 * BLOCK * width + 2 * BLOCK;
    floats.next_multiple_of(LANES)
}

levels! {
    /// Computes one unit for one KV head.
    unsafe fn unit(shared: &Shared<'_>, unit: &Unit, head: usize, memory: *mut f32) = unit_body
}

#[inline(always)]
unsafe fn unit_body<S: Simd>(shared: &Shared<'_>, unit: &Unit, head: usize, memory: *mut f32) {
    let Shared { group, width, heads, .. } = *shared;
    let shape = shared.store.shape();
    let (rows, dim) = (unit.count * group, shape.head_dim);
    let most = TOKENS * group;
    let q = memory;
    let running = q.add(most * width);
    let merged = running.add(most * (width + 2));
    let wide = merged.add(most * (width + 2));
    let weights = wide.add(2 * BLOCK * width);
    let sequence = &shared.sequences[unit.sequence];
    for r in 0..rows {
        let from = ((unit.at + r / group) * heads + head * group + r % group) * dim;
        for d in 0..dim {
            *q.add(r * width + d) = *shared.q.add(from + d) * shared.scale;
        }
        std::slice::from_raw_parts_mut(q.add(r * width + dim), width - dim).fill(0.0);
    }
    let position = |r: usize| sequence.start + unit.first + r / group;
    let end = position(rows - 1) + 1;
    let parts = match unit.only {
        Some((part, _)) => part..part + 1,
        None => 0..end.div_ceil(PARTITION),
    };
    let state = |memory: *mut f32, r: usize| memory.add(r * (width + 2));
    for part in parts.clone() {
        for r in 0..rows {
            let row = std::slice::from_raw_parts_mut(state(running, r), width + 2);
            row.fill(0.0);
            row[0] = f32::NEG_INFINITY;
        }
        let blocks = part * PARTITION / BLOCK..((part + 1) * PARTITION).min(end).div_ceil(BLOCK);
        for block in blocks {
            let stored = shared.store.head(shared.layer, sequence.blocks[block], head).as_ptr();
            let half = shape.kind == KvType::F16;
            let widened = half && rows >= WIDEN;
            if widened {
                for i in (0..2 * BLOCK * width).step_by(LANES) {
                    S::store(wide.add(i), S::load_half(stored.cast::<u16>().add(i)));
                }
            }
            let from = if widened { wide.cast_const().cast() } else { stored };
            let query = |r: usize| q.add(r * width).cast_const();
            let valid = |r: usize| (position(r) + 1).saturating_sub(block * BLOCK).min(BLOCK);
            let mut r = 0;
            while r < rows {
                // Positions ascend with the row: once the first of two has something, so has the second.
                let two = r + 1 < rows && valid(r) > 0;
                let pair =
                    ([query(r), query(r + 1)], [valid(r), valid(r + 1)], [state(running, r), state(running, r + 1)]);
                let one = ([query(r)], [valid(r)], [state(running, r)]);
                match (two, valid(r) > 0, half && !widened) {
                    (true, _, true) => turn::<S, true, 2>(from, (dim, width), pair, weights),
                    (true, _, false) => turn::<S, false, 2>(from, (dim, width), pair, weights),
                    (false, true, true) => turn::<S, true, 1>(from, (dim, width), one, weights),
                    (false, true, false) => turn::<S, false, 1>(from, (dim, width), one, weights),
                    (false, false, _) => {}
                }
                r += if two { 2 } else { 1 };
            }
        }
        for r in 0..rows {
            if let Some((_, at)) = unit.only {
                let to = ((at + r / group) * heads + head * group + r % group) * (width + 2);
                std::ptr::copy_nonoverlapping(state(running, r), shared.parts.add(to), width + 2);
            } else if part == 0 {
                std::ptr::copy_nonoverlapping(state(running, r), state(merged, r), width + 2);
            } else if position(r) >= part * PARTITION {
                merge::<S>(state(merged, r), state(running, r), width);
            }
        }
    }
    if unit.only.is_none() {
        for r in 0..rows {
            let to = ((unit.at + r / group) * heads + head * group + r % group) * dim;
            finish::<S>(state(merged, r), shared.out.add(to), dim);
        }
    }
}

levels! {
    /// Merges the parts of one split unit, for all heads.
    unsafe fn merge_unit(shared: &Shared<'_>, unit: &Unit, parts: usize, memory: *mut f32) = merge_unit_body
}

#[inline(always)]
unsafe fn merge_unit_body<S: Simd>(shared: &Shared<'_>, unit: &Unit, parts: usize, memory: *mut f32) {
    let Shared { heads, width, .. } = *shared;
    let dim = shared.store.shape().head_dim;
    let Some((_, first)) = unit.only else { return };
    let start = shared.sequences[unit.sequence].start + unit.first;
    for token in 0..unit.count {
        for head in 0..heads {
            let at = |part: usize| shared.parts.add(((first + part * unit.count + token) * heads + head) * (width + 2));
            std::ptr::copy_nonoverlapping(at(0), memory, width + 2);
            for part in 1..parts {
                if start + token >= part * PARTITION {
                    merge::<S>(memory, at(part), width);
                }
            }
            finish::<S>(memory, shared.out.add(((unit.at + token) * heads + head) * dim), dim);
        }
    }
}

/// Some queries, how many of a block's positions each sees, and their states.
type Queries<const R: usize> = ([*const f32; R], [usize; R], [*mut f32; R]);

/// One block for `R` queries: `state` is the maximum, the sum, and the weighted values so far.
#[inline(always)]
unsafe fn turn<S: Simd, const HALF: bool, const R: usize>(
    block: *const u8,
    (dim, width): (usize, usize),
    (q, valid, state): Queries<R>,
    weights: *mut f32,
) {
    let mut scores = [[S::splat(0.0); 2]; R];
    // Rows past the head's width were never written.
    for d in 0..dim {
        let keys = [load::<S, HALF>(block, d * BLOCK), load::<S, HALF>(block, d * BLOCK + LANES)];
        for r in 0..R {
            let q = S::splat(*q[r].add(d));
            scores[r] = [S::fma(keys[0], q, scores[r][0]), S::fma(keys[1], q, scores[r][1])];
        }
    }
    let mut shrink = [S::splat(0.0); R];
    for r in 0..R {
        let [a, b] = scores[r];
        let (kept, rest) = (valid[r].min(LANES), valid[r].saturating_sub(LANES));
        let none = S::splat(f32::NEG_INFINITY);
        let (a, b) = (S::keep(a, kept, none), S::keep(b, rest, none));
        let before = *state[r];
        let most = largest::<S>(S::max(a, b));
        let most = if most > before { most } else { before };
        let by = S::splat(most);
        // A lane that is masked counts nothing, not the least that `exp` gives.
        let zero = S::splat(0.0);
        let (a, b) = (S::keep(exp::<S>(S::sub(a, by)), kept, zero), S::keep(exp::<S>(S::sub(b, by)), rest, zero));
        S::store(weights.add(r * BLOCK), a);
        S::store(weights.add(r * BLOCK + LANES), b);
        shrink[r] = exp::<S>(S::sub(S::splat(before), by));
        *state[r] = most;
        *state[r].add(1) = (*state[r].add(1)).mul_add(first::<S>(shrink[r]), sum::<S>(S::add(a, b)));
    }
    let common = if R == 2 { valid[0].min(valid[R - 1]) } else { valid[0] };
    let mut from = 0;
    while from < width {
        if from + 2 * LANES <= width {
            values::<S, HALF, R, 2>(block, width, from, common, valid, state, shrink, weights);
            from += 2 * LANES;
        } else {
            values::<S, HALF, R, 1>(block, width, from, common, valid, state, shrink, weights);
            from += LANES;
        }
    }
}

/// Adds the values' columns from `from`, `C` vectors of them, position by position.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn values<S: Simd, const HALF: bool, const R: usize, const C: usize>(
    block: *const u8,
    width: usize,
    from: usize,
    common: usize,
    valid: [usize; R],
    state: [*mut f32; R],
    shrink: [S::F; R],
    weights: *const f32,
) {
    let at = BLOCK * width + from;
    let mut sums = [[S::splat(0.0); C]; R];
    for r in 0..R {
        for c in 0..C {
            sums[r][c] = S::mul(S::load(state[r].add(2 + from + c * LANES)), shrink[r]);
        }
    }
    for j in 0..common {
        let mut v = [S::splat(0.0); C];
        for c in 0..C {
            v[c] = load::<S, HALF>(block, at + j * width + c * LANES);
        }
        for r in 0..R {
            let weight = S::splat(*weights.add(r * BLOCK + j));
            for c in 0..C {
                sums[r][c] = S::fma(v[c], weight, sums[r][c]);
            }
        }
    }
    for r in 0..R {
        for j in common..valid[r] {
            let weight = S::splat(*weights.add(r * BLOCK + j));
            for c in 0..C {
                sums[r][c] = S::fma(load::<S, HALF>(block, at + j * width + c * LANES), weight, sums[r][c]);
            }
        }
        for c in 0..C {
            S::store(state[r].add(2 + from + c * LANES), sums[r][c]);
        }
    }
}

#[inline(always)]
unsafe fn load<S: Simd, const HALF: bool>(block: *const u8, index: usize) -> S::F {
    if HALF { S::load_half(block.cast::<u16>().add(index)) } else { S::load(block.cast::<f32>().add(index)) }
}

/// Adds a later partition's state to what the earlier ones gave.
#[inline(always)]
unsafe fn merge<S: Simd>(to: *mut f32, part: *const f32, width: usize) {
    let most = if *part > *to { *part } else { *to };
    let of = |x: f32| exp::<S>(S::sub(S::splat(x), S::splat(most)));
    let (a, b) = (of(*to), of(*part));
    *to = most;
    *to.add(1) = (*part.add(1)).mul_add(first::<S>(b), *to.add(1) * first::<S>(a));
    for i in (0..width).step_by(LANES) {
        let (x, y) = (S::load(to.add(2 + i)), S::load(part.add(2 + i)));
        S::store(to.add(2 + i), S::fma(y, b, S::mul(x, a)));
    }
}

/// Writes the values over the sum of weights.
#[inline(always)]
unsafe fn finish<S: Simd>(state: *const f32, out: *mut f32, dim: usize) {
    let inverse = S::splat(1.0 / *state.add(1));
    for i in (0..dim).step_by(LANES) {
        let x = S::mul(S::load(state.add(2 + i)), inverse);
        store_part::<S>(out.add(i), x, (dim - i).min(LANES));
    }
}
