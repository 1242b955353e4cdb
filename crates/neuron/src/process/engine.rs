//! The process of an external engine: its start up to health, the watch over it, and its end.

use std::net::{Ipv4Addr, TcpListener};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use service::clock::Clock;
use service::command::{CommandFailure, Lines, Running, stop_signal};
use service::ring::LogRing;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use words::{Code, Error};

use super::memory::resident_bytes;
use super::upstream::{Http, Upstream};
use super::{Plan, Queue};
use crate::harness::LoadFailure;

/// How often a process that starts is asked for its health: a small server is up in less.
const STARTING_POLL: Duration = Duration::from_millis(50);
/// How long one look at its health may take.
const LOOK_MAX: Duration = Duration::from_secs(5);
/// Free ports that are tried when others take them between the choice and the server's bind.
const PORTS_TRIED: usize = 3;
/// How long the last words of a process that has ended are waited for.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// Last lines that are told with a failure, and most bytes of each.
const LINES_TOLD: usize = 5;
const LINE_BYTES_TOLD: usize = 300;

/// What is known of a running engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Watched {
    /// Its last look was a good one.
    pub(crate) healthy: bool,
    /// Memory of its whole process group.
    pub(crate) memory_bytes: u64,
    /// Why it is gone, though nobody asked it to stop.
    pub(crate) lost: Option<Arc<str>>,
}

/// A process that is healthy. Dropping it kills it, and everything that it has started.
#[derive(Debug)]
pub(crate) struct Supervised {
    plan: Plan,
    http: Http,
    clock: Clock,
    running: Running,
    said: Said,
    pid: u32,
    port: u16,
    state: watch::Sender<Watched>,
}

/// An engine that serves.
pub(crate) struct Serving {
    pub(crate) upstream: Upstream,
    /// Ends once nothing of the engine is left.
    pub(crate) thread: std::thread::JoinHandle<()>,
    /// Ends with the thread.
    pub(crate) ended: oneshot::Receiver<()>,
}

/// What one life of the process writes, line by line into its model's log.
#[derive(Debug)]
struct Said {
    log: LogRing,
    source: Arc<str>,
    /// The log's newest line before this life.
    before: u64,
    pump: JoinHandle<()>,
}

impl Drop for Said {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

impl Said {
    fn listen(plan: &Plan, log: &LogRing, clock: Clock, running: &mut Running) -> Self {
        let (log, source) = (log.clone(), Arc::<str>::from(plan.name()));
        let before = *log.watch().borrow();
        let (out, err) = running.outputs();
        let (mut out, mut err) = (Lines::new(out), Lines::new(err));
        let (ring, name) = (log.clone(), source.clone());
        let pump = tokio::spawn(async move {
            let mut line = |text: &str| ring.push(clock.unix_ms(), &name, text);
            while !(out.over && err.over) {
                tokio::select! {
                    read = out.fill() => out.tell(read, &mut line),
                    read = err.fill() => err.tell(read, &mut line),
                }
            }
            out.flush(&mut line);
            err.flush(&mut line);
        });
        Said { log, source, before, pump }
    }

