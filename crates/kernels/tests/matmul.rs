//! Products and rows: every level, any number of rows and threads, equals plain loops over the file's own bytes.

mod support;

use kernels::rows::{Heads, place};
use kernels::{Activations, Input, Job, MatrixBuilder, Pool, Source, Wanted, matmul};
use proptest::prelude::*;
use support::{Random, bits};

const SOURCES: [Source; 8] =
    [Source::F32, Source::F16, Source::BF16, Source::Q4_0, Source::Q5_0, Source::Q8_0, Source::Q4K, Source::Q6K];

fn norm(x: &[f32], weight: &[f32]) -> Vec<f32> {
    let mut lanes = [0f32; 16];
    x.iter().enumerate().for_each(|(i, x)| lanes[i % 16] = x.mul_add(*x, lanes[i % 16]));
    let scale = 1.0 / (support::tree(lanes) / x.len() as f32 + 1e-6).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

fn inputs(source: Source, blocks: usize) -> usize {
    match source.block().0 {
        1 => 7 * blocks,
        block => block * blocks,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_product_equals_plain_loops_at_every_level(
        kind in 0..SOURCES.len(), outputs in 1usize..70, blocks in 1usize..4, count in 1usize..11, seed: u64,
        threads in 1usize..4, add: bool,
    ) {
        let (source, mut random) = (SOURCES[kind], Random(seed));
        let inputs = inputs(source, blocks);
        let bytes = support::rows(source, outputs, inputs, &mut random);
        let x = random.floats(count * inputs);
        let before = random.floats(count * outputs);
        let row_bytes = bytes.len() / outputs;
        let wanted: Vec<f32> = (0..count * outputs).map(|i| {
            let product = support::product(source, &bytes[i % outputs * row_bytes..][..row_bytes], &x[i / outputs * inputs..][..inputs]);
            if add { before[i] + product } else { product }
        }).collect();
        let matrix = MatrixBuilder::pack(source, outputs, inputs, &bytes).expect("whole blocks");
        let mut pool = Pool::new(threads).expect("threads");
        for level in support::levels() {
            let mut activations = Activations::default();
            activations.fill(level, &mut pool, Input::Plain(&x), inputs, Wanted::by([&matrix]));
            let mut out = before.clone();
            matmul(level, &mut pool, &activations, &mut [Job { matrix: &matrix, out: &mut out, add }]);
            prop_assert_eq!(bits(&out), bits(&wanted), "{:?} at {}", source, level);
        }
    }

    #[test]
    fn a_row_of_a_matrix_is_the_files_row(kind in 0..SOURCES.len(), outputs in 1usize..40, blocks in 1usize..4, seed: u64) {
        let (source, mut random) = (SOURCES[kind], Random(seed));
        let inputs = inputs(source, blocks);
        let bytes = support::rows(source, outputs, inputs, &mut random);
        let matrix = MatrixBuilder::pack(source, outputs, inputs, &bytes).expect("whole blocks");
        let mut row = vec![0.0; inputs];
        for i in 0..outputs {
            matrix.row(i, &mut row);
            prop_assert_eq!(bits(&row), bits(&support::widen(source, &bytes[i * bytes.len() / outputs..][..bytes.len() / outputs])));
        }
    }

    #[test]
    fn norms_and_gates_equal_plain_loops(n in 1usize..100, rows in 1usize..9, seed: u64) {
        let mut random = Random(seed);
        let (x, up, weight) = (random.floats(n * rows), random.floats(n * rows), random.floats(n));
        let identity: Vec<u8> = (0..n * n).flat_map(|i| if i / n == i % n { 1f32 } else { 0.0 }.to_le_bytes()).collect();
        let identity = MatrixBuilder::pack(Source::F32, n, n, &identity).expect("a matrix");
        let normed: Vec<f32> = x.chunks(n).flat_map(|x| norm(x, &weight)).collect();
        let gated: Vec<f32> = x.iter().zip(&up).map(|(x, up)| x / (1.0 + support::exp(0.0 - x)) * up).collect();
        let mut pool = Pool::new(2).expect("threads");
        for level in support::levels() {
            for (input, wanted) in [(Input::Normed(&x, &weight, 1e-6), &normed), (Input::Gated(&x, &up), &gated)] {
                let mut activations = Activations::default();
                activations.fill(level, &mut pool, input, n, Wanted::by([&identity]));
                let mut out = vec![0.0; n * rows];
                matmul(level, &mut pool, &activations, &mut [Job { matrix: &identity, out: &mut out, add: false }]);
                // The identity adds zeros, which leave all but a negative zero as it is.
                prop_assert_eq!(&out, wanted, "at {}", level);
            }
        }
    }
}

#[test]
fn a_matrix_of_half_blocks_is_refused() {
    assert!(MatrixBuilder::new(Source::Q4K, 4, 255).is_none());
    assert!(MatrixBuilder::new(Source::Q8_0, 0, 32).is_none());
    assert!(MatrixBuilder::new(Source::F32, usize::MAX / 8, 1 << 20).is_none());
    assert!(MatrixBuilder::pack(Source::F16, 2, 3, &[0; 13]).is_none());
}

#[test]
fn the_exponential_is_within_two_units_of_the_last_place() {
    for i in -8700..8800 {
        let x = i as f32 / 100.0;
        let (ours, true_value) = (f64::from(support::exp(x)), f64::from(x).exp());
        assert!((ours / true_value - 1.0).abs() < 2.0 * f64::from(f32::EPSILON), "exp({x}) = {ours}, not {true_value}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn heads_are_normed_and_rotated_as_plain_loops_do_it(
        tokens in 1usize..20, heads in 1usize..4, half in 1usize..30, halves: bool, normed: bool, seed: u64,
    ) {
        let (mut random, dim) = (Random(seed), 2 * half);
        let (x, weight) = (random.floats(tokens * heads * dim), random.floats(dim));
        let (cos, sin) = (random.floats(tokens * half), random.floats(tokens * half));
        let mut wanted = x.clone();
        for (i, head) in wanted.chunks_mut(dim).enumerate() {
            if normed {
                head.copy_from_slice(&norm(head, &weight));
            }
            let before = head.to_vec();
            for pair in 0..half {
                let (cos, sin) = (cos[i / heads * half + pair], sin[i / heads * half + pair]);
                let (a, b) = if halves { (pair, pair + half) } else { (2 * pair, 2 * pair + 1) };
                head[a] = before[a] * cos - before[b] * sin;
                head[b] = before[b] * cos + before[a] * sin;
            }
        }
        let mut pool = Pool::new(2).expect("threads");
        for level in support::levels() {
            let mut out = x.clone();
            let norm = normed.then_some((weight.as_slice(), 1e-6));
            place(level, &mut pool, &mut out, &Heads { head_dim: dim, norm, cos: &cos, sin: &sin, halves });
            prop_assert_eq!(bits(&out), bits(&wanted), "at {}", level);
        }
    }
}
