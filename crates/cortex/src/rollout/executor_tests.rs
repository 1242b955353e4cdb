//! Rules of the executor, with nodes that live in memory.
#![allow(clippy::unwrap_used)]
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use fleet::Slot;
use fleet::rollout::Policy;
use service::metrics::Registry;
use words::{
    Code, Epoch, Error, Hold, Incarnation, Intent, ModelId, ModelState, ModelStatus, NodeId, NodeState, NodeStatus,
};

use super::super::hands::Doing;
use super::super::store::tests::MemoryStore;
use super::super::store::{Lease, RolloutStore, Stored};
use super::*;
use crate::fleet_task::{self, Report};
use crate::metrics::Metrics;

/// How long a node is away.
const AWAY: Duration = Duration::from_millis(200);

/// Nodes in memory, the store between the gateways, and who ordered what.
#[derive(Default)]
struct Nodes {
    statuses: Mutex<Vec<NodeStatus>>,
    away: Mutex<Vec<(usize, std::time::Instant, NodeStatus)>>,
    orders: Mutex<Vec<(NodeId, u64)>>,
    wrong: AtomicBool,
}

fn gateway(name: &str) -> GatewayId {
    GatewayId::new(name).unwrap()
}

impl Nodes {
    fn new(names: &[&str]) -> Arc<Self> {
        let status = |name: &&str| {
            let mut status = NodeStatus::new(NodeId::new(*name).unwrap(), Incarnation { counter: 1, random: 1 });
            status.state = NodeState::Ready;
            status.data_address = "127.0.0.1:1".into();
            status.gateways = [gateway("g1"), gateway("g2")].into();
            status.models = vec![ModelStatus {
                state: ModelState::Ready,
                harness: "fake".into(),
                context_length: 1,
                ..ModelStatus::absent(ModelId::new("m").unwrap())
            }];
            status
        };
        Arc::new(Nodes { statuses: Mutex::new(names.iter().map(status).collect()), ..Nodes::default() })
    }

    /// Brings back those whose time has come, and returns what the others say.
    fn live(&self) -> Vec<(usize, NodeStatus)> {
        let mut statuses = self.statuses.lock().unwrap();
        let mut away = self.away.lock().unwrap();
        away.retain(|(i, since, back)| {
            let over = since.elapsed() >= AWAY;
            if over {
                statuses[*i] = back.clone();
            }
            !over
        });
        let here = |i: &usize| !away.iter().any(|(gone, ..)| gone == i);
        (0..statuses.len()).filter(here).map(|i| (i, statuses[i].clone())).collect()
    }

    fn order(&self, errand: &Errand) -> Result<NodeStatus, Error> {
        let i = self.live().into_iter().find(|(_, status)| status.node == *errand.step.node());
        let Some((i, _)) = i else { return Err(Error::new(Code::UpstreamFailed, "away")) };
        let mut statuses = self.statuses.lock().unwrap();
        let status = &mut statuses[i];
        match &errand.step {
            Step::Restart { order, .. } => {
                if order.seen != status.epoch || order.incarnation != Some(status.incarnation) {
                    return Err(Error::new(Code::Conflict, "stale"));
                }
                self.orders.lock().unwrap().push((status.node.clone(), errand.lease_revision));
                let mut back = status.clone();
                back.epoch = Epoch(status.epoch.0 + 1);
                back.incarnation = Incarnation { counter: 2, random: 2 };
                back.state = NodeState::Held;
                back.rollout = Some(errand.rollout.clone());
                back.hold = Some(Hold { rollout: errand.rollout.clone(), lease_revision: 1, ttl_ms: 1 });
                status.epoch = back.epoch;
                status.intent = Intent::Restart;
                status.rollout = back.rollout.clone();
                self.away.lock().unwrap().push((i, std::time::Instant::now(), back));
            }
            Step::Release { .. } => {
                (status.hold, status.state) = (None, NodeState::Ready);
                status.generation = status.generation.next();
            }
            Step::Fence { .. } => status.epoch.0 += 1,
            Step::Canary { .. } => {}
        }
        Ok(status.clone())
    }
}

struct InMemory(Arc<Nodes>);

impl Hands for InMemory {
    fn take(&self, errand: Errand) -> Doing {
        let nodes = self.0.clone();
        Box::pin(async move {
            if let Step::Canary { .. } = errand.step {
                let text = if nodes.wrong.load(Ordering::Relaxed) { "green" } else { "it is blue" };
                return Outcome::Answer { text: text.into() };
            }
            match nodes.order(&errand) {
                Ok(status) => Outcome::Taken(Box::new(status)),
                Err(error) if error.code() == Code::Conflict => Outcome::Refused(error),
                Err(error) => Outcome::Lost(error),
            }
        })
    }
}

/// A store that can be made to fail.
#[derive(Default)]
struct Fragile {
    inner: MemoryStore,
    broken: AtomicBool,
}

impl Fragile {
    fn check(&self) -> Result<(), StoreError> {
        let error = StoreError::Unusable { path: "x".into(), detail: "disk full".into() };
        if self.broken.load(Ordering::Relaxed) { Err(error) } else { Ok(()) }
    }

    fn rollout(&self) -> Rollout {
        self.inner.load().unwrap().rollout.unwrap()
    }
}

impl RolloutStore for Fragile {
    fn load(&self) -> Result<Stored, StoreError> {
        self.check().and_then(|()| self.inner.load())
    }
    fn swap(&self, expected: u64, fence: Option<u64>, rollout: &Rollout) -> Result<u64, StoreError> {
        self.check().and_then(|()| self.inner.swap(expected, fence, rollout))
    }
    fn swap_lease(&self, expected: &Lease, next: &Lease) -> Result<(), StoreError> {
        self.check().and_then(|()| self.inner.swap_lease(expected, next))
    }
}

