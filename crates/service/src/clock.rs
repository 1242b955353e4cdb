//! The one place that reads clocks.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use words::Moment;

/// Monotonic time since the process began, and the wall clock for what clients see.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// Starts counting.
    pub fn start() -> Self {
        Clock { start: Instant::now() }
    }

    /// Returns the present.
    pub fn now(&self) -> Moment {
        Moment::after_start(self.start.elapsed())
    }

    /// Returns the instant at which `moment` comes, for timers.
    pub fn instant(&self, moment: Moment) -> tokio::time::Instant {
        (self.start + moment.elapsed()).into()
    }

    /// Returns the time left until `moment`.
    pub fn until(&self, moment: Moment) -> Duration {
        moment.since(self.now())
    }

    /// Returns what tells the wall clock's time at a moment of the past. It reads both clocks once, so that what it tells
    /// of several moments fits together.
    pub fn wall(&self) -> impl Fn(Moment) -> SystemTime + use<> {
        let (now, wall) = (self.now(), SystemTime::now());
        move |moment| wall.checked_sub(now.since(moment)).unwrap_or(UNIX_EPOCH)
    }

    /// Returns Unix seconds.
    pub fn unix_seconds(&self) -> u64 {
        self.unix_ms() / 1000
    }

    /// Returns Unix time in milliseconds.
    pub fn unix_ms(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
    }
}
