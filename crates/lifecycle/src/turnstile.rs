//! Who is let through to an engine that has no scheduler of ours: so many at once, so many behind them, in their order.

use std::collections::{BTreeSet, VecDeque};

/// What bounds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnstileLimits {
    /// Most at the engine at once, at least one.
    pub max_running: usize,
    /// Most that wait.
    pub max_waiting: usize,
}

/// What becomes of one that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It goes through at once.
    Runs,
    /// It waits.
    Waits,
    /// There is no room to wait in, or the turnstile is closed.
    Refused,
}

/// The turnstile. Keys are their owner's and not used twice.
#[derive(Clone, Debug)]
pub struct Turnstile {
    limits: TurnstileLimits,
    running: BTreeSet<u64>,
    waiting: VecDeque<u64>,
    closed: bool,
}

impl Turnstile {
    /// Makes an open one.
    pub fn new(limits: TurnstileLimits) -> Self {
        Turnstile { limits, running: BTreeSet::new(), waiting: VecDeque::new(), closed: false }
    }

    /// Takes one that arrives.
    pub fn enter(&mut self, key: u64) -> Turn {
        if self.closed {
            return Turn::Refused;
        }
        if self.waiting.is_empty() && self.running.len() < self.limits.max_running.max(1) {
            self.running.insert(key);
            return Turn::Runs;
        }
        if self.waiting.len() >= self.limits.max_waiting {
            return Turn::Refused;
        }
        self.waiting.push_back(key);
        Turn::Waits
    }

    /// Takes the end of one, wherever it is; returns who goes through in its place.
    pub fn leave(&mut self, key: u64) -> Option<u64> {
        if !self.running.remove(&key) {
            self.waiting.retain(|waiting| *waiting != key);
            return None;
        }
        let next = self.waiting.pop_front()?;
        self.running.insert(next);
        Some(next)
    }

    /// Takes all out who wait.
    pub fn hand_back(&mut self) -> Vec<u64> {
        self.waiting.drain(..).collect()
    }

    /// Lets nobody in from now on.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Returns whether it was closed.
    pub fn closed(&self) -> bool {
        self.closed
    }

    /// Returns how many are at the engine.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Returns how many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::*;
    use proptest::prelude::*;

    fn turnstile(max_running: usize, max_waiting: usize) -> Turnstile {
        Turnstile::new(TurnstileLimits { max_running, max_waiting })
    }

    #[test]
    fn who_waits_goes_through_in_order_and_nobody_once_it_is_closed() {
        let mut turnstile = turnstile(1, 2);
        let turns = [1, 2, 3, 4].map(|key| turnstile.enter(key));
        assert_eq!(turns, [Turn::Runs, Turn::Waits, Turn::Waits, Turn::Refused]);
        assert_eq!(turnstile.leave(1), Some(2));
        assert_eq!(turnstile.leave(3), None);
        assert_eq!(turnstile.leave(2), None);
        turnstile.close();
        assert_eq!(turnstile.enter(5), Turn::Refused);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Enter,
        Leave(usize),
        HandBack,
    }

    fn step() -> impl Strategy<Value = Step> {
        let leave = any::<usize>().prop_map(Step::Leave);
        prop_oneof![
            4 => Just(Step::Enter), 3 => leave, 1 => Just(Step::HandBack)
        ]
    }

    proptest! {
        #[test]
        fn nobody_is_lost_overtaken_or_one_too_many(
            running in 1usize..4, waiting in 0usize..4, steps in proptest::collection::vec(step(), 0..80)
        ) {
            let mut turnstile = turnstile(running, waiting);
            // Each that is here, by its place in the order of arrival, and whether it runs.
            let mut here = BTreeMap::<u64, bool>::new();
            for (i, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Enter => match turnstile.enter(i as u64) {
                        Turn::Runs => _ = here.insert(i as u64, true),
                        Turn::Waits => _ = here.insert(i as u64, false),
                        Turn::Refused => {
                            let waits = here.values().filter(|runs| !**runs).count();
                            prop_assert_eq!((here.len() - waits, waits), (running, waiting));
                        }
                    },
                    Step::Leave(which) if !here.is_empty() => {
                        let key = *here.keys().nth(which % here.len()).unwrap();
                        here.remove(&key);
                        if let Some(next) = turnstile.leave(key) {
                            let first = here.iter().find(|(_, runs)| !**runs).map(|(key, _)| *key);
                            prop_assert_eq!(first, Some(next), "overtaken");
                            here.insert(next, true);
                        }
                    }
                    Step::Leave(_) => {}
                    Step::HandBack => {
                        for gone in turnstile.hand_back() {
                            prop_assert_eq!(here.remove(&gone), Some(false));
                        }
                    }
                }
                let runs = here.values().filter(|runs| **runs).count();
                prop_assert_eq!((turnstile.running(), turnstile.waiting()), (runs, here.len() - runs));
                prop_assert!(runs <= running && (runs == running || here.len() == runs), "work waits for nobody");
            }
        }
    }
}
