//! The engine: one decoder described by data, on two backends.
//!
//! - On the CPU the `kernels` crate computes: packed weights, keys and values in blocks of 32 positions, any number of
//!   threads, and the same bits whatever else is in the batch.
//! - On CUDA, and as the kernels' oracle, plain candle operations do: activations and KV in f32, weights as the file has
//!   them where candle multiplies that type. candle computes on the process's global rayon pool.

mod architecture;
mod attention;
mod decoder;
mod error;
mod kv;
mod options;
mod packed;
mod rope;
mod weights;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::Device;
use inference::engine::{Batch, BlockId, Capabilities, Engine, EngineError, Outputs, RowOutput, Wanted};
use model_files::gguf::Header;

pub use architecture::Architecture;
pub use error::LoadError;
pub use kernels::kv::KvType;
pub use kernels::{Level, THREADS_MAX};
pub use options::{Arithmetic, DeviceChoice, KernelOptions, Options};

use decoder::Decoder;
use weights::Loader;

/// How far a load is.
#[derive(Clone, Copy, Debug)]
pub struct LoadProgress {
    /// Bytes of weights read.
    pub bytes_done: u64,
    /// Bytes of weights there are.
    pub bytes: u64,
}

/// What computes.
enum Backend {
    Kernels(Box<packed::Decoder>),
    Candle(Box<Decoder>),
}

/// The engine.
pub struct CandleEngine {
    backend: Backend,
    capabilities: Capabilities,
    block_bytes: usize,
    /// Bytes of weights in the file.
    file_bytes: u64,
}

/// The blocks of keys and values of an engine.
struct Kv {
    context_length: usize,
    blocks: usize,
    block_bytes: usize,
}

impl Kv {
    fn plan(
        architecture: &Architecture,
        options: &Options,
        kernels: Option<&KernelOptions>,
    ) -> Result<Self, LoadError> {
        let wanted = options.context_length.unwrap_or(architecture.context_length);
        let context_length = architecture.context_length.min(wanted);
        let block_bytes = match kernels {
            Some(kernels) => packed::kv_shape(architecture, kernels).block_bytes(),
            None => architecture.kv_block_bytes(options.block_tokens),
        };
        let useful = context_length.div_ceil(options.block_tokens) * options.max_batch;
        let blocks = (options.kv_bytes / block_bytes).min(useful);
        if blocks == 0 {
            return Err(LoadError::Memory { needed: block_bytes, given: options.kv_bytes });
        }
        // A sequence can't be longer than all blocks together.
        Ok(Kv { context_length: context_length.min(blocks * options.block_tokens), blocks, block_bytes })
    }
}

/// Returns the bytes that a model will take for its weights and its keys and values, as its header and the options tell.
///
/// # Errors
/// As [`CandleEngine::load`], where the header or the options are at fault.
pub fn memory_needed(header: &Header, options: &Options) -> Result<u64, LoadError> {
    options.check()?;
    let architecture = Architecture::read(header)?;
    let device = options.device.open()?;
    let kernels = options.kernels(&device)?;
    let kv = Kv::plan(&architecture, options, kernels)?;
    let weights: u64 = match kernels {
        Some(_) => header.tensors.iter().map(packed::packed_bytes).sum(),
        None => header.tensors.iter().map(|tensor| tensor.bytes).sum(),
    };
    Ok(weights.saturating_add(kv.blocks as u64 * kv.block_bytes as u64))
}

