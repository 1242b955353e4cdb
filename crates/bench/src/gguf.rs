//! Random-weight models: only the arithmetic of a shape, for timing and for comparing logits.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;
use half::f16;
use model_files::gguf::{Builder, TensorType, Value};

/// Shapes by the name of the model that has them.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Shape {
    /// 28 layers of 1024.
    #[value(name = "qwen3-0.6b")]
    Qwen3Small,
    /// 2 layers of 256, for tests of the generator itself.
    #[value(name = "qwen3-tiny")]
    Qwen3Tiny,
}

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Quant {
    /// 32 bits.
    F32,
    /// 16 bits.
    F16,
    /// 8 bits and a scale a block.
    #[value(name = "q8_0")]
    Q8_0,
}

struct Sizes {
    layers: u32,
    hidden: u64,
    heads: u64,
    kv_heads: u64,
    head: u64,
    feed: u64,
    vocabulary: u64,
    context: u32,
}

impl Shape {
    fn sizes(self) -> Sizes {
        match self {
            Shape::Qwen3Small => Sizes {
                layers: 28,
                hidden: 1024,
                heads: 16,
                kv_heads: 8,
                head: 128,
                feed: 3072,
                vocabulary: 151_936,
                context: 40_960,
            },
            Shape::Qwen3Tiny => Sizes {
                layers: 2,
                hidden: 256,
                heads: 4,
                kv_heads: 2,
                head: 64,
                feed: 512,
                vocabulary: 1024,
                context: 4096,
            },
        }
    }
}

/// Returns the `i`th weight of a tensor: the sum of four uniform numbers, so nearly normal, of deviation 0.03.
fn weight(seed: u64, i: u64) -> f32 {
    let mut z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let sum: u32 = (0..4).map(|part| (z >> (16 * part)) as u32 & 0xffff).sum();
    // Four uniform numbers of width 1 have deviation 0.577 together.
    (sum as f32 / 65_536.0 - 2.0) * (0.03 / 0.577)
}

const CHUNK: u64 = 1 << 16;

fn stream(out: &mut dyn Write, seed: u64, count: u64, quant: Quant) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(CHUNK as usize * 4);
    for start in (0..count).step_by(CHUNK as usize) {
        let values: Vec<f32> = (start..(start + CHUNK).min(count)).map(|i| weight(seed, i)).collect();
        bytes.clear();
        match quant {
            Quant::F32 => values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes())),
            Quant::F16 => values.iter().for_each(|value| bytes.extend_from_slice(&f16::from_f32(*value).to_le_bytes())),
            Quant::Q8_0 => values.chunks_exact(32).for_each(|block| {
                let most = block.iter().fold(0f32, |most, value| most.max(value.abs()));
                bytes.extend_from_slice(&f16::from_f32(most / 127.0).to_le_bytes());
                let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
                bytes.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
            }),
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}

/// Returns a vocabulary that loads everywhere: the byte-level alphabet, so that every text has tokens, then words.
fn tokens(vocabulary: u64) -> Vec<String> {
    let printable = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    // The bytes that are not printable have the characters from 256 on.
    let (plain, others): (Vec<u32>, Vec<u32>) = (0..256).partition(printable);
    let moved = 256..256 + others.len() as u32;
    let alphabet = plain.into_iter().chain(moved).filter_map(char::from_u32).map(String::from);
    alphabet.chain((0..).map(|word| format!("t{word}"))).take(vocabulary as usize).collect()
}

/// Says what was said, and nothing else.
const TEMPLATE: &str = "{% for message in messages %}{{ message.content }}{% endfor %}";

