//! The owner of the memory that models may take: what is set aside, who gets room, and who makes it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use lifecycle::{Held, Room, no_room, room};
use service::clock::Clock;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use words::{Code, Error, ModelId, Moment, NodeMemory};

use super::door::Door;
use super::owner::Message;
use crate::metrics::Metrics;
use crate::publisher::Publisher;

/// Words that wait for the owner.
const INBOX: usize = 64;
/// How often loads that wait for room are looked at, though nothing was told.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What a model needs, and what it is to the others.
pub(super) struct Claim {
    pub(super) model: ModelId,
    /// In bytes.
    pub(super) need: u64,
    /// Whether others may be evicted for it.
    pub(super) evict: bool,
    pub(super) pinned: bool,
    pub(super) priority: i32,
    pub(super) door: Door,
    /// Where the model is told to go.
    pub(super) inbox: mpsc::Sender<Message>,
    /// When it waits no longer.
    pub(super) until: Moment,
}

enum Word {
    Reserve(Box<Claim>, oneshot::Sender<Result<(), Error>>),
    Measured(ModelId, u64),
    Leaving(ModelId),
    Free(ModelId),
    Explain(ModelId, u64, oneshot::Sender<String>),
}

/// The way to the owner; cheap to clone.
#[derive(Clone)]
pub(super) struct Memory {
    inbox: mpsc::Sender<Word>,
}

impl Memory {
    /// Sets memory aside, once there is room.
    ///
    /// # Errors
    /// `InsufficientMemory` with the numbers, when it can't come or did not in time.
    pub(super) async fn reserve(&self, claim: Claim) -> Result<(), Error> {
        let gone = || Error::internal("the owner of the memory is gone");
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Word::Reserve(Box::new(claim), reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Says what a model takes really.
    pub(super) async fn measured(&self, model: &ModelId, bytes: u64) {
        let _ = self.inbox.send(Word::Measured(model.clone(), bytes)).await;
    }

    /// Says that a model is on its way out.
    pub(super) async fn leaving(&self, model: &ModelId) {
        let _ = self.inbox.send(Word::Leaving(model.clone())).await;
    }

    /// Gives back what is set aside for a model, and what is asked for it.
    pub(super) async fn free(&self, model: &ModelId) {
        let _ = self.inbox.send(Word::Free(model.clone())).await;
    }

    /// Says in numbers how it is with a model's room.
    pub(super) async fn explain(&self, model: &ModelId, need: u64) -> Option<String> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Word::Explain(model.clone(), need, reply)).await.ok()?;
        answer.await.ok()
    }
}

struct Holder {
    bytes: u64,
    claim: Box<Claim>,
    /// It was told to go, or goes.
    leaving: bool,
}

struct Pending {
    claim: Box<Claim>,
    since: Moment,
    reply: oneshot::Sender<Result<(), Error>>,
}

struct Owner {
    /// In bytes; 0: unknown.
    budget: u64,
    turn: Duration,
    clock: Clock,
    publisher: Publisher,
    metrics: Metrics,
    holders: BTreeMap<ModelId, Holder>,
    pending: VecDeque<Pending>,
    evictions: JoinSet<(ModelId, bool)>,
}

/// Starts the owner. `emptied` is told by every door whose last request leaves.
pub(super) fn start(
    budget: u64,
    turn: Duration,
    clock: Clock,
    publisher: Publisher,
    metrics: Metrics,
    emptied: Arc<Notify>,
) -> Memory {
    let (inbox, words) = mpsc::channel(INBOX);
    let owner = Owner {
        budget,
        turn,
        clock,
        publisher,
        metrics,
        holders: BTreeMap::new(),
        pending: VecDeque::new(),
        evictions: JoinSet::new(),
    };
    tokio::spawn(owner.run(words, emptied));
    Memory { inbox }
}

impl Owner {
    async fn run(mut self, mut words: mpsc::Receiver<Word>, emptied: Arc<Notify>) {
        self.show();
        loop {
            self.plan();
            let waits = !self.pending.is_empty();
            tokio::select! {
                word = words.recv() => match word {
                    Some(word) => self.take(word),
                    None => return,
                },
                Some(ended) = self.evictions.join_next() => self.evicted(ended),
                () = emptied.notified(), if waits => {}
                () = tokio::time::sleep(LOOK_EVERY.min(self.turn)), if waits => {}
            }
        }
    }

