//! One step's activations as products read them: floats, or quantised a row at a time in fixed blocks.
//!
//! A block's scale is its largest magnitude over 127 and its numbers are rounded to even: ggml's Q8_K and Q8_0, with
//! a float scale. What a row becomes depends on that row alone.

use crate::pool::Disjoint;
use crate::rows::{gate_row, norm_row};
use crate::simd::{LANES, Simd, largest, levels};
use crate::weights::{Matrix, Stored};
use crate::{Level, Pool};

/// Inputs a block of K-quants.
const K_BLOCK: usize = 256;
/// Inputs a block of Q8_0.
const Q8_BLOCK: usize = 32;

/// The forms that the products to come read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// For F32 and F16 weights.
    pub floats: bool,
    /// For Q8_0 weights.
    pub q8: bool,
    /// For Q4_K and Q6_K weights.
    pub k: bool,
}

impl Wanted {
    /// Returns what these matrices read.
    pub fn by<'a>(matrices: impl IntoIterator<Item = &'a Matrix>) -> Self {
        matrices.into_iter().fold(Wanted::default(), |mut wanted, matrix| {
            match matrix.stored() {
                Stored::F32 | Stored::F16 => wanted.floats = true,
                Stored::Q8_0 => wanted.q8 = true,
                Stored::Q4K | Stored::Q6K => wanted.k = true,
            }
            wanted
        })
    }
}

/// Where a row's numbers come from.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// As they are: `[rows, columns]`.
    Plain(&'a [f32]),
    /// RMS norm: the rows, the weight `[columns]`, and epsilon.
    Normed(&'a [f32], &'a [f32], f32),
    /// `silu(gate) * up`, both `[rows, columns]`.
    Gated(&'a [f32], &'a [f32]),
}

/// Rows of quantised numbers.
#[derive(Debug, Default)]
struct Quantised {
    numbers: Vec<i8>,
    scales: Vec<f32>,
    /// Sums of 32 neighbours, and of 16.
    sums32: Vec<i16>,
    sums16: Vec<i16>,
}

impl Quantised {
    fn resize(&mut self, rows: usize, columns: usize, block: usize) {
        self.numbers.resize(rows * columns, 0);
        self.scales.resize(rows * columns / block, 0.0);
        self.sums32.resize(rows * columns / 32, 0);
        self.sums16.resize(rows * columns / 16, 0);
    }
}

/// The rows of one step; kept from step to step, so that nothing is allocated once the largest was there.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    columns: usize,
    has: Wanted,
    floats: Vec<f32>,
    k: Quantised,
    q8: Quantised,
}

/// One row's quantised form.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub(crate) numbers: *const i8,
    pub(crate) scales: *const f32,
    pub(crate) sums32: *const i16,
    pub(crate) sums16: *const i16,
}

impl Activations {
    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the inputs of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns the rows as floats, which they are whatever other forms were wanted.
    pub fn floats(&self) -> &[f32] {
        &self.floats
    }

    pub(crate) fn has(&self) -> Wanted {
        self.has
    }

    /// Fills `rows` rows of `columns`, in the wanted forms.
    ///
    /// # Panics
    /// When the input's lengths differ from `rows * columns`, or a quantised form is wanted of columns that are not
    /// whole blocks of it.
    pub fn fill(&mut self, level: Level, pool: &mut Pool, input: Input<'_>, columns: usize, wanted: Wanted) {
        let level = level.checked();
        let length = match input {
            Input::Plain(x) => x.len(),
            Input::Normed(x, weight, _) => {
                assert_eq!(weight.len(), columns, "the norm's weight");
                x.len()
            }
            Input::Gated(gate, up) => {
                assert_eq!(gate.len(), up.len(), "gate and up");
                gate.len()
            }
        };
        assert!(columns > 0 && length.is_multiple_of(columns), "whole rows");
        assert!(!wanted.k || columns.is_multiple_of(K_BLOCK), "whole blocks of {K_BLOCK}");
        assert!(!wanted.q8 || columns.is_multiple_of(Q8_BLOCK), "whole blocks of {Q8_BLOCK}");
        (self.rows, self.columns, self.has) = (length / columns, columns, wanted);
        self.floats.resize(length, 0.0);
        if wanted.k {
            self.k.resize(self.rows, columns, K_BLOCK);
        }
        if wanted.q8 {
            self.q8.resize(self.rows, columns, Q8_BLOCK);
        }
        let into = Into {
            columns,
            wanted,
            floats: self.floats.as_mut_ptr(),
            k: Target::of(&mut self.k),
            q8: Target::of(&mut self.q8),
        };
        let source = match input {
            Input::Plain(x) => Pointers::Plain(x.as_ptr()),
            Input::Normed(x, weight, epsilon) => Pointers::Normed(x.as_ptr(), weight.as_ptr(), epsilon),
            Input::Gated(gate, up) => Pointers::Gated(gate.as_ptr(), up.as_ptr()),
        };
        // A task is a few rows; one row is not worth waking anybody.
        let (rows, each) = (self.rows, 4);
        let shared = Disjoint((into, source));
        pool.run(rows.div_ceil(each), &|task, _| {
            let Disjoint((into, source)) = &shared;
            for row in task * each..rows.min((task + 1) * each) {
                // SAFETY: the level was checked; rows are disjoint, and inside all buffers by the checks above.
                unsafe { fill_row(level, into, source, row) };
            }
        });
    }

