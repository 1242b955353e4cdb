//! The engine's logprobs beside those of another program, on a file of random weights.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use engine_candle::{Arithmetic, CandleEngine, DeviceChoice, KernelOptions, KvType, Options};
use inference::engine::{Batch, BlockId, Engine, Row, RowOutput, SequenceId};
use inference::sampling::Sampling;
use model_files::gguf::{Header, Limits};

const BLOCK_TOKENS: usize = 32;
const LONGEST: usize = 1024;
/// Most that one of the top five logprobs may differ.
const TOLERANCE: f64 = 0.01;

/// The prompt's rule, as the golden file states it.
fn prompt(length: usize) -> Vec<u32> {
    (0..length as u64).map(|i| ((i * 7919 + 13) % 151_936) as u32).collect()
}

fn logprobs(engine: &mut CandleEngine, tokens: Vec<u32>) -> Result<Vec<f64>> {
    let blocks = (0..tokens.len().div_ceil(BLOCK_TOKENS) as u32).map(BlockId).collect();
    let row = Row { sequence: SequenceId(0), tokens, start: 0, blocks, wants_logits: true, sampling: Sampling::GREEDY };
    let outputs = engine.step(&Batch { copies: Vec::new(), rows: vec![row] })?;
    let Some(RowOutput::Logits(logits)) = outputs.rows.first() else { anyhow::bail!("the engine gave no logits") };
    let top = logits.iter().fold(f32::NEG_INFINITY, |top, logit| top.max(*logit));
    let total: f64 = logits.iter().map(|logit| f64::from(logit - top).exp()).sum();
    Ok(logits.iter().map(|logit| f64::from(logit - top) - total.ln()).collect())
}

/// Compares at every length of the golden file and prints a row for each.
#[allow(clippy::print_stdout)]
pub(crate) fn compare(model: &Path, golden: &Path, threads: usize) -> Result<()> {
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(golden)?)?;
    let header = Header::read(model, &Limits::default())?;
    let arithmetic = Arithmetic::Auto(KernelOptions { threads, kv: KvType::F32, level: None });
    let options = Options {
        device: DeviceChoice::Cpu,
        arithmetic,
        kv_bytes: 512 << 20,
        block_tokens: BLOCK_TOKENS,
        max_batch: 1,
        max_step_tokens: LONGEST,
        context_length: Some(LONGEST),
    };
    let mut engine = CandleEngine::load(model, &header, &options, &mut |_| ControlFlow::Continue(()))?;
    println!("{:>8} {:>12} {:>10}", "tokens", "largest gap", "seconds");
    let mut worst = 0f64;
    for entry in golden["at"].as_array().context("the golden file has no list 'at'")? {
        let length = entry["length"].as_u64().context("an entry has no length")? as usize;
        ensure!((1..=LONGEST).contains(&length), "a prompt of {length} tokens is out of range");
        let begun = Instant::now();
        let ours = logprobs(&mut engine, prompt(length))?;
        let seconds = begun.elapsed().as_secs_f64();
        let mut gap = 0f64;
        for pair in entry["top"].as_array().context("an entry has no list 'top'")? {
            let id = pair[0].as_u64().context("an id is none")? as usize;
            let theirs = pair[1].as_f64().context("a logprob is none")?;
            gap = gap.max((ours.get(id).context("an id is outside the vocabulary")? - theirs).abs());
        }
        println!("{length:>8} {gap:>12.6} {seconds:>10.2}");
        worst = worst.max(gap);
    }
    ensure!(worst <= TOLERANCE, "the top five differ by {worst:.6}, more than {TOLERANCE}");
    Ok(())
}
