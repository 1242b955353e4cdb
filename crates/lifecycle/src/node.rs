//! One life of a node: activation, cordon, hold, drain, restart; every order and signal goes through this one machine.
//!
//! ```text
//! activating --> ready <--cordon, hold--> (closed to new work, alive)
//!     ^            |
//!     |            | drain, restart, SIGTERM        restart, SIGTERM: --> upgrading --> stopped
//!     |            v                                |
//!     |        draining --finished--> unloading ----+
//!     |            |                                |
//!     +--undrain---+------------ drained <----------+ drain
//! ```
//! The machine decides, its shell acts. An [`Act::Persist`] comes before every act that depends on what it records.
//! After each input the shell calls [`NodeLife::advance`], with fresh facts, until it returns nothing.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use words::{Canary, Door, DrainPhase, Epoch, Incarnation, Intent, Moment, RolloutClaim, RolloutId, UpgradeOutcome};

use crate::drain::{Drain, DrainBudget, DrainFacts, DrainStep};

/// Running streams that are offered to other workers at once, so that nobody has to prefill many at a time.
pub const OFFERS_MAX: usize = 4;
/// Offers are looked at this often while something still runs.
pub const OFFER_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for the answer of a node's own canary.
pub const CANARY_MAX: Duration = Duration::from_secs(60);
/// Pause after a canary's first wrong answer; doubles up to [`CANARY_AGAIN_MAX`].
pub const CANARY_AGAIN_FIRST: Duration = Duration::from_secs(5);
/// Longest such pause.
pub const CANARY_AGAIN_MAX: Duration = Duration::from_secs(300);
/// Longest deadline and hold that an order may ask for: a day.
pub const ORDER_SPAN_MAX: Duration = Duration::from_secs(86_400);

/// What bounds one node's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeRules {
    /// The node's own drain; orders may ask for another deadline.
    pub drain: DrainBudget,
    /// Longest time for all models to unload.
    pub unload_max: Duration,
    /// Longest time for an upgrade.
    pub upgrade_max: Duration,
    /// Whether records outlive the process. Without it what must be remembered is refused.
    pub durable: bool,
}

/// An order to leave and come back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartRecord {
    /// The life that must leave; the next one is held by the claim.
    pub incarnation: Incarnation,
    /// On whose behalf.
    pub claim: Option<RolloutClaim>,
    /// The upgrade to run on the way.
    pub upgrade: Option<String>,
}

/// What outlives the process, exactly as it is on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Rises with each accepted order.
    pub epoch: Epoch,
    /// The sticky intent: none, a cordon or a drain.
    pub intent: Intent,
    /// The restart in force; dies with the life it names.
    pub restart: Option<RestartRecord>,
    /// The claim that holds this life.
    pub hold: Option<RolloutClaim>,
    /// The rollout that spoke last, and its newest lease revision.
    pub lease: Option<(RolloutId, u64)>,
    /// How the last upgrade went.
    pub upgrade: Option<UpgradeOutcome>,
}

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// Everything ended properly.
    Clean,
    /// Streams were cut at the hard deadline.
    StreamsCut,
}

/// What the shell must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Put the record on disk before anything after it is done. When that fails after an order or a release, the shell puts the
    /// machine back as it was before the order, does nothing of the rest, and refuses the order.
    Persist(Box<Record>),
    /// Set the gate.
    Admit(Door),
    /// Hand queued work back, and let each connection end with its response.
    HandBack,
    /// Connections stay open again.
    Reopen,
    /// Let the gateways know of the new state.
    Publish,
    /// Offer running streams to other workers until this many offers are open.
    Offer {
        /// Offers open at most.
        open_at_most: usize,
    },
    /// Take all offers back.
    Withdraw,
    /// End what still runs with a typed error.
    Cut,
    /// Unload every model, then call [`NodeLife::unloaded`].
    Unload,
    /// Load the default models, then call [`NodeLife::activated`].
    Load,
    /// Ask the node's own model, then call [`NodeLife::canary_answered`].
    RunCanary(Canary),
    /// Run the upgrade of this name, then call [`NodeLife::upgraded`].
    Upgrade(String),
    /// End the process.
    Exit(ExitKind),
}

/// What the machine needs to know of the world.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Requests accepted and not over.
    pub in_flight: usize,
    /// Attached gateways that have not acknowledged the generation of the last [`Act::Publish`].
    pub unaware_gateways: usize,
    /// Offers that are open.
    pub offers_open: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Stage {
    /// The default models are being loaded; nobody is let in.
    Activating,
    /// Alive. `close_at` while a cordon settles.
    Open { close_at: Option<Moment> },
    /// `offered`: when streams were last offered, and how many requests there were then.
    Draining { drain: Drain, offered: Option<(Moment, usize)> },
    /// Freeing memory, within a bound.
    Unloading { by: Moment },
    /// Empty and alive.
    Drained,
    /// Unloaded, and the upgrade runs.
    Upgrading { by: Moment },
    /// The exit is the shell's.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// By an order; can be called off until the unloading.
    Restart,
    /// By a signal; nothing calls it off.
    Signal { forced: bool },
}

