//! The owner of the fleet view: reports in, immutable snapshots out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use fleet::{FleetView, Observation, Slot};
use service::clock::Clock;
use tokio::sync::{mpsc, watch};
use words::NodeStatus;

use crate::metrics::Metrics;

/// Reports that wait; attach loops wait with them.
const REPORTS: usize = 256;

/// What an attach loop reports.
#[derive(Debug)]
pub(crate) enum Report {
    /// A status, pushed or polled.
    Status(Slot, Box<NodeStatus>),
    /// A sign of life.
    Heard(Slot),
    /// The connection is gone.
    Lost(Slot),
}

/// What the rest of the gateway sees of the fleet; cheap to clone.
#[derive(Clone)]
pub(crate) struct Fleet {
    view: watch::Receiver<Arc<FleetView>>,
    sent_since: Arc<[AtomicU32]>,
}

impl Fleet {
    /// Returns the present view.
    pub(crate) fn view(&self) -> Arc<FleetView> {
        self.view.borrow().clone()
    }

    /// Returns a reader that wakes at each change.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<FleetView>> {
        self.view.clone()
    }

    /// Returns what was sent to a worker since its last report.
    pub(crate) fn sent_since(&self, slot: Slot) -> u32 {
        self.sent_since.get(slot.0).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// Counts a request as sent.
    pub(crate) fn sent(&self, slot: Slot) {
        if let Some(count) = self.sent_since.get(slot.0) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Starts the task.
pub(crate) fn spawn(control_addresses: &[String], clock: Clock, metrics: Metrics) -> (Fleet, mpsc::Sender<Report>) {
    let view = FleetView::new(control_addresses.iter().cloned());
    let (sender, mut reports) = mpsc::channel(REPORTS);
    let (publish, watch) = watch::channel(Arc::new(view.clone()));
    let sent_since: Arc<[AtomicU32]> = control_addresses.iter().map(|_| AtomicU32::new(0)).collect();
    let fleet = Fleet { view: watch, sent_since: sent_since.clone() };
    tokio::spawn(async move {
        let mut view = view;
        while let Some(report) = reports.recv().await {
            let now = clock.now();
            match report {
                Report::Status(slot, status) => {
                    let state = status.state;
                    if let Observation::Fresh { changed } = view.observe(now, slot, *status) {
                        if let Some(count) = sent_since.get(slot.0) {
                            count.store(0, Ordering::Relaxed);
                        }
                        if changed {
                            log_change(&view, slot, state);
                        }
                    }
                }
                Report::Heard(slot) => view.heard(now, slot),
                Report::Lost(slot) => view.lost(slot),
            }
            show(&view, &metrics, now);
            publish.send_replace(Arc::new(view.clone()));
        }
    });
    (fleet, sender)
}

fn log_change(view: &FleetView, slot: Slot, state: words::NodeState) {
    let Some(node) = view.node(slot) else { return };
    let Some(status) = &node.status else { return };
    tracing::debug!(node = %status.node, ?state, generation = status.generation.0, "node status");
    if node.conflicted {
        tracing::error!(node = %status.node, control = node.control_address, "two live processes use one node id");
    }
}

fn show(view: &FleetView, metrics: &Metrics, now: words::Moment) {
    for (_, node) in view.nodes() {
        let labels = &[node.control_address.as_str()];
        metrics.routable.with_label_values(labels).set(i64::from(node.routable(now).is_some()));
        metrics.conflicted.with_label_values(labels).set(i64::from(node.conflicted));
    }
}
