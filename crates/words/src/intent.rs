//! What operators and rollouts ask of a node, and how.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Epoch, Incarnation, ModelId, RolloutId};

/// What is asked of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Intent {
    /// Nothing: serve.
    #[default]
    None,
    /// Leave and come back; dies with the incarnation it names.
    Restart,
    /// Take no new work, let what runs finish, keep the models; survives restarts.
    Cordon,
    /// Take no new work, end or hand over what runs, unload, stay alive and empty; survives restarts.
    Drain,
}

/// When running streams are handed over to other workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandoffPolicy {
    /// As soon as the node is closed.
    Now,
    /// At the soft deadline.
    #[default]
    Soft,
    /// Never: what does not finish is cut at the hard deadline.
    Never,
}

/// An order to a node: compare-and-set by the epoch that its author saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IntentOrder {
    /// The epoch that the author saw; another one is refused.
    pub seen: Epoch,
    /// What is asked.
    pub intent: Intent,
    /// The life that must leave; needed for [`Intent::Restart`].
    pub incarnation: Option<Incarnation>,
    /// From the order to the cut of what still runs; the node's own when absent.
    pub deadline: Option<Duration>,
    /// When running streams are handed over.
    pub handoff: HandoffPolicy,
    /// The rollout on whose behalf.
    pub rollout: Option<RolloutClaim>,
    /// The `[upgrade.NAME]` to run once everything is unloaded, before the restart.
    pub upgrade: Option<String>,
}

/// A rollout's authority over a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutClaim {
    /// The rollout.
    pub id: RolloutId,
    /// The coordinator's lease revision; the node refuses lower ones of the same rollout.
    pub lease_revision: u64,
    /// How long the next life stays held without a word of the coordinator, in milliseconds.
    pub hold_ttl_ms: u64,
    /// What the next life must answer before it opens by itself.
    pub canary: Option<Canary>,
}

/// A question with its only right answer, at temperature 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// The model that is asked.
    pub model: ModelId,
    /// The user's message.
    pub prompt: String,
    /// What the answer must contain.
    pub answer: String,
}

/// Who is let in at a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Door {
    /// Everybody.
    #[default]
    All,
    /// The canary of this rollout's coordinator alone.
    Canary(RolloutId),
    /// Nobody.
    Nobody,
}

impl Door {
    /// Returns whether a request gets in; `canary_of` for the canary of a rollout's coordinator.
    pub fn admits(&self, canary_of: Option<&RolloutId>) -> bool {
        match self {
            Door::All => true,
            Door::Canary(rollout) => canary_of == Some(rollout),
            Door::Nobody => false,
        }
    }
}
