//! What an operator asks of a rollout, and what is known of its progress; all of it is stored.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use words::{Canary, Epoch, HandoffPolicy, Incarnation, ModelId, NodeId, RolloutId};

/// A restarted node serves this long without a fault before the next one may go.
pub const HEALTH_FOR: Duration = Duration::from_secs(10);
/// A node that came back is held this long without a word of its coordinator.
pub const HOLD_TTL: Duration = Duration::from_secs(60);
/// A node is back, models loaded, this long after it left.
pub const BACK_WITHIN: Duration = Duration::from_secs(600);
/// A rollout that nothing else keeps busy waits this long for capacity.
pub const BLOCKED_MAX: Duration = Duration::from_secs(300);
/// The drain's deadline of a worker that was given none.
pub const DEADLINE_OF_NODES: Duration = Duration::from_secs(600);

mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(span.as_millis() as u64)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

/// How many nodes may be out of service at once, for whatever reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaxUnavailable {
    /// So many.
    Count(u32),
    /// A share of the configured nodes, rounded down, but never less than one node.
    Percent(u32),
}

impl MaxUnavailable {
    /// Returns the number for a fleet of `nodes`.
    pub fn of(self, nodes: usize) -> usize {
        match self {
            MaxUnavailable::Count(count) => count as usize,
            MaxUnavailable::Percent(share) => (nodes * share.min(100) as usize / 100).max(1),
        }
    }
}

/// How many replicas of a model stay routable while a node that has one is away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MinAvailable {
    /// For models that are not named.
    pub default: u32,
    /// For those that are.
    pub models: BTreeMap<ModelId, u32>,
}

impl MinAvailable {
    /// Returns the floor of a model.
    pub fn of(&self, model: &ModelId) -> u32 {
        self.models.get(model).copied().unwrap_or(self.default)
    }
}

/// What an operator asks of a rollout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The nodes to restart, in the order wished for; one that can't go yet lets the next one go first.
    pub targets: Vec<NodeId>,
    /// How many nodes may be out of service at once.
    pub max_unavailable: MaxUnavailable,
    /// How many replicas of each model stay.
    pub min_available: MinAvailable,
    /// Models that may have no replica for a while.
    pub allow_dark: BTreeSet<ModelId>,
    /// What a node must answer before it is opened; asked of nodes that had the model before.
    pub canary: Option<Canary>,
    /// How long a node that came back is held without a word of the coordinator.
    #[serde(with = "millis")]
    pub hold_ttl: Duration,
    /// From the order to the cut of what still runs; each node's own when absent.
    pub deadline_ms: Option<u64>,
    /// When running streams are handed over.
    pub handoff: HandoffPolicy,
    /// The `[upgrade.NAME]` to run on each node before its restart.
    pub upgrade: Option<String>,
    /// How long a node is healthy before its permit is released.
    #[serde(with = "millis")]
    pub health_for: Duration,
    /// How long a node may take to come back with its models, once it left.
    #[serde(with = "millis")]
    pub back_within: Duration,
    /// How long the rollout waits for capacity before it pauses.
    #[serde(with = "millis")]
    pub blocked_max: Duration,
}

impl Policy {
    /// Makes the policy of a plain restart: one node at a time, one replica of each model stays.
    pub fn new(targets: Vec<NodeId>) -> Self {
        Policy {
            targets,
            max_unavailable: MaxUnavailable::Count(1),
            min_available: MinAvailable { default: 1, models: BTreeMap::new() },
            allow_dark: BTreeSet::new(),
            canary: None,
            hold_ttl: HOLD_TTL,
            deadline_ms: None,
            handoff: HandoffPolicy::default(),
            upgrade: None,
            health_for: HEALTH_FOR,
            back_within: BACK_WITHIN,
            blocked_max: BLOCKED_MAX,
        }
    }

    /// Returns the longest time from the order to the life's end.
    pub fn leave_within(&self) -> Duration {
        // Beyond the deadline: settling, flushing, hooks and unloading.
        let after = Duration::from_secs(120);
        self.deadline_ms.map_or(DEADLINE_OF_NODES, Duration::from_millis) + after
    }
}

