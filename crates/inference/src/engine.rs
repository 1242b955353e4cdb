//! The seam between scheduling and arithmetic: one synchronous call, plain values in and out.

use std::fmt;

use crate::sampling::Sampling;

/// Names one sequence (one choice of one request) for as long as it holds KV blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// Names one block of KV storage; the scheduler owns the ledger, the engine owns the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// What an engine can hold and do; fixed for its lifetime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Most rows in one batch.
    pub max_batch: usize,
    /// Most tokens in one batch, over all rows.
    pub max_step_tokens: usize,
    /// Tokens a KV block holds.
    pub block_tokens: usize,
    /// KV blocks there are.
    pub blocks: usize,
    /// Most tokens in one sequence, prompt and completion together.
    pub context_length: usize,
    /// Tokens in the vocabulary: how many logits follow a position.
    pub vocab_size: usize,
    /// Numbers in a position's hidden state.
    pub width: usize,
}

/// What a row must give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: a prompt's chunk before its last.
    #[default]
    Nothing,
    /// The token after the row's last one, or the logits to choose it by.
    Token,
    /// Logits after each of the row's last tokens, this many, at least one; also from a device that samples by itself.
    Logits(usize),
    /// The hidden states of the row's last tokens, this many, at least one: the last layer's output, normed.
    Hidden(usize),
}

impl Wanted {
    /// Returns after how many of the row's last tokens something is wanted.
    pub fn positions(self) -> usize {
        match self {
            Wanted::Nothing => 0,
            Wanted::Token => 1,
            Wanted::Logits(count) | Wanted::Hidden(count) => count,
        }
    }
}

/// One sequence's part of a step: `tokens` take positions `start..start + tokens.len()`.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Whose row this is.
    pub sequence: SequenceId,
    /// The tokens to run, at least one.
    pub tokens: Vec<u32>,
    /// The position of `tokens[0]`; positions below it are already in the sequence's blocks.
    pub start: usize,
    /// The sequence's blocks in order of position; they cover `start + tokens.len()` positions. Blocks wholly below
    /// `start` may be shared: other rows of the batch may read them too. A block that the row writes to (positions
    /// `start..start + tokens.len()`) is in no other row; it may be the source of one of the batch's copies.
    pub blocks: Vec<BlockId>,
    /// What the row must give.
    pub wanted: Wanted,
    /// How the next token will be chosen, for a device that samples by itself.
    pub sampling: Sampling,
}

/// A copy of one block's bytes to another, done before the rows run. What is copied was computed by an earlier
/// batch; the target is in one row at most and in no other copy. Only positions below the start of the target's row
/// matter: the source's holder may have gone on writing behind them, and may do so in this very batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// Read from.
    pub from: BlockId,
    /// Written to.
    pub to: BlockId,
}

/// One step for the device. A batch of one row is a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Copies to do first.
    pub copies: Vec<BlockCopy>,
    /// Rows, each of another sequence, at most [`Capabilities::max_batch`].
    pub rows: Vec<Row>,
}

impl Batch {
    /// Returns the tokens this batch runs, over all rows.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.tokens.len()).sum()
    }
}

/// What one row gave.
#[derive(Clone, Debug, PartialEq)]
pub enum RowOutput {
    /// The row asked for nothing.
    Nothing,
    /// [`Capabilities::vocab_size`] logits after each wanted position, in order.
    Logits(Vec<f32>),
    /// [`Capabilities::width`] numbers of each wanted position, in order.
    Hidden(Vec<f32>),
    /// The device sampled by itself, with a result equal to [`crate::sampling::sample`].
    Token(u32),
}

/// Outputs, one a row, in the batch's order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs {
    /// As many as the batch has rows.
    pub rows: Vec<RowOutput>,
}

/// Why a step failed. Every sequence of the batch is lost with it.
#[derive(Debug)]
pub enum EngineError {
    /// The batch breaks the engine's contract: a fault of the caller.
    BadBatch(String),
    /// The device or its arithmetic failed.
    Device(Box<dyn std::error::Error + Send + Sync>),
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EngineError::BadBatch(what) => write!(f, "the batch breaks the engine's contract: {what}"),
            EngineError::Device(source) => write!(f, "the device failed: {source}"),
        }
    }
}

impl std::error::Error for EngineError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            EngineError::BadBatch(_) => None,
            EngineError::Device(source) => Some(source.as_ref()),
        }
    }
}

/// Runs batches. Synchronous: it lives on the device's own OS thread, or inline in a simulation.
pub trait Engine: Send {
    /// Returns what this engine can hold and do.
    fn capabilities(&self) -> Capabilities;

    /// Runs one batch.
    ///
    /// # Errors
    /// [`EngineError::BadBatch`] when the batch exceeds [`Capabilities`] or names blocks that don't exist;
    /// [`EngineError::Device`] when the arithmetic failed.
    fn step(&mut self, batch: &Batch) -> Result<Outputs, EngineError>;

    /// Returns the bytes of one exported block: the same for every block of this engine.
    fn block_bytes(&self) -> usize;

    /// Reads a block's content, [`Engine::block_bytes`] long, in a form that an engine of equal model and build takes.
    ///
    /// # Errors
    /// [`EngineError::BadBatch`] when there is no such block; [`EngineError::Device`] when it can't be read.
    fn export_block(&mut self, block: BlockId) -> Result<Vec<u8>, EngineError>;

    /// Overwrites a block with what [`Engine::export_block`] gave.
    ///
    /// # Errors
    /// [`EngineError::BadBatch`] when there is no such block or `bytes` is not [`Engine::block_bytes`] long;
    /// [`EngineError::Device`] when it can't be written.
    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), EngineError>;
}
