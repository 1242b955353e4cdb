//! Products of activations with packed weights: `x [rows, inputs]` times `[outputs, inputs]` transposed.
//!
//! One order for any number of rows: a tile's sixteen outputs are lanes, each output has one accumulator, inputs go
//! up. Up to four rows share a tile's registers, which changes nothing in any row's arithmetic.

use crate::activations::{Activations, Row, Wanted};
use crate::pack;
use crate::pool::Disjoint;
use crate::simd::{LANES, Simd, levels};
use crate::weights::{Matrix, Stored};
use crate::{Level, Pool};

/// Rows whose activations stay in the cache while a chunk of tiles passes over them.
const BLOCK_ROWS: usize = 128;
/// Weights of one task, in bytes: small enough to share out, large enough that counting costs nothing.
const TASK_BYTES: usize = 96 << 10;
/// Tiles that one row of floats passes at a time: enough independent sums to fill the units.
const TILES: usize = 4;

/// One product of a region.
#[derive(Debug)]
pub struct Job<'a> {
    /// The weights; `inputs` are the activations' columns.
    pub matrix: &'a Matrix,
    /// The result, `[rows, outputs]`.
    pub out: &'a mut [f32],
    /// Whether to add to what `out` has.
    pub add: bool,
}

struct Target<'a> {
    matrix: &'a Matrix,
    out: *mut f32,
    add: bool,
    /// The first task of this job, and tiles a task.
    first: usize,
    each: usize,
}

