//! The owner of one model: wishes, ends of work and time in, the machine's acts out, one after another.

use std::sync::Arc;
use std::time::Duration;

use lifecycle::{Claim, DrainBudget, HookEvent, Leaving, ModelAct, ModelEvent, ModelLife, ModelWork};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};
use words::{Capabilities, Code, Error, ModelId, ModelState, ModelStatus, Moment};

use super::door::Door;
use super::load::{self, News, Product, Running, Way, Work};
use super::loss::{self, Losses, Sign};
use super::memory::Ways;
use super::replies::{LeaveReply, LoadReply, Replies, Reply};
use super::{Inner, View};
use crate::harness::{LoadFailure, LoadSpec, Loaded};

/// Words that wait for one model's owner.
pub(super) const INBOX: usize = 64;

/// What a load goes by.
#[derive(Clone, Debug)]
pub(super) struct Order {
    pub(super) spec: LoadSpec,
    /// Whether others may be evicted for it.
    pub(super) make_room: bool,
    /// Whether it is of the node's own configuration, on which its activation alone decides.
    pub(super) even_closed: bool,
}

/// What an owner is told.
pub(super) enum Message {
    /// Somebody wants it loaded.
    Load(Box<Order>, LoadReply),
    /// Somebody wants it gone: within a budget, or at once.
    Leave(Option<DrainBudget>, LeaveReply),
    /// Its memory is wanted; it is told whether it goes.
    Evict(oneshot::Sender<bool>),
}

/// The owner.
pub(super) struct Owner {
    inner: Arc<Inner>,
    id: ModelId,
    door: Door,
    /// The way to itself, for those who want its memory.
    own: mpsc::WeakSender<Message>,
    view: watch::Sender<View>,
    life: ModelLife,
    replies: Replies,
    /// What the load in hand goes by, or went by.
    order: Option<Order>,
    /// What the next one goes by.
    next_order: Option<Order>,
    work: Option<Work>,
    cancel: watch::Sender<bool>,
    hurry: watch::Sender<bool>,
    news: watch::Sender<News>,
    running: Option<Running>,
    /// Why the last load failed.
    failure: Option<LoadFailure>,
    budget: Option<DrainBudget>,
    cut: usize,
    /// What its last load took, and by what it went.
    measured: Option<(LoadSpec, u64)>,
    losses: Losses,
}

impl Owner {
    /// Makes the owner of an absent model.
    pub(super) fn new(
        inner: Arc<Inner>,
        id: ModelId,
        door: Door,
        own: mpsc::WeakSender<Message>,
        view: watch::Sender<View>,
    ) -> Self {
        Owner {
            inner,
            id,
            door,
            own,
            view,
            life: ModelLife::default(),
            replies: Replies::default(),
            order: None,
            next_order: None,
            work: None,
            cancel: watch::Sender::new(false),
            hurry: watch::Sender::new(false),
            news: watch::Sender::new(News::default()),
            running: None,
            failure: None,
            budget: None,
            cut: 0,
            measured: None,
            losses: Losses::of(None),
        }
    }

