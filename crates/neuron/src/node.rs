//! The wiring of one worker, and the order of things: control port, activation, data port, drain, exit.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::service::TowerToHyperService;
use rand::Rng;
use service::metrics::{MetricsError, Registry};
use service::notify::Notifier;
use service::server::{Server, ServerMetrics};
use service::signals::Signal;
use service::token::{Token, TokenError, guard};
use service::{deadman, exit};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use words::{Incarnation, NodeId, NodeState, NodeStatus};

use crate::activation;
use crate::control::{ControlPlane, Sessions, router as control_router};
use crate::crumbs::Crumbs;
use crate::data::{DataPlane, router as data_router};
use crate::exit::Leaving;
use crate::harness::Harnesses;
use crate::metrics::Metrics;
use crate::models::Models;
use crate::options::{Options, SHUTDOWN_MAX};
use crate::publisher::Publisher;
use crate::streams::Streams;
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
    /// The name when the options give none.
    pub host_name: String,
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
    /// The name is no node id.
    #[error("node.id: {0}; set it in the configuration")]
    Name(words::IdError),
    /// A metric could not be registered: a fault of ours.
    #[error("metrics: {0}")]
    Metrics(#[from] MetricsError),
    /// A required model failed.
    #[error("a required model failed to load: {0}")]
    Required(words::Error),
}

/// Counts this start in the state directory: a file that is replaced whole.
fn count_start(state_dir: &Path) -> std::io::Result<u64> {
    std::fs::create_dir_all(state_dir)?;
    let path = state_dir.join("starts");
    let before = match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse::<u64>().map_err(|_| {
            std::io::Error::other(format!("{} holds no number; remove it to start counting anew", path.display()))
        })?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let count = before + 1;
    let fresh = state_dir.join("starts.new");
    let mut file = std::fs::File::create(&fresh)?;
    writeln!(file, "{count}")?;
    file.sync_all()?;
    std::fs::rename(&fresh, &path)?;
    std::fs::File::open(state_dir)?.sync_all()?;
    Ok(count)
}

fn first_status(options: &Options, host_name: &str) -> Result<NodeStatus, NodeError> {
    let name = options.node.id.clone().unwrap_or_else(|| host_name.to_string());
    let counter = match &options.node.state_dir {
        Some(path) => count_start(path).map_err(|source| NodeError::State { path: path.clone(), source })?,
        None => 0,
    };
    let incarnation = Incarnation { counter, random: rand::rng().random() };
    let status = NodeStatus::new(NodeId::new(name).map_err(NodeError::Name)?, incarnation);
    let crumbs = options.node.state_dir.as_deref().map(Crumbs::collect).unwrap_or_default();
    if !crumbs.is_empty() {
        tracing::warn!(prompts = crumbs.len(), "the life before this one crashed while it ran these");
    }
    Ok(NodeStatus { version: env!("CARGO_PKG_VERSION").into(), crumbs, ..status })
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

/// Runs a worker from activation to its exit; returns the exit code.
///
/// # Errors
/// [`NodeError`] when it can't start; by then nothing was served.
pub async fn run(options: Options, mut around: Surroundings) -> Result<u8, NodeError> {
    let clock = Clock::start();
    let token = guard_control(&options)?;
    let publisher = Publisher::new(first_status(&options, &around.host_name)?);
    let registry = Registry::new();
    let metrics = Metrics::new(&registry)?;
    let (sessions, gate) = (Sessions::default(), Gate::new());
    let streams = Streams::default();
    let models = Models::new(
        Harnesses::new(&options.harness),
        options.scheduler,
        clock,
        metrics.clone(),
        publisher.clone(),
        options.node.state_dir.clone(),
    );
    let first = publisher.snapshot();
    tracing::info!(node = %first.node, incarnation = %first.incarnation, version = first.version, "worker starting");
    let plane = ControlPlane {
        publisher: publisher.clone(),
        sessions: sessions.clone(),
        models: models.clone(),
        options: Arc::new(options.clone()),
        token: token.clone(),
        registry: registry.clone(),
    };
    let control = serve("the control port", around.control, &options.control.server, control_router(plane), {
        ServerMetrics::register(&registry, "neuron_control")?
    })?;
    tracing::info!(address = %control.local_addr(), "control port open");

    let plane = DataPlane {
        models: models.clone(),
        gate: gate.clone(),
        streams: streams.clone(),
        publisher: publisher.clone(),
        metrics,
        clock,
        options: options.clone(),
        token,
    };
    let data_metrics = ServerMetrics::register(&registry, "neuron_data")?;
    let activate = activation::activate(&options.default_models, &models, &publisher);
    // Dropping the activation leaves its running load to the unloading below, which cancels it.
    let signal = tokio::select! {
        result = activate => { result.map_err(NodeError::Required)?; None }
        signal = around.signals.recv() => signal,
    };
    let mut data = None;
    if signal.is_none() {
        let bind = options.data.bind;
        let bound = |source| NodeError::Bind { what: "the data port", address: bind.to_string(), source };
        let listener = TcpListener::bind(bind).await.map_err(bound)?;
        let router = data_router(Arc::new(plane));
        let server = serve("the data port", listener, &options.data.server, router, data_metrics)?;
        let address = server.local_addr();
        let advertised = options.data.advertise.clone().unwrap_or_else(|| address.to_string());
        publisher.change(|status| status.data_address = advertised);
        publisher.node_state(NodeState::Ready);
        tracing::info!(%address, "data port open");
        if let Some(told) = around.on_data_address.take() {
            let _ = told.send(address);
        }
        around.notifier.ready();
        data = Some(server);
    }
    let refresher = tokio::spawn(refresh_loads(models.clone(), gate.clone(), publisher.clone()));
    let signal = match signal {
        Some(signal) => Some(signal),
        None => around.signals.recv().await,
    };
    let budget = options.drain.exit_budget();
    tracing::info!(?signal, budget_s = budget.as_secs_f64(), "leaving");
    // A deadman that can't be armed is no reason to stay; the service manager has its own.
    let _deadman = deadman::arm(budget + SHUTDOWN_MAX, exit::WEDGED).ok();
    around.notifier.stopping();
    let leaving = Leaving {
        clock,
        gate: &gate,
        models: &models,
        publisher: &publisher,
        sessions: &sessions,
        data: data.as_ref(),
        notifier: &around.notifier,
        options: &options.drain,
    };
    let cut = leaving.drain(&mut around.signals).await;
    leaving.unload().await;
    let last = tokio::time::Instant::now() + SHUTDOWN_MAX;
    let mut cut_connections = 0;
    if let Some(data) = data {
        cut_connections = data.stop(last).await.cut;
    }
    refresher.abort();
    control.stop(tokio::time::Instant::now() + CONTROL_STOP_MAX.min(SHUTDOWN_MAX)).await;
    tracing::info!(cut, cut_connections, "worker stopped");
    Ok(if cut + cut_connections > 0 { exit::CUT } else { exit::CLEAN })
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
    Server::start(listener, options, TowerToHyperService::new(router), metrics).map_err(unusable)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn starts_are_counted_across_lives_and_a_damaged_count_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        assert_eq!([count_start(&path).unwrap(), count_start(&path).unwrap()], [1, 2]);
        std::fs::write(path.join("starts"), "many").unwrap();
        assert!(count_start(&path).is_err());
    }
}
