//! One model's engine thread: the only owner of its scheduler and engine.
//!
//! Commands come in through one inbox; events go out through one bounded queue a request. A queue that is full
//! pauses its own sequence; what its last step gave waits here, so nothing is lost and the batch goes on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use inference::engine::{Batch, Engine, EngineError, Outputs};
use inference::{Event, EventKind, Load, RequestKey, Scheduler, Submission};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use words::{Code, Error, Fingerprint, Moment};

use crate::crumbs::Crumbs;
use crate::keeper::Keeper;
use crate::metrics::ModelMetrics;
use crate::process::Queue;
use service::clock::Clock;

/// How often a thread with nothing but paused sequences looks whether a reader has caught up.
const PAUSED_POLL: Duration = Duration::from_millis(5);

/// What a request's owner receives.
#[derive(Debug)]
pub(crate) enum Message {
    /// The scheduler took nothing of it.
    Refused(Error),
    /// The scheduler says.
    Event(EventKind),
}

#[derive(Debug)]
enum Command {
    Submit(Box<Submission>, Fingerprint, mpsc::Sender<Message>),
    Cancel(RequestKey),
    End(RequestKey),
    HandBack,
    FailAll(Code, &'static str),
    Stop,
}

/// What takes commands: an engine's thread, or the queue to an external engine.
#[derive(Clone, Debug)]
enum Inbox {
    Thread(Sender<Command>),
    Queue(Queue),
}

impl Inbox {
    fn send(&self, command: Command) {
        match (self, command) {
            // A thread that is gone has ended everything already.
            (Inbox::Thread(inbox), command) => _ = inbox.send(command),
            (Inbox::Queue(_), Command::Submit(_, _, events)) => {
                let error = Error::internal("an external engine takes requests at its queue alone");
                let _ = events.try_send(Message::Refused(error));
            }
            (Inbox::Queue(queue), Command::Cancel(request)) => queue.cancel(request),
            (Inbox::Queue(queue), Command::End(request)) => queue.end(request),
            (Inbox::Queue(queue), Command::HandBack) => queue.hand_back(),
            (Inbox::Queue(queue), Command::FailAll(code, message)) => queue.fail_all(code, message),
            (Inbox::Queue(queue), Command::Stop) => queue.stop(),
        }
    }
}

/// The way to an engine; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct EngineHandle {
    inbox: Inbox,
    load: watch::Receiver<Load>,
    turns: Arc<AtomicU64>,
    /// When the last step ended, or the thread began: milliseconds of the program's clock.
    stepped: Arc<AtomicU64>,
    /// It was told to end.
    stopped: Arc<AtomicBool>,
}

/// Cancels requests when it is dropped, whoever drops it and why.
#[derive(Debug)]
pub(crate) struct CancelGuard {
    inbox: Inbox,
    requests: Vec<RequestKey>,
}

impl CancelGuard {
    /// Ends the requests properly: their events go on to the end, which comes before the next step.
    pub(crate) fn end(&self) {
        for request in &self.requests {
            self.inbox.send(Command::End(*request));
        }
    }
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        for request in self.requests.drain(..) {
            self.inbox.send(Command::Cancel(request));
        }
    }
}

impl EngineHandle {
    /// Makes the way to an external engine.
    pub(crate) fn of_queue(queue: Queue) -> Self {
        let (load, turns, stepped) = (queue.watch(), queue.turns(), queue.stepped());
        EngineHandle { load, turns, stepped, stopped: Arc::default(), inbox: Inbox::Queue(queue) }
    }

    /// Submits a request, which breadcrumbs know by `name`; its events, or its refusal, come out of the receiver. What
    /// cancels it is [`EngineHandle::guard`].
    pub(crate) fn submit(&self, submission: Submission, name: Fingerprint, queue: usize) -> mpsc::Receiver<Message> {
        let (events, receiver) = mpsc::channel(queue);
        // When the thread is gone the sender is dropped with the command, and the receiver ends.
        self.inbox.send(Command::Submit(Box::new(submission), name, events));
        receiver
    }

    /// Returns what cancels these requests, whether they were submitted or not.
    pub(crate) fn guard(&self, requests: Vec<RequestKey>) -> CancelGuard {
        CancelGuard { inbox: self.inbox.clone(), requests }
    }

    /// Ends a request properly, if it is known here; see [`CancelGuard::end`].
    pub(crate) fn end(&self, request: RequestKey) {
        self.inbox.send(Command::End(request));
    }

