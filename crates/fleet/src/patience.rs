//! When a silent attempt is given up: never by the length of an answer, only by silence.

use std::time::Duration;

use words::Moment;

/// Control plane and stream were both silent for this long: the worker is out of reach.
pub const UNREACHABLE_AFTER: Duration = Duration::from_secs(3);
/// A gateway that was not scheduled for this long has no right to judge others' silence.
pub const ASLEEP_AFTER: Duration = Duration::from_secs(1);
/// A stall is at least this many times the worker's own 99th percentile between tokens.
const STALL_TIMES_P99: u32 = 20;
/// How often an open attempt is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Silences that are borne.
#[derive(Clone, Copy, Debug)]
pub struct PatienceLimits {
    /// Before the first token. Workers that queue, load or prefill show a sign of life each second.
    pub first_event: Duration,
    /// From then on, at least.
    pub stall: Duration,
    /// Until when the load of the request's model is waited for.
    pub load_until: Moment,
}

/// What the watch sees of the world.
#[derive(Clone, Copy, Debug)]
pub struct PatienceFacts {
    /// When the worker's control plane was last heard.
    pub control_heard: Moment,
    /// The worker's 99th percentile between tokens, zero while unknown.
    pub inter_token_p99: Duration,
    /// The client has a token of it.
    pub begun: bool,
    /// The worker says of itself that the request's model is on its way: that is a sign of life while its control plane
    /// is heard.
    pub coming: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Look again then, or when something is heard.
    WaitUntil(Moment),
    /// The stream stood still for too long.
    Stalled,
    /// Stream and control plane are both silent.
    Unreachable,
    /// The model is still on its way, and the time to wait for it is over.
    StillLoading,
}

/// The watch over one attempt.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    heard: Moment,
    looked: Moment,
}

impl Patience {
    /// Begins to watch.
    pub fn new(now: Moment) -> Self {
        Patience { heard: now, looked: now }
    }

    /// Returns when to look first: no later than any verdict could fall.
    pub fn first_look(&self, limits: &PatienceLimits) -> Moment {
        (self.heard + LOOK_EVERY.min(limits.first_event).min(limits.stall)).min(limits.load_until)
    }

    /// Takes a sign of life of the stream.
    pub fn heard(&mut self, now: Moment) {
        (self.heard, self.looked) = (now, now);
    }

    /// Judges. Must be called again by the moment it returns.
    pub fn look(&mut self, now: Moment, limits: &PatienceLimits, facts: &PatienceFacts) -> Verdict {
        if now.since(self.looked) > LOOK_EVERY + ASLEEP_AFTER {
            // This process slept, or its client did not read: what it did not hear says nothing about the worker.
            self.heard = now;
        }
        self.looked = now;
        if facts.coming && now.since(facts.control_heard) < UNREACHABLE_AFTER {
            if now >= limits.load_until {
                return Verdict::StillLoading;
            }
            self.heard = now;
        }
        let limit = if facts.begun {
            limits.stall.max(facts.inter_token_p99.saturating_mul(STALL_TIMES_P99))
        } else {
            limits.first_event
        };
        let silent = now.since(self.heard);
        if silent >= limit {
            return Verdict::Stalled;
        }
        if silent >= UNREACHABLE_AFTER && now.since(facts.control_heard) >= UNREACHABLE_AFTER {
            return Verdict::Unreachable;
        }
        let next = (self.heard + limit).min(now + LOOK_EVERY);
        // Not later than the end of the wait for a load, where that is still to come.
        Verdict::WaitUntil(if now < limits.load_until { next.min(limits.load_until) } else { next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PatienceLimits =
        PatienceLimits { first_event: Duration::from_secs(30), stall: Duration::from_secs(5), load_until: LOAD_UNTIL };
    const LOAD_UNTIL: Moment = Moment::after_start(Duration::from_secs(100));

    fn at(ms: u64) -> Moment {
        Moment::after_start(Duration::from_millis(ms))
    }

    /// Looks as told until the verdict is not to wait; `control` says when the control plane was last heard.
    fn watch(begun: bool, p99: u64, control: impl Fn(Moment) -> Moment) -> (Moment, Verdict) {
        watch_load(begun, p99, control, |_| false)
    }

    /// As `watch`; `coming` says when the model is said to be on its way.
    fn watch_load(
        begun: bool,
        p99: u64,
        control: impl Fn(Moment) -> Moment,
        coming: impl Fn(Moment) -> bool,
    ) -> (Moment, Verdict) {
        let mut patience = Patience::new(at(0));
        let mut now = at(0);
        loop {
            let facts = PatienceFacts {
                control_heard: control(now),
                inter_token_p99: Duration::from_millis(p99),
                begun,
                coming: coming(now),
            };
            match patience.look(now, &LIMITS, &facts) {
                Verdict::WaitUntil(next) => {
                    assert!(next > now);
                    now = next;
                }
                verdict => return (now, verdict),
            }
        }
    }

    #[test]
    fn the_first_look_is_no_later_than_any_verdict() {
        for (first_event, stall) in [(30_000, 5_000), (100, 5_000), (30_000, 70), (1, 1)] {
            let [first_event, stall] = [first_event, stall].map(Duration::from_millis);
            let limits = PatienceLimits { first_event, stall, ..LIMITS };
            let first = Patience::new(at(7)).first_look(&limits);
            for begun in [false, true] {
                let facts =
                    PatienceFacts { control_heard: at(7), inter_token_p99: Duration::ZERO, begun, coming: false };
                let mut patience = Patience::new(at(7));
                assert!(matches!(patience.look(at(7), &limits, &facts), Verdict::WaitUntil(look) if look >= first));
            }
            assert!(first > at(7));
        }
    }

    #[test]
    fn a_stall_is_five_seconds_or_twenty_times_the_workers_own_pace() {
        assert_eq!(watch(true, 10, |now| now), (at(5_000), Verdict::Stalled));
        assert_eq!(watch(true, 600, |now| now), (at(12_000), Verdict::Stalled));
        assert_eq!(watch(false, 600, |now| now), (at(30_000), Verdict::Stalled));
    }

    #[test]
    fn silence_on_both_planes_is_known_after_three_seconds() {
        assert_eq!(watch(true, 1_000, |_| at(0)), (at(3_000), Verdict::Unreachable));
        assert_eq!(watch(false, 0, |_| at(0)), (at(3_000), Verdict::Unreachable));
    }

    #[test]
    fn a_model_on_its_way_is_a_sign_of_life_until_the_wait_is_over() {
        assert_eq!(watch_load(false, 0, |now| now, |_| true), (LOAD_UNTIL, Verdict::StillLoading));
        // From its end on a worker is held to its first token again.
        assert_eq!(watch_load(false, 0, |now| now, |now| now < at(40_000)), (at(69_500), Verdict::Stalled));
        // What a worker said that is out of reach since counts for nothing.
        assert_eq!(watch_load(false, 0, |now| now.min(at(8_000)), |_| true), (at(13_500), Verdict::Unreachable));
    }

    #[test]
    fn a_gateway_that_slept_starts_its_timers_anew() {
        let mut patience = Patience::new(at(0));
        let facts = PatienceFacts { control_heard: at(0), inter_token_p99: Duration::ZERO, begun: true, coming: false };
        assert_eq!(patience.look(at(60_000), &LIMITS, &facts), Verdict::WaitUntil(at(60_500)));
        assert_eq!(patience.look(at(60_500), &LIMITS, &facts), Verdict::WaitUntil(at(61_000)));
    }
}
