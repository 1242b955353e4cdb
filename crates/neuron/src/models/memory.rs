//! The owner of the memory that models may take. `lifecycle::Claims` says who gets room, and who makes it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lifecycle::{Claim, ClaimAct, Claims, DoorFacts};
use service::clock::Clock;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use words::{Code, Error, ModelId, NodeMemory};

use super::door::Door;
use super::owner::Message;
use crate::metrics::Metrics;
use crate::publisher::Publisher;

/// Words that wait for the owner.
const INBOX: usize = 64;
/// How often loads that wait for room are looked at, though nothing was told.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The ways to a model that holds memory, or wants some.
pub(super) struct Ways {
    pub(super) door: Door,
    /// Where it is told to go.
    pub(super) inbox: mpsc::Sender<Message>,
}

enum Word {
    Reserve(Claim, Ways, oneshot::Sender<Result<(), Error>>),
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
    pub(super) async fn reserve(&self, claim: Claim, ways: Ways) -> Result<(), Error> {
        let gone = || Error::internal("the owner of the memory is gone");
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Word::Reserve(claim, ways, reply)).await.map_err(|_| gone())?;
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

struct Owner {
    claims: Claims,
    clock: Clock,
    publisher: Publisher,
    metrics: Metrics,
    /// Those of every model in `claims`.
    ways: BTreeMap<ModelId, Ways>,
    replies: BTreeMap<ModelId, oneshot::Sender<Result<(), Error>>>,
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
        claims: Claims::new(budget, turn),
        clock,
        publisher,
        metrics,
        ways: BTreeMap::new(),
        replies: BTreeMap::new(),
        evictions: JoinSet::new(),
    };
    tokio::spawn(owner.run(words, emptied));
    Memory { inbox }
}

impl Owner {
    async fn run(mut self, mut words: mpsc::Receiver<Word>, emptied: Arc<Notify>) {
        self.show();
        let look_every = LOOK_EVERY.min(self.claims.turn());
        loop {
            self.plan();
            let waits = self.claims.waits();
            tokio::select! {
                word = words.recv() => match word {
                    Some(word) => self.take(word),
                    None => return,
                },
                Some(ended) = self.evictions.join_next() => self.evicted(ended),
                () = emptied.notified(), if waits => {}
                () = tokio::time::sleep(look_every), if waits => {}
            }
        }
    }

    fn take(&mut self, word: Word) {
        match word {
            Word::Reserve(claim, ways, reply) => {
                self.ways.insert(claim.model.clone(), ways);
                self.replies.insert(claim.model.clone(), reply);
                self.claims.ask(self.clock.now(), claim);
            }
            Word::Measured(model, bytes) => {
                if self.claims.measured(&model, bytes) {
                    self.show();
                }
            }
            Word::Leaving(model) => self.claims.leaving(&model),
            Word::Free(model) => self.free(&model),
            Word::Explain(model, need, reply) => {
                let ways = &self.ways;
                // Whoever asked may be gone.
                let _ = reply.send(self.claims.explain(&model, need, &|model| facts(ways, model)));
            }
        }
    }

    fn free(&mut self, model: &ModelId) {
        self.replies.remove(model);
        self.ways.remove(model);
        if self.claims.free(model) {
            self.show();
        }
    }

    fn evicted(&mut self, ended: Result<(ModelId, bool), tokio::task::JoinError>) {
        let Ok((model, goes)) = ended else { return };
        if goes {
            tracing::info!(%model, "model evicted to make room");
            self.metrics.evicted(model.as_str());
        } else {
            // Somebody was quicker: it is planned anew.
            self.claims.stays(&model);
        }
    }

    /// Does what the claims say.
    fn plan(&mut self) {
        let gone = |(model, reply): (&ModelId, &oneshot::Sender<_>)| reply.is_closed().then(|| model.clone());
        let gone: Vec<ModelId> = self.replies.iter().filter_map(gone).collect();
        gone.iter().for_each(|model| self.free(model));
        let ways = &self.ways;
        let acts = self.claims.plan(self.clock.now(), |model| facts(ways, model));
        for act in acts {
            match act {
                ClaimAct::Grant(model) => {
                    let told = self.replies.remove(&model).is_some_and(|reply| reply.send(Ok(())).is_ok());
                    if told { self.show() } else { self.free(&model) }
                }
                ClaimAct::Refuse(model, words) => {
                    if let Some(reply) = self.replies.remove(&model) {
                        let _ = reply.send(Err(Error::new(Code::InsufficientMemory, words)));
                    }
                    self.ways.remove(&model);
                }
                ClaimAct::Shut(model) => self.shut(&model, true),
                ClaimAct::Reopen(model) => self.shut(&model, false),
                ClaimAct::Evict(model) => self.evict(model),
            }
        }
    }

    fn shut(&self, model: &ModelId, shut: bool) {
        if let Some(ways) = self.ways.get(model) {
            ways.door.shut(shut);
        }
    }

    fn evict(&mut self, model: ModelId) {
        let Some(ways) = self.ways.get(&model) else { return };
        let inbox = ways.inbox.clone();
        self.evictions.spawn(async move {
            let (reply, answer) = oneshot::channel();
            let told = inbox.send(Message::Evict(reply)).await.is_ok();
            (model, told && answer.await.unwrap_or(false))
        });
    }

    fn show(&self) {
        let memory = NodeMemory { budget: self.claims.budget(), used: self.claims.used() };
        self.metrics.show_memory(memory);
        self.publisher.change(|status| status.memory = memory);
    }
}

/// Says how it is with a model's door; one that nobody knows is closed.
fn facts(ways: &BTreeMap<ModelId, Ways>, model: &ModelId) -> DoorFacts {
    ways.get(model).map_or(DoorFacts::CLOSED, |ways| ways.door.facts())
}
