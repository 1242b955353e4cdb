//! Small random models, written as GGUF.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use model_files::gguf::{Builder, TensorType, Value};

/// A model's shape and constants.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub family: &'static str,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub feed_forward: usize,
    pub vocabulary: usize,
    pub context: usize,
    pub rope_base: f32,
    pub linear_factor: Option<f32>,
    pub rope_divisors: bool,
    pub tied: bool,
}

impl Shape {
    pub const QWEN3: Shape = Shape {
        family: "qwen3",
        hidden: 48,
        layers: 3,
        heads: 6,
        kv_heads: 2,
        head_dim: 16,
        feed_forward: 80,
        vocabulary: 97,
        context: 512,
        rope_base: 1_000_000.0,
        linear_factor: None,
        rope_divisors: false,
        tied: true,
    };
    pub const LLAMA: Shape =
        Shape { family: "llama", rope_base: 10_000.0, tied: false, rope_divisors: true, ..Shape::QWEN3 };

    pub fn qk_norm(&self) -> bool {
        self.family == "qwen3"
    }

    /// Every tensor's name and shape, outermost dimension first.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let Shape { hidden, head_dim, feed_forward, .. } = *self;
        let (queries, keys) = (self.heads * head_dim, self.kv_heads * head_dim);
        let mut list = vec![("token_embd.weight".into(), vec![self.vocabulary, hidden])];
        list.push(("output_norm.weight".into(), vec![hidden]));
        if !self.tied {
            list.push(("output.weight".into(), vec![self.vocabulary, hidden]));
        }
        if self.rope_divisors {
            list.push(("rope_freqs.weight".into(), vec![head_dim / 2]));
        }
        for layer in 0..self.layers {
            let mut add = |part: &str, shape: &[usize]| list.push((format!("blk.{layer}.{part}"), shape.to_vec()));
            add("attn_norm.weight", &[hidden]);
            add("ffn_norm.weight", &[hidden]);
            if self.qk_norm() {
                add("attn_q_norm.weight", &[head_dim]);
                add("attn_k_norm.weight", &[head_dim]);
            }
            for (part, out, inner) in [
                ("attn_q", queries, hidden),
                ("attn_k", keys, hidden),
                ("attn_v", keys, hidden),
                ("attn_output", hidden, queries),
                ("ffn_gate", feed_forward, hidden),
                ("ffn_up", feed_forward, hidden),
                ("ffn_down", hidden, feed_forward),
            ] {
                add(&format!("{part}.weight"), &[out, inner]);
            }
        }
        list
    }

    fn metadata(&self, builder: &mut Builder<'_>) {
        builder.add("general.architecture", Value::String(self.family.into()));
        let mut add = |suffix: &str, value| {
            builder.add(format!("{}.{suffix}", self.family), value);
        };
        add("block_count", Value::U32(self.layers as u32));
        add("context_length", Value::U32(self.context as u32));
        add("embedding_length", Value::U32(self.hidden as u32));
        add("feed_forward_length", Value::U32(self.feed_forward as u32));
        add("attention.head_count", Value::U32(self.heads as u32));
        add("attention.head_count_kv", Value::U32(self.kv_heads as u32));
        add("attention.key_length", Value::U32(self.head_dim as u32));
        add("attention.value_length", Value::U32(self.head_dim as u32));
        add("attention.layer_norm_rms_epsilon", Value::F32(1e-6));
        add("rope.freq_base", Value::F32(self.rope_base));
        if let Some(factor) = self.linear_factor {
            add("rope.scaling.type", Value::String("linear".into()));
            add("rope.scaling.factor", Value::F32(factor));
        }
    }
}

/// Weights, as they are after rounding to what the file stores.
pub struct Model {
    pub shape: Shape,
    pub weights: BTreeMap<String, Vec<f32>>,
    stored: Vec<(String, Vec<usize>, TensorType, Vec<u8>)>,
}

/// A linear congruential generator (Knuth's MMIX constants): enough for weights, and the same everywhere.
pub struct Numbers(pub u64);

