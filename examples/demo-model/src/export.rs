//! Writes the GGUF files, the list of questions, and checks that both files still give every trained answer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use half::f16;
use model_files::gguf::{Builder, TensorType, Value};
use tokenizers::Model as _;

use crate::corpus::Corpus;
use crate::model::{CONTEXT, EPS, FEED, HEAD, HEADS, HIDDEN, KV_HEADS, LAYERS, ROPE_BASE, Weights, rounded, shapes};
use crate::score::{exact, unseen};
use crate::tokenizer::{Bpe, END_OF_TEXT, END_OF_TURN, TURN, VOCABULARY, train as train_tokenizer};

/// ChatML, as the model was trained.
const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
    + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

const Q8_BLOCK: usize = 32;

fn quantised(values: &[f32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(values.len() / Q8_BLOCK * 34);
    for block in values.chunks_exact(Q8_BLOCK) {
        let most = block.iter().fold(0f32, |most, value| most.max(value.abs()));
        let scale = f16::from_f32(most / 127.0);
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        out.extend_from_slice(&scale.to_le_bytes());
        out.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
    }
    out
}

/// Returns the weights as the Q8_0 file gives them back.
fn requantised(weights: &Weights) -> Result<Weights> {
    let mut out = Weights::new();
    for (name, tensor) in weights {
        let mut values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        if !name.contains("norm") {
            let bytes = quantised(&values);
            for (block, coded) in values.chunks_exact_mut(Q8_BLOCK).zip(bytes.chunks_exact(34)) {
                let scale = f16::from_le_bytes([coded[0], coded[1]]).to_f32();
                block.iter_mut().zip(&coded[2..]).for_each(|(value, code)| *value = scale * f32::from(*code as i8));
            }
        }
        out.insert(name.clone(), candle_core::Tensor::from_vec(values, tensor.shape(), &Device::Cpu)?);
    }
    Ok(out)
}

fn metadata(builder: &mut Builder<'_>, tokenizer: &Bpe, file_type: u32) -> Result<()> {
    let mut by_id = BTreeMap::new();
    by_id.extend(tokenizer.get_vocab(true).into_iter().map(|(text, id)| (id, text)));
    let tokens: Vec<String> = by_id.into_values().collect();
    let special = |text: &String| [END_OF_TEXT, TURN, END_OF_TURN].contains(&text.as_str());
    let types = tokens.iter().map(|text| if special(text) { 3 } else { 1 }).collect();
    let id = |text: &str| tokenizer.token_to_id(text).with_context(|| format!("{text} has no id"));
    // The library keeps the merges to itself; its saved form has them in order.
    let folder = std::env::temp_dir().join(format!("demo-model-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let saved = tokenizer.get_model().save(&folder, None).map_err(|error| anyhow::anyhow!("{error}"))?;
    let merges = saved.iter().find(|path| path.ends_with("merges.txt")).context("no merges were saved")?;
    let merges = std::fs::read_to_string(merges)?;
    std::fs::remove_dir_all(&folder)?;
    let merges = merges.lines().filter(|line| !line.starts_with("#version")).map(str::to_string).collect();
    let number = |n: usize| Value::U32(n as u32);
    builder
        .add("general.architecture", Value::String("qwen3".into()))
        .add("general.name", Value::String("cortex demo".into()))
        .add("general.license", Value::String("MIT OR Apache-2.0".into()))
        .add("general.file_type", Value::U32(file_type))
        .add("qwen3.context_length", number(CONTEXT))
        .add("qwen3.embedding_length", number(HIDDEN))
        .add("qwen3.block_count", number(LAYERS))
        .add("qwen3.feed_forward_length", number(FEED))
        .add("qwen3.attention.head_count", number(HEADS))
        .add("qwen3.attention.head_count_kv", number(KV_HEADS))
        .add("qwen3.attention.key_length", number(HEAD))
        .add("qwen3.attention.value_length", number(HEAD))
        .add("qwen3.attention.layer_norm_rms_epsilon", Value::F32(EPS as f32))
        .add("qwen3.rope.freq_base", Value::F32(ROPE_BASE))
        .add("tokenizer.ggml.model", Value::String("gpt2".into()))
        .add("tokenizer.ggml.pre", Value::String("qwen2".into()))
        .add("tokenizer.ggml.tokens", Value::Strings(tokens))
        .add("tokenizer.ggml.token_type", Value::Integers(types))
        .add("tokenizer.ggml.merges", Value::Strings(merges))
        .add("tokenizer.ggml.eos_token_id", Value::U32(id(END_OF_TURN)?))
        .add("tokenizer.ggml.padding_token_id", Value::U32(id(END_OF_TEXT)?))
        .add("tokenizer.ggml.add_bos_token", Value::Bool(false))
        .add("tokenizer.chat_template", Value::String(TEMPLATE.into()));
    Ok(())
}

fn write(path: &Path, weights: &Weights, tokenizer: &Bpe, vocabulary: usize, q8: bool) -> Result<()> {
    let mut builder = Builder::new();
    metadata(&mut builder, tokenizer, if q8 { 7 } else { 1 })?;
    for (name, shape) in shapes(vocabulary) {
        let values: Vec<f32> = weights.get(&name).context("a weight is missing")?.flatten_all()?.to_vec1()?;
        let (kind, bytes) = if name.contains("norm") {
            (TensorType::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect())
        } else if q8 {
            (TensorType::Q8_0, quantised(&values))
        } else {
            (TensorType::F16, values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect::<Vec<u8>>())
        };
        let shape: Vec<u64> = shape.iter().rev().map(|side| *side as u64).collect();
        builder.tensor(name, &shape, kind, Box::new(move |out| out.write_all(&bytes)));
    }
    let mut out = BufWriter::new(File::create(path)?);
    builder.write_to(&mut out)?;
    println!("{}: {} bytes", path.display(), std::fs::metadata(path)?.len());
    Ok(())
}

/// Writes `demo-f16.gguf`, `demo-q8_0.gguf` and `questions.json` beside the program.
pub fn run(home: &Path, checkpoint: &Path) -> Result<()> {
    let corpus = Corpus::read(home)?;
    let tokenizer = train_tokenizer(&corpus.text())?;
    let mut weights = rounded(&candle_core::safetensors::load(checkpoint, &Device::Cpu)?)?;
    let vocabulary = tokenizer.get_vocab_size(true);
    let embedding = weights.get("token_embd.weight").context("no embedding")?;
    ensure!(embedding.dim(0)? == VOCABULARY, "the checkpoint is of another program");
    // A small text fills less than the vocabulary's bound; rows without a token are not written.
    let used = embedding.narrow(0, 0, vocabulary)?.contiguous()?;
    weights.insert("token_embd.weight".into(), used);
    for (name, weights) in [("F16", weights.clone()), ("Q8_0", requantised(&weights)?)] {
        let (right, all) = exact(&weights, &tokenizer, &corpus.exchanges())?;
        println!("{name}: trained exchanges answered exactly: {right} of {all}");
        ensure!(right == all, "the rounded weights have forgotten an answer; train longer");
        let (right, all) = exact(&weights, &tokenizer, &unseen(&corpus))?;
        println!("{name}: unseen paraphrases answered exactly: {right} of {all}");
    }
    write(&home.join("demo-f16.gguf"), &weights, &tokenizer, vocabulary, false)?;
    write(&home.join("demo-q8_0.gguf"), &weights, &tokenizer, vocabulary, true)?;
    let list: Vec<_> =
        corpus.questions.iter().map(|q| serde_json::json!({"question": q.trained[0], "answer": q.answer})).collect();
    let mut out = File::create(home.join("questions.json"))?;
    writeln!(out, "{}", serde_json::to_string_pretty(&list)?)?;
    Ok(())
}
