//! Everything an operator can set on a worker.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use hooks::HooksOptions;
use lifecycle::{DrainBudget, NodeRules};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use service::config::{DAY_MS, UnusableOption, check_address, check_bounds};
use service::server::ServerOptions;
use service::telemetry::LogOptions;
use words::NodeId;

mod models;
mod process;
pub use models::{MemoryOptions, ModelEntry, SamplingOptions};
pub use process::{EndpointName, ProcessOptions};

/// The worker's configuration.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Who this worker is.
    pub node: NodeOptions,
    /// The data plane: the OpenAI API.
    pub data: DataOptions,
    /// The control plane: gRPC for gateways, probes and metrics.
    pub control: ControlOptions,
    /// How the worker leaves.
    pub drain: DrainOptions,
    /// How requests are scheduled, for every model.
    pub scheduler: SchedulerOptions,
    /// The harnesses' own settings.
    pub harness: HarnessOptions,
    /// The catalogue: models that a request loads when they are absent, and whose names clients are shown.
    pub models: Vec<ModelEntry>,
    /// Models loaded at start, one after another, in this order. One that says nothing but its id is that of the catalogue.
    pub default_models: Vec<ModelEntry>,
    /// What models may take.
    pub memory: MemoryOptions,
    /// Commands that a restart may run once everything is unloaded, by name.
    pub upgrade: BTreeMap<String, UpgradeOptions>,
    /// What outlives a model's memory of what it has computed.
    pub kv_store: KvStoreOptions,
    /// What runs at the turns of this worker's and its models' life.
    pub hooks: HooksOptions,
    /// What is logged.
    pub log: LogOptions,
}

/// Who this worker is.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NodeOptions {
    /// The worker's name in the fleet: up to 64 letters, digits, '-', '_', '.'. The host's name when absent.
    pub id: Option<String>,
    /// A folder that survives restarts: it counts the starts, and remembers cordons and drains. Without one neither is
    /// possible.
    pub state_dir: Option<PathBuf>,
}

/// The data plane.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataOptions {
    /// Where it listens. Port 0 takes a free one.
    pub bind: SocketAddr,
    /// The address gateways are told, host:port, when it differs from the one bound (behind NAT, say). One that listens on
    /// every address (0.0.0.0) is looked for at its control port's host.
    pub advertise: Option<String>,
    /// Largest request body, in bytes.
    pub max_body_bytes: usize,
    /// Longest time for a request body to arrive, in milliseconds.
    pub body_timeout_ms: u64,
    /// After this long without a first token a stream is committed with status 200, in milliseconds. For clients
    /// that talk to the worker directly; gateways have their own.
    pub commit_after_ms: u64,
    /// Events that wait for a slow reader before its sequence pauses.
    pub event_queue: usize,
    /// Longest wait of a request for its model's load, and of a load for its memory, in seconds.
    pub load_wait_s: f64,
    /// The listener's limits and timeouts.
    pub server: ServerOptions,
}

impl Default for DataOptions {
    fn default() -> Self {
        DataOptions {
            bind: SocketAddr::from(([127, 0, 0, 1], 13131)),
            advertise: None,
            max_body_bytes: 4 << 20,
            body_timeout_ms: 30_000,
            commit_after_ms: 5_000,
            event_queue: 64,
            load_wait_s: 600.0,
            server: ServerOptions::default(),
        }
    }
}

impl Options {
    /// Says what gateways on other hosts can't reach, though they may give orders.
    pub(crate) fn unreachable_data(&self) -> Option<String> {
        let hidden = self.data.bind.ip().is_loopback() && self.data.advertise.is_none();
        let bind = self.data.bind;
        (hidden && !self.control.bind.ip().is_loopback())
            .then(|| format!("the data port is bound to {bind}, where gateways on other hosts can't reach it"))
    }
}

impl DataOptions {
    /// Returns the longest wait for a load.
    pub fn load_wait(&self) -> Duration {
        seconds(self.load_wait_s)
    }

    /// Returns how long a stream waits for its first token before its head goes out.
    pub fn commit_after(&self) -> Duration {
        Duration::from_millis(self.commit_after_ms)
    }
}

