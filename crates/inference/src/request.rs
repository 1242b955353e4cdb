//! What goes into a scheduler and what comes out of it.

use std::sync::Arc;
use std::time::Duration;

use words::Code;

use crate::sampling::Sampling;
use crate::text::StopRules;

/// Names a request inside one scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestKey(pub u64);

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// The token limit or the context.
    Length,
}

/// What a choice begins with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChoiceStart {
    /// Ids that an earlier attempt generated and the client's gateway accepted.
    pub accepted: Vec<u32>,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Its name, new to this scheduler.
    pub request: RequestKey,
    /// The prompt's tokens, at least one.
    pub prompt: Arc<[u32]>,
    /// One entry a choice, at least one.
    pub choices: Vec<ChoiceStart>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens a choice may have, accepted ones included; at least one.
    pub max_tokens: usize,
    /// When a choice ends by what it says.
    pub stop: Arc<StopRules>,
}

/// What the scheduler bounds by itself.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most sequences in the batch; the engine's own limit holds too.
    pub max_running: usize,
    /// Most requests in the queue.
    pub max_waiting: usize,
    /// Longest wait in the queue.
    pub max_wait: Duration,
    /// Most tokens of prompts in one step, beside the decodes.
    pub prefill_tokens: usize,
}

/// Tokens a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, over all choices, accepted ones included.
    pub completion_tokens: usize,
}

/// Something a request's owner must hear.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Whose it is.
    pub request: RequestKey,
    /// What it is.
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// The request left the queue.
    Started,
    /// The text that accepted ids had already released, for whoever folds a whole answer.
    Resumed {
        /// The choice.
        choice: u32,
        /// Its text so far.
        text: String,
        /// Set when the accepted ids had already ended the choice.
        finish: Option<FinishReason>,
    },
    /// A token was chosen.
    Token {
        /// The choice.
        choice: u32,
        /// The token's index in the choice, from 0.
        index: u32,
        /// The token.
        id: u32,
        /// The text it released, maybe none.
        text: String,
        /// Set when it ended the choice.
        finish: Option<FinishReason>,
    },
    /// Every choice has ended.
    Done(Usage),
    /// The request ended without its answer.
    Failed(Code, &'static str),
}

/// How busy a scheduler is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests in the batch.
    pub running: usize,
    /// Requests queued.
    pub waiting: usize,
    /// KV blocks in use.
    pub blocks_used: usize,
    /// KV blocks there are.
    pub blocks: usize,
}
