//! A point in time of one process, handed to every decision so that none reads a clock.

use std::ops::{Add, Sub};
use std::time::Duration;

/// Monotonic time since the process (or the simulation) began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(Duration);

impl Moment {
    /// The beginning.
    pub const ZERO: Moment = Moment(Duration::ZERO);

    /// Makes the moment that lies `elapsed` after the beginning.
    pub const fn after_start(elapsed: Duration) -> Self {
        Moment(elapsed)
    }

    /// Returns the time since the beginning.
    pub const fn elapsed(self) -> Duration {
        self.0
    }

    /// Returns the time from `earlier` to here, zero when `earlier` is later.
    pub fn since(self, earlier: Moment) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Moment {
    type Output = Moment;

    fn add(self, span: Duration) -> Moment {
        Moment(self.0.saturating_add(span))
    }
}

impl Sub<Moment> for Moment {
    type Output = Duration;

    fn sub(self, earlier: Moment) -> Duration {
        self.since(earlier)
    }
}
