//! What follows when a model's engine has ended by itself: how long the model rests, and when it is given up.

use std::sync::Arc;
use std::time::Duration;

use lifecycle::{Restart, RestartPolicy, Restarts};
use tokio::sync::watch;
use words::{Code, Error, ModelId, Moment};

use super::Inner;
use super::load::{Product, Running, cancelled};
use crate::harness::{LoadFailure, LoadSpec};

/// An engine of this process that fails again this soon will fail once more.
const AGAIN: Duration = Duration::from_secs(60);
/// It is loaded again at once, and once.
const LOCAL: RestartPolicy =
    RestartPolicy { limit: 1, window: AGAIN, first: Duration::ZERO, longest: Duration::ZERO, proven: AGAIN };

/// The losses of one model since it was wanted.
pub(super) struct Losses {
    restarts: Restarts,
    window: Duration,
}

impl Losses {
    /// Begins with a clean record.
    pub(super) fn of(spec: Option<&LoadSpec>) -> Self {
        let policy = spec.and_then(|spec| spec.process.as_ref()).map_or(LOCAL, |process| process.restarts());
        Losses { restarts: Restarts::new(policy), window: policy.window }
    }

    /// The model serves from now on.
    pub(super) fn serving(&mut self, now: Moment) {
        self.restarts.serving(now);
    }

    /// Takes a loss, and says until when the model rests.
    ///
    /// # Errors
    /// `EngineFailed` with the reason when it is given up.
    pub(super) fn rest(&mut self, now: Moment, why: &str) -> Result<Moment, Error> {
        match self.restarts.lost(now) {
            Restart::At(at) => Ok(at),
            Restart::GiveUp(count) => {
                let often = if count == 1 { "once".to_string() } else { format!("{count} times") };
                let message = format!("{why}; lost {often} within {} s, and given up", self.window.as_secs_f64());
                Err(Error::new(Code::EngineFailed, message))
            }
        }
    }
}

/// What an engine shows by itself.
pub(super) enum Sign {
    /// It has ended, for this reason.
    Ended(String),
    /// It takes this much memory now, in bytes.
    Memory(u64),
}

impl Running {
    /// Waits for its end, or until its measured memory is another by more than a sixteenth. Safe to cancel.
    pub(super) async fn sign(&mut self) -> Sign {
        let memory = self.memory;
        let another = async {
            let Some(watched) = &mut self.watched else { return std::future::pending().await };
            while watched.changed().await.is_ok() {
                let bytes = watched.borrow_and_update().memory_bytes;
                if bytes.abs_diff(memory) > memory / 16 {
                    return bytes;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            biased;
            _ = &mut self.lost => {}
            bytes = another => return Sign::Memory(bytes),
        }
        let known = self.watched.as_ref().and_then(|watched| watched.borrow().lost.clone());
        Sign::Ended(known.map_or_else(|| "the engine has ended by itself".to_string(), |why| why.to_string()))
    }
}

/// Waits until a model has rested, before its engine is started again.
pub(super) async fn rest(
    inner: Arc<Inner>,
    id: ModelId,
    until: Moment,
    mut unwanted: watch::Receiver<bool>,
) -> Result<Product, LoadFailure> {
    let rested = tokio::time::sleep_until(inner.parts.clock.instant(until));
    tokio::select! {
        () = rested => {
            inner.parts.metrics.engine_restarted(id.as_str());
            Ok(Product::Over)
        }
        // The sender lives as long as its owner.
        _ = unwanted.wait_for(|unwanted| *unwanted) => Err(cancelled().into()),
    }
}
