//! CPU kernels: slices in and out, one result whatever the instructions, the threads and the batch.
//!
//! The order of every sum is fixed, so that a sequence's numbers never depend on what else runs:
//! - A product's lanes are output rows. Each output has one accumulator that takes blocks of inputs in ascending
//!   order; inside a block of quantised numbers sums are integers, hence exact in any order. One row and many rows of
//!   activations run the same code, and no sum is split over threads.
//! - Activations are quantised a row at a time, in blocks of fixed size.
//! - Reductions of floats use sixteen virtual lanes and one tree (`simd`); `exp` is our own polynomial; every
//!   multiplication that is fused is fused explicitly. Portable code, AVX2 and AVX-512 therefore give the same bits.
//! - Attention goes over absolute positions, 32 at a time, in partitions of [`attention::PARTITION`] that are merged in
//!   ascending order; keys and values are read as they were rounded into the store.
//!
//! The crate knows no model: `engine-candle` composes a decoder of these parts.

mod activations;
mod aligned;
pub mod attention;
pub mod kv;
mod level;
mod matmul;
mod pack;
mod pool;
pub mod proof;
pub mod rows;
mod simd;
mod weights;

pub use activations::{Activations, Input, Wanted};
pub use level::Level;
pub use matmul::{Job, matmul};
pub use pool::{Pool, THREADS_MAX};
pub use weights::{Matrix, MatrixBuilder, Source, Stored};

/// How the kernels' sums are ordered: part of the exact-fingerprint, raised when any result may change.
pub const ORDER: &str = "kernels-1";
