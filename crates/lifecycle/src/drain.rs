//! The drain machine: from the order to leave to an empty process, counted and bounded.
//!
//! ```text
//! settle --all gateways know, or settle_max--> closed --empty--> finished
//!                                                 |--soft deadline--> handoff --empty--> finished
//!                                                 |                      |
//!                                                 +--hard deadline or second signal--> force --empty or cut_max--> finished
//! ```
//! One budget covers all phases; the machine never waits for anything without a bound, and nothing puts its end off.

use std::time::Duration;

use words::{DrainPhase, Moment};

/// How long each phase may take. The sum, plus the unloading, is the exit's budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainBudget {
    /// Longest wait for the gateways to know.
    pub settle_max: Duration,
    /// From the start of the drain to the hand-over of what still runs; `None` hands nothing over.
    pub handoff: Option<Duration>,
    /// From the start of the drain to the cut of what still runs.
    pub deadline: Duration,
    /// Longest wait for cut streams to be flushed.
    pub cut_max: Duration,
}

impl DrainBudget {
    /// Returns the longest time from the start to the end of the drain.
    pub fn total(&self) -> Duration {
        self.settle_max.max(self.deadline) + self.cut_max
    }
}

/// What the machine needs to know of the world.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrainFacts {
    /// Requests accepted and not over.
    pub in_flight: usize,
    /// Attached gateways that have not acknowledged the draining generation.
    pub unaware_gateways: usize,
    /// A second signal came.
    pub forced: bool,
}

/// What the shell must do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainStep {
    /// Refuse new work and hand queued work back.
    Close,
    /// Begin to hand running streams over to other workers.
    HandOver,
    /// End what still runs with a typed error.
    Cut,
    /// Nothing runs any more, or its time is over: go on to unload.
    Finish,
}

/// One drain.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    phase: DrainPhase,
    close_at: Moment,
    handoff_at: Option<Moment>,
    cut_at: Moment,
    cut_max: Duration,
    /// The end of the force phase, once it has begun.
    over_at: Option<Moment>,
}

impl Drain {
    /// Begins at settle.
    pub fn begin(now: Moment, budget: DrainBudget) -> Self {
        let cut_at = now + budget.deadline;
        Drain {
            phase: DrainPhase::Settle,
            close_at: (now + budget.settle_max).min(cut_at),
            handoff_at: budget.handoff.map(|span| now + span),
            cut_at,
            cut_max: budget.cut_max,
            over_at: None,
        }
    }

    /// Begins at closed, for those who refuse new work already: nobody has to learn of it first.
    pub fn begin_closed(now: Moment, budget: DrainBudget) -> Self {
        Drain { phase: DrainPhase::Closed, ..Drain::begin(now, budget) }
    }

    /// Returns the phase.
    pub fn phase(&self) -> DrainPhase {
        self.phase
    }

    /// Returns when what still runs is handed over, unless it never is.
    pub fn handoff_at(&self) -> Option<Moment> {
        self.handoff_at.filter(|at| *at < self.cut_at)
    }

    /// Returns when what still runs is cut.
    pub fn cut_at(&self) -> Moment {
        self.cut_at
    }

    /// Returns the moment by which the drain is over.
    pub fn over_at(&self) -> Moment {
        self.over_at.unwrap_or(self.cut_at + self.cut_max)
    }

    /// Brings each deadline forward to where a drain that began now would have it; never puts one off.
    pub fn tighten(&mut self, now: Moment, budget: DrainBudget) {
        let fresh = Drain::begin(now, budget);
        self.close_at = self.close_at.min(fresh.close_at);
        self.handoff_at = self.handoff_at.into_iter().chain(fresh.handoff_at).min();
        self.cut_at = self.cut_at.min(fresh.cut_at);
        self.cut_max = self.cut_max.min(fresh.cut_max);
    }

    /// Returns the moment by which `advance` must be called again.
    pub fn wake_at(&self) -> Moment {
        match self.phase {
            DrainPhase::Settle => self.close_at,
            DrainPhase::Closed => self.handoff_at().unwrap_or(self.cut_at),
            DrainPhase::Handoff => self.cut_at,
            DrainPhase::Force => self.over_at(),
        }
    }

