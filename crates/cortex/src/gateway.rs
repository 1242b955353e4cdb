//! The wiring of one gateway, and the order of things: admin port, fleet, API port, drain, exit.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use fleet::{Quarantine, RetryBudget, Slot};
use http::{Response, StatusCode};
use hyper::service::service_fn;
use hyper_util::service::TowerToHyperService;
use lifecycle::{Drain, DrainFacts, DrainStep};
use rand::Rng;
use service::addresses::Addresses;
use service::clock::Clock;
use service::gate::Gate;
use service::lanes::Lanes;
use service::metrics::{MetricsError, Registry};
use service::notify::Notifier;
use service::server::Server;
use service::signals::Signal;
use service::supervision::Supervision;
use service::token::{Token, TokenError, guard};
use service::traces::{Program, TraceError, TraceSettings, Traces};
use service::{deadman, exit};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use words::GatewayId;

use crate::admin::{Admin, router};
use crate::attach::Attach;
use crate::fleet_task::{self, Fleet};
use crate::front::Front;
use crate::metrics::{Families, Metrics};
use crate::options::{Options, SHUTDOWN_MAX};
use crate::proxy::{BoxBody, Flights, Proxy, Upstream, full};
use crate::rollout;

/// What a gateway takes from its surroundings.
pub struct Surroundings {
    /// The bound admin listener.
    pub admin: TcpListener,
    /// The bound API listener; it accepts nothing before the gateway is ready.
    pub api: TcpListener,
    /// Where the API's connections run.
    pub lanes: Lanes,
    /// Signals, real or a test's.
    pub signals: mpsc::Receiver<Signal>,
    /// The service manager.
    pub notifier: Notifier,
    /// What the environment says of traces.
    pub traces: TraceSettings,
}

