//! Attention: every level equals plain loops; chunks, threads and other sequences change no bit.

mod support;

use half::f16;
use kernels::attention::{self, PARTITION, Scratch, Sequence};
use kernels::kv::{BLOCK, KvShape, KvStore, KvType, Slot};
use kernels::{Level, Pool};
use proptest::prelude::*;
use support::{Random, bits, exp, tree};

struct Case {
    shape: KvShape,
    group: usize,
    /// `[length, heads, head_dim]`, and `[length, kv_heads, head_dim]` twice.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    blocks: Vec<u32>,
}

impl Case {
    fn new(kv_heads: usize, group: usize, head_dim: usize, kind: KvType, length: usize, random: &mut Random) -> Self {
        let shape = KvShape { layers: 2, kv_heads, head_dim, kind };
        let count = length.div_ceil(BLOCK);
        let mut blocks: Vec<u32> = (0..count as u32 + 2).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, random.below(i + 1));
        }
        blocks.truncate(count);
        let numbers = length * kv_heads * head_dim;
        let (q, k, v) = (random.floats(numbers * group), random.floats(numbers), random.floats(numbers));
        Case { shape, group, q, k, v, blocks }
    }

    /// Runs the whole sequence in these chunks; the store is full of NaN before.
    fn run(&self, level: Level, threads: usize, chunks: &[usize]) -> Vec<f32> {
        let blocks = self.blocks.len() + 2;
        let mut store = KvStore::new(self.shape, blocks).expect("a store");
        let garbage = vec![0xff; self.shape.block_bytes()];
        (0..blocks as u32).for_each(|block| store.import(block, &garbage));
        let (mut pool, mut scratch) = (Pool::new(threads).expect("threads"), Scratch::default());
        let (mut out, mut start) = (Vec::new(), 0);
        let kv = self.shape.kv_heads * self.shape.head_dim;
        for tokens in chunks {
            let end = start + tokens;
            let slot = |p: usize| Slot { block: self.blocks[p / BLOCK], offset: (p % BLOCK) as u32 };
            let slots: Vec<Slot> = (start..end).map(slot).collect();
            store.write(level, &mut pool, 1, &slots, &self.k[start * kv..end * kv], &self.v[start * kv..end * kv]);
            let mut part = vec![0.0; tokens * kv * self.group];
            let sequence = Sequence { start, tokens: *tokens, blocks: &self.blocks };
            let q = &self.q[start * kv * self.group..end * kv * self.group];
            attention::attend(level, &mut pool, &mut scratch, &store, 1, &[sequence], q, &mut part);
            out.extend(part);
            start = end;
        }
        out
    }

    /// One query, one head: the definition.
    fn naive(&self, position: usize, head: usize) -> Vec<f32> {
        let (dim, heads) = (self.shape.head_dim, self.shape.kv_heads * self.group);
        let scale = 1.0 / (dim as f32).sqrt();
        let q: Vec<f32> = self.q[(position * heads + head) * dim..][..dim].iter().map(|q| q * scale).collect();
        let stored = |x: f32| match self.shape.kind {
            KvType::F16 => f16::from_f32(x).to_f32(),
            KvType::F32 => x,
        };
        let at = |of: &[f32], p: usize, d: usize| stored(of[(p * self.shape.kv_heads + head / self.group) * dim + d]);
        let mut all: Option<(f32, f32, Vec<f32>)> = None;
        for part in 0..=position / PARTITION {
            let (mut most, mut sum, mut values) = (f32::NEG_INFINITY, 0f32, vec![0f32; dim]);
            let end = ((part + 1) * PARTITION).min(position + 1);
            for block in (part * PARTITION..end).step_by(BLOCK) {
                let seen = (end - block).min(BLOCK);
                let scores: Vec<f32> = (block..block + seen)
                    .map(|p| (0..dim).fold(0f32, |sum, d| at(&self.k, p, d).mul_add(q[d], sum)))
                    .collect();
                let before = most;
                most = scores.iter().fold(most, |most, s| most.max(*s));
                let weights: Vec<f32> = scores.iter().map(|s| exp(s - most)).collect();
                let shrink = exp(before - most);
                let lane = |i: usize| weights.get(i).copied().unwrap_or(0.0);
                sum = sum.mul_add(shrink, tree(std::array::from_fn(|i| lane(i) + lane(i + 16))));
                for (d, value) in values.iter_mut().enumerate() {
                    *value =
                        (0..seen).fold(*value * shrink, |sum, j| at(&self.v, block + j, d).mul_add(weights[j], sum));
                }
            }
            all = Some(match all {
                None => (most, sum, values),
                Some((m, s, v)) => {
                    let top = if most > m { most } else { m };
                    let (a, b) = (exp(m - top), exp(most - top));
                    let values = values.iter().zip(&v).map(|(new, old)| new.mul_add(b, old * a)).collect();
                    (top, sum.mul_add(b, s * a), values)
                }
            });
        }
        let (_, sum, values) = all.expect("a position");
        values.iter().map(|value| value * (1.0 / sum)).collect()
    }
}

