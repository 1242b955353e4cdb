//! Plain loops: the definitions that the kernels must equal, bit by bit.
#![allow(dead_code, missing_docs, unreachable_pub)]

use half::f16;
use kernels::{Level, Source};

/// A small generator (Steele, Lea and Flood 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// From -1 to 1, now and then much larger, or zero.
    pub fn float(&mut self) -> f32 {
        let x = (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        match self.below(64) {
            0 => 0.0,
            1 => x * 50.0,
            _ => x,
        }
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

pub fn levels() -> Vec<Level> {
    Level::ALL.into_iter().filter(|level| level.is_available()).collect()
}

/// Rows of a file's format with random contents and sane factors.
pub fn rows(source: Source, outputs: usize, inputs: usize, random: &mut Random) -> Vec<u8> {
    let (block, bytes) = source.block();
    let mut out = Vec::new();
    for _ in 0..outputs * inputs / block {
        let mut one: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
        let mut half = |one: &mut [u8], at: usize| {
            one[at..at + 2].copy_from_slice(&f16::from_f32(random.float() / 50.0).to_le_bytes());
        };
        match source {
            Source::F32 => one = random.float().to_le_bytes().to_vec(),
            Source::F16 => half(&mut one, 0),
            Source::BF16 => one = half::bf16::from_f32(random.float()).to_le_bytes().to_vec(),
            Source::Q4_0 | Source::Q5_0 | Source::Q8_0 => half(&mut one, 0),
            Source::Q4K => {
                half(&mut one, 0);
                half(&mut one, 2);
            }
            Source::Q6K => half(&mut one, 208),
        }
        out.extend(one);
    }
    out
}

fn half_of(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// A block in parts: its factors, and a sub-block's scale, minimum and whole weights.
pub struct Block {
    pub factor: f32,
    pub min_factor: f32,
    pub parts: Vec<(i32, i32, Vec<i32>)>,
}

/// Reads one block as ggml's documentation lays it out.
pub fn block(source: Source, bytes: &[u8]) -> Block {
    let simple = |factor: f32, weights: Vec<i32>| Block { factor, min_factor: 0.0, parts: vec![(1, 0, weights)] };
    match source {
        Source::Q8_0 => simple(half_of(bytes), bytes[2..].iter().map(|b| i32::from(*b as i8)).collect()),
        Source::Q4_0 => {
            let low = bytes[2..].iter().map(|b| i32::from(b & 15) - 8);
            simple(half_of(bytes), low.chain(bytes[2..].iter().map(|b| i32::from(b >> 4) - 8)).collect())
        }
        Source::Q5_0 => {
            let bit = |k: usize| i32::from(bytes[2 + k / 8] >> (k % 8) & 1) * 16;
            let low = (0..16).map(|k| i32::from(bytes[6 + k] & 15) + bit(k) - 16);
            let high = (0..16).map(|k| i32::from(bytes[6 + k] >> 4) + bit(k + 16) - 16);
            simple(half_of(bytes), low.chain(high).collect())
        }
        Source::Q4K => {
            let packed = &bytes[4..16];
            let mut parts = Vec::new();
            for j in 0..8 {
                let (scale, min) = if j < 4 {
                    (packed[j] % 64, packed[j + 4] % 64)
                } else {
                    (packed[j + 4] % 16 + packed[j - 4] / 64 * 16, packed[j + 4] / 16 + packed[j] / 64 * 16)
                };
                let part = &bytes[16 + 32 * (j / 2)..][..32];
                let weights = part.iter().map(|b| i32::from(if j % 2 == 0 { b % 16 } else { b / 16 })).collect();
                parts.push((i32::from(scale), i32::from(min), weights));
            }
            Block { factor: half_of(bytes), min_factor: half_of(&bytes[2..]), parts }
        }
        Source::Q6K => {
            let mut weights = [0i32; 256];
            for n in 0..2 {
                let (ql, qh) = (&bytes[64 * n..], &bytes[128 + 32 * n..]);
                for l in 0..32 {
                    let top = |shift: u32| i32::from(qh[l] >> shift & 3) * 16 - 32;
                    weights[128 * n + l] = i32::from(ql[l] % 16) + top(0);
                    weights[128 * n + l + 32] = i32::from(ql[l + 32] % 16) + top(2);
                    weights[128 * n + l + 64] = i32::from(ql[l] / 16) + top(4);
                    weights[128 * n + l + 96] = i32::from(ql[l + 32] / 16) + top(6);
                }
            }
            let scale = |j: usize| i32::from(bytes[192 + j] as i8);
            let parts = (0..16).map(|j| (scale(j), 0, weights[16 * j..16 * j + 16].to_vec())).collect();
            Block { factor: half_of(&bytes[208..]), min_factor: 0.0, parts }
        }
        _ => unreachable!("floats have no blocks"),
    }
}

/// The weights of one row as floats.
pub fn widen(source: Source, bytes: &[u8]) -> Vec<f32> {
    match source {
        Source::F32 => bytes.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Source::F16 => bytes.chunks(2).map(half_of).collect(),
        Source::BF16 => {
            bytes.chunks(2).map(|b| f32::from_bits(u32::from(b[0]) << 16 | u32::from(b[1]) << 24)).collect()
        }
        _ => bytes
            .chunks(source.block().1)
            .flat_map(|bytes| {
                let Block { factor, min_factor, parts } = block(source, bytes);
                parts.into_iter().flat_map(move |(scale, min, weights)| {
                    weights.into_iter().map(move |w| factor * scale as f32 * w as f32 - min_factor * min as f32)
                })
            })
            .collect(),
    }
}

/// Blocks of a row of activations: the scale, and whole numbers.
pub fn quantised(x: &[f32], block: usize) -> Vec<(f32, Vec<i32>)> {
    x.chunks(block)
        .map(|x| {
            let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            let inverse = if most > 0.0 && (127.0 / most).is_finite() { 127.0 / most } else { 0.0 };
            (most / 127.0, x.iter().map(|x| (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i32).collect())
        })
        .collect()
}

/// One output: the definition of the order of summation.
pub fn product(source: Source, weights: &[u8], x: &[f32]) -> f32 {
    match source {
        Source::F32 | Source::F16 | Source::BF16 => {
            widen(source, weights).iter().zip(x).fold(0.0, |sum, (w, x)| w.mul_add(*x, sum))
        }
        _ => {
            let (inputs, bytes) = source.block();
            weights.chunks(bytes).zip(quantised(x, inputs)).fold(0f32, |sum, (weights, (scale, numbers))| {
                let Block { factor, min_factor, parts } = block(source, weights);
                let (mut whole, mut least, mut at) = (0i32, 0i32, 0);
                for (scale, min, weights) in parts {
                    let numbers = &numbers[at..at + weights.len()];
                    whole += scale * weights.iter().zip(numbers).map(|(w, n)| w * n).sum::<i32>();
                    least += min * numbers.iter().sum::<i32>();
                    at += weights.len();
                }
                let sum = (factor * scale).mul_add(whole as f32, sum);
                if source == Source::Q4K { (min_factor * -scale).mul_add(least as f32, sum) } else { sum }
            })
        }
    }
}

/// Adds sixteen lanes as the kernels' tree does.
pub fn tree(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// The kernels' exponential, one number.
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-355.0 / 512.0, x));
    let p = [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0].into_iter().fold(1f32 / 720.0, |p, c| p.mul_add(r, c));
    p * 2f32.powi(n as i32)
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}