    /// Goes on by one step where the facts allow it; call again until it returns `None`.
    pub fn advance(&mut self, now: Moment, facts: DrainFacts) -> Option<DrainStep> {
        match self.phase {
            DrainPhase::Settle if facts.unaware_gateways == 0 || facts.forced || now >= self.close_at => {
                self.phase = DrainPhase::Closed;
                Some(DrainStep::Close)
            }
            DrainPhase::Closed | DrainPhase::Handoff if facts.in_flight == 0 => Some(DrainStep::Finish),
            DrainPhase::Closed | DrainPhase::Handoff if facts.forced || now >= self.cut_at => {
                self.phase = DrainPhase::Force;
                self.over_at = Some(now + self.cut_max);
                Some(DrainStep::Cut)
            }
            DrainPhase::Closed if self.handoff_at().is_some_and(|at| now >= at) => {
                self.phase = DrainPhase::Handoff;
                Some(DrainStep::HandOver)
            }
            DrainPhase::Force if facts.in_flight == 0 || now >= self.over_at() => Some(DrainStep::Finish),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn budget() -> DrainBudget {
        DrainBudget {
            settle_max: Duration::from_secs(2),
            handoff: Some(Duration::from_secs(20)),
            deadline: Duration::from_secs(60),
            cut_max: Duration::from_secs(1),
        }
    }

    fn at(seconds: u64) -> Moment {
        Moment::after_start(Duration::from_secs(seconds))
    }

    #[test]
    fn an_idle_worker_without_gateways_is_through_at_once() {
        let mut drain = Drain::begin(at(5), budget());
        assert_eq!(drain.advance(at(5), DrainFacts::default()), Some(DrainStep::Close));
        assert_eq!(drain.advance(at(5), DrainFacts::default()), Some(DrainStep::Finish));
    }

    #[test]
    fn settle_waits_for_the_gateways_but_not_for_ever() {
        let mut drain = Drain::begin(at(0), budget());
        let unaware = DrainFacts { unaware_gateways: 1, ..DrainFacts::default() };
        assert_eq!(drain.advance(at(1), unaware), None);
        assert_eq!(drain.advance(at(2), unaware), Some(DrainStep::Close));
    }

    #[test]
    fn running_work_is_handed_over_then_cut_and_a_second_signal_ends_it() {
        let busy = DrainFacts { in_flight: 3, ..DrainFacts::default() };
        let mut drain = Drain::begin(at(0), budget());
        assert_eq!(drain.advance(at(0), busy), Some(DrainStep::Close));
        assert_eq!(drain.advance(at(19), busy), None);
        let mut forced = drain;
        assert_eq!(drain.advance(at(20), busy), Some(DrainStep::HandOver));
        assert_eq!(drain.advance(at(59), busy), None);
        assert_eq!(drain.advance(at(60), busy), Some(DrainStep::Cut));
        assert_eq!(drain.advance(at(61), busy), Some(DrainStep::Finish));
        assert_eq!(forced.advance(at(10), DrainFacts { forced: true, ..busy }), Some(DrainStep::Cut));
        let mut never = Drain::begin_closed(at(0), DrainBudget { handoff: None, ..budget() });
        assert_eq!((never.advance(at(59), busy), never.advance(at(60), busy)), (None, Some(DrainStep::Cut)));
    }

    proptest! {
        #[test]
        fn a_drain_ends_by_its_budget_whatever_happens(
            facts in proptest::collection::vec((0usize..3, 0usize..3, any::<bool>(), any::<bool>(), 0u64..5), 1..200)
        ) {
            let mut drain = Drain::begin(at(0), budget());
            let (mut now, mut steps) = (0, Vec::new());
            for (in_flight, unaware_gateways, forced, tightened, pause) in facts {
                now += pause;
                let (over, phase) = (drain.over_at(), drain.phase());
                if tightened {
                    drain.tighten(at(now), budget());
                }
                let facts = DrainFacts { in_flight, unaware_gateways, forced: forced && pause == 0 };
                while let Some(step) = drain.advance(at(now), facts) {
                    steps.push(step);
                    if step == DrainStep::Finish {
                        break;
                    }
                }
                prop_assert!(drain.over_at() <= over.max(at(now) + budget().cut_max), "nothing puts the end off");
                prop_assert!(drain.phase() >= phase, "phases never go back");
                if steps.last() == Some(&DrainStep::Finish) {
                    break;
                }
                prop_assert!(at(now) < drain.wake_at(), "DR2: nothing waits past its wake-up");
            }
            prop_assert!(steps.first().is_none_or(|step| *step == DrainStep::Close));
            prop_assert!(now as f64 <= budget().total().as_secs_f64() + 5.0);
        }
    }
}
