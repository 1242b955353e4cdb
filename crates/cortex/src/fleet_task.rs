//! The owner of the fleet view: reports in, immutable snapshots out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fleet::{FleetView, Observation, Placements, Quarantine, Slot};
use service::clock::Clock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use words::{ModelId, NodeStatus};

use crate::metrics::Metrics;

/// Continuations that compute their past anew on one worker at once.
const PREFILLS_MAX: usize = 4;
/// Reports that wait; attach loops wait with them.
const REPORTS: usize = 256;

/// What an attach loop reports.
#[derive(Debug)]
pub(crate) enum Report {
    /// A status, pushed or polled.
    Status(Slot, Box<NodeStatus>),
    /// A sign of life.
    Heard(Slot),
    /// There is no connection, and why.
    Lost(Slot, String),
}

/// What the rest of the gateway sees of the fleet; cheap to clone.
#[derive(Clone)]
pub(crate) struct Fleet {
    view: watch::Receiver<Arc<FleetView>>,
    sent_since: Arc<[AtomicU32]>,
    prefills: Arc<[Arc<Semaphore>]>,
    /// Held for a decision, never over a wait.
    placements: Arc<Mutex<Placements>>,
}

/// A request that may wait at a worker for its model; dropped once it is answered.
pub(crate) struct LoadWait {
    placements: Arc<Mutex<Placements>>,
    model: ModelId,
    slot: Slot,
}

impl Drop for LoadWait {
    fn drop(&mut self) {
        self.placements.lock().unwrap_or_else(PoisonError::into_inner).leave(&self.model, self.slot);
    }
}

impl Fleet {
    /// Returns who waits where for a load, for one decision.
    pub(crate) fn placements(&self) -> MutexGuard<'_, Placements> {
        self.placements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request in that will wait at a worker, by the table that the decision was made with.
    pub(crate) fn wait_at(&self, placements: &mut Placements, model: &ModelId, slot: Slot) -> LoadWait {
        placements.enter(model, slot);
        LoadWait { placements: self.placements.clone(), model: model.clone(), slot }
    }

    /// Returns the id of the model that a name means which is no id itself.
    pub(crate) fn alias(&self, name: &ModelId) -> Option<ModelId> {
        self.view.borrow().alias(name).cloned()
    }

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

    /// Takes one of a worker's places for continuations that compute their past anew; `None` when none is free.
    pub(crate) fn prefill(&self, slot: Slot) -> Option<OwnedSemaphorePermit> {
        self.prefills.get(slot.0)?.clone().try_acquire_owned().ok()
    }

    /// Returns whether such a place is free.
    pub(crate) fn may_prefill(&self, slot: Slot) -> bool {
        self.prefills.get(slot.0).is_some_and(|places| places.available_permits() > 0)
    }

    /// Counts a request as sent.
    pub(crate) fn sent(&self, slot: Slot) {
        if let Some(count) = self.sent_since.get(slot.0) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Starts the task.
pub(crate) fn spawn(
    control_addresses: &[String],
    clock: Clock,
    metrics: Metrics,
    quarantine: Arc<Mutex<Quarantine>>,
) -> (Fleet, mpsc::Sender<Report>) {
    let view = FleetView::new(control_addresses.iter().cloned());
    let (sender, mut reports) = mpsc::channel(REPORTS);
    let (publish, watch) = watch::channel(Arc::new(view.clone()));
    let sent_since: Arc<[AtomicU32]> = control_addresses.iter().map(|_| AtomicU32::new(0)).collect();
    let prefills = control_addresses.iter().map(|_| Arc::new(Semaphore::new(PREFILLS_MAX))).collect();
    let fleet = Fleet { view: watch, sent_since: sent_since.clone(), prefills, placements: Arc::default() };
    tokio::spawn(async move {
        let (mut view, mut shown, mut told) = (view, BTreeMap::new(), BTreeSet::new());
        while let Some(report) = reports.recv().await {
            let now = clock.now();
            match report {
                Report::Status(slot, status) => {
                    let state = status.state;
                    convict(&quarantine, now, &status);
                    if let Observation::Fresh { changed } = view.observe(now, slot, *status) {
                        if let Some(count) = sent_since.get(slot.0) {
                            count.store(0, Ordering::Relaxed);
                        }
                        if changed {
                            log_change(&view, slot, state);
                            log_ambiguous(&view, &mut told);
                        }
                    }
                }
                Report::Heard(slot) => view.heard(now, slot),
                Report::Lost(slot, why) => view.unreachable(slot, why),
            }
            show(&view, &metrics, &mut shown, now);
            publish.send_replace(Arc::new(view.clone()));
        }
    });
    (fleet, sender)
}

/// Takes the breadcrumbs of a worker's crash.
fn convict(quarantine: &Mutex<Quarantine>, now: words::Moment, status: &NodeStatus) {
    if status.crumbs.is_empty() {
        return;
    }
    let mut table = quarantine.lock().unwrap_or_else(PoisonError::into_inner);
    let proven = table.crumbs(now, &status.crumbs);
    if proven > 0 {
        tracing::error!(node = %status.node, proven, "a crash names requests; they are refused for a while");
    }
}

fn log_change(view: &FleetView, slot: Slot, state: words::NodeState) {
    let Some(node) = view.node(slot) else { return };
    let Some(status) = &node.status else { return };
    tracing::debug!(node = %status.node, ?state, generation = status.generation.0, "node status");
    if node.conflicted {
        tracing::error!(node = %status.node, control = node.control_address, "two live processes use one node id");
    }
    if let Some(first) = node.same_as.and_then(|slot| view.node(slot)) {
        let (control, first) = (&node.control_address, &first.control_address);
        tracing::warn!(node = %status.node, control, first, "one worker is listed twice; the later entry gets no requests");
    }
}

/// Names each alias that means different models once for as long as it does.
fn log_ambiguous(view: &FleetView, told: &mut BTreeSet<ModelId>) {
    told.retain(|alias| view.ambiguous().any(|(name, _)| name == alias));
    for (alias, ids) in view.ambiguous() {
        if told.insert(alias.clone()) {
            let means = ids.iter().map(|id| id.as_str()).collect::<Vec<_>>().join(", ");
            tracing::warn!(%alias, means, "an alias means different models on different workers; the first is used");
        }
    }
}

/// Shows the view; `shown` are the models of the last call with their replicas.
fn show(view: &FleetView, metrics: &Metrics, shown: &mut BTreeMap<ModelId, usize>, now: words::Moment) {
    for (_, node) in view.nodes() {
        let labels = &[node.control_address.as_str()];
        metrics.routable.with_label_values(labels).set(i64::from(node.routable(now).is_some()));
        metrics.conflicted.with_label_values(labels).set(i64::from(node.conflicted));
    }
    let replicas = view.replicas(now);
    for gone in shown.keys().filter(|model| !replicas.contains_key(*model)) {
        // A label that is not there any more is what was wanted.
        let _ = metrics.replicas.remove_label_values(&[gone.as_str()]);
    }
    for (model, count) in &replicas {
        metrics.replicas.with_label_values(&[model.as_str()]).set(*count as i64);
    }
    *shown = replicas;
}
