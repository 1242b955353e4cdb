//! Who gets memory, in which order, and who makes room for whom: what is set aside, and what waits.
//!
//! ```text
//! ask -> waits -> granted -> (measured) -> leaving -> freed
//!          '--> refused: it can't fit, or did not in time
//! ```
//! The owner of a node's memory calls [`Claims::plan`] after each change and does what that says; [`room`] says who goes.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use words::{ModelId, Moment};

use crate::room::{Held, Room, no_room, room};

/// What a model needs, and what it is to the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Which.
    pub model: ModelId,
    /// In bytes.
    pub need: u64,
    /// Whether others may be evicted for it.
    pub evict: bool,
    /// It is never evicted.
    pub pinned: bool,
    /// Of two that could go the lower one does.
    pub priority: i32,
    /// When it waits no longer.
    pub until: Moment,
}

/// How it is with a model's door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoorFacts {
    /// The model serves.
    pub open: bool,
    /// It lets nobody in for now.
    pub shut: bool,
    /// Somebody is inside.
    pub inside: bool,
    /// Somebody waits before it.
    pub waiting: bool,
    /// When the last one left, or when it opened.
    pub idle_since: Moment,
    /// When it opened.
    pub opened_at: Moment,
}

impl DoorFacts {
    /// The door of a model that does not serve, with nobody before it.
    pub const CLOSED: DoorFacts = DoorFacts {
        open: false,
        shut: false,
        inside: false,
        waiting: false,
        idle_since: Moment::ZERO,
        opened_at: Moment::ZERO,
    };

    /// Returns whether somebody is inside, or waits and will be let in.
    pub fn in_use(&self) -> bool {
        self.inside || (self.waiting && !self.shut)
    }
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimAct {
    /// Its memory is set aside.
    Grant(ModelId),
    /// There is no room for it, in words.
    Refuse(ModelId, String),
    /// It lets nobody in for now, so that those inside come to an end.
    Shut(ModelId),
    /// It lets requests in again.
    Reopen(ModelId),
    /// It is to go. It counts as leaving from now on, unless [`Claims::stays`] says otherwise.
    Evict(ModelId),
}

#[derive(Clone, Debug)]
struct Holder {
    bytes: u64,
    claim: Claim,
    /// It was told to go, or goes.
    leaving: bool,
}

#[derive(Clone, Debug)]
struct Pending {
    claim: Claim,
    since: Moment,
}

/// The memory of a node's models: one entry a model that holds or wants some.
#[derive(Clone, Debug)]
pub struct Claims {
    budget: u64,
    turn: Duration,
    holders: BTreeMap<ModelId, Holder>,
    pending: VecDeque<Pending>,
}

impl Claims {
    /// Begins with nothing set aside. A `budget` of 0 bytes is unknown, and everything fits. One that has waited for a
    /// `turn` is passed by nobody, and models that had as long a one make room for it.
    pub fn new(budget: u64, turn: Duration) -> Self {
        Claims { budget, turn, holders: BTreeMap::new(), pending: VecDeque::new() }
    }

    /// Takes a claim, which waits until a plan grants or refuses it.
    pub fn ask(&mut self, now: Moment, claim: Claim) {
        self.pending.push_back(Pending { claim, since: now });
    }

    /// Takes what a model takes really, in bytes; says whether that is news.
    pub fn measured(&mut self, model: &ModelId, bytes: u64) -> bool {
        self.holders.get_mut(model).is_some_and(|holder| std::mem::replace(&mut holder.bytes, bytes) != bytes)
    }

    /// A model is on its way out.
    pub fn leaving(&mut self, model: &ModelId) {
        if let Some(holder) = self.holders.get_mut(model) {
            holder.leaving = true;
        }
    }

    /// A model that was to go does not: somebody was quicker.
    pub fn stays(&mut self, model: &ModelId) {
        if let Some(holder) = self.holders.get_mut(model) {
            holder.leaving = false;
        }
    }

    /// Takes back what is set aside for a model, and what waits for it; says whether something was set aside.
    pub fn free(&mut self, model: &ModelId) -> bool {
        self.pending.retain(|pending| pending.claim.model != *model);
        self.holders.remove(model).is_some()
    }

    /// Returns whether something is set aside for a model, or waits for it.
    pub fn knows(&self, model: &ModelId) -> bool {
        self.holders.contains_key(model) || self.pending.iter().any(|pending| pending.claim.model == *model)
    }

