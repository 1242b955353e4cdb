//! The endpoints that a worker answers, and the dialect of their answers.

use bytes::Bytes;

use crate::completion::{ChatEncoder, Folder, Identity, Usage};
use crate::embeddings::EmbeddingFolder;
use crate::logprobs::TokenLogprob;
use crate::output::Delta;
use crate::text::{TextEncoder, TextFolder};

/// What a client asks a model for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// An answer to messages.
    Chat,
    /// The continuation of texts.
    Completions,
    /// A vector for each text.
    Embeddings,
    /// The tokens of a text.
    Tokenize,
    /// The text of tokens.
    Detokenize,
}

impl Endpoint {
    /// Every endpoint.
    pub const ALL: [Endpoint; 5] =
        [Endpoint::Chat, Endpoint::Completions, Endpoint::Embeddings, Endpoint::Tokenize, Endpoint::Detokenize];

    /// Returns its path.
    pub const fn path(self) -> &'static str {
        match self {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
            Endpoint::Embeddings => "/v1/embeddings",
            Endpoint::Tokenize => "/tokenize",
            Endpoint::Detokenize => "/detokenize",
        }
    }

    /// Finds the endpoint at a path.
    pub fn at(path: &str) -> Option<Endpoint> {
        Endpoint::ALL.into_iter().find(|endpoint| endpoint.path() == path)
    }

    /// Says in words what there is, for somebody who asked for something else.
    pub fn list() -> String {
        format!("{} and /v1/models", Endpoint::ALL.map(Endpoint::path).join(", "))
    }

    /// Makes the name of one answer.
    pub fn answer_id(self, random: u128) -> String {
        let prefix = match self {
            Endpoint::Chat => "chatcmpl",
            Endpoint::Completions => "cmpl",
            Endpoint::Embeddings => "embd",
            Endpoint::Tokenize | Endpoint::Detokenize => "tok",
        };
        words::random_name(prefix, random)
    }

    /// Returns its name in traces, as OpenTelemetry's conventions have it where they do.
    pub const fn operation(self) -> &'static str {
        match self {
            Endpoint::Chat => "chat",
            Endpoint::Completions => "text_completion",
            Endpoint::Embeddings => "embeddings",
            Endpoint::Tokenize => "tokenize",
            Endpoint::Detokenize => "detokenize",
        }
    }

    /// Returns whether answers may be streams, and may be several to one request.
    pub const fn generates(self) -> bool {
        matches!(self, Endpoint::Chat | Endpoint::Completions)
    }
}

/// The encoder of a stream's dialect.
#[derive(Clone, Debug)]
pub enum Encoder {
    /// `chat.completion.chunk`
    Chat(ChatEncoder),
    /// `text_completion`
    Text(TextEncoder),
}

impl Encoder {
    /// The first event of a choice; `None` where the dialect has none. `plain` says that all text is content, `scored` are
    /// an echoed prompt's tokens.
    pub fn begin(&self, choice: u32, plain: bool, scored: Option<&[TokenLogprob]>) -> Option<Bytes> {
        match self {
            Encoder::Chat(encoder) => Some(encoder.role(choice, plain)),
            Encoder::Text(encoder) => encoder.begin(choice, scored),
        }
    }

    /// Parts of an answer, with the tokens they are of when those are told: then there is an event even without a part.
    pub fn parts(&self, choice: u32, parts: &[Delta], scored: Option<&[TokenLogprob]>) -> Vec<Bytes> {
        let event = |part: &Delta, scored| match (self, part) {
            (Encoder::Chat(encoder), part) => encoder.part(choice, part, scored),
            (Encoder::Text(encoder), Delta::Content(text)) => encoder.content(choice, text, scored),
            // Only messages are taken apart.
            (Encoder::Text(encoder), _) => encoder.content(choice, "", scored),
        };
        match parts.split_first() {
            Some((first, rest)) => {
                [event(first, scored)].into_iter().chain(rest.iter().map(|part| event(part, None))).collect()
            }
            None => scored.map(|scored| event(&Delta::Content(String::new()), Some(scored))).into_iter().collect(),
        }
    }

