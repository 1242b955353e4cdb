//! ggml's blocks into tiles and back, one row at a time.
//!
//! All layouts put sixteen rows side by side in groups of four inputs: 64 bytes are `[16 rows][4 inputs]`. What a
//! block has of half-precision factors stands behind all blocks' integers, so that those stay on cache lines.

use crate::simd::LANES;
use crate::weights::half;

/// Bytes of a tile's block of Q8_0, with its scales.
pub(crate) const Q8_0_BYTES: usize = 32 * LANES + 2 * LANES;
/// Bytes of the integers of a tile's block of Q4_K: 2048 of nibbles, 128 of scales, 128 of minimums.
pub(crate) const Q4K_INTS: usize = 2048 + 256;
/// The same with both factors.
pub(crate) const Q4K_BYTES: usize = Q4K_INTS + 4 * LANES;
/// Bytes of the integers of a tile's block of Q6_K: 3072 of weights, 256 of scales.
pub(crate) const Q6K_INTS: usize = 3072 + 256;
/// The same with its factor.
pub(crate) const Q6K_BYTES: usize = Q6K_INTS + 2 * LANES;

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

/// Packs a row of blocks of 32 signed bytes.
pub(crate) fn q8_0<const N: usize>(tile: &mut [u8], lane: usize, row: &[[u8; N]], read: fn(&[u8; N]) -> Block) {
    let scales = row.len() * 512;
    for (b, block) in row.iter().enumerate() {
        let (scale, weights) = read(block);
        for (k, weight) in weights.into_iter().enumerate() {
            tile[b * 512 + k / 4 * 64 + lane * 4 + k % 4] = weight as u8;
        }
        tile[scales + (b * LANES + lane) * 2..][..2].copy_from_slice(&scale);
    }
}

pub(crate) fn q8_0_row(tile: &[u8], lane: usize, out: &mut [f32]) {
    let scales = out.len() / 32 * 512;
    for (b, out) in out.chunks_exact_mut(32).enumerate() {
        let scale = half_at(&tile[scales..], b * LANES + lane);
        for (k, out) in out.iter_mut().enumerate() {
            *out = f32::from(tile[b * 512 + k / 4 * 64 + lane * 4 + k % 4] as i8) * scale;
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

/// Packs a row of Q4_K. A block's integers: eight sub-blocks of 32 inputs, each `[4][16 rows][4]` bytes whose low
/// nibbles are the inputs 0 to 15 and whose high ones are 16 to 31; then `[4 pairs of sub-blocks][16 rows][2]`
/// scales, and the same of minimums. Factors: `[blocks][2][16]` halves, the scales' and the minimums'.
pub(crate) fn q4k(tile: &mut [u8], lane: usize, row: &[[u8; 144]]) {
    let factors = row.len() * Q4K_INTS;
    for (b, block) in row.iter().enumerate() {
        let base = b * Q4K_INTS;
        for s in 0..8 {
            // ggml holds two sub-blocks in 32 bytes: the even one's weights are the low nibbles.
            let bytes = &block[16 + s / 2 * 32..][..32];
            let weight = |k: usize| if s % 2 == 0 { bytes[k] & 15 } else { bytes[k] >> 4 };
            for k in 0..16 {
                tile[base + s * 256 + k / 4 * 64 + lane * 4 + k % 4] = weight(k) | weight(k + 16) << 4;
            }
            let (scale, min) = q4k_scale(&block[4..16], s);
            let at = base + 2048 + (s / 2 * LANES + lane) * 2 + s % 2;
            (tile[at], tile[at + 128]) = (scale, min);
        }
        for factor in 0..2 {
            let at = factors + ((b * 2 + factor) * LANES + lane) * 2;
            tile[at..at + 2].copy_from_slice(&block[2 * factor..2 * factor + 2]);
        }
    }
}

pub(crate) fn q4k_row(tile: &[u8], lane: usize, out: &mut [f32]) {
    let factors = &tile[out.len() / 256 * Q4K_INTS..];
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (b, s) = (i / 8, i % 8);
        let base = b * Q4K_INTS;
        let at = base + 2048 + (s / 2 * LANES + lane) * 2 + s % 2;
        let scale = half_at(factors, b * 2 * LANES + lane) * f32::from(tile[at]);
        let min = half_at(factors, (b * 2 + 1) * LANES + lane) * f32::from(tile[at + 128]);
        for (k, out) in out.iter_mut().enumerate() {
            let byte = tile[base + s * 256 + k % 16 / 4 * 64 + lane * 4 + k % 4];
            *out = scale * f32::from(if k < 16 { byte & 15 } else { byte >> 4 }) - min;
        }
    }
}

/// Packs a row of Q6_K. A block's integers: sixteen sub-blocks of 16 inputs, each three times `[16 rows][4]` bytes:
/// low nibbles of the inputs 0 to 3 and (high half) 4 to 7; of 8 to 11 and 12 to 15; the upper two bits of all four
/// groups, from the lowest bits up; then `[8 pairs of sub-blocks][16 rows][2]` signed scales. Factors: `[blocks][16]`
/// halves.
pub(crate) fn q6k(tile: &mut [u8], lane: usize, row: &[[u8; 210]]) {
    let factors = row.len() * Q6K_INTS;
    for (b, block) in row.iter().enumerate() {
        let base = b * Q6K_INTS;
        let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
        for (k, weight) in q6k_weights(low, high).into_iter().enumerate() {
            let (s, group, i) = (k / 16, k % 16 / 4, k % 4);
            let at = base + s * 192 + group / 2 * 64 + lane * 4 + i;
            tile[at] |= (weight & 15) << (4 * (group % 2));
            tile[base + s * 192 + 128 + lane * 4 + i] |= (weight >> 4) << (2 * group);
        }
        for (s, scale) in scales.iter().enumerate() {
            tile[base + 3072 + (s / 2 * LANES + lane) * 2 + s % 2] = *scale;
        }
        tile[factors + (b * LANES + lane) * 2..][..2].copy_from_slice(&block[208..210]);
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
    let factors = &tile[out.len() / 256 * Q6K_INTS..];
    for (k, out) in out.iter_mut().enumerate() {
        let (b, s, group, i) = (k / 256, k % 256 / 16, k % 16 / 4, k % 4);
        let base = b * Q6K_INTS;
        let nibble = tile[base + s * 192 + group / 2 * 64 + lane * 4 + i] >> (4 * (group % 2)) & 15;
        let top = tile[base + s * 192 + 128 + lane * 4 + i] >> (2 * group) & 3;
        let scale = f32::from(tile[base + 3072 + (s / 2 * LANES + lane) * 2 + s % 2] as i8);
        *out = half_at(factors, b * LANES + lane) * scale * (f32::from(nibble | top << 4) - 32.0);
    }
}