    /// Owns it as long as anybody can speak of it.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        let mut news = self.news.subscribe();
        loop {
            let ttl = self.ttl_ends().map(|at| self.inner.parts.clock.instant(at));
            tokio::select! {
                biased;
                ended = next(&mut self.work) => {
                    self.work = None;
                    let well = self.ended(ended);
                    self.take(ModelEvent::Done(well)).await;
                }
                message = inbox.recv() => match message {
                    Some(message) => self.told(message).await,
                    None => return,
                },
                sign = shown(&mut self.running), if self.life.state() == ModelState::Ready => match sign {
                    Sign::Memory(bytes) => self.measured(bytes).await,
                    Sign::Ended(why) => {
                        tracing::error!(model = %self.id, why, "the engine has ended by itself");
                        self.view.send_modify(|view| view.status.failure = Some(why));
                        self.take(ModelEvent::EngineLost).await;
                    }
                },
                _ = news.changed() => self.heard(*news.borrow_and_update()),
                () = sleep_until(ttl) => self.ttl_over().await,
            }
        }
    }

    fn now(&self) -> Moment {
        self.inner.parts.clock.now()
    }

    async fn told(&mut self, message: Message) {
        match message {
            Message::Load(order, reply) => {
                if !order.even_closed && !self.inner.is_open() {
                    let _ = reply.send(Err(super::closed().into()));
                    return;
                }
                if matches!(self.life.state(), ModelState::Absent | ModelState::Failed | ModelState::Unloading) {
                    self.next_order.get_or_insert(*order);
                }
                let caller = self.replies.enter(Some(Reply::Load(reply)));
                self.take(ModelEvent::Load(caller)).await;
            }
            Message::Leave(budget, reply) => {
                if self.life.state() == ModelState::Ready {
                    self.budget = budget;
                }
                self.next_order = None;
                let how = if budget.is_some() { Leaving::Drained } else { Leaving::Cut };
                let caller = self.replies.enter(Some(Reply::Leave(reply)));
                self.take(ModelEvent::Leave(caller, how)).await;
            }
            Message::Evict(reply) => {
                let goes = self.life.state() == ModelState::Ready && self.door.close_if_idle(Duration::ZERO);
                let _ = reply.send(goes);
                if goes {
                    self.go_idle().await;
                }
            }
        }
    }

    async fn go_idle(&mut self) {
        let caller = self.replies.enter(None);
        self.take(ModelEvent::Leave(caller, Leaving::Idle)).await;
    }

    /// Says when its time without a request is over, if it has one.
    fn ttl_ends(&self) -> Option<Moment> {
        let ttl = self.inner.entry(&self.id).filter(|(entry, listed)| *listed && !entry.pin)?.0.ttl_s;
        let facts = self.door.facts();
        if ttl == 0 || !facts.open {
            return None;
        }
        // While it is in use its time can't be over before a whole one from now on.
        let from = if facts.in_use() { self.now() } else { facts.idle_since };
        Some(from + Duration::from_secs(ttl))
    }

    async fn ttl_over(&mut self) {
        let ttl = self.inner.entry(&self.id).map_or(0, |(entry, _)| entry.ttl_s);
        if self.life.state() == ModelState::Ready && self.door.close_if_idle(Duration::from_secs(ttl)) {
            tracing::info!(model = %self.id, ttl_s = ttl, "model idle for its time; unloading it");
            self.inner.parts.metrics.ttl_over(self.id.as_str());
            self.go_idle().await;
        }
    }

    /// Takes what its engine's memory is now.
    async fn measured(&mut self, bytes: u64) {
        let told = self.order.as_ref().map_or(0, |order| order.spec.memory);
        let Some(running) = &mut self.running else { return };
        let memory = bytes.max(told);
        running.memory = memory;
        if let Some((_, known)) = &mut self.measured {
            *known = memory;
        }
        self.show(|view| view.status.memory_bytes = memory);
        self.inner.memory.measured(&self.id, memory).await;
    }

    fn show(&self, change: impl FnOnce(&mut View)) {
        self.view.send_modify(change);
        self.inner.parts.publisher.model(self.view.borrow().status.clone());
    }

    fn heard(&self, news: News) {
        if !self.life.work().is_some_and(ModelWork::loads) {
            return;
        }
        self.show(|view| {
            view.status.progress_permille = news.permille;
            view.need = news.need;
        });
    }

    /// Takes what work in hand has brought; says whether it ended well.
    fn ended(&mut self, ended: Result<Product, LoadFailure>) -> bool {
        let failure = match ended {
            Ok(Product::Over) => return true,
            Ok(Product::Files(path)) => {
                if let Some(order) = &mut self.order {
                    order.spec.path = Some(path);
                }
                return true;
            }
            Ok(Product::Reserved(bytes)) => {
                let now = self.now();
                // From here on it waits for memory no more, whatever is told of its progress.
                self.news.send_modify(|news| news.need = 0);
                self.show(|view| {
                    view.status.memory_bytes = bytes;
                    (view.need, view.begun) = (0, Some(now));
                });
                return true;
            }
            Ok(Product::Cut(cut)) => {
                self.cut = cut;
                return true;
            }
            Ok(Product::Loaded(loaded)) => match self.started(loaded) {
                Ok(()) => return true,
                Err(error) => LoadFailure::from(error),
            },
            Err(failure) => failure,
        };
        if self.life.work().is_some_and(ModelWork::loads) && self.life.state() != ModelState::Unloading {
            let source = std::error::Error::source(&failure.error).map(|source| source.to_string()).unwrap_or_default();
            let transient = failure.transient;
            tracing::error!(model = %self.id, error = %failure.error, source, transient, "load failed");
            self.view.send_modify(|view| view.status.failure = Some(failure.error.message().to_string()));
        }
        self.failure = Some(failure);
        false
    }

    fn started(&mut self, loaded: Loaded) -> Result<(), Error> {
        let Some(order) = &self.order else { return Err(Error::internal("a load without its order")) };
        let running = load::start(&self.inner, &order.spec, loaded)?;
        self.view.send_modify(|view| {
            view.status.context_length = running.ready.context_length as u32;
            view.status.continue_fingerprint = running.ready.continue_fingerprint;
            view.status.exact_fingerprint = running.ready.exact_fingerprint;
            view.status.memory_bytes = running.memory;
            view.status.progress_permille = 1000;
        });
        self.measured = Some((order.spec.clone(), running.memory));
        self.running = Some(running);
        Ok(())
    }

    async fn take(&mut self, event: ModelEvent) {
        for act in self.life.take(event) {
            match act {
                ModelAct::Moved(from, to) => {
                    self.moved(from, to);
                    if matches!(to, ModelState::Draining | ModelState::Unloading) {
                        self.inner.memory.leaving(&self.id).await;
                    }
                }
                ModelAct::Open => self.open().await,
                ModelAct::Close => self.door.close(),
                ModelAct::Begin(work) => self.work = Some(self.begin(work)),
                ModelAct::Cancel => drop(self.cancel.send_replace(true)),
                ModelAct::Hurry => drop(self.hurry.send_replace(true)),
                ModelAct::Free => self.inner.memory.free(&self.id).await,
                ModelAct::Answer(caller, answer) => {
                    self.replies.tell(&self.id, caller, answer, self.failure.as_ref(), self.cut);
                }
            }
        }
    }

    fn moved(&mut self, from: ModelState, to: ModelState) {
        tracing::info!(model = %self.id, ?from, ?to, "model state");
        let clock = self.inner.parts.clock;
        if to == ModelState::Fetching {
            self.order = self.next_order.take().or(self.order.take());
            self.cut = 0;
            self.losses = Losses::of(self.order.as_ref().map(|order| &order.spec));
        }
        if to == ModelState::Ready {
            self.losses.serving(clock.now());
        }
        let spec = self.order.as_ref().map(|order| &order.spec);
        let capabilities = spec.map_or_else(Capabilities::default, LoadSpec::capabilities);
        let harness = self.order.as_ref().map(|order| order.spec.harness.clone()).unwrap_or_default();
        let mut absent = self.inner.absent(&self.id);
        if let Some((_, bytes)) = &self.measured {
            absent.card.memory_estimate = *bytes;
        }
        // For want of room nothing failed: the next one who asks may find some.
        let no_room = self.failure.as_ref().is_some_and(|failure| failure.error.code() == Code::InsufficientMemory);
        self.view.send_modify(|view| {
            match to {
                ModelState::Fetching => {
                    view.status = ModelStatus { harness, created: clock.unix_seconds(), capabilities, ..absent };
                    (view.wanted, view.begun, view.need) = (Some(clock.now()), None, 0);
                }
                ModelState::Absent => view.status = absent,
                ModelState::Failed => {
                    (view.status.memory_bytes, view.failed_at) = (0, Some(clock.now()).filter(|_| !no_room));
                }
                ModelState::Ready => {
                    view.status.failure = None;
                    if let Some(begun) = view.begun.take() {
                        view.took = Some(clock.now().since(begun));
                    }
                }
                _ => {}
            }
            view.status.state = to;
            view.status.since_unix_ms = clock.unix_ms();
        });
        let status = self.view.borrow().status.clone();
        if to == ModelState::Absent {
            // What is gone is not busy.
            self.inner.parts.metrics.show_load(self.id.as_str(), &inference::Load::default());
        }
        let why = status.failure.as_deref().filter(|_| to == ModelState::Failed);
        self.inner.parts.turns.note_state(&self.id, from, to, why);
        let outcome = match (from, to) {
            (_, ModelState::Ready) => Some("ok"),
            (_, ModelState::Failed) if no_room => Some("no_room"),
            (_, ModelState::Failed) => Some("failed"),
            (ModelState::Ready | ModelState::Draining, ModelState::Unloading) => None,
            (_, ModelState::Unloading) => Some("cancelled"),
            _ => None,
        };
        if let Some(outcome) = outcome {
            self.inner.parts.metrics.load_ended(self.id.as_str(), outcome);
        }
        self.inner.parts.publisher.model(status);
    }

    async fn open(&mut self) {
        let (Some(running), Some(order)) = (&self.running, &self.order) else { return };
        let now = self.now();
        let (took, wanted) = {
            let view = self.view.borrow();
            (view.took.unwrap_or_default(), view.wanted.map_or(Duration::ZERO, |wanted| now.since(wanted)))
        };
        let seconds = took.as_secs_f64();
        self.inner.parts.metrics.loaded(self.id.as_str(), seconds, wanted.as_secs_f64());
        tracing::info!(model = %self.id, harness = order.spec.harness, seconds, "model ready");
        let (memory, ready) = (running.memory, running.ready.clone());
        self.inner.memory.measured(&self.id, memory).await;
        self.door.open(ready);
        // Nothing waits for these.
        let (turns, id, harness) = (self.inner.parts.turns.clone(), self.id.clone(), order.spec.harness.clone());
        tokio::spawn(async move {
            let _ = turns.of_model(HookEvent::Ready, &id, &harness, Value::Null).await;
        });
    }

    fn way(&mut self) -> Option<Way> {
        let spec = self.order.as_ref()?.spec.clone();
        let (inner, news) = (self.inner.clone(), self.news.clone());
        Some(Way { inner, spec, news, cancelled: self.cancel.subscribe() })
    }

    fn begin(&mut self, work: ModelWork) -> Work {
        let lost_order = || -> Work { Box::pin(async { Err(Error::internal("a load without its order").into()) }) };
        if matches!(work, ModelWork::Fetch | ModelWork::Pause) {
            // What was told to an earlier load is no word to this one.
            self.cancel = watch::Sender::new(false);
            self.news.send_replace(News::default());
        }
        let (inner, id) = (self.inner.clone(), self.id.clone());
        let harness = self.order.as_ref().map(|order| order.spec.harness.clone()).unwrap_or_default();
        let ready = self.running.as_ref().map(|running| running.ready.clone());
        match work {
            ModelWork::Fetch => self.way().map_or_else(lost_order, |way| Box::pin(way.fetch())),
            ModelWork::Reserve => {
                let (claim, way) = (self.claim(), self.way());
                let Some((way, (claim, ways))) = way.zip(claim) else { return lost_order() };
                let equal = self.measured.as_ref().filter(|(spec, _)| *spec == way.spec);
                let known = equal.map(|(_, bytes)| *bytes);
                Box::pin(way.reserve(known, claim, ways))
            }
            ModelWork::BeforeLoad => Box::pin(load::hooks(inner, HookEvent::BeforeLoad, id, harness)),
            ModelWork::Load => self.way().map_or_else(lost_order, |way| Box::pin(way.load())),
            ModelWork::Warm => match (ready, &self.order) {
                (Some(ready), Some(order)) => Box::pin(load::warm(inner, ready, order.spec.clone())),
                _ => lost_order(),
            },
            ModelWork::AfterHealthy => Box::pin(load::hooks(inner, HookEvent::AfterHealthy, id, harness)),
            ModelWork::Empty { cut } => {
                self.hurry = watch::Sender::new(cut);
                let (budget, hurry) = (self.budget.take(), self.hurry.subscribe());
                match ready {
                    Some(ready) => Box::pin(load::empty(inner, ready, budget, hurry)),
                    None => Box::pin(async { Ok(Product::Cut(0)) }),
                }
            }
            ModelWork::BeforeStop => Box::pin(load::hooks(inner, HookEvent::BeforeStop, id, harness)),
            ModelWork::Stop => {
                // A process that ends is nobody's to ask.
                self.inner.parts.turns.served_by(&self.id, None);
                Box::pin(load::stop(self.running.take()))
            }
            ModelWork::AfterUnload => Box::pin(load::hooks(inner, HookEvent::AfterUnload, id, harness)),
            ModelWork::Pause => {
                let (now, why) = (self.now(), self.view.borrow().status.failure.clone().unwrap_or_default());
                match self.losses.rest(now, &why) {
                    Ok(until) => Box::pin(loss::rest(inner, id, until, self.cancel.subscribe())),
                    Err(error) => Box::pin(async { Err(error.into()) }),
                }
            }
        }
    }

    fn claim(&self) -> Option<(Claim, Ways)> {
        let (order, inbox) = (self.order.as_ref()?, self.own.upgrade()?);
        let card = self.inner.absent(&self.id).card;
        let claim = Claim {
            model: self.id.clone(),
            need: 0,
            evict: order.make_room,
            pinned: card.pinned,
            priority: card.priority,
            until: self.now() + self.inner.parts.options.data.load_wait(),
        };
        Some((claim, Ways { door: self.door.clone(), inbox }))
    }
}

async fn next(work: &mut Option<Work>) -> Result<Product, LoadFailure> {
    match work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}

async fn shown(running: &mut Option<Running>) -> Sign {
    match running {
        Some(running) => running.sign().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
