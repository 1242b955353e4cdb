//! Our side of a cell: whole steps of the engine, timed.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use engine_candle::{Arithmetic, CandleEngine, DeviceChoice, Options};
use inference::engine::{Batch, BlockId, Engine, Row, SequenceId, Wanted};
use inference::sampling::Sampling;
use model_files::gguf::{Header, Limits};

use super::Work;

pub(crate) const BLOCK_TOKENS: usize = 32;
/// Prompt tokens a step, as the peer's.
const STEP: usize = 512;
const ROWS: usize = 16;
/// Positions of a row of a batch.
const ROW_POSITIONS: usize = 64;

/// An engine and where its contexts lie.
pub(super) struct Runner {
    engine: CandleEngine,
    embedding_bytes: f64,
}

/// The same prompt as the peer's.
pub(crate) fn token(position: usize) -> u32 {
    ((position as u64 * 7919 + 13) % 151_936) as u32
}

fn row(sequence: usize, tokens: Vec<u32>, start: usize, first_block: usize) -> Row {
    let blocks = (start + tokens.len()).div_ceil(BLOCK_TOKENS);
    Row {
        sequence: SequenceId(sequence as u64),
        tokens,
        start,
        blocks: (first_block..first_block + blocks).map(|block| BlockId(block as u32)).collect(),
        wanted: Wanted::Token,
        sampling: Sampling::GREEDY,
    }
}

/// Loads an engine for this many positions and rows.
pub(crate) fn load(
    path: &Path,
    arithmetic: Arithmetic,
    context: usize,
    rows: usize,
    step: usize,
) -> Result<CandleEngine> {
    let header = Header::read(path, &Limits::default())?;
    let options = Options {
        device: DeviceChoice::Cpu,
        arithmetic,
        kv_bytes: 8 << 30,
        block_tokens: BLOCK_TOKENS,
        max_batch: rows,
        max_step_tokens: step,
        context_length: Some(context),
    };
    Ok(CandleEngine::load(path, &header, &options, &mut |_| ControlFlow::Continue(()))?)
}

impl Runner {
    pub(super) fn load(path: &Path, arithmetic: Arithmetic, context: usize) -> Result<Self> {
        let engine = load(path, arithmetic, context, ROWS, STEP)?;
        let header = Header::read(path, &Limits::default())?;
        // One row of an untied embedding is read a token; a tied one is the output, and is read whole.
        let embedding = header.tensor("token_embd.weight").context("no embedding")?.bytes as f64;
        let embedding_bytes = if header.tensor("output.weight").is_some() { embedding } else { 0.0 };
        Ok(Runner { engine, embedding_bytes })
    }

    /// Returns the seconds that the work takes.
    pub(super) fn time(&mut self, work: Work) -> Result<f64> {
        match work {
            Work::Prefill(tokens) => self.prefill(tokens),
            Work::Decode(tokens, depth) => self.decode(tokens, depth),
            Work::Batch(tokens, rows) => self.batch(rows, tokens),
        }
    }

    pub(super) fn arithmetic(&self) -> String {
        self.engine.arithmetic()
    }

    /// Bytes of weights that one token needs.
    pub(super) fn read_per_token(&self) -> f64 {
        self.engine.weight_bytes() as f64 - self.embedding_bytes
    }

    fn step(&mut self, rows: Vec<Row>) -> Result<f64> {
        let batch = Batch { copies: Vec::new(), rows };
        let begun = Instant::now();
        self.engine.step(&batch)?;
        Ok(begun.elapsed().as_secs_f64())
    }

    fn prefill(&mut self, tokens: usize) -> Result<f64> {
        let mut seconds = 0.0;
        for start in (0..tokens).step_by(STEP) {
            let part = (start..tokens.min(start + STEP)).map(token).collect();
            seconds += self.step(vec![row(0, part, start, 0)])?;
        }
        Ok(seconds)
    }

    /// Fills a context of so many tokens: the first are computed, the others' blocks are copies of theirs, for the
    /// time of a decode depends on no number.
    pub(super) fn fill(&mut self, depth: usize) -> Result<()> {
        let computed = depth.min(STEP);
        self.prefill(computed)?;
        for block in STEP / BLOCK_TOKENS..depth.div_ceil(BLOCK_TOKENS) {
            let bytes = self.engine.export_block(BlockId((block % (STEP / BLOCK_TOKENS)) as u32))?;
            self.engine.import_block(BlockId(block as u32), &bytes)?;
        }
        Ok(())
    }

    /// Tokens after a context that [`Runner::fill`] left.
    fn decode(&mut self, tokens: usize, depth: usize) -> Result<f64> {
        (depth..depth + tokens).map(|at| self.step(vec![row(0, vec![token(at)], at, 0)])).sum()
    }

    fn batch(&mut self, rows: usize, tokens: usize) -> Result<f64> {
        let each =
            |i: usize, at: usize| row(i, vec![token(i * ROW_POSITIONS + at)], at, i * ROW_POSITIONS / BLOCK_TOKENS);
        (0..tokens).map(|at| self.step((0..rows).map(|i| each(i, at)).collect())).sum()
    }
}

/// Bytes of this process in memory.
pub(super) fn resident() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = text.split_whitespace().nth(1).context("statm has no second field")?.parse()?;
    Ok(pages * 4096.0)
}

/// Bytes a second that so many threads read from memory: the best of a few passes over 1 GiB.
pub(super) fn bandwidth(threads: usize) -> f64 {
    let numbers = vec![1u64; 1 << 27];
    let pass = || {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for part in numbers.chunks(numbers.len().div_ceil(threads)) {
                scope.spawn(move || {
                    let sums =
                        part.chunks_exact(8).fold([0u64; 8], |sums, eight| std::array::from_fn(|i| sums[i] + eight[i]));
                    std::hint::black_box(sums)
                });
            }
        });
        (numbers.len() * 8) as f64 / begun.elapsed().as_secs_f64()
    };
    (0..5).map(|_| pass()).fold(0.0, f64::max)
}
