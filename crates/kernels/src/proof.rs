//! A proof on the machine itself: a level's kernels against the portable ones, bit by bit, in a few milliseconds.
//!
//! Tests run the levels that their own machine has. A worker may start on another kind, under an emulator, or on a
//! part that errs; what it computes must then not be the first to show it.

use crate::attention::{Scratch, Sequence, attend};
use crate::kv::{BLOCK, KvShape, KvStore, KvType, Slot};
use crate::{Activations, Input, Job, Level, MatrixBuilder, Pool, Source, Wanted, matmul};

/// What a machine may run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The highest level that was proven.
    pub level: Level,
    /// Levels that the machine has and that gave other bits: a fault to look into.
    pub refused: Vec<Level>,
}

/// Chooses the highest level that equals the portable kernels here.
///
/// # Errors
/// When the system refuses a thread.
pub fn choose() -> std::io::Result<Choice> {
    let (wanted, mut refused) = (results(Level::Portable)?, Vec::new());
    for level in Level::ALL.into_iter().rev().filter(|level| level.is_available()) {
        if level == Level::Portable || results(level)? == wanted {
            return Ok(Choice { level, refused });
        }
        refused.push(level);
    }
    Ok(Choice { level: Level::Portable, refused })
}

/// Numbers from -1 to 1 (Knuth's MMIX generator): the same everywhere.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next() as f32 / (1u64 << 30) as f32 - 1.0).collect()
    }

    /// Rows of a format, with factors that are small and finite.
    fn rows(&mut self, source: Source, outputs: usize, inputs: usize) -> Vec<u8> {
        let (block, bytes) = source.block();
        let mut all: Vec<u8> = (0..outputs * inputs / block * bytes).map(|_| self.next() as u8).collect();
        let halves: &[usize] = match source {
            Source::F32 => return self.floats(outputs * inputs).into_iter().flat_map(f32::to_le_bytes).collect(),
            Source::Q4K => &[0, 2],
            Source::Q6K => &[208],
            _ => &[0],
        };
        for block in all.chunks_exact_mut(bytes) {
            for at in halves {
                // The exponent's upper bits are cleared: below one half.
                block[at + 1] &= 0x37;
            }
        }
        all
    }
}

/// The bits of everything that a decoder uses.
fn results(level: Level) -> std::io::Result<Vec<u32>> {
    let (mut pool, mut numbers, mut bits) = (Pool::new(1)?, Numbers(9), Vec::new());
    let mut note = |x: &[f32]| bits.extend(x.iter().map(|x| x.to_bits()));
    let (rows, columns, outputs) = (7, 512, 40);
    let (x, up, weight) = (numbers.floats(rows * columns), numbers.floats(rows * columns), numbers.floats(columns));
    for source in [Source::F32, Source::F16, Source::Q8_0, Source::Q4K, Source::Q6K] {
        let bytes = numbers.rows(source, outputs, columns);
        let Some(matrix) = MatrixBuilder::pack(source, outputs, columns, &bytes) else { continue };
        for input in [Input::Plain(&x), Input::Normed(&x, &weight, 1e-6), Input::Gated(&x, &up)] {
            let mut activations = Activations::default();
            activations.fill(level, &mut pool, input, columns, Wanted::by([&matrix]));
            let mut out = up[..rows * outputs].to_vec();
            matmul(level, &mut pool, &activations, &mut [Job { matrix: &matrix, out: &mut out, add: true }]);
            note(&out);
        }
    }
    for kind in [KvType::F16, KvType::F32] {
        let (tokens, heads, head_dim) = (75usize, 4, 48);
        let shape = KvShape { layers: 1, kv_heads: 2, head_dim, kind };
        let Some(mut store) = KvStore::new(shape, tokens.div_ceil(BLOCK)) else { continue };
        let blocks: Vec<u32> = (0..store.blocks() as u32).rev().collect();
        let slot = |i: usize| Slot { block: blocks[i / BLOCK], offset: (i % BLOCK) as u32 };
        let slots: Vec<Slot> = (0..tokens).map(slot).collect();
        let (keys, values) = (numbers.floats(tokens * 2 * head_dim), numbers.floats(tokens * 2 * head_dim));
        store.write(level, &mut pool, 0, &slots, &keys, &values);
        // The prompt but for its last token together, then that one alone.
        for (start, tokens) in [(0, tokens - 1), (tokens - 1, 1)] {
            let q = numbers.floats(tokens * heads * head_dim);
            let (mut out, mut scratch) = (vec![0.0; q.len()], Scratch::default());
            let sequence = Sequence { start, tokens, blocks: &blocks };
            attend(level, &mut pool, &mut scratch, &store, 0, &[sequence], &q, &mut out);
            note(&out);
        }
    }
    Ok(bits)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn this_machines_best_level_is_proven() {
        assert_eq!(choose().unwrap(), Choice { level: Level::best(), refused: Vec::new() });
        let bits = results(Level::Portable).unwrap();
        assert!(bits.len() > 10_000 && bits.iter().all(|bits| f32::from_bits(*bits).is_finite()));
        assert!(bits.iter().filter(|bits| **bits == 0).count() < bits.len() / 100, "the proof is about something");
    }
}