/// Writes the file.
pub(crate) fn write(shape: Shape, quant: Quant, seed: u64, out: &Path) -> Result<()> {
    let sizes = shape.sizes();
    let mut builder = Builder::new();
    let number = |n: u64| Value::U32(n as u32);
    builder
        .add("general.architecture", Value::String("qwen3".into()))
        .add("general.name", Value::String("random weights".into()))
        .add("qwen3.context_length", Value::U32(sizes.context))
        .add("qwen3.embedding_length", number(sizes.hidden))
        .add("qwen3.block_count", Value::U32(sizes.layers))
        .add("qwen3.feed_forward_length", number(sizes.feed))
        .add("qwen3.attention.head_count", number(sizes.heads))
        .add("qwen3.attention.head_count_kv", number(sizes.kv_heads))
        .add("qwen3.attention.key_length", number(sizes.head))
        .add("qwen3.attention.value_length", number(sizes.head))
        .add("qwen3.attention.layer_norm_rms_epsilon", Value::F32(1e-6))
        .add("qwen3.rope.freq_base", Value::F32(1_000_000.0))
        .add("tokenizer.ggml.model", Value::String("gpt2".into()))
        .add("tokenizer.ggml.pre", Value::String("qwen2".into()))
        .add("tokenizer.ggml.tokens", Value::Strings(tokens(sizes.vocabulary)))
        .add("tokenizer.ggml.token_type", Value::Integers(vec![1; sizes.vocabulary as usize]))
        .add("tokenizer.ggml.merges", Value::Strings(vec!["t 0".into()]))
        .add("tokenizer.chat_template", Value::String(TEMPLATE.into()))
        .add("tokenizer.ggml.eos_token_id", Value::U32(0))
        .add("tokenizer.ggml.add_bos_token", Value::Bool(false));
    let mut index = 0u64;
    let kind = match quant {
        Quant::F32 => TensorType::F32,
        Quant::F16 => TensorType::F16,
        Quant::Q8_0 => TensorType::Q8_0,
    };
    let mut matrix = |builder: &mut Builder<'_>, name: String, inputs: u64, outputs: u64| {
        index += 1;
        let own = seed.wrapping_mul(0x0100_0000_01b3) ^ (index << 40);
        let source = move |out: &mut dyn Write| stream(out, own, inputs * outputs, quant);
        builder.tensor(name, &[inputs, outputs], kind, Box::new(source));
    };
    let norm = |builder: &mut Builder<'_>, name: String, length: u64| {
        let ones = vec![1f32.to_le_bytes(); length as usize].concat();
        builder.tensor(name, &[length], TensorType::F32, Box::new(move |out| out.write_all(&ones)));
    };
    matrix(&mut builder, "token_embd.weight".into(), sizes.hidden, sizes.vocabulary);
    let (q, kv) = (sizes.heads * sizes.head, sizes.kv_heads * sizes.head);
    for layer in 0..sizes.layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        norm(&mut builder, name("attn_norm"), sizes.hidden);
        matrix(&mut builder, name("attn_q"), sizes.hidden, q);
        matrix(&mut builder, name("attn_k"), sizes.hidden, kv);
        matrix(&mut builder, name("attn_v"), sizes.hidden, kv);
        norm(&mut builder, name("attn_q_norm"), sizes.head);
        norm(&mut builder, name("attn_k_norm"), sizes.head);
        matrix(&mut builder, name("attn_output"), q, sizes.hidden);
        norm(&mut builder, name("ffn_norm"), sizes.hidden);
        matrix(&mut builder, name("ffn_gate"), sizes.hidden, sizes.feed);
        matrix(&mut builder, name("ffn_up"), sizes.hidden, sizes.feed);
        matrix(&mut builder, name("ffn_down"), sizes.feed, sizes.hidden);
    }
    norm(&mut builder, "output_norm.weight".into(), sizes.hidden);
    let mut file = BufWriter::with_capacity(1 << 20, File::create(out)?);
    builder.write_to(&mut file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn weights_are_nearly_normal_and_the_same_everywhere() {
        let count = 100_000u64;
        let values: Vec<f64> = (0..count).map(|i| f64::from(weight(7, i))).collect();
        let mean = values.iter().sum::<f64>() / count as f64;
        let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count as f64).sqrt();
        assert!(mean.abs() < 1e-3 && (deviation - 0.03).abs() < 1e-3, "{mean} {deviation}");
        assert_eq!(weight(1, 0).to_bits(), weight(1, 0).to_bits());
        assert_ne!(weight(1, 1), weight(2, 1));
    }
}
