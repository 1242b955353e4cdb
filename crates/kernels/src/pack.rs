//! ggml's blocks into tiles and back, one row at a time.
//!
//! All layouts put sixteen rows side by side in groups of four inputs: 64 bytes are `[16 rows][4 inputs]`. Everything
//! stands in the order in which a product reads it, on whole cache lines: one stream that the machine can foresee.

use crate::simd::LANES;
use crate::weights::half;

/// Bytes of a tile's two blocks of Q8_0, with their factors; an odd block stands alone in its pair.
pub(crate) const Q8_0_PAIR: usize = 64 + 2 * 512;
/// Bytes of a tile's block of Q4_K: its factors, and four pairs of sub-blocks.
pub(crate) const Q4K_BYTES: usize = 64 + 4 * Q4K_PAIR;
/// Bytes of a pair of sub-blocks of Q4_K: scales, minimums, nibbles.
pub(crate) const Q4K_PAIR: usize = 32 + 32 + 512;
/// Where the weights of a tile's block of Q6_K begin: after the factors, half a line of nothing, and scales.
pub(crate) const Q6K_WEIGHTS: usize = 64 + 256;
/// Bytes of a tile's block of Q6_K.
pub(crate) const Q6K_BYTES: usize = Q6K_WEIGHTS + 16 * 192;

/// Reads half number `index` of a slice.
pub(crate) fn half_at(bytes: &[u8], index: usize) -> f32 {
    half(&bytes[2 * index..])
}

/// A block's half-precision scale, as bytes, and its weights.
pub(crate) type Block = ([u8; 2], [i8; 32]);

/// Returns a block's scale bytes and its 32 weights.
pub(crate) fn q8_0_block(block: &[u8; 34]) -> Block {
    ([block[0], block[1]], std::array::from_fn(|k| block[2 + k] as i8))
}

/// The same for Q4_0: a nibble less 8.
pub(crate) fn q4_0_block(block: &[u8; 18]) -> Block {
    let nibble = |k: usize| if k < 16 { block[2 + k] & 15 } else { block[2 + k - 16] >> 4 };
    ([block[0], block[1]], std::array::from_fn(|k| nibble(k) as i8 - 8))
}

/// The same for Q5_0: a nibble with a fifth bit, less 16.
pub(crate) fn q5_0_block(block: &[u8; 22]) -> Block {
    let top = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    let nibble = |k: usize| if k < 16 { block[6 + k] & 15 } else { block[6 + k - 16] >> 4 };
    ([block[0], block[1]], std::array::from_fn(|k| (nibble(k) | ((top >> k & 1) as u8) << 4) as i8 - 16))
}

/// Where block `b` of a tile of Q8_0 has its factors, and its weights.
pub(crate) const fn q8_0_at(b: usize) -> (usize, usize) {
    let pair = b / 2 * Q8_0_PAIR;
    (pair + b % 2 * 32, pair + 64 + b % 2 * 512)
}

/// Packs a row of blocks of 32 signed bytes. Two blocks: `[2][16]` half factors, then each `[8][16 rows][4]` weights.
pub(crate) fn q8_0<const N: usize>(tile: &mut [u8], lane: usize, row: &[[u8; N]], read: fn(&[u8; N]) -> Block) {
    for (b, block) in row.iter().enumerate() {
        let (scale, weights) = read(block);
        let (factors, base) = q8_0_at(b);
        for (k, weight) in weights.into_iter().enumerate() {
            tile[base + k / 4 * 64 + lane * 4 + k % 4] = weight as u8;
        }
        tile[factors + lane * 2..][..2].copy_from_slice(&scale);
    }
}

pub(crate) fn q8_0_row(tile: &[u8], lane: usize, out: &mut [f32]) {
    for (b, out) in out.chunks_exact_mut(32).enumerate() {
        let (factors, base) = q8_0_at(b);
        let scale = half_at(&tile[factors..], lane);
        for (k, out) in out.iter_mut().enumerate() {
            *out = f32::from(tile[base + k / 4 * 64 + lane * 4 + k % 4] as i8) * scale;
        }
    }
}

/// Returns the scale and the minimum of sub-block `j` of a Q4_K block's twelve packed bytes.
fn q4k_scale(packed: &[u8], j: usize) -> (u8, u8) {
    match j {
        0..4 => (packed[j] & 63, packed[j + 4] & 63),
        _ => (packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4, packed[j + 4] >> 4 | (packed[j] >> 6) << 4),
    }
}

/// Where sub-block `s` of a block of Q4_K has its scale (the minimum is 32 bytes further), and its nibbles.
fn q4k_at(s: usize, lane: usize) -> (usize, usize) {
    let pair = 64 + s / 2 * Q4K_PAIR;
    (pair + lane * 2 + s % 2, pair + 64 + s % 2 * 256)
}

