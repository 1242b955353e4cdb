//! The wiring of one worker, and the order of things: control port, activation, data port, drain, exit.

use std::sync::Arc;
use std::time::Duration;

use hooks::{FunctionHook, HookConfigError};
use hyper_util::service::TowerToHyperService;
use lifecycle::{HookEvent, NodeLife};
use rand::Rng;
use service::exit;
use service::lanes::Lanes;
use service::metrics::{MetricsError, Registry};
use service::notify::Notifier;
use service::server::{Server, ServerMetrics};
use service::signals::Signal;
use service::token::{Token, TokenError, guard};
use service::traces::{Program, TraceError, TraceSettings, Traces};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use words::{Incarnation, NodeId, NodeStatus};

use crate::control::{ControlPlane, router as control_router};
use crate::crumbs::Crumbs;
use crate::data::{DataPlane, Texts, router as data_router};
use crate::fetch::{self, Downloads};
use crate::harness::Harnesses;
use crate::inspect::Inspector;
use crate::kv::StoredKv;
use crate::life::{self, Life, Parts};
use crate::manager::Manager;
use crate::metrics::Families;
use crate::models::{self, Models};
use crate::options::{Options, SHUTDOWN_MAX};
use crate::publisher::Publisher;
use crate::sessions::Sessions;
use crate::state_dir::StateDir;
use crate::stopped::StopTeller;
use crate::streams::Streams;
use crate::turns::Turns;
use service::clock::Clock;
use service::gate::Gate;

/// What a worker takes from its surroundings.
pub struct Surroundings {
    /// The bound control listener.
    pub control: TcpListener,
    /// Signals, real or a test's.
    pub signals: mpsc::Receiver<Signal>,
    /// The service manager.
    pub notifier: Notifier,
    /// Where models come from, as the environment says; the options come first.
    pub hub: hub::Settings,
    /// The name when the options give none.
    pub host_name: String,
    /// Hooks of the program around, which run before those of the configuration.
    pub hooks: Vec<FunctionHook>,
    /// What the environment says of traces.
    pub traces: TraceSettings,
    /// Told the data address once it is bound.
    pub on_data_address: Option<tokio::sync::oneshot::Sender<std::net::SocketAddr>>,
}