    /// Hands queued requests back to their owners as `Draining`.
    pub(crate) fn hand_back(&self) {
        self.inbox.send(Command::HandBack);
    }

    /// Ends every request with `code`.
    pub(crate) fn fail_all(&self, code: Code, message: &'static str) {
        self.inbox.send(Command::FailAll(code, message));
    }

    /// Ends the thread after its running step; what still runs is failed.
    pub(crate) fn stop(&self) {
        // One that was lost before was not told to end.
        self.stopped.fetch_or(self.alive(), Ordering::Release);
        self.inbox.send(Command::Stop);
    }

    /// Says why a request's events ended without an end.
    pub(crate) fn ended(&self) -> Error {
        match self.stopped.load(Ordering::Acquire) {
            true => Error::new(Code::ModelNotHere, "the model was unloaded before it could answer"),
            false => Error::new(Code::EngineFailed, "the model's engine was lost before the answer was complete"),
        }
    }

    /// Returns how many turns the thread has made: one that does not rise is stuck in its step.
    pub(crate) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// Returns when the last step ended, or the thread began.
    pub(crate) fn stepped(&self) -> Moment {
        Moment::after_start(Duration::from_millis(self.stepped.load(Ordering::Relaxed)))
    }

    /// Whether the thread is there.
    pub(crate) fn alive(&self) -> bool {
        self.load.has_changed().is_ok()
    }

    /// Returns a reader of the load.
    pub(crate) fn watch(&self) -> watch::Receiver<Load> {
        self.load.clone()
    }

    /// Returns the load.
    pub(crate) fn load(&self) -> Load {
        *self.load.borrow()
    }
}

struct Outlet {
    name: Fingerprint,
    queue: mpsc::Sender<Message>,
    overflow: VecDeque<Message>,
}

/// What the thread owns from its start.
pub(crate) struct Own {
    pub(crate) scheduler: Scheduler,
    pub(crate) engine: Box<dyn Engine>,
    /// Where KV goes at the thread's end, and comes from.
    pub(crate) keeper: Option<Keeper>,
    pub(crate) crumbs: Crumbs,
    pub(crate) metrics: ModelMetrics,
}

struct EngineLoop {
    own: Own,
    clock: Clock,
    inbox: Receiver<Command>,
    outlets: BTreeMap<RequestKey, Outlet>,
    load: watch::Sender<Load>,
    turns: Arc<AtomicU64>,
    stepped: Arc<AtomicU64>,
}

/// A thread that was started.
pub(crate) struct Started {
    pub(crate) handle: EngineHandle,
    pub(crate) thread: JoinHandle<()>,
    /// Ends with the thread, however that ends.
    pub(crate) ended: oneshot::Receiver<()>,
}

/// Starts the thread.
///
/// # Errors
/// When the system gives no thread.
pub(crate) fn spawn(name: &str, clock: Clock, own: Own) -> Result<Started, Error> {
    let (sender, inbox) = channel();
    let (load, watch) = watch::channel(own.scheduler.load());
    let turns = Arc::new(AtomicU64::new(0));
    let stepped = Arc::new(AtomicU64::new(millis(clock.now())));
    let (outlets, turns_made, steps_made) = (BTreeMap::new(), turns.clone(), stepped.clone());
    let state = EngineLoop { own, clock, inbox, outlets, load, turns: turns_made, stepped: steps_made };
    // Linux shows the first 15 bytes of a thread's name.
    let thread = std::thread::Builder::new().name(format!("engine {name}"));
    let (alive, ended) = oneshot::channel::<()>();
    let thread = thread.spawn(move || {
        let _alive = alive;
        state.run();
    });
    let handle = EngineHandle { inbox: Inbox::Thread(sender), load: watch, turns, stepped, stopped: Arc::default() };
    Ok(Started { handle, thread: thread.map_err(Error::internal)?, ended })
}

pub(crate) fn millis(moment: Moment) -> u64 {
    moment.since(Moment::ZERO).as_millis() as u64
}

enum Turn {
    Go,
    Stop,
}