    /// Returns whether anything waits.
    pub fn waits(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Returns what may be set aside, in bytes; 0: unknown.
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Returns how long a model serves while others wait for its memory.
    pub fn turn(&self) -> Duration {
        self.turn
    }

    /// Returns what is set aside, in bytes.
    pub fn used(&self) -> u64 {
        self.holders.values().fold(0, |sum: u64, holder| sum.saturating_add(holder.bytes))
    }

    /// Says in numbers how it is with a model's room.
    pub fn explain(&self, model: &ModelId, need: u64, doors: &impl Fn(&ModelId) -> DoorFacts) -> String {
        no_room(model, &self.held(doors, &|_, _| false), self.budget, need)
    }

    /// Lists who holds memory; `had_turn` says whose work does not count.
    fn held(&self, doors: &impl Fn(&ModelId) -> DoorFacts, had_turn: &dyn Fn(&Holder, DoorFacts) -> bool) -> Vec<Held> {
        let held = |(model, holder): (&ModelId, &Holder)| {
            let door = doors(model);
            Held {
                model: model.clone(),
                bytes: holder.bytes,
                in_use: !door.open || (door.in_use() && !had_turn(holder, door)),
                leaving: holder.leaving,
                pinned: holder.claim.pinned,
                priority: holder.claim.priority,
                idle_since: door.idle_since,
            }
        };
        self.holders.iter().map(held).collect()
    }

    /// Gives room to those who find it, in the order in which they came, and makes it where that is possible. One that
    /// has waited for its turn is passed by nobody any more. `doors` answers for every model that holds memory.
    pub fn plan(&mut self, now: Moment, doors: impl Fn(&ModelId) -> DoorFacts) -> Vec<ClaimAct> {
        let (mut acts, mut shut) = (Vec::new(), Vec::new());
        let (mut left, mut turn_taken) = (VecDeque::new(), false);
        while let Some(pending) = self.pending.pop_front() {
            let Claim { need, evict, until, .. } = pending.claim;
            let due = now.since(pending.since) >= self.turn;
            let found = match room(&self.held(&doors, &|_, _| false), self.budget, need, evict) {
                Room::Never => Room::Never,
                found @ (Room::Fits | Room::Evict(_)) if !turn_taken => found,
                _ if now >= until => Room::Never,
                Room::Wait if due && !turn_taken => {
                    turn_taken = true;
                    let had_turn = |_: &Holder, door: DoorFacts| now.since(door.opened_at) >= self.turn;
                    match room(&self.held(&doors, &had_turn), self.budget, need, evict) {
                        Room::Evict(models) => {
                            shut.extend(models.iter().cloned());
                            Room::Evict(models)
                        }
                        _ => Room::Wait,
                    }
                }
                _ => Room::Wait,
            };
            match found {
                Room::Fits => {
                    let Pending { claim, .. } = pending;
                    acts.push(ClaimAct::Grant(claim.model.clone()));
                    self.holders.insert(claim.model.clone(), Holder { bytes: need, claim, leaving: false });
                }
                Room::Never => {
                    let words = self.explain(&pending.claim.model, need, &doors);
                    acts.push(ClaimAct::Refuse(pending.claim.model, words));
                }
                Room::Wait => left.push_back(pending),
                Room::Evict(models) => {
                    self.evict(&models, &shut, &doors, &mut acts);
                    left.push_back(pending);
                }
            }
        }
        self.pending = left;
        // Those for whom nobody waits any more let requests in again.
        for (model, holder) in &self.holders {
            if !holder.leaving && !shut.contains(model) && doors(model).shut {
                acts.push(ClaimAct::Reopen(model.clone()));
            }
        }
        acts
    }

    fn evict(
        &mut self,
        models: &[ModelId],
        shut: &[ModelId],
        doors: &impl Fn(&ModelId) -> DoorFacts,
        acts: &mut Vec<ClaimAct>,
    ) {
        for model in models {
            let Some(holder) = self.holders.get_mut(model) else { continue };
            let mut door = doors(model);
            if shut.contains(model) && door.in_use() && !door.shut {
                door.shut = true;
                acts.push(ClaimAct::Shut(model.clone()));
            }
            if door.in_use() {
                // Those inside end in their own time.
                continue;
            }
            holder.leaving = true;
            acts.push(ClaimAct::Evict(model.clone()));
        }
    }
}

#[cfg(test)]
#[path = "claims_tests.rs"]
mod tests;
