//! What gateways and nodes say to each other about one request: what the private headers, fields and lines carry.

use std::sync::Arc;

use fleet::Origin;
use inference::{FinishReason, Priority, StopRules, Usage};
use words::{Code, Fingerprint, GatewayId, ModelId, RolloutId};

/// A request as it goes to a node.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// The client's request.
    pub(crate) request: usize,
    /// Which attempt at it, from 1.
    pub(crate) attempt: u32,
    /// Whose.
    pub(crate) gateway: GatewayId,
    pub(crate) order: Arc<Order>,
    /// What earlier attempts had, for a continuation.
    pub(crate) resume: Option<(Origin, Vec<Vec<u32>>)>,
    /// The rollout on whose behalf it is asked, for the canary alone.
    pub(crate) canary: Option<RolloutId>,
}

/// What the client asked for; it never changes.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) model: ModelId,
    pub(crate) prompt: Arc<[u32]>,
    pub(crate) choices: usize,
    pub(crate) max_tokens: usize,
    pub(crate) stop: Arc<StopRules>,
    pub(crate) priority: Priority,
    /// The client reads a stream; else the last event carries the whole answer.
    pub(crate) streamed: bool,
}

/// An event of an answer.
#[derive(Clone, Debug)]
pub(crate) enum Said {
    /// The request has reached the node: the head of its answer.
    Reached,
    /// What the node made of the request, as it begins to run it.
    Origin(Origin),
    /// A token and the text that it released.
    Token { attempt: u32, choice: u32, index: u32, id: u32, text: String, finish: Option<FinishReason> },
    /// Everything was said; the texts are there for a client that wants one JSON.
    Done(Usage, Vec<(String, Option<FinishReason>)>),
    /// It was cancelled, and has this much: its usage, and what each choice still held back.
    Cut(Usage, Vec<(u32, String)>),
    /// The node will not go on.
    Refused(Code),
    /// A sign of life.
    Progress,
    /// The node is leaving; another one may go on.
    Offer(Option<RolloutId>),
    /// The node stays after all.
    Withdrawn,
}

/// Hashes tokens into a fingerprint (FNV-1a, spread over the bytes): good enough to tell prompts apart.
pub(crate) fn fingerprint(tag: u64, tokens: &[u32]) -> Fingerprint {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ tag;
    for token in tokens {
        hash = (hash ^ u64::from(*token)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&hash.to_le_bytes());
    bytes[8..16].copy_from_slice(&tag.to_le_bytes());
    Fingerprint(bytes)
}
