//! Snapshots that travel: what a neuron says of itself and its models.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{Epoch, Fingerprint, GatewayId, Generation, Incarnation, Intent, ModelId, NodeId, RolloutId};

/// Where a model is between absent and serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    /// Not on this node.
    Absent,
    /// Its files are being fetched.
    Fetching,
    /// Its weights are being read.
    Loading,
    /// It is answering its warm-up prompt.
    Warming,
    /// It serves.
    Ready,
    /// It finishes what runs and takes nothing new.
    Draining,
    /// Its memory is being freed.
    Unloading,
    /// It could not be loaded, or its device failed.
    Failed,
    /// A device fault is being repaired.
    Recovering,
    /// A state of a newer version: never routable.
    Unknown,
}

impl ModelState {
    /// Returns the state's name, as JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            ModelState::Absent => "absent",
            ModelState::Fetching => "fetching",
            ModelState::Loading => "loading",
            ModelState::Warming => "warming",
            ModelState::Ready => "ready",
            ModelState::Draining => "draining",
            ModelState::Unloading => "unloading",
            ModelState::Failed => "failed",
            ModelState::Recovering => "recovering",
            ModelState::Unknown => "unknown",
        }
    }
}

/// How far a drain has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainPhase {
    /// Announced; still accepts until the gateways have acknowledged.
    Settle,
    /// New work is refused, queued work handed back, running work goes on.
    Closed,
    /// Running streams are handed over.
    Handoff,
    /// What still runs is cut.
    Force,
}

/// Where a node is between its start and its exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "phase")]
pub enum NodeState {
    /// Loading its default models; no data port yet.
    Activating,
    /// Serving.
    Ready,
    /// Ready but held by a rollout: serves only its coordinator's canary.
    Held,
    /// On its way out, or being emptied.
    Draining(DrainPhase),
    /// Empty and alive, by a cordon.
    Drained,
    /// Unloading its models.
    Unloading,
    /// About to exit.
    Stopped,
    /// A state of a newer version: never routable.
    Unknown,
}

/// What a model on a node can do, as the proxy needs to know it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Answers `/v1/chat/completions`.
    pub chat: bool,
    /// Streams carry private lines, so another worker can continue them.
    pub continuation: bool,
}

/// A model's load as its worker counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelLoad {
    /// Requests in the batch.
    pub running: u32,
    /// Requests queued.
    pub waiting: u32,
    /// Most requests in the batch at once.
    pub max_running: u32,
    /// Most requests queued at once.
    pub max_waiting: u32,
    /// KV blocks there are.
    pub kv_blocks: u32,
    /// KV blocks in use.
    pub kv_blocks_used: u32,
}

/// What a catalogue says of a model, loaded or not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelCard {
    /// Other names that clients may use for it.
    pub aliases: Vec<ModelId>,
    /// Such as `qwen3`.
    pub family: Option<String>,
    /// Who made it.
    pub provider: Option<String>,
    /// What it is for, in a sentence.
    pub description: Option<String>,
    /// What it is good at, in its operator's words, such as `tools` or `vision`.
    pub capabilities: Vec<String>,
    /// A request for it loads it.
    pub on_demand: bool,
    /// It is never evicted, and never unloaded for being idle.
    pub pinned: bool,
    /// Of two models that could be evicted the lower one goes.
    pub priority: i32,
    /// It is unloaded after this long without a request, in seconds; 0: never.
    pub ttl_s: u64,
    /// Memory that it is expected to take once loaded, in bytes; 0 while unknown.
    pub memory_estimate: u64,
}

/// The memory that a node has for models, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeMemory {
    /// What models may take altogether; 0: unknown, and nothing is refused for want of it.
    pub budget: u64,
    /// What loaded models take, as measured, and what loads that run are expected to take.
    pub used: u64,
}

impl NodeMemory {
    /// Returns what is free, in bytes; `None` while the budget is unknown.
    pub fn free(&self) -> Option<u64> {
        (self.budget > 0).then(|| self.budget.saturating_sub(self.used))
    }
}

/// One model on one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// Its name.
    pub id: ModelId,
    /// Where it is.
    pub state: ModelState,
    /// Which harness runs it.
    pub harness: String,
    /// Most tokens of prompt and completion together; 0 while unknown.
    pub context_length: u32,
    /// Unix seconds of its load.
    pub created: u64,
    /// Equal ones may continue each other's streams.
    pub continue_fingerprint: Fingerprint,
    /// Equal ones give equal bytes.
    pub exact_fingerprint: Fingerprint,
    /// What it can do.
    pub capabilities: Capabilities,
    /// How busy it is.
    pub load: ModelLoad,
    /// Share of the load that is done, in thousandths.
    pub progress_permille: u32,
    /// Why it failed, for operators.
    pub failure: Option<String>,
    /// The 99th percentile of the time between two tokens, in milliseconds; 0 while unknown.
    pub inter_token_p99_ms: u32,
    /// What the catalogue says of it.
    pub card: ModelCard,
    /// Memory that it takes, as measured once it is loaded, in bytes; before that what is set aside for it.
    pub memory_bytes: u64,
    /// Whole seconds since its last request ended, or since its load; 0 while it has one.
    pub idle_s: u32,
    /// When it came into its state, in Unix milliseconds; 0 while unknown.
    pub since_unix_ms: u64,
    /// Time that the load in hand still takes, in milliseconds, where that can be estimated.
    pub eta_ms: Option<u64>,
}