impl EngineLoop {
    fn run(mut self) {
        let mut events = Vec::new();
        let mut idle = true;
        loop {
            if let Turn::Stop = self.take_commands(idle, &mut events) {
                break;
            }
            self.turns.fetch_add(1, Ordering::Relaxed);
            self.flush_overflow();
            let batch = self.own.scheduler.plan(self.clock.now(), &mut events);
            idle = batch.is_none();
            // Before the step: a long one must not hide what it runs.
            self.publish_load();
            // So that who left the queue knows it before the step, of which a crash may be its doing. A reader that
            // catches up after the plan makes its sequence runnable: then there is nothing to wait for.
            idle &= !self.deliver(&mut events);
            self.lay_crumbs(batch.as_ref());
            if let Some(batch) = batch {
                match guarded_step(self.own.engine.as_mut(), &batch) {
                    Ok(outputs) => self.own.scheduler.complete(&batch, outputs, &mut events),
                    Err(error) => {
                        tracing::error!(%error, rows = batch.rows.len(), "the engine failed a step");
                        self.own.metrics.engine_failures.inc();
                        self.own.scheduler.step_failed(&batch, &mut events);
                    }
                }
                self.stepped.store(millis(self.clock.now()), Ordering::Relaxed);
            }
            idle &= !self.deliver(&mut events);
            self.publish_load();
        }
        self.own.scheduler.fail_all(Code::ModelNotHere, "the model was unloaded", &mut events);
        self.deliver(&mut events);
        self.publish_load();
        if let Some(keeper) = &self.own.keeper {
            keeper.leave(&self.own.scheduler, self.own.engine.as_mut());
        }
    }

    /// Names what the next step runs, so that a crash in it can be laid at the right door.
    fn lay_crumbs(&mut self, batch: Option<&Batch>) {
        if !self.own.crumbs.active() {
            return;
        }
        let rows = batch.into_iter().flat_map(|batch| &batch.rows);
        let owners = rows.filter_map(|row| self.own.scheduler.owner(row.sequence));
        self.own.crumbs.lay(owners.filter_map(|owner| self.outlets.get(&owner)).map(|outlet| outlet.name));
    }

