//! What the tests share: small random models, a naive twin, and a runner of single steps.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

pub mod driver;
pub mod model;
pub mod naive;

use std::ops::ControlFlow;
use std::path::Path;

use engine_candle::{Arithmetic, CandleEngine, DeviceChoice, KernelOptions, KvType, Level, LoadError, Options};
use inference::engine::{Batch, BlockId, Engine, RowOutput, SequenceId, Wanted};
use inference::sampling::Sampling;
use model_files::gguf::{Header, Limits};

pub type Row = inference::engine::Row;

pub fn options(block_tokens: usize) -> Options {
    Options {
        device: DeviceChoice::Cpu,
        arithmetic: Arithmetic::Candle,
        kv_bytes: 64 << 20,
        block_tokens,
        max_batch: 8,
        max_step_tokens: 1024,
        context_length: None,
    }
}

/// Everything that computes: candle, and the kernels at every level of this machine, with keys and values as given.
pub fn arithmetics(kv: KvType) -> Vec<Arithmetic> {
    let levels = Level::ALL.into_iter().filter(|level| level.is_available());
    let kernels = levels.map(|level| Arithmetic::Auto(KernelOptions { threads: 2, kv, level: Some(level) }));
    [Arithmetic::Candle].into_iter().chain(kernels).collect()
}

pub fn load(path: &Path, options: &Options) -> Result<CandleEngine, LoadError> {
    let header = Header::read(path, &Limits::default()).unwrap();
    CandleEngine::load(path, &header, options, &mut |_| ControlFlow::Continue(()))
}

pub fn row(sequence: u64, tokens: &[u32], start: usize, blocks: &[u32]) -> Row {
    Row {
        sequence: SequenceId(sequence),
        tokens: tokens.to_vec(),
        start,
        blocks: blocks.iter().copied().map(BlockId).collect(),
        wanted: Wanted::Token,
        sampling: Sampling::GREEDY,
    }
}

pub fn step(engine: &mut CandleEngine, rows: Vec<Row>) -> Vec<RowOutput> {
    engine.step(&Batch { copies: Vec::new(), rows }).unwrap().rows
}

pub fn logits(output: &RowOutput) -> &[f32] {
    match output {
        RowOutput::Logits(logits) => logits,
        other => panic!("no logits but {other:?}"),
    }
}

/// Runs a prompt in chunks of `chunk` tokens and returns the logits after its last token.
pub fn prefill(engine: &mut CandleEngine, prompt: &[u32], blocks: &[u32], chunk: usize) -> Vec<f32> {
    let mut last = Vec::new();
    for (index, part) in prompt.chunks(chunk).enumerate() {
        let outputs = step(engine, vec![row(1, part, index * chunk, blocks)]);
        last = logits(&outputs[0]).to_vec();
    }
    last
}

pub fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