impl Numbers {
    /// Draws from -1 to 1.
    pub fn draw(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1 << 23) as f32) - 1.0
    }
}

impl Model {
    /// Draws a model whose matrices are stored as `kind`; vectors are always F32.
    pub fn random(shape: Shape, kind: TensorType, seed: u64) -> Model {
        let mut numbers = Numbers(seed);
        let mut model = Model { shape, weights: BTreeMap::new(), stored: Vec::new() };
        for (name, dims) in shape.tensors() {
            let count: usize = dims.iter().product();
            let spread = match dims.as_slice() {
                [_, inner] if name != "token_embd.weight" => 3.0 / (*inner as f32).sqrt(),
                _ => 1.0,
            };
            let drawn: Vec<f32> = match name.as_str() {
                "rope_freqs.weight" => (0..count).map(|_| 2.5 + 1.5 * numbers.draw()).collect(),
                name if name.ends_with("norm.weight") => (0..count).map(|_| 1.0 + 0.5 * numbers.draw()).collect(),
                _ => (0..count).map(|_| spread * numbers.draw()).collect(),
            };
            let kind = if dims.len() == 2 { kind } else { TensorType::F32 };
            let (bytes, rounded) = store(&drawn, &dims, kind);
            model.weights.insert(name.clone(), rounded);
            model.stored.push((name, dims, kind, bytes));
        }
        model
    }

    /// Writes the model; `change` may drop, rename or reshape tensors, or damage the metadata.
    pub fn write(&self, path: &Path) {
        self.write_with(path, |_| true, |_| ());
    }

    pub fn write_with(&self, path: &Path, keep: impl Fn(&str) -> bool, extra: impl FnOnce(&mut Builder<'_>)) {
        let mut builder = Builder::new();
        self.shape.metadata(&mut builder);
        for (name, dims, kind, bytes) in self.stored.iter().filter(|tensor| keep(&tensor.0)) {
            let inner_first: Vec<u64> = dims.iter().rev().map(|side| *side as u64).collect();
            builder.tensor(name.clone(), &inner_first, *kind, Box::new(|out| out.write_all(bytes)));
        }
        extra(&mut builder);
        let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
        builder.write_to(&mut file).unwrap();
        file.flush().unwrap();
    }
}

/// Gives the bytes that store `numbers`, and the numbers that come out of them again.
fn store(numbers: &[f32], dims: &[usize], kind: TensorType) -> (Vec<u8>, Vec<f32>) {
    let blocks = match kind {
        TensorType::F32 => {
            return (numbers.iter().flat_map(|n| n.to_le_bytes()).collect(), numbers.to_vec());
        }
        TensorType::F16 => {
            let halves = numbers.iter().map(|n| f16::from_f32(*n));
            return (halves.clone().flat_map(f16::to_le_bytes).collect(), halves.map(f16::to_f32).collect());
        }
        TensorType::BF16 => {
            let halves = numbers.iter().map(|n| bf16::from_f32(*n));
            return (halves.clone().flat_map(bf16::to_le_bytes).collect(), halves.map(bf16::to_f32).collect());
        }
        TensorType::Q4_0 => GgmlDType::Q4_0,
        TensorType::Q5_0 => GgmlDType::Q5_0,
        TensorType::Q8_0 => GgmlDType::Q8_0,
        TensorType::Q4_1 => GgmlDType::Q4_1,
        TensorType::Q5_1 => GgmlDType::Q5_1,
        TensorType::Q2K => GgmlDType::Q2K,
        TensorType::Q3K => GgmlDType::Q3K,
        TensorType::Q4K => GgmlDType::Q4K,
        TensorType::Q5K => GgmlDType::Q5K,
        TensorType::Q6K => GgmlDType::Q6K,
        other => panic!("no test stores {other:?}"),
    };
    let tensor = Tensor::from_slice(numbers, dims, &Device::Cpu).unwrap();
    let quantised = QTensor::quantize(&tensor, blocks).unwrap();
    let rounded = quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    (quantised.data().unwrap().into_owned(), rounded)
}