impl CandleEngine {
    /// Loads a model whose header was read and checked. `progress` is told after each tensor; `Break` stops the
    /// load there.
    ///
    /// # Errors
    /// [`LoadError`], in words that name the tensor, the metadata or the numbers at fault.
    pub fn load(
        path: &Path,
        header: &Header,
        options: &Options,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self, LoadError> {
        options.check()?;
        let architecture = Architecture::read(header)?;
        let device = options.device.open()?;
        let kernels = options.kernels(&device)?;
        let width = architecture.hidden;
        let Kv { context_length, blocks, block_bytes } = Kv::plan(&architecture, options, kernels)?;
        let file_bytes = header.tensors.iter().map(|tensor| tensor.bytes).sum();
        let mut loader = Loader::open(path, header, device, progress)?;
        let (backend, vocab_size) = match kernels {
            Some(kernels) => {
                let decoder = packed::Decoder::load(architecture, &mut loader, blocks, kernels)?;
                let vocabulary = decoder.vocabulary();
                (Backend::Kernels(Box::new(decoder)), vocabulary)
            }
            None => {
                let decoder = Decoder::load(architecture, &mut loader, blocks, options.block_tokens)?;
                let vocabulary = decoder.vocabulary();
                (Backend::Candle(Box::new(decoder)), vocabulary)
            }
        };
        let capabilities = Capabilities {
            max_batch: options.max_batch,
            max_step_tokens: options.max_step_tokens,
            block_tokens: options.block_tokens,
            blocks,
            context_length,
            vocab_size,
            width,
        };
        Ok(CandleEngine { backend, capabilities, block_bytes, file_bytes })
    }

    /// Returns where it computes, for the log.
    pub fn device(&self) -> &'static str {
        match &self.backend {
            Backend::Kernels(_) => "cpu",
            Backend::Candle(decoder) => match decoder.device() {
                Device::Cpu => "cpu",
                Device::Cuda(_) => "cuda",
                Device::Metal(_) => "metal",
            },
        }
    }

    /// Returns what decides a result's bits beside the model: the arithmetic, its order, and how KV is rounded. Part of
    /// the exact-fingerprint. Instructions and threads are not in it, for they change nothing.
    pub fn exactness(&self) -> String {
        match &self.backend {
            Backend::Kernels(decoder) => format!("{} kv-{}", kernels::ORDER, decoder.kv().shape().kind.name()),
            Backend::Candle(_) => {
                let order = if cfg!(feature = "flash-attn") { "candle-0.11 flash 1" } else { "candle-0.11 plain 1" };
                format!("{order} kv-f32 {}", self.device())
            }
        }
    }

    /// Returns what computes, for the log: `kernels avx2`, or `candle`.
    pub fn arithmetic(&self) -> String {
        match &self.backend {
            Backend::Kernels(decoder) => format!("kernels {}", decoder.level()),
            Backend::Candle(_) => "candle".into(),
        }
    }

    /// Returns the instructions that this machine has and that failed their proof at the load: a fault to look into.
    pub fn refused_levels(&self) -> &[Level] {
        match &self.backend {
            Backend::Kernels(decoder) => decoder.refused(),
            Backend::Candle(_) => &[],
        }
    }

    /// Returns the bytes of packed weights; zero where candle holds them.
    pub fn weight_bytes(&self) -> usize {
        match &self.backend {
            Backend::Kernels(decoder) => decoder.weight_bytes(),
            Backend::Candle(_) => 0,
        }
    }

    /// Returns the bytes that weights and all blocks of keys and values take together.
    pub fn memory_bytes(&self) -> u64 {
        let weights = match &self.backend {
            Backend::Kernels(decoder) => decoder.weight_bytes() as u64,
            Backend::Candle(_) => self.file_bytes,
        };
        weights + self.capabilities.blocks as u64 * self.block_bytes as u64
    }

    fn check_block(&self, block: BlockId) -> Result<(), EngineError> {
        if (block.0 as usize) < self.capabilities.blocks {
            return Ok(());
        }
        Err(EngineError::BadBatch(format!("block {} does not exist", block.0)))
    }