/// The control plane.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ControlOptions {
    /// Where it listens. Port 0 takes a free one.
    pub bind: SocketAddr,
    /// A file with the token that gateways must show. Needed to bind outside loopback.
    pub token_file: Option<PathBuf>,
    /// The listener's limits and timeouts.
    pub server: ServerOptions,
}

impl Default for ControlOptions {
    fn default() -> Self {
        ControlOptions {
            bind: SocketAddr::from(([127, 0, 0, 1], 13231)),
            token_file: None,
            server: ServerOptions::default(),
        }
    }
}

/// How the worker leaves. The whole exit takes at most `settle_max_ms` or `deadline_s`, whichever is longer, plus
/// `cut_max_ms`, plus `unload_max_s`; systemd's TimeoutStopSec must be larger.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DrainOptions {
    /// Longest wait until every attached gateway knows of the drain, in milliseconds.
    pub settle_max_ms: u64,
    /// Time that running requests have to finish before they are offered to other workers, in seconds. An order with
    /// another deadline moves this in proportion.
    pub handoff_s: f64,
    /// Time that running requests have to finish, in seconds; what still runs then is cut.
    pub deadline_s: f64,
    /// Longest wait for cut streams to be flushed, in milliseconds.
    pub cut_max_ms: u64,
    /// Longest time for all models to unload, in seconds.
    pub unload_max_s: f64,
}

impl Default for DrainOptions {
    fn default() -> Self {
        DrainOptions {
            settle_max_ms: 2_000,
            handoff_s: 120.0,
            deadline_s: 600.0,
            cut_max_ms: 2_000,
            unload_max_s: 30.0,
        }
    }
}

impl DrainOptions {
    /// Returns the drain machine's budget.
    pub fn budget(&self) -> DrainBudget {
        DrainBudget {
            settle_max: Duration::from_millis(self.settle_max_ms),
            handoff: Some(seconds(self.handoff_s)),
            deadline: seconds(self.deadline_s),
            cut_max: Duration::from_millis(self.cut_max_ms),
        }
    }

    /// Returns the longest time for all models to unload.
    pub fn unload_max(&self) -> Duration {
        seconds(self.unload_max_s)
    }

    /// Returns the longest time from the signal to the exit.
    pub fn exit_budget(&self) -> Duration {
        self.budget().total() + self.unload_max() + SHUTDOWN_MAX
    }
}

/// Longest wait for connections to close once everything is unloaded.
pub const SHUTDOWN_MAX: Duration = Duration::from_secs(2);

/// The harness of external engines.
pub(crate) const PROCESS_HARNESS: &str = "process";

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

/// A command that a restart may run once everything is unloaded; its failure does not stop the restart.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UpgradeOptions {
    /// The program and its arguments; no shell reads them.
    pub argv: Vec<String>,
    /// Longest time it may take, in seconds; past it, it is killed with everything that it started.
    pub timeout_s: f64,
}

impl Default for UpgradeOptions {
    fn default() -> Self {
        UpgradeOptions { argv: Vec::new(), timeout_s: 600.0 }
    }
}

impl UpgradeOptions {
    /// Returns the longest time it may take.
    pub fn timeout(&self) -> Duration {
        seconds(self.timeout_s)
    }
}

/// How requests are scheduled.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerOptions {
    /// Most sequences in a batch.
    pub max_running: usize,
    /// Most requests in a model's queue.
    pub max_waiting: usize,
    /// Longest wait in the queue, in milliseconds.
    pub max_wait_ms: u64,
    /// Longest time from a request's arrival to its end, in seconds; what takes longer fails.
    pub max_request_s: u64,
    /// Most prompt tokens in one step, beside the decodes.
    pub prefill_tokens: usize,
    /// Tokens a request may generate when it names no limit; the context bounds it too. 0: the context alone.
    pub default_max_tokens: u32,
    /// Most choices of one request.
    pub max_choices: usize,
    /// Whether the KV of prompts and answers is kept, while nobody needs its room, and found again by its tokens.
    pub prefix_cache: bool,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        SchedulerOptions {
            max_running: 8,
            max_waiting: 256,
            max_wait_ms: 120_000,
            max_request_s: 3_600,
            prefill_tokens: 256,
            default_max_tokens: 0,
            max_choices: 8,
            prefix_cache: true,
        }
    }
}