    /// Returns the last lines of a process that has ended.
    async fn last(&mut self) -> String {
        // A grandchild that has left the group may hold the pipes for ever.
        let _ = timeout(LAST_WORDS, &mut self.pump).await;
        let lines = self.log.tail(LINES_TOLD * 4);
        let own =
            |line: &&service::ring::LogLine| line.sequence > self.before && Arc::ptr_eq(&line.source, &self.source);
        let mut lines: Vec<String> =
            lines.iter().rev().filter(own).take(LINES_TOLD).map(|line| cut(&line.text)).collect();
        lines.reverse();
        if lines.is_empty() { "it said nothing".into() } else { format!("its last lines: {}", lines.join(" | ")) }
    }
}

fn cut(line: &str) -> String {
    line.char_indices().take_while(|(at, _)| *at < LINE_BYTES_TOLD).map(|(_, character)| character).collect()
}

/// Finds a free port of 127.0.0.1.
fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Says in words how a process ended by itself.
fn how(running: &Running, ended: std::io::Result<std::process::ExitStatus>, name: &str) -> String {
    running
        .judge(ended)
        .err()
        .map_or_else(|| format!("{name} ended with exit status: 0"), |failure| failure.to_string())
}

/// Starts an engine and waits until it is healthy. `wanted` is told how far that is, in thousandths of its deadline, and
/// may break it off.
///
/// # Errors
/// `InvalidModelFile` when it can't be started at all, `EngineFailed` when it ends before it is healthy or its deadline
/// passes, `Conflict` when it was broken off.
pub(crate) async fn start(
    plan: &Plan,
    http: &Http,
    log: &LogRing,
    clock: Clock,
    mut wanted: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Supervised, LoadFailure> {
    let mut tried = 0;
    loop {
        tried += 1;
        let port = match plan.options.port {
            0 => free_port().map_err(Error::internal)?,
            port => port,
        };
        match begin(plan, http, log, clock, port, &mut wanted).await {
            Ok(supervised) => return Ok(supervised),
            // Somebody was faster: another one may be free.
            Err(Ended { early: true, .. }) if plan.options.port == 0 && tried < PORTS_TRIED && taken(port) => {
                tracing::warn!(model = %plan.id, port, "the port was taken by somebody else; trying another one");
            }
            Err(Ended { error, .. }) => return Err(error.into()),
        }
    }
}

/// Says whether somebody else listens on a port.
fn taken(port: u16) -> bool {
    let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    bound.is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse)
}

/// Why a start came to nothing.
struct Ended {
    error: Error,
    /// The process ended by itself.
    early: bool,
}

async fn begin(
    plan: &Plan,
    http: &Http,
    log: &LogRing,
    clock: Clock,
    port: u16,
    wanted: &mut impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Supervised, Ended> {
    let over = |code, message: String| Ended { error: Error::new(code, message), early: false };
    let order = plan.order(port).map_err(|error| over(Code::InvalidModelFile, error.to_string()))?;
    let mut running = Running::start(&order).map_err(|failure: CommandFailure| {
        let mut ended = over(Code::InvalidModelFile, failure.to_string());
        ended.error = ended.error.at("process.argv");
        ended
    })?;
    running.close_input();
    let Some(pid) = running.id() else {
        return Err(over(Code::EngineFailed, format!("{} has no process id", plan.name())));
    };
    tracing::info!(model = %plan.id, program = plan.name(), pid, port, "engine process started");
    let mut said = Said::listen(plan, log, clock, &mut running);
    let (begun, whole) = (Instant::now(), plan.options.health_deadline());
    let came = {
        let mut end = std::pin::pin!(running.ended());
        loop {
            tokio::select! {
                biased;
                ended = &mut end => break Err(ended),
                healthy = look(http, port, &plan.options.health_path, whole) => if healthy {
                    break Ok(true);
                }
            }
            let permille = begun.elapsed().as_millis() * 1000 / whole.as_millis().max(1);
            if begun.elapsed() >= whole {
                break Ok(false);
            }
            if wanted(permille.min(999) as u32).is_break() {
                return Err(over(Code::Conflict, "the load was cancelled".into()));
            }
        }
    };
    match came {
        Ok(true) => {
            let state = watch::Sender::new(Watched { healthy: true, ..Watched::default() });
            let (plan, http) = (plan.clone(), http.clone());
            Ok(Supervised { plan, http, clock, running, said, pid, port, state })
        }
        Ok(false) => {
            let seconds = whole.as_secs_f64();
            running.signal(rustix::process::Signal::KILL);
            let _ = running.ended().await;
            let last = said.last().await;
            let path = &plan.options.health_path;
            let name = plan.name();
            let message = format!("{name} did not answer 200 at {path} within {seconds} s and was killed; {last}");
            Err(over(Code::EngineFailed, message))
        }
        Err(ended) => {
            let how = how(&running, ended, plan.name());
            let message = format!("{how} before it was healthy; {}", said.last().await);
            Err(Ended { early: true, ..over(Code::EngineFailed, message) })
        }
    }
}

/// Looks whether an engine is healthy; a look that says no takes a moment.
async fn look(http: &Http, port: u16, path: &str, longest: Duration) -> bool {
    if timeout(LOOK_MAX.min(longest), http.is_ok(port, path)).await.unwrap_or(false) {
        return true;
    }
    sleep(STARTING_POLL).await;
    false
}

impl Supervised {
    /// Opens a queue to it, and watches over it on a thread of its own, until the queue is stopped or the engine is lost.
    /// When the thread ends, nothing of the engine is left.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(crate) fn serve(self, runtime: Handle, max_wait: Duration) -> Result<Serving, Error> {
        let queue = Queue::new(self.clock, self.plan.limits(), max_wait);
        let (plan, pid, port, http) = (self.plan.clone(), self.pid, self.port, self.http.clone());
        let upstream = Upstream { plan, queue: queue.clone(), pid, port, watched: self.state.subscribe(), http };
        let thread = std::thread::Builder::new().name(format!("engine {}", self.plan.id));
        let (alive, ended) = oneshot::channel::<()>();
        let thread = thread.spawn(move || {
            let _alive = alive;
            runtime.block_on(self.run(queue));
        });
        Ok(Serving { upstream, thread: thread.map_err(Error::internal)?, ended })
    }

    /// Returns the memory of its whole process group, in bytes. Blocks for a moment.
    pub(crate) fn memory_bytes(&self) -> u64 {
        resident_bytes(self.pid)
    }

    async fn run(mut self, queue: Queue) {
        let mut stopping = queue.stopping();
        let ended = {
            let pid = self.pid;
            let mut end = std::pin::pin!(self.running.ended());
            let mut looks = std::pin::pin!(looks(&self.plan, &self.http, pid, self.port, &self.state, &queue));
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => None,
                ended = &mut end => Some(Err(ended)),
                failures = &mut looks => Some(Ok(failures)),
            }
        };
        let reason = match ended {
            None => return self.stop().await,
            Some(Err(ended)) => format!("{}; {}", how(&self.running, ended, self.plan.name()), self.said.last().await),
            Some(Ok(failures)) => {
                self.running.signal(rustix::process::Signal::KILL);
                let _ = self.running.ended().await;
                let path = &self.plan.options.health_path;
                let name = self.plan.name();
                let last = self.said.last().await;
                format!("{name} was not healthy at {path} {failures} times in a row and was killed; {last}")
            }
        };
        tracing::error!(model = %self.plan.id, pid = self.pid, reason, "engine process lost");
        queue.lost();
        self.state.send_modify(|state| (state.healthy, state.lost) = (false, Some(reason.into())));
    }