/// Why a rollout is paused, or a node failed in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reason")]
pub enum Reason {
    /// An operator said so.
    Operator,
    /// The node refused the order.
    OrderRefused {
        /// Its words.
        detail: String,
    },
    /// Somebody took the order back.
    OrderUndone,
    /// The node did not leave within its drain's budget.
    NotLeft,
    /// The node did not come back, or not with its models, in time.
    NotBack {
        /// What was seen last.
        detail: String,
    },
    /// The node came back and then failed again.
    Crashed,
    /// A model that the node had before failed there.
    ModelFailed {
        /// Which.
        model: ModelId,
        /// The node's words.
        detail: String,
    },
    /// The node's upgrade failed, or did not run.
    UpgradeFailed {
        /// The node's words.
        detail: String,
    },
    /// The canary's answer was wrong.
    CanaryWrong {
        /// The beginning of what it was.
        got: String,
    },
    /// The node would not be opened.
    NotOpened {
        /// Its words, or what was seen last.
        detail: String,
    },
    /// The node was opened and did not stay healthy.
    NotHealthy,
    /// No node could go for too long.
    Blocked {
        /// Each with what is in its way.
        nodes: Vec<String>,
    },
}

impl Reason {
    /// Returns the reason's short name, as it is stored.
    pub fn name(&self) -> &'static str {
        match self {
            Reason::Operator => "operator",
            Reason::OrderRefused { .. } => "order_refused",
            Reason::OrderUndone => "order_undone",
            Reason::NotLeft => "not_left",
            Reason::NotBack { .. } => "not_back",
            Reason::Crashed => "crashed",
            Reason::ModelFailed { .. } => "model_failed",
            Reason::UpgradeFailed { .. } => "upgrade_failed",
            Reason::CanaryWrong { .. } => "canary_wrong",
            Reason::NotOpened { .. } => "not_opened",
            Reason::NotHealthy => "not_healthy",
            Reason::Blocked { .. } => "blocked",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Operator => f.write_str("an operator paused it"),
            Reason::OrderRefused { detail } => write!(f, "the order was refused: {detail}"),
            Reason::OrderUndone => f.write_str("somebody took the order to restart back"),
            Reason::NotLeft => f.write_str("the node did not leave within its drain's budget"),
            Reason::NotBack { detail } => write!(f, "the node did not come back in time: {detail}"),
            Reason::Crashed => f.write_str("the node came back and then ended again"),
            Reason::ModelFailed { model, detail } => write!(f, "the model '{model}' failed: {detail}"),
            Reason::UpgradeFailed { detail } => write!(f, "the upgrade failed: {detail}"),
            Reason::CanaryWrong { got } => write!(f, "the canary's answer was wrong: '{got}'"),
            Reason::NotOpened { detail } => write!(f, "the node could not be opened: {detail}"),
            Reason::NotHealthy => f.write_str("the node was opened and did not stay healthy"),
            Reason::Blocked { nodes } => write!(f, "no node can go: {}", nodes.join("; ")),
        }
    }
}

/// How far one node has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Progress {
    /// Its turn has not come.
    #[default]
    Pending,
    /// It has a permit, stored before the order is sent; the order may be under way.
    Permitted,
    /// It has taken the order: it drains, leaves and comes back.
    Ordered {
        /// The epoch that the node gave the order.
        epoch: Epoch,
    },
    /// Its next life was heard from; the canary is asked once it is ready.
    Back,
    /// The canary's answer was right, or there is none; the hold is to be opened.
    Answered,
    /// It is open, and its health is watched.
    Opened,
    /// Its permit is released.
    Done,
    /// It stands where it failed.
    Failed {
        /// Why.
        reason: Reason,
    },
    /// It was not restarted, because the rollout ended before.
    Skipped,
}

impl Progress {
    /// Returns whether the node holds a permit: it counts as away, whatever it says of itself.
    pub fn away(&self) -> bool {
        matches!(
            self,
            Progress::Permitted
                | Progress::Ordered { .. }
                | Progress::Back
                | Progress::Answered
                | Progress::Opened
                | Progress::Failed { .. }
        )
    }

