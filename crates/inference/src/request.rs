//! What goes into a scheduler and what comes out of it.

use std::sync::Arc;
use std::time::Duration;

use words::{Code, Moment};

use crate::constraint::Grammar;
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

/// How urgent a request is. Ordered: the more urgent is the lesser, `High` first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Before everything else.
    High,
    /// What a request has that says nothing.
    #[default]
    Normal,
    /// When nothing else wants to run.
    Low,
}

impl Priority {
    /// Returns the class `steps` above this one, at most `High`.
    #[must_use]
    pub fn raised(self, steps: usize) -> Priority {
        const CLASSES: [Priority; 3] = [Priority::High, Priority::Normal, Priority::Low];
        CLASSES[(self as usize).saturating_sub(steps)]
    }
}

/// What a choice begins with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChoiceStart {
    /// Ids that an earlier attempt generated and the client's gateway accepted.
    pub accepted: Vec<u32>,
}

/// How the hidden states of a prompt become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The mean over all tokens.
    Mean,
    /// The last token's.
    Last,
}

/// What is told of tokens besides themselves: see [`Score`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scoring {
    /// How many of the likeliest tokens are told beside each.
    pub top: usize,
    /// Whether the prompt's tokens are scored too, from its second on; once, by the first choice that runs,
    /// whose accepted ids are then scored again as well.
    pub prompt: bool,
    /// Whether accepted ids are scored again.
    pub accepted: bool,
}

/// What a request wants of the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Task {
    /// Tokens.
    #[default]
    Generate,
    /// Tokens, with their scores.
    Score(Scoring),
    /// One vector of the prompt, as [`EventKind::Embedded`], and no token.
    Embed(Pooling),
}

/// How likely a token was, by the model's own logits: before bias, penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Its log-probability, natural; never below [`crate::sampling::LOGPROB_MIN`].
    pub logprob: f32,
    /// The likeliest tokens and theirs, falling; of equal ones the lower id first.
    pub top: Vec<(u32, f32)>,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Its name, new to this scheduler.
    pub request: RequestKey,
    /// The prompt's tokens, at least one.
    pub prompt: Arc<[u32]>,
    /// One entry a choice, at least one and at most [`Limits::max_choices`]. They share the prompt's blocks.
    pub choices: Vec<ChoiceStart>,
    /// The first choice's number, in events and draws: not 0 where several prompts are one answer.
    pub first_choice: u32,
    /// What is wanted.
    pub task: Task,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Added to the logits of these tokens; engines that choose tokens by themselves know nothing of it.
    pub bias: Arc<[(u32, f32)]>,
    /// What every choice must be; see [`crate::constraint`]. Without effect on an embedding.
    pub constraint: Option<Arc<dyn Grammar>>,
    /// Most tokens a choice may have, accepted ones included; at least one, and none for an embedding.
    pub max_tokens: usize,
    /// When a choice ends by what it says.
    pub stop: Arc<StopRules>,
    /// Its class in the queue, and whom it may preempt.
    pub priority: Priority,
    /// The moment after which nobody wants the answer: the request then fails, queued or running.
    pub deadline: Option<Moment>,
    /// Keeps prefix caches of tenants apart: only requests of equal salt share computed blocks. Zeros by default.
    pub salt: [u8; 32],
}

impl Submission {
    /// Makes the plainest request: one choice from its start, likeliest tokens, and no end but `max_tokens`, the context
    /// and what the caller adds. Of normal priority, without deadline, in the prefix cache that all share.
    pub fn new(request: RequestKey, prompt: impl Into<Arc<[u32]>>, max_tokens: usize) -> Self {
        Submission {
            request,
            prompt: prompt.into(),
            choices: vec![ChoiceStart::default()],
            first_choice: 0,
            task: Task::Generate,
            sampling: Sampling::GREEDY,
            bias: Arc::default(),
            constraint: None,
            max_tokens,
            stop: Arc::default(),
            priority: Priority::Normal,
            deadline: None,
            salt: [0; 32],
        }
    }
}

/// What the scheduler bounds by itself.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most sequences in the batch; the engine's own limit holds too.
    pub max_running: usize,
    /// Most requests in the queue that have not run yet; preempted ones have a place beside them, and as many resumes.
    pub max_waiting: usize,
    /// Longest wait in the queue of a request that has not run yet. Ageing is measured by it too.
    pub max_wait: Duration,
    /// Most tokens of prompts in one step, beside the decodes.
    pub prefill_tokens: usize,
    /// Most choices in one request.
    pub max_choices: usize,
    /// Whether computed blocks are kept and found again by their content.
    pub prefix_cache: bool,
}

/// Tokens a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, over all choices, accepted ones included.
    pub completion_tokens: usize,
    /// Tokens of the prompt, as the first choice that ran needed it, that came from the prefix cache and that the
    /// engine never computed for this request; at most `prompt_tokens`.
    pub cached_tokens: usize,
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
    Started {
        /// Tokens of the prompt that were found in the prefix cache.
        cached: usize,
    },
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
        /// How likely it was, for a [`Task::Score`]; never of an end token, which is no part of the answer.
        score: Option<Box<Score>>,
    },
    /// How likely a token was that this request came with.
    Scored {
        /// The choice.
        choice: u32,
        /// The token's place, counted from the prompt's start.
        position: usize,
        /// The token.
        id: u32,
        /// How likely it was.
        score: Score,
    },
    /// The prompt as one vector.
    Embedded {
        /// The choice.
        choice: u32,
        /// [`crate::engine::Capabilities::width`] numbers.
        vector: Vec<f32>,
    },
    /// A choice ends early, because its request was stopped.
    Stopped {
        /// The choice.
        choice: u32,
        /// Text that its tokens had not released yet.
        text: String,
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
    /// Requests queued, preempted ones included: at most [`Limits::max_waiting`] and those preempted.
    pub waiting: usize,
    /// KV blocks that requests in the batch hold.
    pub blocks_used: usize,
    /// KV blocks that only the prefix cache holds; they are given to whoever needs them.
    pub blocks_cached: usize,
    /// KV blocks there are.
    pub blocks: usize,
    /// Times a running request had to make room for a more urgent one. Never falls.
    pub preemptions: u64,
    /// Tokens, prompts and accepted ids, that requests found in the prefix cache when they first ran. Never falls.
    pub prefix_hit_tokens: u64,
    /// Tokens, prompts and accepted ids, that were looked up in the prefix cache then. Never falls.
    pub prefix_query_tokens: u64,
}
