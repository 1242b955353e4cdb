//! Emptying one model of a node that stays: the drain machine, as for a whole node, over the model's own requests.

use std::time::Duration;

use lifecycle::{Drain, DrainBudget, DrainFacts, DrainStep, OFFER_EVERY, OFFERS_MAX};
use service::clock::Clock;
use tokio::sync::watch;
use words::{Code, DrainPhase};

use crate::metrics::Metrics;
use crate::ready::ReadyModel;
use crate::streams::Streams;

/// Hands queued requests back, lets running ones end or go elsewhere within the budget, and cuts the rest; without a
/// budget, or once `hurry` says so, at once. Returns how many were cut.
pub(crate) async fn empty(
    model: &ReadyModel,
    budget: Option<DrainBudget>,
    mut hurry: watch::Receiver<bool>,
    clock: Clock,
    streams: &Streams,
    metrics: &Metrics,
) -> usize {
    let now = DrainBudget { settle_max: Duration::ZERO, handoff: None, deadline: Duration::ZERO, cut_max: CUT_MAX };
    let mut hurried = *hurry.borrow() || budget.is_none();
    let mut drain = Drain::begin_closed(clock.now(), budget.filter(|_| !hurried).unwrap_or(now));
    let mut load = model.engine.watch();
    let mut cut = 0;
    model.engine.hand_back();
    loop {
        let busy = *load.borrow_and_update();
        let facts = DrainFacts { in_flight: busy.running + busy.waiting, unaware_gateways: 0, forced: false };
        match drain.advance(clock.now(), facts) {
            Some(DrainStep::Finish) => return cut,
            Some(DrainStep::Cut) => {
                cut = busy.running;
                model.engine.fail_all(Code::StreamCut, "the model was unloaded before the answer was complete");
            }
            Some(DrainStep::Close | DrainStep::HandOver) => {}
            None => {
                let mut wake = clock.instant(drain.wake_at());
                if drain.phase() == DrainPhase::Handoff {
                    let made = streams.offer(clock.now(), OFFERS_MAX, Some(&model.id));
                    metrics.handoffs_offered.inc_by(made as u64);
                    wake = wake.min(clock.instant(clock.now() + OFFER_EVERY));
                }
                tokio::select! {
                    // An engine whose thread has ended has nothing left.
                    changed = tokio::time::timeout_at(wake, load.changed()) => {
                        if let Ok(Err(_)) = changed {
                            return cut;
                        }
                    }
                    Ok(_) = hurry.wait_for(|hurry| *hurry), if !hurried => {
                        hurried = true;
                        drain = Drain::begin_closed(clock.now(), now);
                    }
                }
            }
        }
    }
}

/// Longest wait for cut requests to be told.
const CUT_MAX: Duration = Duration::from_secs(2);