    fn check(&self, batch: &Batch) -> Result<(), EngineError> {
        let limits = &self.capabilities;
        let bad = |words: String| Err(EngineError::BadBatch(words));
        if batch.rows.len() > limits.max_batch || batch.tokens() > limits.max_step_tokens {
            return bad(format!("{} rows of {} tokens are too many", batch.rows.len(), batch.tokens()));
        }
        let mut uses = vec![0u32; limits.blocks];
        let mut sequences = BTreeSet::new();
        for (i, row) in batch.rows.iter().enumerate() {
            let end = row.start.saturating_add(row.tokens.len());
            if row.tokens.is_empty() || end > limits.context_length {
                return bad(format!("row {i} has {} tokens from position {}", row.tokens.len(), row.start));
            }
            if row.wanted.positions() > row.tokens.len() || matches!(row.wanted, Wanted::Logits(0) | Wanted::Hidden(0))
            {
                return bad(format!("row {i} has {} tokens and wants {:?}", row.tokens.len(), row.wanted));
            }
            if row.tokens.iter().any(|id| *id as usize >= limits.vocab_size) {
                return bad(format!("row {i} has a token outside the vocabulary"));
            }
            if row.blocks.len() * limits.block_tokens < end {
                return bad(format!("row {i} has too few blocks for {end} positions"));
            }
            if !sequences.insert(row.sequence) {
                return bad(format!("row {i} is of a sequence that has another row"));
            }
            for block in &row.blocks {
                let Some(uses) = uses.get_mut(block.0 as usize) else {
                    return bad(format!("row {i} names block {}, which does not exist", block.0));
                };
                *uses += 1;
            }
        }
        // Blocks that are only read may be shared; one that is written is in one place of one row.
        for row in &batch.rows {
            let end = row.start + row.tokens.len();
            let written = &row.blocks[row.start / limits.block_tokens..end.div_ceil(limits.block_tokens)];
            if let Some(block) = written.iter().find(|block| uses[block.0 as usize] > 1) {
                return bad(format!("block {} is written and is used twice", block.0));
            }
        }
        let exists = |block: BlockId| (block.0 as usize) < limits.blocks;
        if batch.copies.iter().any(|copy| !exists(copy.from) || !exists(copy.to)) {
            return bad("a copy names a block that does not exist".into());
        }
        Ok(())
    }
}

impl Engine for CandleEngine {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn step(&mut self, batch: &Batch) -> Result<Outputs, EngineError> {
        self.check(batch)?;
        let outputs = match &mut self.backend {
            Backend::Kernels(decoder) => decoder.step(batch),
            Backend::Candle(decoder) => decoder.step(batch).map_err(device_error)?,
        };
        let (mut logits, mut hidden) = (outputs.logits.as_slice(), outputs.hidden.as_slice());
        let output = |row: &inference::engine::Row| {
            let count = row.wanted.positions();
            match row.wanted {
                Wanted::Nothing => RowOutput::Nothing,
                Wanted::Token | Wanted::Logits(_) => {
                    RowOutput::Logits(take(&mut logits, count * self.capabilities.vocab_size))
                }
                Wanted::Hidden(_) => RowOutput::Hidden(take(&mut hidden, count * self.capabilities.width)),
            }
        };
        Ok(Outputs { rows: batch.rows.iter().map(output).collect() })
    }

    fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn export_block(&mut self, block: BlockId) -> Result<Vec<u8>, EngineError> {
        self.check_block(block)?;
        match &self.backend {
            Backend::Kernels(decoder) => Ok(decoder.kv().export(block.0)),
            Backend::Candle(decoder) => decoder.kv().export(block).map_err(device_error),
        }
    }

    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), EngineError> {
        self.check_block(block)?;
        if bytes.len() != self.block_bytes {
            let words = format!("a block has {} bytes, {} were given", self.block_bytes, bytes.len());
            return Err(EngineError::BadBatch(words));
        }
        match &mut self.backend {
            Backend::Kernels(decoder) => {
                decoder.kv_mut().import(block.0, bytes);
                Ok(())
            }
            Backend::Candle(decoder) => decoder.kv().import(block, bytes).map_err(device_error),
        }
    }
}

/// What the rows of a step want, over all rows and in order; `[positions, ...]`.
#[derive(Default)]
struct StepOutputs {
    logits: Vec<f32>,
    hidden: Vec<f32>,
}

/// Takes the first `count` numbers, or what there is.
fn take(numbers: &mut &[f32], count: usize) -> Vec<f32> {
    let (taken, rest) = numbers.split_at(count.min(numbers.len()));
    *numbers = rest;
    taken.to_vec()
}

/// Lists the places of the positions in a step's tokens after which logits (or hidden states) are wanted.
fn places(batch: &Batch, hidden: bool) -> Vec<usize> {
    let (mut places, mut end) = (Vec::new(), 0);
    for row in &batch.rows {
        end += row.tokens.len();
        if matches!(row.wanted, Wanted::Hidden(_)) == hidden {
            places.extend(end - row.wanted.positions()..end);
        }
    }
    places
}

fn device_error(error: candle_core::Error) -> EngineError {
    EngineError::Device(Box::new(error))
}