    /// Asks it to stop, and kills it when it takes too long.
    async fn stop(mut self) {
        let options = &self.plan.options;
        let (grace, asked) = (options.stop_grace(), Instant::now());
        if let Some(signal) = stop_signal(&options.stop_signal) {
            self.running.signal(signal);
        }
        let in_time = timeout(grace, self.running.ended()).await.is_ok();
        if !in_time {
            self.running.signal(rustix::process::Signal::KILL);
            let _ = self.running.ended().await;
        }
        let _ = self.said.last().await;
        let seconds = asked.elapsed().as_secs_f64();
        tracing::info!(model = %self.plan.id, pid = self.pid, killed = !in_time, seconds, "engine process stopped");
    }
}

/// Looks at an engine from time to time; returns after how many bad looks in a row it is given up.
async fn looks(plan: &Plan, http: &Http, pid: u32, port: u16, state: &watch::Sender<Watched>, queue: &Queue) -> u32 {
    let (every, most) = (plan.options.health_interval(), plan.options.health_failures_max);
    let mut ticks = interval_at(Instant::now(), every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failures = 0;
    loop {
        ticks.tick().await;
        let healthy = timeout(LOOK_MAX, http.is_ok(port, &plan.options.health_path)).await.unwrap_or(false);
        let memory_bytes = tokio::task::spawn_blocking(move || resident_bytes(pid)).await.unwrap_or_default();
        state.send_if_modified(|state| {
            let before = state.clone();
            (state.healthy, state.memory_bytes) = (healthy, memory_bytes);
            *state != before
        });
        failures = if healthy { 0 } else { failures + 1 };
        if healthy {
            queue.healthy();
        } else {
            tracing::warn!(model = %plan.id, pid, failures, "the engine is not healthy");
        }
        if most > 0 && failures >= most {
            return failures;
        }
    }
}
