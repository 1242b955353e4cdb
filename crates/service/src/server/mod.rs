//! The accept loop and the connection set, owned here so that an exit has a deadline.
//!
//! Phases: *open*; *closing*, in which each response ends its connection and idle ones close, but new
//! connections are still accepted, so that handlers can refuse with words (and which can be undone); *stopping*, in which nothing is
//! accepted, silent and idle connections are dropped and busy ones have until the deadline.

mod connection;
mod track;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use prometheus::{IntCounter, IntGauge};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::addresses::Addresses;
use crate::config::{DAY_MS, UnusableOption, check_bounds};
use crate::lanes::Lanes;
use crate::metrics::{MetricsError, Registry};

/// Limits and timeouts of one listener.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServerOptions {
    /// Connections at once; further ones wait in the system's backlog, and those without a request are closed after
    /// a second as long as that is so.
    pub max_connections: usize,
    /// Connections at once from one address (IPv6: from one /64); further ones are closed at once. 0 for no bound.
    /// Behind a proxy all clients have the proxy's address.
    pub max_connections_per_address: usize,
    /// A connection must send its first byte within this, in milliseconds.
    pub sniff_timeout_ms: u64,
    /// A request's headers must arrive within this, in milliseconds.
    pub header_timeout_ms: u64,
    /// A connection without a request is closed after this, in milliseconds.
    pub idle_timeout_ms: u64,
    /// A client that takes nothing of its answer for this long is cut off, in milliseconds.
    pub write_stall_ms: u64,
    /// What the system may hold of one connection's answers, in bytes, before their client has taken them. More is of use
    /// to fast clients far away alone: 256 KiB allow 2.5 MB a second over 100 ms.
    pub send_buffer_bytes: usize,
    /// Most bytes of a request's headers; at least 8192.
    pub max_header_bytes: usize,
    /// Requests at once on one HTTP/2 connection.
    pub h2_max_streams: u32,
    /// An HTTP/2 peer is asked for a sign of life this often, in milliseconds.
    pub h2_keepalive_interval_ms: u64,
    /// An HTTP/2 peer that gives none within this is gone, in milliseconds.
    pub h2_keepalive_timeout_ms: u64,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            max_connections: 4096,
            max_connections_per_address: 0,
            sniff_timeout_ms: 10_000,
            header_timeout_ms: 10_000,
            idle_timeout_ms: 75_000,
            write_stall_ms: 60_000,
            send_buffer_bytes: 256 << 10,
            max_header_bytes: 64 << 10,
            h2_max_streams: 1024,
            h2_keepalive_interval_ms: 20_000,
            h2_keepalive_timeout_ms: 10_000,
        }
    }
}

impl ServerOptions {
    /// Checks what types can't; `table` is where the options are.
    ///
    /// # Errors
    /// [`UnusableOption`] with the key's path.
    pub fn check(&self, table: &str) -> Result<(), UnusableOption> {
        let bounds = [
            ("max_connections", self.max_connections as u64, 1, 1 << 20),
            ("max_connections_per_address", self.max_connections_per_address as u64, 0, 1 << 20),
            ("sniff_timeout_ms", self.sniff_timeout_ms, 1, DAY_MS),
            ("header_timeout_ms", self.header_timeout_ms, 1, DAY_MS),
            ("idle_timeout_ms", self.idle_timeout_ms, 1, DAY_MS),
            ("write_stall_ms", self.write_stall_ms, 1, DAY_MS),
            ("send_buffer_bytes", self.send_buffer_bytes as u64, 4096, 1 << 30),
            ("max_header_bytes", self.max_header_bytes as u64, 8192, 1 << 20),
            ("h2_max_streams", u64::from(self.h2_max_streams), 1, 1 << 20),
            ("h2_keepalive_interval_ms", self.h2_keepalive_interval_ms, 1, DAY_MS),
            ("h2_keepalive_timeout_ms", self.h2_keepalive_timeout_ms, 1, DAY_MS),
        ];
        check_bounds(&bounds).map_err(|error| UnusableOption { key: format!("{table}.{}", error.key), ..error })
    }
}

/// What Prometheus sees of one listener.
#[derive(Clone, Debug)]
pub struct ServerMetrics {
    connections: IntGauge,
    accepted: IntCounter,
    refused: IntCounter,
    limited: IntCounter,
    stalled: IntCounter,
    in_flight: IntGauge,
}

impl ServerMetrics {
    /// Registers the listener's metrics under `prefix`.
    ///
    /// # Errors
    /// When the names are taken.
    pub fn register(registry: &Registry, prefix: &str) -> Result<Self, MetricsError> {
        let gauge = |name: &str, help: &str| {
            registry
                .gauge_vec(&format!("{prefix}_{name}"), help, &[])
                .map(|family| family.with_label_values::<&str>(&[]))
        };
        let counter = |name: &str, help: &str| {
            let family = registry.counter_vec(&format!("{prefix}_{name}"), help, &[]);
            family.map(|family| family.with_label_values::<&str>(&[]))
        };
        Ok(ServerMetrics {
            connections: gauge("connections", "Open connections.")?,
            accepted: counter("connections_accepted_total", "Connections accepted.")?,
            refused: counter("accept_errors_total", "Connections that the system could not hand over.")?,
            limited: counter(
                "connections_limited_total",
                "Connections closed at once, for their address had too many.",
            )?,
            stalled: counter("stalled_clients_total", "Clients cut off, for they took nothing of their answer.")?,
            in_flight: gauge("requests_in_flight", "Requests whose response has not ended.")?,
        })
    }