    fn take(&mut self, word: Word) {
        match word {
            Word::Reserve(claim, reply) => {
                self.pending.push_back(Pending { claim, since: self.clock.now(), reply });
            }
            Word::Measured(model, bytes) => {
                if let Some(holder) = self.holders.get_mut(&model) {
                    holder.bytes = bytes;
                    self.show();
                }
            }
            Word::Leaving(model) => {
                if let Some(holder) = self.holders.get_mut(&model) {
                    holder.leaving = true;
                }
            }
            Word::Free(model) => {
                self.pending.retain(|pending| pending.claim.model != model);
                if self.holders.remove(&model).is_some() {
                    self.show();
                }
            }
            Word::Explain(model, need, reply) => {
                // Whoever asked may be gone.
                let _ = reply.send(no_room(&model, &self.held(&|_| false), self.budget, need));
            }
        }
    }

    fn evicted(&mut self, ended: Result<(ModelId, bool), tokio::task::JoinError>) {
        let Ok((model, goes)) = ended else { return };
        if goes {
            tracing::info!(%model, "model evicted to make room");
            self.metrics.evicted(model.as_str());
        } else if let Some(holder) = self.holders.get_mut(&model) {
            // Somebody was quicker: it is planned anew.
            holder.leaving = false;
        }
    }

    /// Lists who holds memory; `had_turn` says whose work does not count.
    fn held(&self, had_turn: &dyn Fn(&Holder) -> bool) -> Vec<Held> {
        let held = |(model, holder): (&ModelId, &Holder)| {
            let door = holder.claim.door.facts();
            Held {
                model: model.clone(),
                bytes: holder.bytes,
                in_use: !door.open || (door.in_use && !had_turn(holder)),
                leaving: holder.leaving,
                pinned: holder.claim.pinned,
                priority: holder.claim.priority,
                idle_since: door.idle_since,
            }
        };
        self.holders.iter().map(held).collect()
    }

    /// Gives room to those who find it, in the order in which they came, and makes it where that is possible. One that
    /// has waited for its turn is passed by nobody any more.
    fn plan(&mut self) {
        self.pending.retain(|pending| !pending.reply.is_closed());
        let now = self.clock.now();
        let (mut left, mut shut) = (VecDeque::new(), Vec::new());
        let mut turn_taken = false;
        while let Some(pending) = self.pending.pop_front() {
            let Claim { need, evict, until, .. } = *pending.claim;
            let due = now.since(pending.since) >= self.turn;
            let found = match room(&self.held(&|_| false), self.budget, need, evict) {
                Room::Never => Room::Never,
                Room::Wait if now >= until => Room::Never,
                _ if turn_taken => Room::Wait,
                Room::Wait if due => {
                    let had_turn = |holder: &Holder| now.since(holder.claim.door.facts().opened_at) >= self.turn;
                    let held = self.held(&had_turn);
                    turn_taken = true;
                    match room(&held, self.budget, need, evict) {
                        Room::Evict(models) => {
                            shut.extend(models.iter().cloned());
                            Room::Evict(models)
                        }
                        _ => Room::Wait,
                    }
                }
                found => found,
            };
            match found {
                Room::Fits => self.grant(pending),
                Room::Never => {
                    let claim = &pending.claim;
                    let words = no_room(&claim.model, &self.held(&|_| false), self.budget, need);
                    let _ = pending.reply.send(Err(Error::new(Code::InsufficientMemory, words)));
                }
                Room::Wait => left.push_back(pending),
                Room::Evict(models) => {
                    self.evict(&models, &shut);
                    left.push_back(pending);
                }
            }
        }
        self.pending = left;
        // Those for whom nobody waits any more let requests in again.
        for (model, holder) in &self.holders {
            if !holder.leaving && !shut.contains(model) {
                holder.claim.door.shut(false);
            }
        }
    }

    fn evict(&mut self, models: &[ModelId], shut: &[ModelId]) {
        for model in models {
            let Some(holder) = self.holders.get_mut(model) else { continue };
            let door = &holder.claim.door;
            if shut.contains(model) && door.facts().in_use {
                door.shut(true);
            }
            if door.facts().in_use {
                // Those inside end in their own time.
                continue;
            }
            holder.leaving = true;
            let (inbox, model) = (holder.claim.inbox.clone(), model.clone());
            self.evictions.spawn(async move {
                let (reply, answer) = oneshot::channel();
                let told = inbox.send(Message::Evict(reply)).await.is_ok();
                (model, told && answer.await.unwrap_or(false))
            });
        }
    }

    fn grant(&mut self, pending: Pending) {
        let Pending { claim, reply, .. } = pending;
        let (model, bytes) = (claim.model.clone(), claim.need);
        if reply.send(Ok(())).is_ok() {
            self.holders.insert(model, Holder { bytes, claim, leaving: false });
            self.show();
        }
    }

    fn show(&self) {
        let used = self.holders.values().fold(0, |sum: u64, holder| sum.saturating_add(holder.bytes));
        let memory = NodeMemory { budget: self.budget, used };
        self.metrics.show_memory(memory);
        self.publisher.change(|status| status.memory = memory);
    }
}