/// Why a worker can't start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A listener can't be bound.
    #[error("{what} can't be bound to {address}: {source}")]
    Bind {
        /// Which listener.
        what: &'static str,
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The token is unusable, or missing where one is needed.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The state directory is unusable.
    #[error("the state directory {path} is unusable: {source}")]
    State {
        /// Which folder.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What the life before left can't be read.
    #[error("the record of this worker's intents: {0}")]
    Record(std::io::Error),
    /// The name is no node id.
    #[error("node.id: {0}; set it in the configuration")]
    Name(words::IdError),
    /// Traces are wanted and can't be exported.
    #[error(transparent)]
    Traces(#[from] TraceError),
    /// A metric could not be registered: a fault of ours.
    #[error("metrics: {0}")]
    Metrics(#[from] MetricsError),
    /// A hook can't be run as it is written.
    #[error(transparent)]
    Hooks(#[from] HookConfigError),
    /// A hook of the start failed.
    #[error("{0}")]
    Startup(words::Error),
    /// A required model failed.
    #[error("a required model failed to load: {0}")]
    Required(words::Error),
}

fn first_status(options: &Options, host_name: &str, state_dir: Option<&StateDir>) -> Result<NodeStatus, NodeError> {
    let name = options.node.id.clone().unwrap_or_else(|| host_name.to_string());
    let counter = match state_dir {
        Some(dir) => dir.count_start().map_err(|source| NodeError::State { path: dir.path().into(), source })?,
        None => 0,
    };
    let incarnation = Incarnation { counter, random: rand::rng().random() };
    let status = NodeStatus::new(NodeId::new(name).map_err(NodeError::Name)?, incarnation);
    let crumbs = options.node.state_dir.as_deref().map(Crumbs::collect).unwrap_or_default();
    if !crumbs.is_empty() {
        tracing::warn!(prompts = crumbs.len(), "the life before this one crashed while it ran these");
    }
    // Gateways know from them that a model exists, before it is loaded and while the node is drained.
    let models = models::configured(options);
    Ok(NodeStatus { version: env!("CARGO_PKG_VERSION").into(), crumbs, models, ..status })
}

/// Reads the control token, and refuses a bind outside loopback without one.
///
/// # Errors
/// [`NodeError::Token`].
pub fn guard_control(options: &Options) -> Result<Option<Token>, NodeError> {
    let token = options.control.token_file.as_deref().map(Token::read).transpose()?;
    guard("the control port", options.control.bind, token.as_ref())?;
    Ok(token)
}

/// How often loads are looked at between the heartbeats.
const LOAD_REFRESH: Duration = Duration::from_millis(100);

/// Keeps the published load fresh; ends with its handle.
async fn refresh_loads(models: Models, gate: Gate, publisher: Publisher) {
    let mut every = tokio::time::interval(LOAD_REFRESH);
    loop {
        every.tick().await;
        publisher.load(gate.in_flight(), &models.loads());
    }
}

/// The data port before it is bound: only once activation is over, so that the first request ever served finds the
/// loaded models.
pub(crate) struct DataPort {
    plane: Option<DataPlane>,
    metrics: Option<ServerMetrics>,
    turns: Turns,
    on_address: Option<tokio::sync::oneshot::Sender<std::net::SocketAddr>>,
}

impl DataPort {
    /// Binds it, and lets the gateways know its address.
    ///
    /// # Errors
    /// [`NodeError::Bind`], also when it was bound already.
    pub(crate) async fn open(&mut self, publisher: &Publisher) -> Result<Server, NodeError> {
        let what = "the data port";
        let (Some(plane), Some(metrics)) = (self.plane.take(), self.metrics.take()) else {
            let source = std::io::Error::other("it was bound before");
            return Err(NodeError::Bind { what, address: String::new(), source });
        };
        let options = plane.options.data.clone();
        let bound = |source| NodeError::Bind { what, address: options.bind.to_string(), source };
        let listener = TcpListener::bind(options.bind).await.map_err(bound)?;
        let server = serve(what, listener, &options.server, data_router(Arc::new(plane)), metrics)?;
        let address = server.local_addr();
        let advertised = options.advertise.unwrap_or_else(|| address.to_string());
        publisher.change(|status| status.data_address = advertised);
        self.turns.bound(address.port());
        tracing::info!(%address, "data port open");
        if let Some(told) = self.on_address.take() {
            let _ = told.send(address);
        }
        Ok(server)
    }
}

/// Runs a worker from activation to its exit; returns the exit code.
///
/// # Errors
/// [`NodeError`] when it can't start; by then nothing was served.
pub async fn run(options: Options, mut around: Surroundings) -> Result<u8, NodeError> {
    let clock = Clock::start();
    let token = guard_control(&options)?;
    let taken = |path| StateDir::take(path).map_err(|source| NodeError::State { path: path.into(), source });
    if let Some(hidden) = options.unreachable_data() {
        tracing::warn!("{hidden}: set data.bind or data.advertise");
    }
    let state_dir = options.node.state_dir.as_deref().map(taken).transpose()?;
    let record = state_dir.as_ref().map(StateDir::read_record).transpose().map_err(NodeError::Record)?;
    let first = first_status(&options, &around.host_name, state_dir.as_ref())?;
    let machine = NodeLife::start(first.incarnation, record.unwrap_or_default(), options.rules());
    let registry = Registry::new();
    let families = Families::register(&registry)?;
    let Families { worker: metrics, control: control_metrics, data: data_metrics, .. } = families;
    let program = Program { name: "neuron", version: env!("CARGO_PKG_VERSION"), instance: first.node.as_str() };
    let (traces, exporting) = Traces::start(&around.traces, program, families.traces)?;
    let publisher = Publisher::new(first.clone(), clock);
    let (sessions, gate, streams) = (Sessions::new(clock), Gate::new(), Streams::default());
    let settings = fetch::settings(around.hub, &options.harness.candle);
    let downloads = Downloads::new(settings, clock, metrics.clone());
    let turns = Turns::new(&options, first.node.as_str(), around.hooks, clock, families.hooks)?;
    let (end_max, unload_max) = (turns.longest_end(&options), options.drain.unload_max());
    if end_max > unload_max {
        let message = "hooks of a model's end, and the stop of its engine, may take longer than drain.unload_max_s";
        tracing::warn!(?end_max, ?unload_max, message);
    }
    let kv = StoredKv::open(&options.kv_store, clock);
    let models = Models::new(models::Parts {
        harnesses: Harnesses::new(&options, clock),
        options: Arc::new(options.clone()),
        budget: crate::check::memory_budget(&options),
        clock,
        metrics: metrics.clone(),
        publisher: publisher.clone(),
        streams: streams.clone(),
        downloads: downloads.clone(),
        turns: turns.clone(),
        kv: kv.store(),
    });
    let (intent, budget_s) = (machine.intent(), options.drain.exit_budget().as_secs_f64());
    let version = first.version;
    tracing::info!(node = %first.node, incarnation = %first.incarnation, version, ?intent, budget_s, "worker starting");
    let (life, commands) = life::inbox();
    let options_shared = Arc::new(options.clone());
    let inspector = Inspector {
        clock,
        options: options_shared.clone(),
        publisher: publisher.clone(),
        models: models.clone(),
        sessions: sessions.clone(),
        turns: turns.clone(),
        kv: kv.store(),
        state_dir: state_dir.clone(),
        control: control_metrics.clone(),
        data: data_metrics.clone(),
    };
    let plane = ControlPlane {
        publisher: publisher.clone(),
        sessions: sessions.clone(),
        models: models.clone(),
        streams: streams.clone(),
        turns: turns.clone(),
        inspector,
        life,
        downloads,
        options: options_shared,
        token: token.clone(),
        registry,
        metrics: metrics.clone(),
    };
    let router = control_router(plane);
    let control = serve("the control port", around.control, &options.control.server, router, control_metrics)?;
    tracing::info!(address = %control.local_addr(), "control port open");

    let plane = DataPlane {
        models: models.clone(),
        gate: gate.clone(),
        streams: streams.clone(),
        // The engine has as many threads as there are processors.
        texts: Texts::new(std::thread::available_parallelism().map_or(1, std::num::NonZero::get) / 2),
        stopped: StopTeller::start(turns.clone(), models.clone(), metrics.clone()),
        publisher: publisher.clone(),
        metrics: metrics.clone(),
        traces,
        clock,
        options: options.clone(),
        token,
    };
    let port = DataPort {
        plane: Some(plane),
        metrics: Some(data_metrics),
        turns: turns.clone(),
        on_address: around.on_data_address.take(),
    };
    let refresher = tokio::spawn(refresh_loads(models.clone(), gate.clone(), publisher.clone()));
    let parts = Parts {
        clock,
        gate,
        models,
        publisher,
        sessions,
        streams,
        turns: turns.clone(),
        metrics,
        manager: Manager::new(clock, around.notifier),
        options: Arc::new(options),
        state_dir,
        kv: kv.clone(),
        port,
    };
    let (unload_max, keep_max) = (parts.options.drain.unload_max(), parts.options.kv_store.keep_max());
    let ended = Life::new(machine, parts).run(&mut around.signals, commands).await;
    let hooks_by = ended.as_ref().map_or(clock.now() + unload_max, |ended| ended.hooks_by);
    kv.spill(hooks_by.min(clock.now() + keep_max)).await;
    if tokio::time::timeout_at(clock.instant(hooks_by), turns.of_node(HookEvent::Shutdown)).await.is_err() {
        tracing::warn!("the hooks of the shutdown took too long and were ended");
    }
    let ended = ended?;
    let last = tokio::time::Instant::now() + SHUTDOWN_MAX;
    let mut cut_connections = 0;
    if let Some(data) = ended.data {
        cut_connections = data.stop(last).await.cut;
    }
    refresher.abort();
    let soon = tokio::time::Instant::now() + CONTROL_STOP_MAX.min(SHUTDOWN_MAX);
    tokio::join!(control.stop(soon), exporting.close(last.max(soon)));
    tracing::info!(streams_cut = ended.cut, cut_connections, "worker stopped");
    // Disarmed last: whatever was wedged above, the process has ended by then.
    drop(ended.deadman);
    Ok(if ended.cut || cut_connections > 0 { exit::CUT } else { exit::CLEAN })
}

/// Attach streams never end by themselves; gateways have read the last status by then.
const CONTROL_STOP_MAX: Duration = Duration::from_millis(100);

fn serve(
    what: &'static str,
    listener: TcpListener,
    options: &service::server::ServerOptions,
    router: axum::Router,
    metrics: ServerMetrics,
) -> Result<Server, NodeError> {
    let unusable = |source| NodeError::Bind { what, address: "its listener".into(), source };
    let service = TowerToHyperService::new(router);
    Server::start(&Lanes::here(), listener, options, |_| service.clone(), metrics).map_err(unusable)
}
