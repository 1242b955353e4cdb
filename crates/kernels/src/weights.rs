//! Weight matrices, packed in tiles of sixteen output rows.
//!
//! A tile holds its rows for all inputs, so that a product reads memory once, in order. Beside the tiles nothing of
//! the file is kept: [`Matrix::row`] takes a row out of its tile again, for an embedding that is also the output.

use half::{bf16, f16};

use crate::aligned::Aligned;
use crate::pack;
use crate::simd::LANES;

/// How a file stores rows, each row by itself: ggml's block formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Source {
    F32,
    F16,
    BF16,
    Q4_0,
    Q5_0,
    Q8_0,
    Q4K,
    Q6K,
}

impl Source {
    /// Inputs a block, and its bytes.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Source::F32 => (1, 4),
            Source::F16 | Source::BF16 => (1, 2),
            Source::Q4_0 => (32, 18),
            Source::Q5_0 => (32, 22),
            Source::Q8_0 => (32, 34),
            Source::Q4K => (256, 144),
            Source::Q6K => (256, 210),
        }
    }

    /// Returns the bytes of a row of `inputs`; `None` where they don't make whole blocks.
    pub const fn row_bytes(self, inputs: usize) -> Option<usize> {
        let (block, bytes) = self.block();
        if inputs == 0 || !inputs.is_multiple_of(block) { None } else { Some(inputs / block * bytes) }
    }

    /// Returns how tiles of such rows are stored: always without loss.
    pub const fn stored(self) -> Stored {
        match self {
            Source::F32 | Source::BF16 => Stored::F32,
            Source::F16 => Stored::F16,
            Source::Q4_0 | Source::Q5_0 | Source::Q8_0 => Stored::Q8_0,
            Source::Q4K => Stored::Q4K,
            Source::Q6K => Stored::Q6K,
        }
    }
}

/// How a tile holds its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// `[inputs][16]` floats.
    F32,
    /// `[inputs][16]` halves.
    F16,
    /// Blocks of 32 inputs, two by two, see `pack::q8_0`.
    Q8_0,
    /// A block of 256 inputs, see `pack::q4k`.
    Q4K,
    /// A block of 256 inputs, see `pack::q6k`.
    Q6K,
}

impl Stored {
    /// Bytes of a tile of sixteen rows of `inputs`.
    pub(crate) const fn tile_bytes(self, inputs: usize) -> usize {
        let bytes = match self {
            Stored::F32 => inputs * 64,
            Stored::F16 => inputs * 32,
            Stored::Q8_0 => (inputs / 32).div_ceil(2) * pack::Q8_0_PAIR,
            Stored::Q4K => inputs / 256 * pack::Q4K_BYTES,
            Stored::Q6K => inputs / 256 * pack::Q6K_BYTES,
        };
        bytes.next_multiple_of(64)
    }
}

/// A matrix `[outputs, inputs]` in tiles.
pub struct Matrix {
    stored: Stored,
    outputs: usize,
    inputs: usize,
    tile_bytes: usize,
    tiles: Aligned,
}

impl Matrix {
    /// Returns the number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Returns the number of inputs.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Returns how the tiles hold weights.
    pub fn stored(&self) -> Stored {
        self.stored
    }

    /// Returns the bytes of all tiles.
    pub fn bytes(&self) -> usize {
        self.tiles.len()
    }

    pub(crate) fn tiles(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    pub(crate) fn tile_bytes(&self) -> usize {
        self.tile_bytes
    }

    pub(crate) fn tile(&self, tile: usize) -> &[u8] {
        &self.tiles.bytes()[tile * self.tile_bytes..][..self.tile_bytes]
    }

    /// Writes row `row` as floats: `[inputs]`.
    ///
    /// # Panics
    /// When there is no such row, or `out` has another length.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.outputs && out.len() == self.inputs, "row {row} of {} outputs", self.outputs);
        let (tile, lane) = (self.tile(row / LANES), row % LANES);
        match self.stored {
            Stored::F32 => {
                for (k, out) in out.iter_mut().enumerate() {
                    let at = (k * LANES + lane) * 4;
                    *out = f32::from_le_bytes([tile[at], tile[at + 1], tile[at + 2], tile[at + 3]]);
                }
            }
            Stored::F16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = pack::half_at(tile, k * LANES + lane);
                }
            }
            Stored::Q8_0 => pack::q8_0_row(tile, lane, out),
            Stored::Q4K => pack::q4k_row(tile, lane, out),
            Stored::Q6K => pack::q6k_row(tile, lane, out),
        }
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix [{}, {}] {:?}", self.outputs, self.inputs, self.stored)
    }
}