/// Packs a row of Q4_K. A block: `[2][16]` halves, the factors of scales and of minimums; four pairs of sub-blocks of
/// 32 inputs: `[16 rows][2]` scales, `[16 rows][2]` minimums, and twice `[4][16 rows][4]` bytes whose low nibbles are
/// the inputs 0 to 15 and whose high ones are 16 to 31.
pub(crate) fn q4k(tile: &mut [u8], lane: usize, row: &[[u8; 144]]) {
    for (b, block) in row.iter().enumerate() {
        let base = b * Q4K_BYTES;
        for s in 0..8 {
            // ggml holds two sub-blocks in 32 bytes: the even one's weights are the low nibbles.
            let bytes = &block[16 + s / 2 * 32..][..32];
            let weight = |k: usize| if s % 2 == 0 { bytes[k] & 15 } else { bytes[k] >> 4 };
            let (scale_at, nibbles) = q4k_at(s, lane);
            for k in 0..16 {
                tile[base + nibbles + k / 4 * 64 + lane * 4 + k % 4] = weight(k) | weight(k + 16) << 4;
            }
            let (scale, min) = q4k_scale(&block[4..16], s);
            (tile[base + scale_at], tile[base + scale_at + 32]) = (scale, min);
        }
        for factor in 0..2 {
            let at = base + (factor * LANES + lane) * 2;
            tile[at..at + 2].copy_from_slice(&block[2 * factor..2 * factor + 2]);
        }
    }
}

pub(crate) fn q4k_row(tile: &[u8], lane: usize, out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (b, s) = (i / 8, i % 8);
        let block = &tile[b * Q4K_BYTES..][..Q4K_BYTES];
        let (scale_at, nibbles) = q4k_at(s, lane);
        let scale = half_at(block, lane) * f32::from(block[scale_at]);
        let min = half_at(block, LANES + lane) * f32::from(block[scale_at + 32]);
        for (k, out) in out.iter_mut().enumerate() {
            let byte = block[nibbles + k % 16 / 4 * 64 + lane * 4 + k % 4];
            *out = scale * f32::from(if k < 16 { byte & 15 } else { byte >> 4 }) - min;
        }
    }
}

/// Packs a row of Q6_K. A block: `[16]` half factors, 32 unused bytes, `[8 pairs of sub-blocks][16 rows][2]` signed
/// scales, and sixteen sub-blocks of 16 inputs, each three times `[16 rows][4]` bytes: low nibbles of the inputs 0 to 3
/// and (high half) 4 to 7; of 8 to 11 and 12 to 15; the upper two bits of all four groups, from the lowest bits up.
pub(crate) fn q6k(tile: &mut [u8], lane: usize, row: &[[u8; 210]]) {
    for (b, block) in row.iter().enumerate() {
        let base = b * Q6K_BYTES;
        let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
        for (k, weight) in q6k_weights(low, high).into_iter().enumerate() {
            let (s, group, i) = (k / 16, k % 16 / 4, k % 4);
            let part = base + Q6K_WEIGHTS + s * 192;
            tile[part + group / 2 * 64 + lane * 4 + i] |= (weight & 15) << (4 * (group % 2));
            tile[part + 128 + lane * 4 + i] |= (weight >> 4) << (2 * group);
        }
        for (s, scale) in scales.iter().enumerate() {
            tile[base + 64 + (s / 2 * LANES + lane) * 2 + s % 2] = *scale;
        }
        tile[base + lane * 2..][..2].copy_from_slice(&block[208..210]);
    }
}

/// The 256 weights of a block of ggml, 0 to 63, in the order of the inputs.
fn q6k_weights(low: &[u8], high: &[u8]) -> [u8; 256] {
    std::array::from_fn(|k| {
        let (half, quarter, l) = (k / 128, k % 128 / 32, k % 32);
        let byte = low[half * 64 + quarter % 2 * 32 + l];
        let nibble = if quarter < 2 { byte & 15 } else { byte >> 4 };
        nibble | (high[half * 32 + l] >> (2 * quarter) & 3) << 4
    })
}

pub(crate) fn q6k_row(tile: &[u8], lane: usize, out: &mut [f32]) {
    for (k, out) in out.iter_mut().enumerate() {
        let (b, s, group, i) = (k / 256, k % 256 / 16, k % 16 / 4, k % 4);
        let block = &tile[b * Q6K_BYTES..][..Q6K_BYTES];
        let part = &block[Q6K_WEIGHTS + s * 192..];
        let nibble = part[group / 2 * 64 + lane * 4 + i] >> (4 * (group % 2)) & 15;
        let top = part[128 + lane * 4 + i] >> (2 * group) & 3;
        let scale = f32::from(block[64 + (s / 2 * LANES + lane) * 2 + s % 2] as i8);
        *out = half_at(block, lane) * scale * (f32::from(nibble | top << 4) - 32.0);
    }
}