#[derive(Clone, Debug)]
pub(crate) enum HoldStep {
    /// The time to live runs from the first activation.
    Unset,
    /// For the coordinator's word.
    Waiting { until: Moment },
    /// The node's own canary is being asked.
    Asking { by: Moment, pause: Duration },
    /// The canary failed.
    Failed { again_at: Moment, pause: Duration, reason: String },
}

#[derive(Clone, Debug)]
pub(crate) struct Holding {
    pub(crate) claim: RolloutClaim,
    pub(crate) step: HoldStep,
}

/// One life of one node.
#[derive(Clone, Debug)]
pub struct NodeLife {
    pub(crate) incarnation: Incarnation,
    pub(crate) record: Record,
    pub(crate) rules: NodeRules,
    pub(crate) stage: Stage,
    /// As the shell was last told.
    pub(crate) door: Door,
    pub(crate) leaving: Option<Leaving>,
    /// Whether the pass over the default models is over.
    pub(crate) loaded: bool,
    pub(crate) hold: Option<Holding>,
    /// The rollout that started this life, or restarts it.
    pub(crate) rollout: Option<RolloutId>,
    pub(crate) facts: NodeFacts,
    pub(crate) cut: bool,
}

impl NodeLife {
    /// Begins a life with what the one before left on disk. Nobody is let in yet.
    ///
    /// A restart that names another life has happened, be it by a crash: its claim holds this one.
    pub fn start(incarnation: Incarnation, record: Record, rules: NodeRules) -> Self {
        let mut record = record;
        if let Some(restart) = record.restart.take_if(|restart| restart.incarnation != incarnation) {
            record.hold = restart.claim;
        }
        let hold = record.hold.clone().map(|claim| Holding { claim, step: HoldStep::Unset });
        NodeLife {
            incarnation,
            rollout: hold.as_ref().map(|hold| hold.claim.id.clone()),
            record,
            rules,
            stage: Stage::Activating,
            door: Door::Nobody,
            leaving: None,
            loaded: false,
            hold,
            facts: NodeFacts::default(),
            cut: false,
        }
    }

    /// Returns whether this life loads its default models now: not when the record says that it is drained.
    pub fn loads_defaults(&self) -> bool {
        matches!(self.stage, Stage::Activating) && self.record.intent != Intent::Drain
    }

    /// Returns whether models may be loaded on demand: not on a node that is cordoned, emptied or on its way out.
    pub fn takes_loads(&self) -> bool {
        let alive = matches!(self.stage, Stage::Activating | Stage::Open { .. });
        alive && self.record.intent == Intent::None && self.leaving.is_none()
    }

    /// Returns the epoch that an order must have seen.
    pub fn epoch(&self) -> Epoch {
        self.record.epoch
    }

    /// Returns what is on disk, or on its way there.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Returns whether a request is let in (DR1); `canary_of` for the canary of a rollout's coordinator.
    pub fn admits(&self, canary_of: Option<&RolloutId>) -> bool {
        self.door.admits(canary_of)
    }

    /// Who should be let in now.
    fn wanted_door(&self) -> Door {
        let open = match self.stage {
            Stage::Open { close_at } => close_at.is_some() || self.record.intent == Intent::None || self.hold.is_some(),
            // What was open stays open while the gateways learn.
            Stage::Draining { drain, .. } => drain.phase() == DrainPhase::Settle,
            _ => false,
        };
        match &self.hold {
            _ if !open => Door::Nobody,
            Some(hold) => Door::Canary(hold.claim.id.clone()),
            None => Door::All,
        }
    }

    pub(crate) fn persist(&self, acts: &mut Vec<Act>) {
        if self.rules.durable {
            acts.push(Act::Persist(Box::new(self.record.clone())));
        }
    }

    pub(crate) fn admit(&mut self, acts: &mut Vec<Act>) {
        let wanted = self.wanted_door();
        if wanted != self.door {
            self.door = wanted;
            acts.push(Act::Admit(self.door.clone()));
        }
    }

    /// Takes the end of the pass over the default models, successful or not.
    pub fn activated(&mut self, now: Moment) -> Vec<Act> {
        if !matches!(self.stage, Stage::Activating) {
            return Vec::new();
        }
        self.loaded = self.record.intent != Intent::Drain;
        self.stage = if self.loaded { Stage::Open { close_at: None } } else { Stage::Drained };
        if let Some(hold) = &mut self.hold
            && matches!(hold.step, HoldStep::Unset)
        {
            let ttl = Duration::from_millis(hold.claim.hold_ttl_ms).min(ORDER_SPAN_MAX);
            hold.step = HoldStep::Waiting { until: now + ttl };
        }
        let mut acts = Vec::new();
        self.admit(&mut acts);
        acts.push(Act::Publish);
        acts
    }

