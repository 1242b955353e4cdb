//! Simulated time: one true time line, and what each process's clocks make of it.

use std::time::Duration;

use rand::Rng;
use words::Moment;

/// A point of the true time line, in microseconds since the simulation began. No machine under test sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct At(pub(crate) u64);

impl At {
    /// Returns the point `span` after this one.
    pub(crate) fn after(self, span: Duration) -> At {
        At(self.0 + span.as_micros() as u64)
    }

    /// Returns the time since an earlier point.
    pub(crate) fn since(self, earlier: At) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// Makes a span of milliseconds.
pub(crate) const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// Draws a span from a range of milliseconds.
pub(crate) fn draw_ms(rng: &mut impl Rng, least: u64, most: u64) -> Duration {
    Duration::from_micros(rng.random_range(least * 1_000..=most * 1_000))
}

/// The clocks of one process: the monotonic one starts with it, runs a little fast or slow and may jump forwards,
/// as after the suspension of its machine; the wall clock is off by any amount.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ProcessClock {
    born: At,
    /// Thousandths of a percent by which it runs fast.
    skew: i64,
    jumped: Duration,
    /// Milliseconds by which the wall clock is ahead.
    wall_ahead: i64,
}

impl ProcessClock {
    /// Makes the clocks of a process that starts now.
    pub(crate) fn start(now: At, rng: &mut impl Rng) -> Self {
        let (skew, wall_ahead) = (rng.random_range(-1_000..=1_000), rng.random_range(-500..=500));
        ProcessClock { born: now, skew, jumped: Duration::ZERO, wall_ahead }
    }

    /// Reads the monotonic clock.
    pub(crate) fn moment(&self, now: At) -> Moment {
        let true_us = now.0.saturating_sub(self.born.0) as i64;
        let us = true_us + true_us * self.skew / 100_000;
        Moment::after_start(Duration::from_micros(us.max(0) as u64) + self.jumped)
    }

    /// Returns when the monotonic clock will show `moment`, at the earliest now.
    pub(crate) fn at(&self, now: At, moment: Moment) -> At {
        let left = moment.since(self.moment(now)).as_micros() as i64;
        // One microsecond more, so that rounding never wakes anybody before the time.
        now.after(Duration::from_micros((left * 100_000 / (100_000 + self.skew)).max(0) as u64 + 1))
    }

    /// Reads the wall clock, in milliseconds.
    pub(crate) fn wall_ms(&self, now: At) -> u64 {
        (1_700_000_000_000 + now.0 as i64 / 1_000 + self.wall_ahead) as u64
    }

    /// Lets the monotonic clock jump forwards.
    pub(crate) fn jump(&mut self, span: Duration) {
        self.jumped += span;
    }

    /// Lets the wall clock jump either way.
    pub(crate) fn set_wall_ahead(&mut self, milliseconds: i64) {
        self.wall_ahead = milliseconds;
    }
}