/// KV that outlives its model: after the next load, and after a restart where there is a folder, what was computed of
/// prompts is found again. Only engines of equal model, settings and build read each other's.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KvStoreOptions {
    /// Most memory for the KV of models that are unloaded, in MiB; 0: none is kept.
    pub ram_mib: usize,
    /// A folder in which KV outlives the process. Who can read it can learn what was asked; it is made for this
    /// worker's user alone. Absent: none.
    pub folder: Option<PathBuf>,
    /// Most bytes in that folder, in MiB.
    pub disk_mib: usize,
    /// KV that was not used for this long is removed, in hours.
    pub age_max_h: f64,
    /// Longest time that keeping takes of an unload, and writing of an exit, in seconds; both count in
    /// `drain.unload_max_s`.
    pub keep_max_s: f64,
}

impl Default for KvStoreOptions {
    fn default() -> Self {
        KvStoreOptions { ram_mib: 512, folder: None, disk_mib: 10_240, age_max_h: 24.0, keep_max_s: 10.0 }
    }
}

impl KvStoreOptions {
    /// Returns the longest time that keeping takes.
    pub fn keep_max(&self) -> Duration {
        seconds(self.keep_max_s)
    }

    /// Returns what there is on disk, if anything.
    pub(crate) fn disk(&self) -> Option<kv_store::DiskOptions> {
        let folder = self.folder.clone()?;
        let (bytes_max, age_max) = ((self.disk_mib as u64) << 20, seconds(self.age_max_h * 3600.0));
        Some(kv_store::DiskOptions { folder, bytes_max, age_max })
    }
}

/// The harnesses' own settings.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HarnessOptions {
    /// The in-process engine.
    pub candle: CandleOptions,
    /// The paced oracle engine, for tests; only builds with the feature `fake` know it.
    #[cfg_attr(not(feature = "fake"), serde(skip))]
    pub fake: FakeOptions,
}

/// The in-process engine.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CandleOptions {
    /// Memory for the KV of one model, in MiB.
    pub kv_cache_mib: usize,
    /// Longest context served, prompt and answer together; the model's own bounds it too. 0: the model's own.
    pub max_context_length: usize,
    /// Threads that compute one model on the CPU. 0: one for each core that this process may use. No token depends on it.
    pub threads: usize,
    /// How keys and values are rounded on the CPU. Workers whose streams may follow one another exactly need the same.
    pub kv_type: KvType,
    /// The folder for models from a hub, in the layout that huggingface_hub uses. When absent: the environment's
    /// HF_HUB_CACHE, or 'hub' in HF_HOME, or '~/.cache/huggingface/hub'.
    pub hf_cache: Option<PathBuf>,
}

impl Default for CandleOptions {
    fn default() -> Self {
        CandleOptions {
            kv_cache_mib: 1024,
            max_context_length: 0,
            threads: 0,
            kv_type: KvType::default(),
            hf_cache: None,
        }
    }
}

/// How keys and values are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// Half precision: half the memory, and faster over long contexts.
    #[default]
    F16,
    /// As computed.
    F32,
}

/// The fake engine: its next token is a hash of the context.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FakeOptions {
    /// Time a step takes, in milliseconds.
    pub step_ms: u64,
    /// Time that a step with the start of a prompt takes besides, in milliseconds.
    pub prefill_ms: u64,
    /// Time a load takes, in milliseconds.
    pub load_ms: u64,
    /// Loads that fail, as if the network were down, before one succeeds.
    pub failing_loads: u32,
    /// Prompt and answer together, in tokens.
    pub context_length: usize,
    /// The process aborts in a step that begins a prompt with this byte in it; 0: never.
    pub crash_byte: u8,
    /// The engine's thread is lost in a step that begins a prompt with this byte in it; 0: never.
    pub lost_byte: u8,
    /// What a model takes that says nothing of it, in MiB.
    pub memory_mib: usize,
}

impl Default for FakeOptions {
    fn default() -> Self {
        FakeOptions {
            step_ms: 0,
            prefill_ms: 0,
            load_ms: 0,
            failing_loads: 0,
            context_length: 8192,
            crash_byte: 0,
            lost_byte: 0,
            memory_mib: 0,
        }
    }
}