    /// The finish event, last of each choice.
    pub fn finish(&self, choice: u32, reason: &'static str) -> Bytes {
        match self {
            Encoder::Chat(encoder) => encoder.finish(choice, reason),
            Encoder::Text(encoder) => encoder.finish(choice, reason),
        }
    }

    /// The finish event of a choice that was cancelled.
    pub fn cancelled(&self, choice: u32) -> Bytes {
        match self {
            Encoder::Chat(encoder) => encoder.cancelled(choice),
            Encoder::Text(encoder) => encoder.cancelled(choice),
        }
    }

    /// The usage event, after every finish; `None` when the client did not ask for it.
    pub fn usage(&self, usage: Usage) -> Option<Bytes> {
        match self {
            Encoder::Chat(encoder) => encoder.usage(usage),
            Encoder::Text(encoder) => encoder.usage(usage),
        }
    }

    /// Makes the encoder of an endpoint's streams, for whoever only ends one: it echoes nothing.
    pub fn of(endpoint: Endpoint, identity: Identity, include_usage: bool) -> Encoder {
        match endpoint {
            Endpoint::Completions => {
                Encoder::Text(TextEncoder::new(identity, include_usage, crate::text::Echo::default()))
            }
            _ => Encoder::Chat(ChatEncoder::new(identity, include_usage)),
        }
    }
}

/// The fold of an answer that is one JSON.
#[derive(Debug)]
pub enum Fold {
    /// `chat.completion`
    Chat(Folder),
    /// `text_completion`
    Text(TextFolder),
    /// `list` of `embedding`
    Embeddings(EmbeddingFolder),
}

impl Fold {
    /// Adds a part of the answer to a choice.
    pub fn part(&mut self, choice: u32, part: &Delta) {
        match (self, part) {
            (Fold::Chat(folder), part) => folder.part(choice, part),
            (Fold::Text(folder), Delta::Content(text)) => folder.content(choice, text),
            // Only messages are taken apart.
            (Fold::Text(_), _) | (Fold::Embeddings(_), _) => {}
        }
    }

    /// Adds tokens to a choice, in their order.
    pub fn score(&mut self, choice: u32, scored: &[TokenLogprob]) {
        match self {
            Fold::Chat(folder) => folder.score(choice, scored),
            Fold::Text(folder) => folder.score(choice, scored),
            Fold::Embeddings(_) => {}
        }
    }

    /// Takes the vector of one text.
    pub fn embedded(&mut self, index: u32, vector: &[f32]) {
        if let Fold::Embeddings(folder) = self {
            folder.embedded(index, vector);
        }
    }

    /// Ends a choice.
    pub fn finish(&mut self, choice: u32, reason: &'static str) {
        match self {
            Fold::Chat(folder) => folder.finish(choice, reason),
            Fold::Text(folder) => folder.finish(choice, reason),
            Fold::Embeddings(_) => {}
        }
    }

    /// Ends a choice that was cancelled.
    pub fn cancelled(&mut self, choice: u32) {
        match self {
            Fold::Chat(folder) => folder.cancelled(choice),
            Fold::Text(folder) => folder.cancelled(choice),
            Fold::Embeddings(_) => {}
        }
    }

    /// Whether what came so far may be an answer: of embeddings all or none are.
    pub fn divisible(&self) -> bool {
        !matches!(self, Fold::Embeddings(_))
    }

    /// Returns the whole answer.
    pub fn done(&self, usage: Usage) -> String {
        match self {
            Fold::Chat(folder) => folder.done(usage),
            Fold::Text(folder) => folder.done(usage),
            Fold::Embeddings(folder) => folder.done(usage),
        }
    }
}