fn start(name: &str, nodes: &Arc<Nodes>, store: &Arc<Fragile>) -> Running {
    let registry = Registry::new();
    let clock = Clock::start();
    let addresses: Vec<String> = nodes.statuses.lock().unwrap().iter().map(|status| status.node.to_string()).collect();
    let (fleet, reports) = fleet_task::spawn(&addresses, clock, Metrics::new(&registry).unwrap(), Arc::default());
    let told = nodes.clone();
    tokio::spawn(async move {
        loop {
            for (i, status) in told.live() {
                if reports.send(Report::Status(Slot(i), Box::new(status))).await.is_err() {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let shelf = Shelf::new(store.clone(), Path::new("memory"));
    let hands = Arc::new(InMemory(nodes.clone()));
    let metrics = RolloutMetrics::new(&registry).unwrap();
    Executor { fleet, clock, gateway: gateway(name), shelf, hands, metrics }.spawn()
}

fn store(change: impl FnOnce(&mut Policy)) -> Arc<Fragile> {
    let store = Arc::new(Fragile::default());
    let mut policy = Policy::new(["a", "b", "c"].map(|name| NodeId::new(name).unwrap()).into());
    policy.health_for = Duration::from_millis(300);
    policy.back_within = Duration::from_secs(5);
    change(&mut policy);
    store.swap(0, None, &Rollout::new(RolloutId::new("r-1").unwrap(), policy)).unwrap();
    store
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(30), "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn names(nodes: &Nodes) -> Vec<String> {
    nodes.orders.lock().unwrap().iter().map(|(node, _)| node.to_string()).collect()
}

#[tokio::test]
async fn a_rollout_goes_through_and_its_lease_is_given_back() {
    let (nodes, store) = (Nodes::new(&["a", "b", "c"]), store(|_| {}));
    let _one = start("g1", &nodes, &store);
    let _two = start("g2", &nodes, &store);
    until("done", || store.rollout().phase == Phase::Done).await;
    assert_eq!(names(&nodes), ["a", "b", "c"]);
    until("the lease is back", || store.inner.load().unwrap().lease.holder.is_none()).await;
}

#[tokio::test]
async fn a_successor_goes_on_when_the_coordinator_is_killed_and_acts_under_a_higher_revision() {
    let (nodes, store) = (Nodes::new(&["a", "b", "c"]), store(|_| {}));
    let one = start("g1", &nodes, &store);
    until("g1 coordinates", || store.inner.load().unwrap().lease.holder == Some(gateway("g1"))).await;
    let _two = start("g2", &nodes, &store);
    until("the first order", || !nodes.orders.lock().unwrap().is_empty()).await;
    one.task.abort();
    until("done", || store.rollout().phase == Phase::Done).await;
    let orders = nodes.orders.lock().unwrap().clone();
    let revisions: Vec<u64> = orders.iter().map(|(_, revision)| *revision).collect();
    assert_eq!(names(&nodes), ["a", "b", "c"], "no node was restarted twice");
    assert_eq!(revisions, [1, 2, 2]);
}

#[tokio::test]
async fn a_gateway_that_leaves_hands_the_lease_over_at_once() {
    let (nodes, store) = (Nodes::new(&["a", "b", "c"]), store(|policy| policy.health_for = Duration::from_secs(1)));
    let one = start("g1", &nodes, &store);
    until("g1 coordinates", || store.inner.load().unwrap().lease.holder == Some(gateway("g1"))).await;
    let _two = start("g2", &nodes, &store);
    one.stop().await;
    // The other gateway may have taken it already.
    assert_ne!(store.inner.load().unwrap().lease.holder, Some(gateway("g1")));
    let begun = std::time::Instant::now();
    until("g2 coordinates", || store.inner.load().unwrap().lease.holder == Some(gateway("g2"))).await;
    assert!(begun.elapsed() < Duration::from_secs(3), "it need not wait for a silence");
}

#[tokio::test]
async fn nothing_is_ordered_while_the_store_fails_and_it_goes_on_afterwards() {
    let (nodes, store) = (Nodes::new(&["a", "b", "c"]), store(|_| {}));
    let _one = start("g1", &nodes, &store);
    until("the first order", || !nodes.orders.lock().unwrap().is_empty()).await;
    store.broken.store(true, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(names(&nodes), ["a"]);
    store.broken.store(false, Ordering::Relaxed);
    until("done", || store.rollout().phase == Phase::Done).await;
    assert_eq!(names(&nodes), ["a", "b", "c"]);
}

#[tokio::test]
async fn a_wrong_canary_pauses_and_an_operators_abort_opens_the_node() {
    let canary = |policy: &mut Policy| {
        let model = ModelId::new("m").unwrap();
        policy.canary = Some(words::Canary { model, prompt: "which colour?".into(), answer: "blue".into() });
    };
    let (nodes, store) = (Nodes::new(&["a", "b", "c"]), store(canary));
    nodes.wrong.store(true, Ordering::Relaxed);
    let _one = start("g1", &nodes, &store);
    until("paused", || matches!(store.rollout().phase, Phase::Paused { .. })).await;
    assert!(store.rollout().phase != Phase::Running && names(&nodes) == ["a"]);
    // An operator's word through the store, by compare-and-swap like everybody's.
    until("aborting", || {
        let stored = store.inner.load().unwrap();
        let mut rollout = stored.rollout.unwrap();
        rollout.abort().unwrap();
        store.swap(stored.revision, None, &rollout).is_ok()
    })
    .await;
    until("aborted", || store.rollout().phase == Phase::Aborted).await;
    assert!(nodes.live().iter().all(|(_, status)| status.hold.is_none() && status.state == NodeState::Ready));
    assert_eq!(names(&nodes), ["a"]);
}