impl ModelStatus {
    /// Makes the status of a model that is configured and not on the node just now.
    pub fn absent(id: ModelId) -> Self {
        ModelStatus {
            id,
            state: ModelState::Absent,
            harness: String::new(),
            context_length: 0,
            created: 0,
            continue_fingerprint: Fingerprint::default(),
            exact_fingerprint: Fingerprint::default(),
            capabilities: Capabilities::default(),
            load: ModelLoad::default(),
            progress_permille: 0,
            failure: None,
            inter_token_p99_ms: 0,
            card: ModelCard::default(),
            memory_bytes: 0,
            idle_s: 0,
            since_unix_ms: 0,
            eta_ms: None,
        }
    }
}

/// How far the activation has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActivationProgress {
    /// Default models there are.
    pub total: u32,
    /// Default models that are over, loaded or failed.
    pub done: u32,
    /// Default models that failed.
    pub failed: u32,
    /// The one in hand.
    pub current: Option<ModelId>,
}

/// A rollout's claim on a node that has come back: it serves only the coordinator's canary until opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Whose.
    pub rollout: RolloutId,
    /// The lease revision under which it was claimed; lower ones command nothing.
    pub lease_revision: u64,
    /// Time until the node looks after itself, in milliseconds.
    pub ttl_ms: u64,
}

/// How a drain goes, for those who watch it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainProgress {
    /// Time until what still runs is cut, in milliseconds.
    pub deadline_ms: u64,
    /// What it waits for.
    pub waiting_for: String,
}

/// How the last upgrade went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeOutcome {
    /// Its name in the worker's configuration.
    pub name: String,
    /// Whether its command succeeded.
    pub ok: bool,
    /// What it ended with, for operators.
    pub detail: String,
    /// When, in Unix seconds.
    pub at: u64,
}

/// Most requests that a crash's breadcrumb names.
pub const CRUMBS_MAX: usize = 64;

/// What a node says of itself. (incarnation, generation) order the snapshots of one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub node: NodeId,
    /// Its life.
    pub incarnation: Incarnation,
    /// Counts its state changes; load alone does not raise it.
    pub generation: Generation,
    /// Orders intents.
    pub epoch: Epoch,
    /// The intent in force.
    pub intent: Intent,
    /// Where it is.
    pub state: NodeState,
    /// `host:port` of its data plane; empty until bound.
    pub data_address: String,
    /// Its program's version.
    pub version: String,
    /// How far activation has come.
    pub activation: ActivationProgress,
    /// Its models, configured ones also while they are absent.
    pub models: Vec<ModelStatus>,
    /// Gateways that hold a session here.
    pub gateways: BTreeSet<GatewayId>,
    /// Requests accepted and not over.
    pub in_flight: u32,
    /// Set while a rollout holds the node.
    pub hold: Option<Hold>,
    /// The rollout that restarts this life, or by which this life was started.
    pub rollout: Option<RolloutId>,
    /// Set while it drains.
    pub drain: Option<DrainProgress>,
    /// Names of the requests in the step in which the life before this one crashed; at most [`CRUMBS_MAX`]. A name is
    /// the BLAKE3 of the completion's id.
    pub crumbs: Vec<Fingerprint>,
    /// How the last upgrade went.
    pub upgrade: Option<UpgradeOutcome>,
    /// Memory for models.
    pub memory: NodeMemory,
}

impl NodeStatus {
    /// Makes the first status of a life: activating, with nothing on it.
    pub fn new(node: NodeId, incarnation: Incarnation) -> Self {
        NodeStatus {
            node,
            incarnation,
            generation: Generation(1),
            epoch: Epoch(0),
            intent: Intent::None,
            state: NodeState::Activating,
            data_address: String::new(),
            version: String::new(),
            activation: ActivationProgress::default(),
            models: Vec::new(),
            gateways: BTreeSet::new(),
            in_flight: 0,
            hold: None,
            rollout: None,
            drain: None,
            crumbs: Vec::new(),
            upgrade: None,
            memory: NodeMemory::default(),
        }
    }

    /// Returns the status of `model`.
    pub fn model(&self, model: &ModelId) -> Option<&ModelStatus> {
        self.models.iter().find(|status| status.id == *model)
    }
}