/// Multiplies the activations with each job's matrix, in one parallel region.
///
/// # Panics
/// When a matrix has other inputs than the activations' columns or reads a form that they were not filled with, or
/// `out` is not `[rows, outputs]`.
pub fn matmul(level: Level, pool: &mut Pool, x: &Activations, jobs: &mut [Job<'_>]) {
    let level = level.checked();
    if x.rows() == 0 {
        return;
    }
    let mut tasks = 0;
    let targets: [Option<Target<'_>>; 4] = {
        assert!(jobs.len() <= 4, "at most four products a region");
        let mut jobs = jobs.iter_mut();
        std::array::from_fn(|_| {
            jobs.next().map(|job| {
                let matrix = job.matrix;
                let Wanted { floats, q8, k } = Wanted::by([matrix]);
                let has = x.has();
                assert_eq!(matrix.inputs(), x.columns(), "the inputs of {matrix:?}");
                assert!((!q8 || has.q8) && (!k || has.k) && (!floats || has.floats), "the form that {matrix:?} reads");
                assert_eq!(job.out.len(), x.rows() * matrix.outputs(), "the outputs of {matrix:?}");
                let each = (TASK_BYTES / matrix.tile_bytes()).max(1).next_multiple_of(TILES);
                let share = matrix.tiles().div_ceil(4 * pool.threads()).next_multiple_of(TILES);
                let each = each.min(share);
                let first = tasks;
                tasks += matrix.tiles().div_ceil(each);
                Target { matrix, out: job.out.as_mut_ptr(), add: job.add, first, each }
            })
        })
    };
    let targets = Disjoint(targets);
    pool.run(tasks, &|task, _| {
        let Disjoint(targets) = &targets;
        let Some(target) = targets.iter().flatten().rfind(|target| target.first <= task) else { return };
        let from = (task - target.first) * target.each;
        let tiles = from..(from + target.each).min(target.matrix.tiles());
        // SAFETY: the level was checked, and tasks write different columns of `out`.
        unsafe { chunk(level, x, target, tiles) };
    });
}

unsafe fn chunk(level: Level, x: &Activations, target: &Target<'_>, tiles: std::ops::Range<usize>) {
    for block in (0..x.rows()).step_by(BLOCK_ROWS) {
        let end = x.rows().min(block + BLOCK_ROWS);
        match target.matrix.stored() {
            Stored::F32 | Stored::F16 => floats(level, x, target, tiles.clone(), block, end),
            Stored::Q8_0 | Stored::Q4K | Stored::Q6K => quantised(level, x, target, tiles.clone(), block, end),
        }
    }
}

/// Calls `$call` with the largest constant number of rows that fits, until all are done.
macro_rules! by_rows {
    ($row:ident, $end:ident, $call:ident, [$($n:literal)*]) => {
        while $row < $end {
            match $end - $row {
                $($n => { $call!($n); $row += $n; })*
                _ => { $call!(4); $row += 4; }
            }
        }
    };
}

unsafe fn quantised(
    level: Level,
    x: &Activations,
    target: &Target<'_>,
    tiles: std::ops::Range<usize>,
    from: usize,
    end: usize,
) {
    let matrix = target.matrix;
    for tile in tiles {
        let weights = matrix.tile(tile).as_ptr();
        let mut row = from;
        macro_rules! call {
            ($n:literal) => {{
                let out = Out::<$n>::of(target, tile, row);
                match matrix.stored() {
                    Stored::Q4K => {
                        let rows = std::array::from_fn(|r| x.k_row(row + r));
                        q4k::<$n>(level, weights, matrix.inputs() / 256, rows, out);
                    }
                    Stored::Q6K => {
                        let rows = std::array::from_fn(|r| x.k_row(row + r));
                        q6k::<$n>(level, weights, matrix.inputs() / 256, rows, out);
                    }
                    _ => {
                        let rows = std::array::from_fn(|r| x.q8_row(row + r));
                        q8_0::<$n>(level, weights, matrix.inputs() / 32, rows, out);
                    }
                }
            }};
        }
        by_rows!(row, end, call, [1 2 3]);
    }
}

unsafe fn floats(
    level: Level,
    x: &Activations,
    target: &Target<'_>,
    tiles: std::ops::Range<usize>,
    from: usize,
    end: usize,
) {
    let matrix = target.matrix;
    let (bytes, half) = (matrix.tile_bytes(), matrix.stored() == Stored::F16);
    let mut tile = tiles.start;
    while tile < tiles.end {
        let weights = matrix.tile(tile).as_ptr();
        // One row alone goes over several tiles; more rows over one.
        let several = end - from == 1 && tile + TILES <= tiles.end;
        if several {
            let outs = std::array::from_fn(|i| Out::<1>::of(target, tile + i, from));
            let row = x.float_row(from);
            match half {
                true => half_tiles::<TILES>(level, weights, bytes, matrix.inputs(), row, outs),
                false => float_tiles::<TILES>(level, weights, bytes, matrix.inputs(), row, outs),
            }
            tile += TILES;
            continue;
        }
        let mut row = from;
        macro_rules! call {
            ($n:literal) => {{
                let out = Out::<$n>::of(target, tile, row);
                let rows: [*const f32; $n] = std::array::from_fn(|r| x.float_row(row + r));
                match half {
                    true => half_rows::<$n>(level, weights, matrix.inputs(), rows, out),
                    false => float_rows::<$n>(level, weights, matrix.inputs(), rows, out),
                }
            }};
        }
        by_rows!(row, end, call, [1 2 3]);
        tile += 1;
    }
}

/// Where a tile's results go: the start in each row, and how many of sixteen exist.
#[derive(Clone, Copy)]
struct Out<const R: usize> {
    at: [*mut f32; R],
    count: usize,
    add: bool,
}

impl<const R: usize> Out<R> {
    unsafe fn of(target: &Target<'_>, tile: usize, row: usize) -> Self {
        let (outputs, column) = (target.matrix.outputs(), tile * LANES);
        Out {
            at: std::array::from_fn(|r| target.out.add((row + r) * outputs + column)),
            count: (outputs - column).min(LANES),
            add: target.add,
        }
    }

    #[inline(always)]
    unsafe fn put<S: Simd>(&self, r: usize, sums: S::F) {
        let at = self.at[r];
        if self.count == LANES {
            S::store(at, if self.add { S::add(S::load(at), sums) } else { sums });
            return;
        }
        let mut lanes = [0f32; LANES];
        S::store(lanes.as_mut_ptr(), sums);
        for (i, sum) in lanes.into_iter().take(self.count).enumerate() {
            *at.add(i) = if self.add { *at.add(i) + sum } else { sum };
        }
    }
}

levels! {
    /// A tile of Q4_K with `R` rows of K-quantised activations.
    unsafe fn q4k<const R: usize>(tile: *const u8, blocks: usize, rows: [Row; R], out: Out<R>) = q4k_body
}

#[inline(always)]
unsafe fn q4k_body<S: Simd, const R: usize>(tile: *const u8, blocks: usize, rows: [Row; R], out: Out<R>) {
    let mut sums = [S::splat(0.0); R];
    for b in 0..blocks {
        let base = tile.add(b * pack::Q4K_BYTES);
        let (mut whole, mut least) = ([S::zero_int(); R], [S::zero_int(); R]);
        for pair in 0..4 {
            let part = base.add(64 + pair * pack::Q4K_PAIR);
            let scales = S::scales(part);
            for (h, scales) in [scales.0, scales.1].into_iter().enumerate() {
                let s = 2 * pair + h;
                let mut dots = [S::zero_dot(); R];
                for j in 0..4 {
                    let bytes = S::load_bytes(part.add(64 + h * 256 + j * 64));
                    let (low, high) = (S::low(bytes), S::high(bytes));
                    for r in 0..R {
                        let a = rows[r].numbers.add(b * 256 + s * 32 + j * 4);
                        dots[r] = S::dot(S::dot(dots[r], low, a), high, a.add(16));
                    }
                }
                for r in 0..R {
                    whole[r] = S::fold(whole[r], dots[r], scales);
                }
            }
            for r in 0..R {
                let sums = rows[r].sums32.add(b * 8 + 2 * pair);
                least[r] = S::pair_dot(least[r], part.add(32), [*sums, *sums.add(1)]);
            }
        }
        let (scale, min) = (S::load_half(base.cast()), S::load_half(base.add(32).cast()));
        for r in 0..R {
            let d = *rows[r].scales.add(b);
            sums[r] = S::fma(S::mul(scale, S::splat(d)), S::to_float(whole[r]), sums[r]);
            sums[r] = S::fma(S::mul(min, S::splat(-d)), S::to_float(least[r]), sums[r]);
        }
    }
    for r in 0..R {
        out.put::<S>(r, sums[r]);
    }
}

levels! {
    /// The same for Q6_K.
    unsafe fn q6k<const R: usize>(tile: *const u8, blocks: usize, rows: [Row; R], out: Out<R>) = q6k_body
}

#[inline(always)]
unsafe fn q6k_body<S: Simd, const R: usize>(tile: *const u8, blocks: usize, rows: [Row; R], out: Out<R>) {
    let mut sums = [S::splat(0.0); R];
    for b in 0..blocks {
        let base = tile.add(b * pack::Q6K_BYTES);
        // Weights are stored plus 32: `offset` is what that adds, less the factor 32.
        let (mut whole, mut offset) = ([S::zero_int(); R], [S::zero_int(); R]);
        for pair in 0..8 {
            let at = base.add(64 + pair * 32).cast();
            let scales = S::signed_scales(at);
            for (h, scales) in [scales.0, scales.1].into_iter().enumerate() {
                let s = 2 * pair + h;
                let part = base.add(pack::Q6K_WEIGHTS + s * 192);
                let (first, second) = (S::load_bytes(part), S::load_bytes(part.add(64)));
                let top = S::load_bytes(part.add(128));
                let w0 = S::with_top::<0>(S::low(first), top);
                let w1 = S::with_top::<1>(S::high(first), top);
                for r in 0..R {
                    let a = rows[r].numbers.add(b * 256 + s * 16);
                    whole[r] = S::fold(whole[r], S::dot(S::dot(S::zero_dot(), w0, a), w1, a.add(4)), scales);
                }
                let w2 = S::with_top::<2>(S::low(second), top);
                let w3 = S::with_top::<3>(S::high(second), top);
                for r in 0..R {
                    let a = rows[r].numbers.add(b * 256 + s * 16 + 8);
                    whole[r] = S::fold(whole[r], S::dot(S::dot(S::zero_dot(), w2, a), w3, a.add(4)), scales);
                }
            }
            for r in 0..R {
                let sums = rows[r].sums16.add(b * 16 + 2 * pair);
                offset[r] = S::signed_pair_dot(offset[r], at, [*sums, *sums.add(1)]);
            }
        }
        let scale = S::load_half(base.cast());
        for r in 0..R {
            let whole = S::to_float(S::sub_32_times(whole[r], offset[r]));
            sums[r] = S::fma(S::mul(scale, S::splat(*rows[r].scales.add(b))), whole, sums[r]);
        }
    }
    for r in 0..R {
        out.put::<S>(r, sums[r]);
    }
}

levels! {
    /// The same for Q8_0.
    unsafe fn q8_0<const R: usize>(tile: *const u8, blocks: usize, rows: [Row; R], out: Out<R>) = q8_0_body
}

#[inline(always)]
unsafe fn q8_0_body<S: Simd, const R: usize>(tile: *const u8, blocks: usize, rows: [Row; R], out: Out<R>) {
    let mut sums = [S::splat(0.0); R];
    for b in 0..blocks {
        let (factors, weights_at) = pack::q8_0_at(b);
        let mut whole = [S::zero_int(); R];
        for j in 0..8 {
            let weights = S::signed(S::load_bytes(tile.add(weights_at + j * 64)));
            for r in 0..R {
                whole[r] = S::dot_signed(whole[r], weights, rows[r].numbers.add(b * 32 + j * 4));
            }
        }
        let scale = S::load_half(tile.add(factors).cast());
        for r in 0..R {
            let whole = S::finish_signed(whole[r], i32::from(*rows[r].sums32.add(b)));
            sums[r] = S::fma(S::mul(scale, S::splat(*rows[r].scales.add(b))), S::to_float(whole), sums[r]);
        }
    }
    for r in 0..R {
        out.put::<S>(r, sums[r]);
    }
}

/// Makes the kernels of one float type.
macro_rules! float_kernels {
    ($rows:ident, $rows_body:ident, $tiles:ident, $tiles_body:ident, $bytes:literal, $load:ident) => {
        levels! {
            unsafe fn $rows<const R: usize>(
                tile: *const u8, inputs: usize, rows: [*const f32; R], out: Out<R>,
            ) = $rows_body
        }

        #[inline(always)]
        unsafe fn $rows_body<S: Simd, const R: usize>(
            tile: *const u8,
            inputs: usize,
            rows: [*const f32; R],
            out: Out<R>,
        ) {
            let mut sums = [S::splat(0.0); R];
            for k in 0..inputs {
                let weights = S::$load(tile.add(k * $bytes).cast());
                for r in 0..R {
                    sums[r] = S::fma(weights, S::splat(*rows[r].add(k)), sums[r]);
                }
            }
            for r in 0..R {
                out.put::<S>(r, sums[r]);
            }
        }

        levels! {
            unsafe fn $tiles<const T: usize>(
                first: *const u8, bytes: usize, inputs: usize, row: *const f32, outs: [Out<1>; T],
            ) = $tiles_body
        }

        #[inline(always)]
        unsafe fn $tiles_body<S: Simd, const T: usize>(
            first: *const u8,
            bytes: usize,
            inputs: usize,
            row: *const f32,
            outs: [Out<1>; T],
        ) {
            let mut sums = [S::splat(0.0); T];
            for k in 0..inputs {
                let x = S::splat(*row.add(k));
                for t in 0..T {
                    sums[t] = S::fma(S::$load(first.add(t * bytes + k * $bytes).cast()), x, sums[t]);
                }
            }
            for t in 0..T {
                outs[t].put::<S>(0, sums[t]);
            }
        }
    };
}

float_kernels!(half_rows, half_rows_body, half_tiles, half_tiles_body, 32, load_half);
float_kernels!(float_rows, float_rows_body, float_tiles, float_tiles_body, 64, load);