impl Options {
    /// Returns what bounds a life of this node.
    pub fn rules(&self) -> NodeRules {
        NodeRules {
            drain: self.drain.budget(),
            unload_max: self.drain.unload_max(),
            upgrade_max: self.upgrade.values().map(UpgradeOptions::timeout).max().unwrap_or_default(),
            durable: self.node.state_dir.is_some(),
        }
    }

    /// Checks what types can't.
    ///
    /// # Errors
    /// [`UnusableOption`] with the key's path.
    pub fn check(&self) -> Result<(), UnusableOption> {
        let wrong = |key: &str, problem: String| Err(UnusableOption { key: key.into(), problem });
        if let Some(id) = &self.node.id
            && let Err(error) = NodeId::new(id.clone())
        {
            return wrong("node.id", error.to_string());
        }
        self.data.server.check("data.server")?;
        self.control.server.check("control.server")?;
        models::check(self)?;
        let mut spans = vec![
            ("data.load_wait_s".to_string(), self.data.load_wait_s),
            ("drain.handoff_s".to_string(), self.drain.handoff_s),
            ("drain.deadline_s".to_string(), self.drain.deadline_s),
            ("drain.unload_max_s".to_string(), self.drain.unload_max_s),
            ("kv_store.keep_max_s".to_string(), self.kv_store.keep_max_s),
            ("kv_store.age_max_h".to_string(), self.kv_store.age_max_h),
        ];
        for (name, upgrade) in &self.upgrade {
            if upgrade.argv.is_empty() {
                return wrong(&format!("upgrade.{name}.argv"), "must name a program".into());
            }
            spans.push((format!("upgrade.{name}.timeout_s"), upgrade.timeout_s));
        }
        for (key, seconds) in spans {
            if !(0.0..=86_400.0).contains(&seconds) {
                return wrong(&key, format!("must be from 0 to 86400, it is {seconds}"));
            }
        }
        check_bounds(&[
            ("data.body_timeout_ms", self.data.body_timeout_ms, 1, DAY_MS),
            ("data.commit_after_ms", self.data.commit_after_ms, 0, DAY_MS),
            ("drain.settle_max_ms", self.drain.settle_max_ms, 0, DAY_MS),
            ("drain.cut_max_ms", self.drain.cut_max_ms, 0, DAY_MS),
            ("scheduler.max_wait_ms", self.scheduler.max_wait_ms, 0, DAY_MS),
        ])?;
        if let Some(address) = &self.data.advertise {
            check_address(address).map_err(|problem| UnusableOption { key: "data.advertise".into(), problem })?;
        }
        if !(1..=86_400).contains(&self.scheduler.max_request_s) {
            let given = self.scheduler.max_request_s;
            return wrong("scheduler.max_request_s", format!("must be from 1 to 86400, it is {given}"));
        }
        let bounds = [
            ("scheduler.max_running", self.scheduler.max_running, 1, 4096),
            ("scheduler.max_choices", self.scheduler.max_choices, 1, 128),
            ("scheduler.max_waiting", self.scheduler.max_waiting, 0, 1 << 20),
            ("scheduler.prefill_tokens", self.scheduler.prefill_tokens, 1, 1 << 16),
            ("kv_store.ram_mib", self.kv_store.ram_mib, 0, 1 << 24),
            ("kv_store.disk_mib", self.kv_store.disk_mib, 1, 1 << 30),
            ("data.event_queue", self.data.event_queue, 1, 1 << 16),
            ("data.max_body_bytes", self.data.max_body_bytes, 1024, 1 << 30),
            ("harness.fake.context_length", self.harness.fake.context_length, 16, 1 << 20),
            ("harness.fake.memory_mib", self.harness.fake.memory_mib, 0, models::MEMORY_MIB_MAX as u64),
            ("harness.candle.threads", self.harness.candle.threads, 0, 256),
            ("harness.candle.kv_cache_mib", self.harness.candle.kv_cache_mib, 1, 1 << 22),
        ];
        check_bounds(&bounds.map(|(key, value, low, high)| (key, value as u64, low, high)))
    }
}