    /// Begins to drain, or hastens the drain that runs.
    pub(crate) fn drain(&mut self, now: Moment, budget: DrainBudget, acts: &mut Vec<Act>) {
        match &mut self.stage {
            Stage::Draining { drain, .. } => drain.tighten(now, budget),
            Stage::Activating | Stage::Open { .. } if self.door == Door::All => {
                self.stage = Stage::Draining { drain: Drain::begin(now, budget), offered: None };
            }
            Stage::Activating | Stage::Open { .. } => {
                self.stage = Stage::Draining { drain: Drain::begin_closed(now, budget), offered: None };
                self.admit(acts);
                acts.push(Act::HandBack);
            }
            Stage::Drained if self.leaving.is_some() => return self.unload(now, acts),
            Stage::Drained | Stage::Unloading { .. } | Stage::Upgrading { .. } | Stage::Stopped => {}
        }
        acts.push(Act::Publish);
    }

    pub(crate) fn unload(&mut self, now: Moment, acts: &mut Vec<Act>) {
        self.stage = Stage::Unloading { by: now + self.rules.unload_max };
        acts.extend([Act::Publish, Act::Unload]);
    }

    /// Takes SIGTERM, which always wins towards stopping; the second one ends what still runs at once.
    pub fn terminate(&mut self, now: Moment) -> Vec<Act> {
        let mut acts = Vec::new();
        if let Some(Leaving::Signal { forced }) = &mut self.leaving {
            *forced = true;
            if matches!(self.stage, Stage::Upgrading { .. }) {
                self.exit(&mut acts);
            }
            return acts;
        }
        self.leaving = Some(Leaving::Signal { forced: false });
        self.drain(now, self.rules.drain, &mut acts);
        acts
    }

    /// Goes on by one step where time and facts allow it. Call again, with fresh facts, until it returns nothing.
    pub fn advance(&mut self, now: Moment, facts: &NodeFacts) -> Vec<Act> {
        self.facts = *facts;
        let mut acts = Vec::new();
        match &mut self.stage {
            Stage::Open { close_at } => {
                if close_at.is_some_and(|at| facts.unaware_gateways == 0 || now >= at) {
                    *close_at = None;
                    self.admit(&mut acts);
                    acts.push(Act::Publish);
                } else {
                    self.advance_hold(now, &mut acts);
                }
            }
            Stage::Draining { .. } => self.advance_drain(now, facts, &mut acts),
            Stage::Unloading { by } if now >= *by => acts = self.unloaded(now),
            Stage::Upgrading { by } if now >= *by => self.exit(&mut acts),
            _ => {}
        }
        acts
    }

    fn advance_drain(&mut self, now: Moment, facts: &NodeFacts, acts: &mut Vec<Act>) {
        let Stage::Draining { drain, offered } = &mut self.stage else { return };
        let forced = self.leaving == Some(Leaving::Signal { forced: true });
        let seen = DrainFacts { in_flight: facts.in_flight, unaware_gateways: facts.unaware_gateways, forced };
        match drain.advance(now, seen) {
            Some(DrainStep::Close) => {
                self.admit(acts);
                acts.extend([Act::HandBack, Act::Publish]);
            }
            Some(DrainStep::HandOver) => acts.push(Act::Publish),
            Some(DrainStep::Cut) => {
                self.cut = true;
                acts.extend([Act::Cut, Act::Publish]);
            }
            Some(DrainStep::Finish) => self.unload(now, acts),
            None if drain.phase() == DrainPhase::Handoff
                && offered.is_none_or(|(at, before)| now >= at + OFFER_EVERY || facts.in_flight < before) =>
            {
                *offered = Some((now, facts.in_flight));
                acts.push(Act::Offer { open_at_most: OFFERS_MAX });
            }
            None => {}
        }
    }

    /// Takes the end of the unloading.
    pub fn unloaded(&mut self, now: Moment) -> Vec<Act> {
        let mut acts = Vec::new();
        let Stage::Unloading { .. } = self.stage else { return acts };
        self.loaded = false;
        let upgrade = self.record.restart.as_ref().and_then(|restart| restart.upgrade.clone());
        match (self.leaving, upgrade) {
            (None, _) => {
                self.stage = Stage::Drained;
                self.cut = false;
                acts.push(Act::Publish);
            }
            (Some(Leaving::Restart), Some(name)) => {
                self.stage = Stage::Upgrading { by: now + self.rules.upgrade_max };
                acts.extend([Act::Publish, Act::Upgrade(name)]);
            }
            // A signal's budget has no room for an upgrade.
            (Some(_), _) => self.exit(&mut acts),
        }
        acts
    }

    /// Takes the end of the upgrade; a failure does not stop the restart.
    pub fn upgraded(&mut self, outcome: UpgradeOutcome) -> Vec<Act> {
        let mut acts = Vec::new();
        if matches!(self.stage, Stage::Upgrading { .. }) {
            self.record.upgrade = Some(outcome);
            self.persist(&mut acts);
            self.exit(&mut acts);
        }
        acts
    }

    fn exit(&mut self, acts: &mut Vec<Act>) {
        self.stage = Stage::Stopped;
        let kind = if self.cut { ExitKind::StreamsCut } else { ExitKind::Clean };
        acts.extend([Act::Publish, Act::Exit(kind)]);
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "node_properties.rs"]
mod properties;