fn random_chunks(length: usize, most: usize, random: &mut Random) -> Vec<usize> {
    let mut left = length;
    let mut chunks = Vec::new();
    while left > 0 {
        let next = (1 + random.below(most)).min(left);
        chunks.push(next);
        left -= next;
    }
    chunks
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn attention_equals_plain_loops_at_every_level(
        kv_heads in 1usize..4, group in 1usize..5, dim in prop::sample::select(vec![8usize, 16, 24, 48, 64]),
        half: bool, length in 1usize..130, most in 1usize..60, threads in 1usize..4, seed: u64,
    ) {
        let mut random = Random(seed);
        let kind = if half { KvType::F16 } else { KvType::F32 };
        let case = Case::new(kv_heads, group, dim, kind, length, &mut random);
        let wanted: Vec<f32> = (0..length).flat_map(|p| (0..kv_heads * group).flat_map(move |h| [(p, h)]))
            .flat_map(|(p, h)| case.naive(p, h)).collect();
        for level in support::levels() {
            let chunks = random_chunks(length, most, &mut random);
            prop_assert_eq!(bits(&case.run(level, threads, &chunks)), bits(&wanted), "at {}", level);
        }
    }
}

#[test]
fn partitions_are_merged_alike_by_one_thread_and_by_many() {
    let mut random = Random(5);
    let length = 2 * PARTITION + 77;
    let case = Case::new(1, 2, 16, KvType::F16, length, &mut random);
    let chunks: Vec<usize> = vec![length - 3, 1, 1, 1];
    for level in
        support::levels().into_iter().filter(|level| *level != Level::Portable || cfg!(not(target_arch = "x86_64")))
    {
        let once = case.run(level, 1, &[length]);
        for threads in [1, 2, 5] {
            assert_eq!(bits(&case.run(level, threads, &chunks)), bits(&once), "{level}, {threads} threads");
        }
        for position in [PARTITION - 1, PARTITION, PARTITION + 1, 2 * PARTITION, length - 1] {
            for head in 0..2 {
                let at = (position * 2 + head) * 16;
                assert_eq!(bits(&once[at..at + 16]), bits(&case.naive(position, head)), "{level}, position {position}");
            }
        }
    }
}

#[test]
fn a_block_goes_out_and_in_again_with_all_its_bits() {
    let shape = KvShape { layers: 3, kv_heads: 2, head_dim: 24, kind: KvType::F16 };
    let mut store = KvStore::new(shape, 4).expect("a store");
    let mut random = Random(1);
    let bytes: Vec<u8> = (0..shape.block_bytes()).map(|_| random.next() as u8).collect();
    store.import(2, &bytes);
    store.copy(2, 0);
    assert_eq!(store.export(0), bytes);
    assert_eq!(store.export(2), bytes);
    assert!(store.export(1).iter().all(|byte| *byte == 0));
}

#[test]
fn a_pool_runs_each_task_once_and_survives_a_panic() {
    let mut pool = Pool::new(3).expect("threads");
    for round in 0..200 {
        let counts: Vec<std::sync::atomic::AtomicUsize> = (0..round % 17).map(|_| 0.into()).collect();
        pool.run(counts.len(), &|task, worker| {
            assert!(worker < 3);
            counts[task].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(counts.iter().all(|count| count.load(std::sync::atomic::Ordering::Relaxed) == 1));
        if round % 50 == 7 {
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.run(9, &|task, _| assert!(task != 4, "as arranged"));
            }));
            assert!(panicked.is_err());
        }
    }
}
