//! The candle engine: one decoder described by data, in plain candle operations.
//!
//! It is the way to CUDA, and the oracle of faster kernels. Activations and KV are f32; weights stay as the file
//! has them where candle multiplies that type, and are widened to f32 where it does not. candle computes on the
//! process's global rayon pool.

mod architecture;
mod attention;
mod decoder;
mod error;
mod kv;
mod rope;
mod weights;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::Device;
use inference::engine::{Batch, Capabilities, Engine, EngineError, Outputs, RowOutput};
use model_files::gguf::Header;

pub use architecture::Architecture;
pub use error::LoadError;

use decoder::Decoder;
use weights::Loader;

/// The order of summation's version: part of the exact-fingerprint.
pub const KERNEL_ORDER: &str = if cfg!(feature = "flash-attn") { "candle-0.11 flash 1" } else { "candle-0.11 plain 1" };

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA when compiled in and present, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// This CUDA device, or an error.
    Cuda(usize),
}

impl DeviceChoice {
    /// Reads `auto`, `cpu`, `cuda` or `cuda:N`.
    ///
    /// # Errors
    /// [`LoadError::Device`] for anything else.
    pub fn parse(text: &str) -> Result<Self, LoadError> {
        let number = |text: &str| text.parse().ok();
        match text {
            "auto" | "" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(number).map(DeviceChoice::Cuda).ok_or_else(|| {
                LoadError::Device(format!("the device must be auto, cpu, cuda or cuda:N, it is '{text}'"))
            }),
        }
    }

    fn open(self) -> Result<Device, LoadError> {
        let cuda = candle_core::utils::cuda_is_available();
        match self {
            // Compiled in, and possibly not present: that is the CPU too.
            DeviceChoice::Auto if cuda => Ok(Device::new_cuda(0).unwrap_or(Device::Cpu)),
            DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda(_) if !cuda => {
                Err(LoadError::Device("this build has no CUDA; use a CUDA build, or the device 'cpu'".into()))
            }
            DeviceChoice::Cuda(number) => Device::new_cuda(number).map_err(LoadError::Candle),
        }
    }
}

/// How an engine is sized.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Where to compute.
    pub device: DeviceChoice,
    /// Most bytes of KV.
    pub kv_bytes: usize,
    /// Tokens a KV block holds.
    pub block_tokens: usize,
    /// Most rows in a batch.
    pub max_batch: usize,
    /// Most tokens in a batch.
    pub max_step_tokens: usize,
    /// Longest sequence; the model's own context bounds it too.
    pub context_length: Option<usize>,
}

/// Largest number of rows, tokens and the like in [`Options`].
const COUNT_MAX: usize = 1 << 20;

impl Options {
    fn check(&self) -> Result<(), LoadError> {
        let context = self.context_length.unwrap_or(1);
        let counts = [
            ("block_tokens", self.block_tokens),
            ("max_batch", self.max_batch),
            ("max_step_tokens", self.max_step_tokens),
        ];
        match counts.into_iter().find(|(_, value)| !(1..=COUNT_MAX).contains(value)) {
            Some((name, value)) => {
                Err(LoadError::Options(format!("{name} must be from 1 to {COUNT_MAX}, it is {value}")))
            }
            None if context == 0 => Err(LoadError::Options("context_length must be at least 1, it is 0".into())),
            None => Ok(()),
        }
    }
}

/// How far a load is.
#[derive(Clone, Copy, Debug)]
pub struct LoadProgress {
    /// Bytes of weights read.
    pub bytes_done: u64,
    /// Bytes of weights there are.
    pub bytes: u64,
}

/// The engine.
pub struct CandleEngine {
    decoder: Decoder,
    capabilities: Capabilities,
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
        let wanted = options.context_length.unwrap_or(architecture.context_length);
        let context_length = architecture.context_length.min(wanted);
        let block_bytes = architecture.kv_block_bytes(options.block_tokens);
        let useful = context_length.div_ceil(options.block_tokens) * options.max_batch;
        let blocks = (options.kv_bytes / block_bytes).min(useful);
        if blocks == 0 {
            return Err(LoadError::Memory { needed: block_bytes, given: options.kv_bytes });
        }
        // A sequence can't be longer than all blocks together.
        let context_length = context_length.min(blocks * options.block_tokens);
        let mut loader = Loader::open(path, header, device, progress)?;
        let decoder = Decoder::load(architecture, &mut loader, blocks, options.block_tokens)?;
        let capabilities = Capabilities {
            max_batch: options.max_batch,
            max_step_tokens: options.max_step_tokens,
            block_tokens: options.block_tokens,
            blocks,
            context_length,
            vocab_size: decoder.vocabulary(),
        };
        Ok(CandleEngine { decoder, capabilities })
    }

    /// Returns where it computes, for the log.
    pub fn device(&self) -> &'static str {
        match self.decoder.device() {
            Device::Cpu => "cpu",
            Device::Cuda(_) => "cuda",
            Device::Metal(_) => "metal",
        }
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
        let exists = |block: inference::engine::BlockId| (block.0 as usize) < limits.blocks;
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
        let mut logits = self.decoder.step(batch).map_err(|error| EngineError::Device(Box::new(error)))?.into_iter();
        let output = |row: &inference::engine::Row| match row.wants_logits {
            true => logits.next().map_or(RowOutput::Nothing, RowOutput::Logits),
            false => RowOutput::Nothing,
        };
        Ok(Outputs { rows: batch.rows.iter().map(output).collect() })
    }
}