    pub(crate) fn float_row(&self, row: usize) -> *const f32 {
        self.floats[row * self.columns..].as_ptr()
    }

    pub(crate) fn k_row(&self, row: usize) -> Row {
        row_of(&self.k, row, self.columns, K_BLOCK)
    }

    pub(crate) fn q8_row(&self, row: usize) -> Row {
        row_of(&self.q8, row, self.columns, Q8_BLOCK)
    }
}

fn row_of(q: &Quantised, row: usize, columns: usize, block: usize) -> Row {
    let at = row * columns;
    Row {
        numbers: q.numbers[at..].as_ptr(),
        scales: q.scales[at / block..].as_ptr(),
        sums32: q.sums32[at / 32..].as_ptr(),
        sums16: q.sums16[at / 16..].as_ptr(),
    }
}

struct Target {
    numbers: *mut i8,
    scales: *mut f32,
    sums32: *mut i16,
    sums16: *mut i16,
}

impl Target {
    fn of(q: &mut Quantised) -> Self {
        Target {
            numbers: q.numbers.as_mut_ptr(),
            scales: q.scales.as_mut_ptr(),
            sums32: q.sums32.as_mut_ptr(),
            sums16: q.sums16.as_mut_ptr(),
        }
    }
}

struct Into {
    columns: usize,
    wanted: Wanted,
    floats: *mut f32,
    k: Target,
    q8: Target,
}

enum Pointers {
    Plain(*const f32),
    Normed(*const f32, *const f32, f32),
    Gated(*const f32, *const f32),
}

levels! {
    /// Fills one row.
    unsafe fn fill_row(into: &Into, source: &Pointers, row: usize) = fill_row_body
}

#[inline(always)]
unsafe fn fill_row_body<S: Simd>(into: &Into, source: &Pointers, row: usize) {
    let (n, at) = (into.columns, row * into.columns);
    let floats = into.floats.add(at);
    match *source {
        Pointers::Plain(x) => std::ptr::copy_nonoverlapping(x.add(at), floats, n),
        Pointers::Normed(x, weight, epsilon) => norm_row::<S>(x.add(at), weight, epsilon, floats, n),
        Pointers::Gated(gate, up) => gate_row::<S>(gate.add(at), up.add(at), floats, n),
    }
    if into.wanted.k {
        quantise::<S, K_BLOCK>(floats, n, &into.k, at);
    }
    if into.wanted.q8 {
        quantise::<S, Q8_BLOCK>(floats, n, &into.q8, at);
    }
}

#[inline(always)]
unsafe fn quantise<S: Simd, const BLOCK: usize>(x: *const f32, n: usize, to: &Target, at: usize) {
    for b in 0..n / BLOCK {
        let x = x.add(b * BLOCK);
        let mut most = S::splat(0.0);
        for i in (0..BLOCK).step_by(LANES) {
            most = S::max(S::abs(S::load(x.add(i))), most);
        }
        let most = largest::<S>(most);
        *to.scales.add((at / BLOCK) + b) = most / 127.0;
        // A block of zeros has the scale zero, and numbers zero; so has one too small to divide by.
        let inverse = 127.0 / most;
        let inverse = S::splat(if inverse.is_finite() { inverse } else { 0.0 });
        let numbers = to.numbers.add(at + b * BLOCK);
        for i in (0..BLOCK).step_by(LANES) {
            let rounded = S::round(S::mul(S::load(x.add(i)), inverse));
            S::store_bytes(numbers.add(i), S::min(S::max(rounded, S::splat(-127.0)), S::splat(127.0)));
        }
        for i in (0..BLOCK).step_by(32) {
            let sixteen = |from: usize| (0..16).map(|k| i16::from(*numbers.add(from + k))).sum::<i16>();
            let (first, second) = (sixteen(i), sixteen(i + 16));
            let sums = at + b * BLOCK + i;
            *to.sums16.add(sums / 16) = first;
            *to.sums16.add(sums / 16 + 1) = second;
            *to.sums32.add(sums / 32) = first + second;
        }
    }
}
