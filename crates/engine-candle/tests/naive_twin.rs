//! The engine against plain loops that share nothing with it.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use engine_candle::{KvType, Options};
use model_files::gguf::TensorType;
use support::model::{Model, Numbers, Shape};
use support::{arithmetics, largest_difference, load, naive, options, prefill};

fn prompt(length: usize, vocabulary: usize) -> Vec<u32> {
    let mut numbers = Numbers(11);
    (0..length).map(|_| ((numbers.draw() + 1.0) / 2.0 * vocabulary as f32) as u32 % vocabulary as u32).collect()
}

/// Runs `length` tokens, the last one as a decode step, and compares logits in the middle and at the end.
fn check(shape: Shape, kind: TensorType, length: usize, tolerance: f32) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let what = format!("{} {kind:?}", shape.family);
    let model = Model::random(shape, kind, 5);
    model.write(&path);
    let tokens = prompt(length, model.shape.vocabulary);
    let expected = naive::forward(&model, &tokens);
    for arithmetic in arithmetics(KvType::F32) {
        let mut engine = load(&path, &Options { arithmetic, ..options(32) }).unwrap();
        let blocks = [9, 3, 4, 5, 1, 0, 14, 2, 7, 8, 6, 11];
        for (chunk, end) in [(length - 1, length), (100, length / 2), (100, length), (33, length)] {
            let got = prefill(&mut engine, &tokens[..end], &blocks, chunk);
            let difference = largest_difference(&got, &expected[end - 1]);
            let case = format!("{what} by {arithmetic:?}");
            assert!(difference < tolerance, "{case}: {difference} after {end} tokens in chunks of {chunk}");
        }
    }
}

#[test]
fn qwen3_equals_its_naive_twin_past_position_200() {
    check(Shape::QWEN3, TensorType::F32, 300, 1e-4);
    check(Shape { tied: false, kv_heads: 6, ..Shape::QWEN3 }, TensorType::F32, 300, 1e-4);
    check(Shape { kv_heads: 1, head_dim: 10, ..Shape::QWEN3 }, TensorType::F32, 230, 1e-4);
}

#[test]
fn llama_with_divisors_or_linear_scaling_equals_its_naive_twin() {
    check(Shape::LLAMA, TensorType::F32, 300, 1e-4);
    let scaled = Shape { linear_factor: Some(4.0), rope_divisors: false, tied: true, ..Shape::LLAMA };
    check(scaled, TensorType::F32, 300, 1e-4);
}

#[test]
fn half_weights_equal_their_naive_twin() {
    check(Shape::QWEN3, TensorType::F16, 250, 1e-4);
    check(Shape::LLAMA, TensorType::F16, 250, 1e-4);
    check(Shape::QWEN3, TensorType::BF16, 250, 1e-4);
    check(Shape::LLAMA, TensorType::BF16, 250, 1e-4);
}

#[test]
fn block_weights_are_near_their_naive_twin() {
    use TensorType as T;
    // Rows of whole k-quant blocks. Activations are rounded to 8 bits beside these weights, so "near" is what can be:
    // two to four percent of the logits of a random model, and over half of them where blocks are misread.
    let wide = Shape { hidden: 256, feed_forward: 512, layers: 2, heads: 8, head_dim: 32, tied: false, ..Shape::QWEN3 };
    let tokens = prompt(40, wide.vocabulary);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for kind in [T::Q4_0, T::Q4_1, T::Q5_0, T::Q5_1, T::Q8_0, T::Q2K, T::Q3K, T::Q4K, T::Q5K, T::Q6K] {
        let model = Model::random(wide, kind, 5);
        model.write(&path);
        let expected = naive::forward(&model, &tokens).pop().unwrap();
        for (arithmetic, chunk) in arithmetics(KvType::F32).into_iter().flat_map(|a| [(a, 40), (a, 1)]) {
            let mut engine = load(&path, &Options { arithmetic, ..options(32) }).unwrap();
            let got = prefill(&mut engine, &tokens, &[3, 1], chunk);
            let square = |x: &[f32]| x.iter().map(|n| n * n).sum::<f32>();
            let errors: Vec<f32> = got.iter().zip(&expected).map(|(a, b)| a - b).collect();
            let share = (square(&errors) / square(&expected)).sqrt();
            assert!(share < 0.06, "{kind:?} by {arithmetic:?} in chunks of {chunk}: {share}");
        }
    }
}

#[test]
fn the_twin_would_notice_wrong_rotations_and_norms() {
    let model = Model::random(Shape::QWEN3, TensorType::F32, 5);
    let tokens = prompt(250, model.shape.vocabulary);
    let right = naive::forward(&model, &tokens).pop().unwrap();
    let mut other = Model::random(Shape::QWEN3, TensorType::F32, 5);
    other.shape.rope_base = 990_000.0;
    let rotated = naive::forward(&other, &tokens).pop().unwrap();
    assert!(largest_difference(&right, &rotated) > 1e-3, "one percent of the base must show");
    let mut other = Model::random(Shape::QWEN3, TensorType::F32, 5);
    other.weights.get_mut("blk.1.attn_k_norm.weight").unwrap()[3] *= 1.01;
    let normed = naive::forward(&other, &tokens).pop().unwrap();
    assert!(largest_difference(&right, &normed) > 1e-3, "one percent of one norm weight must show");
}