/// Why a gateway can't start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// A listener can't be used.
    #[error("{what} can't be bound to {address}: {source}")]
    Bind {
        /// Which listener.
        what: &'static str,
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The threads of the API can't be started.
    #[error("the threads that serve the API: {0}")]
    Threads(std::io::Error),
    /// The token is unusable.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The gateway's name is none.
    #[error("fleet.gateway_id: {0}")]
    Name(#[from] words::IdError),
    /// The client for canaries can't be made.
    #[error("rollouts: {0}")]
    Rollouts(#[from] reqwest::Error),
    /// Traces are wanted and can't be exported.
    #[error(transparent)]
    Traces(#[from] TraceError),
    /// A metric could not be registered: a fault of ours.
    #[error("metrics: {0}")]
    Metrics(#[from] MetricsError),
}

/// Whether load balancers should send requests here.
#[derive(Clone, Debug)]
pub(crate) struct Readiness {
    state: Arc<watch::Sender<&'static str>>,
}

const READY: &str = "ready";

impl Readiness {
    fn new() -> Self {
        Readiness { state: Arc::new(watch::Sender::new("waiting for the fleet")) }
    }

    fn set(&self, state: &'static str) {
        self.state.send_replace(state);
    }

    pub(crate) fn is_ready(&self) -> bool {
        *self.state.borrow() == READY
    }

    pub(crate) fn probe(&self) -> (StatusCode, String) {
        let state = *self.state.borrow();
        let code = if state == READY { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        (code, format!("{state}\n"))
    }

    pub(crate) fn response(&self) -> Response<BoxBody> {
        let (code, text) = self.probe();
        let mut response = Response::new(full(text));
        *response.status_mut() = code;
        response
    }
}

/// How often the service manager hears what this gateway does.
const TICK: Duration = Duration::from_millis(500);

/// What the service manager is told of.
struct Watched {
    /// Requests that run, and tokens passed on.
    supervision: Supervision<(usize, u64)>,
    clock: Clock,
    fleet: Fleet,
    gate: Gate,
    metrics: Metrics,
}

impl Watched {
    fn look(&mut self) {
        let running = self.gate.in_flight();
        let (mut known, mut routable) = (0, 0);
        for (_, node) in self.fleet.view().nodes() {
            known += 1;
            routable += usize::from(node.routable(self.clock.now()).is_some());
        }
        let text = match (self.supervision.is_stopping(), self.supervision.was_ready()) {
            (true, _) => format!("draining: {running} requests left"),
            (false, true) => format!("serving; {routable} of {known} workers are routable"),
            (false, false) => "waiting for the fleet".into(),
        };
        self.supervision.look(self.clock.now(), (running, self.metrics.tokens_total()), text);
    }

    /// Waits for `event`, and tells meanwhile how things are. Safe to cancel where `event` is.
    async fn until<T>(&mut self, event: impl Future<Output = T>) -> T {
        tokio::pin!(event);
        let every = self.supervision.look_every().map_or(TICK, |every| TICK.min(every));
        loop {
            self.look();
            if let Ok(done) = tokio::time::timeout(every, &mut event).await {
                return done;
            }
        }
    }
}

/// Runs a gateway to its exit; returns the exit code.
///
/// # Errors
/// [`GatewayError`] when it can't start; by then nothing was served.
pub async fn run(options: Options, mut around: Surroundings) -> Result<u8, GatewayError> {
    let clock = Clock::start();
    let token = options.fleet.token_file.as_deref().map(Token::read).transpose()?;
    let drawn = || format!("cortex-{:016x}", rand::rng().random::<u64>());
    let gateway = GatewayId::new(options.fleet.gateway_id.clone().unwrap_or_else(drawn))?;
    let registry = Registry::new();
    let families = Families::register(&registry)?;
    let program = Program { name: "cortex", version: env!("CARGO_PKG_VERSION"), instance: gateway.as_str() };
    let (traces, exporting) = Traces::start(&around.traces, program, families.traces)?;
    let metrics = families.gateway;
    metrics.info.with_label_values(&[gateway.as_str(), env!("CARGO_PKG_VERSION")]).set(1);
    let addresses: Vec<String> = options.neurons.iter().map(|neuron| neuron.control.clone()).collect();
    let quarantine = Arc::new(Mutex::new(Quarantine::default()));
    let (fleet, reports) = fleet_task::spawn(&addresses, clock, metrics.clone(), quarantine.clone());
    let readiness = Readiness::new();
    let flights = Flights::default();
    let admin = Admin {
        fleet: fleet.clone(),
        flights: flights.clone(),
        registry,
        readiness: readiness.clone(),
        clock,
        gateway: gateway.clone(),
        token: token.clone(),
    };
    let rollouts =
        rollout::Surroundings { fleet: &fleet, clock, gateway: &gateway, token: &token, metrics: families.rollouts };
    let (rollout_routes, rollouts) = rollout::start(options.rollout.store.as_deref(), rollouts)?;
    let service = TowerToHyperService::new(router(Arc::new(admin)).merge(rollout_routes));
    let admin = Server::start(&Lanes::here(), around.admin, &options.admin.server, |_| service.clone(), families.admin);
    let admin = admin.map_err(|source| GatewayError::Bind {
        what: "the admin port",
        address: options.admin.bind.to_string(),
        source,
    })?;
    tracing::info!(address = %admin.local_addr(), %gateway, neurons = addresses.len(), "gateway starting");
    let mut attached = tokio::task::JoinSet::new();
    for (slot, control_address) in addresses.into_iter().enumerate() {
        let attach = Attach {
            slot: Slot(slot),
            control_address,
            gateway: gateway.clone(),
            token: token.clone(),
            poll: Duration::from_millis(options.fleet.poll_ms.max(100)),
            reports: reports.clone(),
            metrics: metrics.clone(),
        };
        attached.spawn(attach.run());
    }
    drop(reports);
    let gate = Gate::new();
    let mut watched = Watched {
        supervision: Supervision::new(around.notifier),
        clock,
        fleet: fleet.clone(),
        gate: gate.clone(),
        metrics: metrics.clone(),
    };
    watched.look();
    let early = tokio::select! {
        () = fleet_heard(&fleet, Duration::from_millis(options.fleet.ready_after_ms)) => None,
        signal = around.signals.recv() => Some(signal),
    };
    if early.is_some() {
        return Ok(exit::CLEAN);
    }
    let (cut, cut_watch) = watch::channel(false);
    let addresses = Addresses::new(options.api.max_requests_per_address);
    let budget = RetryBudget::new(clock.now(), options.proxy.retry_ratio, options.proxy.retry_floor_per_second);
    let (budget, options) = (Arc::new(Mutex::new(budget)), Arc::new(options));
    let lanes = around.lanes;
    let service = |_| {
        let idle = options.proxy.idle_connections.div_ceil(lanes.count());
        let proxy = Proxy {
            fleet: fleet.clone(),
            upstream: Upstream::new(Duration::from_millis(options.proxy.connect_timeout_ms), idle),
            metrics: metrics.clone(),
            traces: traces.clone(),
            clock,
            options: options.clone(),
            gateway: gateway.clone(),
            budget: budget.clone(),
            quarantine: quarantine.clone(),
            flights: flights.clone(),
            cut: cut_watch.clone(),
        };
        let front = Arc::new(Front {
            proxy: Arc::new(proxy),
            gate: gate.clone(),
            readiness: readiness.clone(),
            addresses: addresses.clone(),
        });
        // Boxed: it would be moved several times for each request, and each connection would keep room for it.
        service_fn(move |request| Box::pin(front.clone().handle(request)))
    };
    let api = Server::start(&lanes, around.api, &options.api.server, service, families.api)
        .map_err(|source| GatewayError::Bind { what: "the API port", address: options.api.bind.to_string(), source })?;
    readiness.set(READY);
    watched.supervision.ready();
    tracing::info!(address = %api.local_addr(), "API port open");

    let signal = watched.until(around.signals.recv()).await;
    let total = options.drain.exit_budget();
    // Armed before anything is logged: the log may be what is stuck. One that can't be armed is no reason to stay; the
    // service manager has its own.
    let _deadman = deadman::arm(total + SHUTDOWN_MAX * 2, exit::WEDGED).ok();
    watched.supervision.stopping();
    tracing::info!(?signal, budget_s = total.as_secs_f64(), "leaving");
    readiness.set("draining");
    // Another gateway coordinates from now on; this one's streams go on meanwhile.
    let stop_rollouts = async {
        if let Some(rollouts) = rollouts {
            rollouts.stop().await
        }
    };
    let drain = drain(&options, clock, &gate, &api, &mut around.signals, &mut watched, &cut);
    let (cut, ()) = tokio::join!(drain, stop_rollouts);
    let report = api.stop(tokio::time::Instant::now() + SHUTDOWN_MAX).await;
    attached.shutdown().await;
    let last = tokio::time::Instant::now() + SHUTDOWN_MAX;
    tokio::join!(admin.stop(last), exporting.close(last));
    tracing::info!(cut, cut_connections = report.cut, "gateway stopped");
    Ok(if cut + report.cut > 0 { exit::CUT } else { exit::CLEAN })
}

/// Waits until every configured worker was heard from, or `patience` is over.
async fn fleet_heard(fleet: &Fleet, patience: Duration) {
    let mut view = fleet.watch();
    let all = view.wait_for(|view| view.all_heard());
    if tokio::time::timeout(patience, all).await.is_err() {
        let view = fleet.view();
        let silent = view.nodes().filter(|(_, node)| node.status.is_none());
        let silent = silent.map(|(_, node)| node.control_address.as_str()).collect::<Vec<_>>().join(", ");
        tracing::warn!(silent, "not every worker was heard from; serving with those that were");
    }
}

/// Drains by the same machine as a worker; returns how many streams were cut.
async fn drain(
    options: &Options,
    clock: Clock,
    gate: &Gate,
    api: &Server,
    signals: &mut mpsc::Receiver<Signal>,
    watched: &mut Watched,
    cut_streams: &watch::Sender<bool>,
) -> usize {
    let mut drain = Drain::begin(clock.now(), options.drain.budget());
    let mut in_flight = gate.watch();
    let (mut forced, mut cut) = (false, 0);
    loop {
        let running = in_flight.borrow_and_update().in_flight;
        // Load balancers acknowledge nothing, so settle takes its whole time.
        let facts = DrainFacts { in_flight: running, unaware_gateways: 1, forced };
        match drain.advance(clock.now(), facts) {
            Some(DrainStep::Close) => {
                tracing::info!(running, "closed: new requests are refused");
                gate.close();
                api.begin_close();
            }
            Some(DrainStep::Cut) => {
                tracing::warn!(running, "the drain's deadline has come: cutting what still runs");
                cut = running;
                cut_streams.send_replace(true);
            }
            // No budget of a gateway has a hand-over.
            Some(DrainStep::HandOver) => {}
            Some(DrainStep::Finish) => return cut,
            None => {
                let wake = tokio::time::sleep_until(clock.instant(drain.wake_at()));
                tokio::select! {
                    _ = in_flight.changed() => {}
                    () = watched.until(wake) => {}
                    Some(_) = signals.recv() => forced = true,
                }
            }
        }
    }
}

/// Refuses to bind the admin port outside loopback without a token: it takes orders for the whole fleet.
pub(crate) fn guard_admin(options: &Options) -> Result<(), GatewayError> {
    let token = options.fleet.token_file.as_deref().map(Token::read).transpose()?;
    Ok(guard("the admin port", options.admin.bind, token.as_ref())?)
}