    /// Returns the open connections.
    pub fn open(&self) -> usize {
        self.connections.get().max(0) as usize
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Open,
    Closing,
    Stopping,
    Cut,
}

/// Where a request comes from; every request has it among its extensions.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

struct Shared {
    options: ServerOptions,
    metrics: ServerMetrics,
    addresses: Addresses,
    /// Every place is taken and somebody may wait.
    crowded: watch::Sender<bool>,
    phase: watch::Sender<Phase>,
    connections: watch::Sender<usize>,
}

/// How a stop went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StopReport {
    /// Connections that were still busy at the deadline.
    pub cut: usize,
}

/// One listener with its connections.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    accept: JoinHandle<()>,
    /// The connections end with their threads.
    _lanes: Lanes,
}

/// A connection's place in the count.
struct Place(Arc<Shared>);

impl Place {
    fn take(shared: &Arc<Shared>) -> Self {
        shared.connections.send_modify(|count| *count += 1);
        shared.metrics.connections.inc();
        Place(shared.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.send_modify(|count| *count -= 1);
        self.0.metrics.connections.dec();
    }
}

impl Server {
    /// Starts serving on `listener`: each connection in one of the `lanes`, by what `service` makes for that lane.
    ///
    /// # Errors
    /// When the listener has no address.
    pub fn start<S, B>(
        lanes: &Lanes,
        listener: TcpListener,
        options: &ServerOptions,
        service: impl Fn(usize) -> S,
        metrics: ServerMetrics,
    ) -> std::io::Result<Server>
    where
        S: hyper::service::Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            options: options.clone(),
            metrics,
            addresses: Addresses::new(options.max_connections_per_address),
            crowded: watch::Sender::new(false),
            phase: watch::Sender::new(Phase::Open),
            connections: watch::Sender::new(0),
        });
        let services = (0..lanes.count()).map(service).collect();
        let accept = tokio::spawn(accept_loop(listener, shared.clone(), lanes.clone(), services));
        Ok(Server { address, shared, accept, _lanes: lanes.clone() })
    }

    /// Returns the bound address.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Returns the open connections.
    pub fn connections(&self) -> usize {
        *self.shared.connections.borrow()
    }

    /// Begins the closing phase: each response ends its connection, idle connections close, new ones still come in.
    pub fn begin_close(&self) {
        self.shared
            .phase
            .send_if_modified(|phase| std::mem::replace(phase, Phase::Closing.max(*phase)) < Phase::Closing);
    }

    /// Undoes the closing phase: connections made from now on stay open between requests.
    pub fn reopen(&self) {
        self.shared.phase.send_if_modified(|phase| {
            let closing = *phase == Phase::Closing;
            if closing {
                *phase = Phase::Open;
            }
            closing
        });
    }

    /// Stops accepting, drops what is idle or silent, waits for what is busy until `deadline`, then cuts it.
    /// Never waits past the deadline.
    pub async fn stop(self, deadline: tokio::time::Instant) -> StopReport {
        self.shared.phase.send_replace(Phase::Stopping);
        self.accept.abort();
        let mut connections = self.shared.connections.subscribe();
        let empty = async {
            let _ = connections.wait_for(|count| *count == 0).await;
        };
        let in_time = tokio::time::timeout_at(deadline, empty).await.is_ok();
        let cut = if in_time { 0 } else { self.connections() };
        self.shared.phase.send_replace(Phase::Cut);
        if cut > 0 {
            tracing::info!(cut, address = %self.address, "connections were cut at the deadline");
        }
        StopReport { cut }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accept.abort();
        self.shared.phase.send_replace(Phase::Cut);
    }
}

/// Pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// After so long without a new connection nobody waits in the backlog.
const CROWD_GONE: Duration = Duration::from_secs(1);

async fn accept_loop<S, B>(listener: TcpListener, shared: Arc<Shared>, lanes: Lanes, services: Vec<S>)
where
    S: hyper::service::Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let room = Arc::new(Semaphore::new(shared.options.max_connections));
    loop {
        let is_crowded = *shared.crowded.borrow();
        let patience = if is_crowded { CROWD_GONE } else { Duration::MAX };
        let Ok(accepted) = tokio::time::timeout(patience, listener.accept()).await else {
            shared.crowded.send_replace(false);
            continue;
        };
        let (stream, address): (TcpStream, SocketAddr) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                shared.metrics.refused.inc();
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        shared.metrics.accepted.inc();
        // Without it a small event waits for the acknowledgement of the one before: 40 ms.
        let held = rustix::net::sockopt::set_socket_send_buffer_size(&stream, shared.options.send_buffer_bytes);
        if stream.set_nodelay(true).is_err() || held.is_err() {
            continue;
        }
        let Some(guard) = shared.addresses.enter(address.ip()) else {
            shared.metrics.limited.inc();
            continue;
        };
        let permit = match room.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                shared.crowded.send_if_modified(|crowded| !std::mem::replace(crowded, true));
                let Ok(permit) = room.clone().acquire_owned().await else { return };
                permit
            }
        };
        // Its lane watches it from now on, and not the loop that accepted it.
        let Ok(stream) = stream.into_std() else { continue };
        let (place, seat) = (Place::take(&shared), lanes.seat());
        let (shared, service) = (shared.clone(), services[seat.lane].clone());
        lanes.spawn(seat, async move {
            if let Ok(stream) = TcpStream::from_std(stream) {
                connection::serve(stream, Peer(address.ip()), shared, service).await;
            }
            drop((place, guard, permit));
        });
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
