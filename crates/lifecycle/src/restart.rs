//! An engine that was lost: when it is started again, and when it is given up.
//!
//! ```text
//! healthy --lost--> pause --start--> healthy ... after a time of health everything is forgiven
//!                     one loss too many within the window -> given up
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use words::Moment;

/// How patient an operator is with an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Most starts after losses within the window; 0: none at all.
    pub limit: u32,
    /// Losses that are older than this are not counted.
    pub window: Duration,
    /// The pause before the first start after a loss; each further one doubles it.
    pub first: Duration,
    /// Longest pause.
    pub longest: Duration,
    /// An engine that served for this long is a good one again: earlier losses are forgotten.
    pub proven: Duration,
}

/// What follows a loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// It is started again then.
    At(Moment),
    /// It was lost too often; so many times within the window, this one included.
    GiveUp(u32),
}

/// The record of one engine's losses: at most [`RestartPolicy::limit`] of them.
#[derive(Clone, Debug)]
pub struct Restarts {
    policy: RestartPolicy,
    losses: VecDeque<Moment>,
    /// Losses in a row without a proven time between them.
    row: u32,
    serving_since: Option<Moment>,
}

impl Restarts {
    /// Begins with a clean record.
    pub fn new(policy: RestartPolicy) -> Self {
        Restarts { policy, losses: VecDeque::new(), row: 0, serving_since: None }
    }

    /// The engine serves from now on.
    pub fn serving(&mut self, now: Moment) {
        self.serving_since.get_or_insert(now);
    }

    /// The engine is lost, or did not come up again; decides what follows.
    pub fn lost(&mut self, now: Moment) -> Restart {
        if self.serving_since.take().is_some_and(|since| now.since(since) >= self.policy.proven) {
            self.losses.clear();
            self.row = 0;
        }
        while self.losses.front().is_some_and(|at| now.since(*at) > self.policy.window) {
            self.losses.pop_front();
        }
        let count = self.losses.len() as u32;
        if count >= self.policy.limit {
            return Restart::GiveUp(count + 1);
        }
        self.losses.push_back(now);
        let doubled = 2u32.saturating_pow(self.row);
        self.row = self.row.saturating_add(1);
        Restart::At(now + self.policy.first.saturating_mul(doubled).min(self.policy.longest))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: u64) -> Moment {
        Moment::after_start(Duration::from_secs(seconds))
    }

    fn policy(limit: u32) -> RestartPolicy {
        let s = Duration::from_secs;
        RestartPolicy { limit, window: s(100), first: s(1), longest: s(8), proven: s(30) }
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_one_loss_too_many_ends_it() {
        let mut restarts = Restarts::new(policy(5));
        let pauses: Vec<Restart> = (0..6).map(|_| restarts.lost(at(10))).collect();
        let wanted = [11, 12, 14, 18, 18].map(|seconds| Restart::At(at(seconds)));
        assert_eq!(pauses[..5], wanted);
        assert_eq!(pauses[5], Restart::GiveUp(6));
        assert_eq!(Restarts::new(policy(0)).lost(at(0)), Restart::GiveUp(1));
    }

    #[test]
    fn an_engine_that_served_long_enough_begins_anew_and_one_that_did_not_does_not() {
        let mut restarts = Restarts::new(policy(2));
        restarts.serving(at(0));
        assert_eq!(restarts.lost(at(29)), Restart::At(at(30)));
        restarts.serving(at(31));
        assert_eq!(restarts.lost(at(40)), Restart::At(at(42)));
        restarts.serving(at(42));
        restarts.serving(at(60));
        assert_eq!(restarts.lost(at(72)), Restart::At(at(73)), "served from 42 to 72");
    }

    proptest! {
        #[test]
        fn no_window_has_more_starts_than_the_limit_unless_a_proven_time_lies_between(
            limit in 0u32..5, steps in proptest::collection::vec((0u64..60, any::<bool>()), 0..60)
        ) {
            let mut restarts = Restarts::new(policy(limit));
            let (mut now, mut since, mut starts, mut last) = (0, None::<u64>, Vec::<u64>::new(), 0);
            for (wait, serves) in steps {
                now += wait;
                if serves {
                    restarts.serving(at(now));
                    since.get_or_insert(now);
                    continue;
                }
                if since.take().is_some_and(|since| now - since >= 30) {
                    starts.clear();
                    last = 0;
                }
                starts.retain(|start| now - start <= 100);
                match restarts.lost(at(now)) {
                    Restart::GiveUp(count) => {
                        prop_assert_eq!(starts.len() as u32, limit, "given up too early");
                        prop_assert_eq!(count, limit + 1);
                    }
                    Restart::At(again) => {
                        prop_assert!((starts.len() as u32) < limit, "started too often");
                        let pause = again.since(at(now)).as_secs();
                        prop_assert!((1..=8).contains(&pause) && pause >= last.min(8));
                        (last, _) = (pause, starts.push(now));
                    }
                }
            }
        }
    }
}