    /// Returns the state's short name, as it is stored.
    pub fn name(&self) -> &'static str {
        match self {
            Progress::Pending => "pending",
            Progress::Permitted => "permitted",
            Progress::Ordered { .. } => "ordered",
            Progress::Back => "back",
            Progress::Answered => "answered",
            Progress::Opened => "opened",
            Progress::Done => "done",
            Progress::Failed { .. } => "failed",
            Progress::Skipped => "skipped",
        }
    }

    /// All short names.
    pub const NAMES: [&'static str; 9] =
        ["pending", "permitted", "ordered", "back", "answered", "opened", "done", "failed", "skipped"];
}

/// What the node was when it got its permit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// The life that must leave.
    pub incarnation: Incarnation,
    /// The epoch that the order names; any other order to the node makes ours void.
    pub epoch: Epoch,
    /// Models that were ready.
    pub models: Vec<ModelId>,
    /// When its last upgrade was, in Unix seconds by its own clock.
    pub upgraded_at: Option<u64>,
}

/// One node of a rollout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeProgress {
    /// Which.
    pub node: NodeId,
    /// How far.
    #[serde(flatten)]
    pub progress: Progress,
    /// What it was, once it had a permit.
    pub before: Option<Before>,
    /// Its life after the restart, once heard.
    pub back: Option<Incarnation>,
    /// How often it refused what this state wants of it.
    pub refused: u32,
}

impl NodeProgress {
    fn pending(node: NodeId) -> Self {
        NodeProgress { node, progress: Progress::Pending, before: None, back: None, refused: 0 }
    }

    /// Moves on; refusals are counted anew.
    pub(super) fn go(&mut self, progress: Progress) {
        self.progress = progress;
        self.refused = 0;
    }
}

/// Where a rollout is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub enum Phase {
    /// It goes on by itself.
    Running,
    /// It gives no orders until it is resumed or aborted.
    Paused {
        /// The node at fault.
        node: Option<NodeId>,
        /// Why.
        why: Reason,
    },
    /// It takes permits back and opens what it holds.
    Aborting,
    /// All nodes were restarted.
    Done,
    /// It was ended before.
    Aborted,
}

impl Phase {
    /// Returns whether the rollout is over.
    pub fn over(&self) -> bool {
        matches!(self, Phase::Done | Phase::Aborted)
    }

    /// Returns the phase's short name, as it is stored.
    pub fn name(&self) -> &'static str {
        match self {
            Phase::Running => "running",
            Phase::Paused { .. } => "paused",
            Phase::Aborting => "aborting",
            Phase::Done => "done",
            Phase::Aborted => "aborted",
        }
    }

    /// All short names.
    pub const NAMES: [&'static str; 5] = ["running", "paused", "aborting", "done", "aborted"];
}

/// A rollout as it is stored. It holds no times: a coordinator counts its own, from its takeover on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// Its name.
    pub id: RolloutId,
    /// What was asked.
    pub policy: Policy,
    /// The fencing token of its present coordinator.
    pub lease_revision: u64,
    /// How often an operator resumed or aborted it; all waits begin anew then.
    pub turns: u32,
    /// Where it is.
    #[serde(flatten)]
    pub phase: Phase,
    /// Its nodes, in the policy's order.
    pub nodes: Vec<NodeProgress>,
}

impl Rollout {
    /// Begins a rollout; [`crate::rollout::rehearse`] says whether it may begin.
    pub fn new(id: RolloutId, policy: Policy) -> Self {
        let nodes = policy.targets.iter().cloned().map(NodeProgress::pending).collect();
        Rollout { id, policy, lease_revision: 0, turns: 0, phase: Phase::Running, nodes }
    }

    /// Returns one node.
    pub fn node(&self, node: &NodeId) -> Option<&NodeProgress> {
        self.nodes.iter().find(|known| known.node == *node)
    }

    pub(super) fn node_mut(&mut self, node: &NodeId) -> Option<&mut NodeProgress> {
        self.nodes.iter_mut().find(|known| known.node == *node)
    }
}