    /// Takes what is in the inbox; waits for a first command when there is nothing to run.
    fn take_commands(&mut self, idle: bool, events: &mut Vec<Event>) -> Turn {
        if idle {
            let first = match self.wait_at_most() {
                Some(limit) => self.inbox.recv_timeout(limit),
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match first {
                Ok(command) => {
                    if let Turn::Stop = self.handle(command, events) {
                        return Turn::Stop;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Turn::Stop,
            }
        }
        while let Ok(command) = self.inbox.try_recv() {
            if let Turn::Stop = self.handle(command, events) {
                return Turn::Stop;
            }
        }
        Turn::Go
    }

    fn wait_at_most(&self) -> Option<Duration> {
        let paused = self.outlets.values().any(|outlet| !outlet.overflow.is_empty()).then_some(PAUSED_POLL);
        let expiry = self.own.scheduler.next_deadline().map(|deadline| self.clock.until(deadline) + PAUSED_POLL);
        paused.into_iter().chain(expiry).min()
    }

    fn handle(&mut self, command: Command, events: &mut Vec<Event>) -> Turn {
        match command {
            Command::Submit(submission, name, queue) => {
                let request = submission.request;
                let Own { scheduler, engine, keeper, .. } = &mut self.own;
                if let Some(keeper) = keeper {
                    keeper.restore(&submission, scheduler, engine.as_mut());
                }
                match self.own.scheduler.submit(self.clock.now(), *submission) {
                    Ok(()) => {
                        self.outlets.insert(request, Outlet { name, queue, overflow: VecDeque::new() });
                    }
                    // The queue is new and empty, so there is room for this one message.
                    Err(error) => drop(queue.try_send(Message::Refused(error))),
                }
            }
            Command::Cancel(request) => {
                self.outlets.remove(&request);
                self.own.scheduler.cancel(request);
            }
            Command::End(request) => drop(self.own.scheduler.stop(request, events)),
            Command::HandBack => self.own.scheduler.hand_back(events),
            Command::FailAll(code, message) => self.own.scheduler.fail_all(code, message, events),
            Command::Stop => return Turn::Stop,
        }
        Turn::Go
    }

    /// Passes events on; `true` when a reader that was behind has caught up.
    fn deliver(&mut self, events: &mut Vec<Event>) -> bool {
        for event in events.drain(..) {
            self.own.metrics.count(&event.kind);
            let over = matches!(event.kind, EventKind::Done(_) | EventKind::Failed(..));
            let Some(outlet) = self.outlets.get_mut(&event.request) else { continue };
            outlet.overflow.push_back(Message::Event(event.kind));
            if over && !push_through(outlet) {
                // The tail waits for its reader; nothing more will come for this request.
                continue;
            }
            if over {
                self.outlets.remove(&event.request);
            }
        }
        self.flush_overflow()
    }

    /// Moves on what waited for its reader; `true` when a reader that was behind has caught up.
    fn flush_overflow(&mut self) -> bool {
        let (scheduler, mut caught_up) = (&mut self.own.scheduler, false);
        self.outlets.retain(|request, outlet| {
            if outlet.queue.is_closed() {
                scheduler.cancel(*request);
                return false;
            }
            let behind = !outlet.overflow.is_empty();
            let through = push_through(outlet);
            caught_up |= behind && through;
            scheduler.set_paused(*request, !through);
            !(through && outlet.queue.is_closed())
        });
        caught_up
    }

    fn publish_load(&self) {
        let load = self.own.scheduler.load();
        self.load.send_if_modified(|known| {
            let before = std::mem::replace(known, load);
            self.own.metrics.count_load(&before, &load);
            before != load
        });
    }
}

/// Runs a step; a panic below fails the batch and not the model, whose other sequences go on.
fn guarded_step(engine: &mut dyn Engine, batch: &Batch) -> Result<Outputs, EngineError> {
    let step = std::panic::AssertUnwindSafe(|| engine.step(batch));
    std::panic::catch_unwind(step).unwrap_or_else(|_| Err(EngineError::Device("the engine panicked".into())))
}

/// Moves what waits into the queue; `false` when the reader is behind. A reader that left takes everything.
fn push_through(outlet: &mut Outlet) -> bool {
    while let Some(message) = outlet.overflow.pop_front() {
        if let Err(TrySendError::Full(message)) = outlet.queue.try_send(message) {
            outlet.overflow.push_front(message);
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use inference::engine::{BlockId, Capabilities};

    use super::*;

    struct Panics;

    impl Engine for Panics {
        fn capabilities(&self) -> Capabilities {
            let (max_batch, max_step_tokens, block_tokens, blocks) = (1, 1, 1, 1);
            Capabilities {
                max_batch,
                max_step_tokens,
                block_tokens,
                blocks,
                context_length: 1,
                vocab_size: 1,
                width: 1,
            }
        }

        fn step(&mut self, _batch: &Batch) -> Result<Outputs, EngineError> {
            panic!("a fault of the arithmetic")
        }

        fn block_bytes(&self) -> usize {
            1
        }

        fn export_block(&mut self, _block: BlockId) -> Result<Vec<u8>, EngineError> {
            Ok(vec![0])
        }

        fn import_block(&mut self, _block: BlockId, _bytes: &[u8]) -> Result<(), EngineError> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_catches_up_after_the_plan_lets_nothing_wait() {
        let model = words::ModelId::new("m").unwrap();
        let limits = inference::Limits {
            max_running: 1,
            max_waiting: 1,
            max_wait: Duration::from_secs(1),
            prefill_tokens: 1,
            max_choices: 1,
            prefix_cache: false,
        };
        let metrics = crate::metrics::Metrics::new(&service::metrics::Registry::new()).unwrap();
        let token_bytes = std::sync::Arc::new(inference::fake_token_bytes());
        let scheduler = Scheduler::new(Panics.capabilities(), limits, token_bytes);
        let (load, inbox) = (watch::Sender::new(scheduler.load()), channel().1);
        let own = Own {
            scheduler,
            engine: Box::new(Panics),
            keeper: None,
            crumbs: Crumbs::begin(None, &model),
            metrics: metrics.model("m"),
        };
        let (clock, turns, stepped) = (Clock::start(), Arc::default(), Arc::default());
        let mut engine = EngineLoop { own, clock, inbox, outlets: BTreeMap::new(), load, turns, stepped };
        let (queue, mut reader) = mpsc::channel(1);
        let (request, name) = (RequestKey(1), Fingerprint::default());
        engine.outlets.insert(request, Outlet { name, queue, overflow: VecDeque::new() });
        let event = || Event { request, kind: EventKind::Started { cached: 0 } };
        assert!(!engine.deliver(&mut vec![event(), event()]), "one of two fits: the reader is behind");
        assert!(!engine.deliver(&mut Vec::new()), "and stays so");
        reader.try_recv().unwrap();
        assert!(engine.deliver(&mut Vec::new()), "its sequence can run again, and nobody else would say so");
    }

    #[test]
    fn a_panic_in_an_engine_is_a_failed_step() {
        let result = guarded_step(&mut Panics, &Batch::default());
        assert!(matches!(result, Err(EngineError::Device(_))));
    }
}