/// Makes a matrix of rows as a file gives them, sixteen at a time: never is more than that held twice.
pub struct MatrixBuilder {
    source: Source,
    row_bytes: usize,
    done: usize,
    matrix: Matrix,
}

impl MatrixBuilder {
    /// Starts a matrix `[outputs, inputs]`; `None` where `inputs` don't make whole blocks, a side is zero, or the
    /// size passes the address space.
    pub fn new(source: Source, outputs: usize, inputs: usize) -> Option<Self> {
        let row_bytes = source.row_bytes(inputs)?;
        let stored = source.stored();
        inputs.checked_mul(64)?;
        let tile_bytes = stored.tile_bytes(inputs);
        let bytes = outputs.div_ceil(LANES).checked_mul(tile_bytes)?;
        if outputs == 0 {
            return None;
        }
        let tiles = Aligned::zeros(bytes)?;
        Some(MatrixBuilder {
            source,
            row_bytes,
            done: 0,
            matrix: Matrix { stored, outputs, inputs, tile_bytes, tiles },
        })
    }

    /// Returns the bytes that the next [`MatrixBuilder::push`] takes; zero when all rows are there.
    pub fn wanted(&self) -> usize {
        (self.matrix.outputs - self.done).min(LANES) * self.row_bytes
    }

    /// Takes the next rows: exactly [`MatrixBuilder::wanted`] bytes.
    ///
    /// # Panics
    /// When it is another number of bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.wanted(), "rows of a tile");
        let rows = bytes.len() / self.row_bytes;
        let tile_bytes = self.matrix.tile_bytes;
        let tile = &mut self.matrix.tiles.bytes_mut()[self.done / LANES * tile_bytes..][..tile_bytes];
        for (lane, row) in bytes.chunks_exact(self.row_bytes).enumerate() {
            match self.source {
                Source::F32 => floats(tile, lane, row.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
                Source::BF16 => {
                    floats(tile, lane, row.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()));
                }
                Source::F16 => {
                    for (k, half) in row.as_chunks::<2>().0.iter().enumerate() {
                        tile[(k * LANES + lane) * 2..][..2].copy_from_slice(half);
                    }
                }
                Source::Q4_0 => pack::q8_0(tile, lane, row.as_chunks::<18>().0, pack::q4_0_block),
                Source::Q5_0 => pack::q8_0(tile, lane, row.as_chunks::<22>().0, pack::q5_0_block),
                Source::Q8_0 => pack::q8_0(tile, lane, row.as_chunks::<34>().0, pack::q8_0_block),
                Source::Q4K => pack::q4k(tile, lane, row.as_chunks::<144>().0),
                Source::Q6K => pack::q6k(tile, lane, row.as_chunks::<210>().0),
            }
        }
        self.done += rows;
    }

    /// Returns the matrix.
    ///
    /// # Panics
    /// When rows are missing.
    pub fn finish(self) -> Matrix {
        assert_eq!(self.done, self.matrix.outputs, "all rows are there");
        self.matrix
    }

    /// Packs rows that are all in memory: `[outputs, inputs]` in the source's format. `None` as
    /// [`MatrixBuilder::new`], or for another number of bytes.
    pub fn pack(source: Source, outputs: usize, inputs: usize, mut bytes: &[u8]) -> Option<Matrix> {
        let mut builder = MatrixBuilder::new(source, outputs, inputs)?;
        if bytes.len() != outputs * builder.row_bytes {
            return None;
        }
        while builder.wanted() > 0 {
            let (rows, rest) = bytes.split_at(builder.wanted());
            builder.push(rows);
            bytes = rest;
        }
        Some(builder.finish())
    }
}

fn floats(tile: &mut [u8], lane: usize, values: impl Iterator<Item = f32>) {
    for (k, value) in values.enumerate() {
        tile[(k * LANES + lane) * 4..][..4].copy_from_slice(&value.to_le_bytes());
    }
}

/// The bits of a half, from two bytes.
pub(crate) fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}
