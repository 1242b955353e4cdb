//! What a seed decides before anything runs: the size of the fleet, its versions, its traffic, its weather.

use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

use crate::clock::{At, ms};

/// How a build of a model reads and computes. Only equal `reads` may continue each other's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Build {
    /// Stands for weights, tokenizer and template: another one gives other tokens.
    pub(crate) reads: u64,
    /// Stands for the order of sums.
    pub(crate) computes: u64,
}

/// What one node is.
#[derive(Clone, Debug)]
pub(crate) struct NodePlan {
    /// The models that it loads by default, by their place, with their builds.
    pub(crate) models: Vec<(usize, Build)>,
    /// The models that a request brings, with their builds.
    pub(crate) catalogue: Vec<(usize, Build)>,
    /// What models may take, in bytes: each one for itself beside those that are loaded by default.
    pub(crate) budget: u64,
    /// It runs the version before: it offers no hand-over, continues nothing and takes no orders.
    pub(crate) old: bool,
}

/// The plan of one run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) nodes: Vec<NodePlan>,
    /// Whether each gateway is of the version before: it continues nothing and knows no new states.
    pub(crate) gateways: Vec<bool>,
    /// Models that some node loads by default; their places come first.
    pub(crate) models: usize,
    /// Models that requests bring.
    pub(crate) on_demand: usize,
    /// How long a request waits for its model at a node.
    pub(crate) load_wait: Duration,
    pub(crate) requests: usize,
    /// Upgrades may leave nodes that answer wrongly.
    pub(crate) bad_upgrades: bool,
    /// Nothing fails by itself: whatever an operator does then costs no client an error.
    pub(crate) calm: bool,
    /// Share of control messages that come late or twice.
    pub(crate) odd_control: f64,
    /// Longest delay of a message, in microseconds.
    pub(crate) delay_us: u64,
    /// Longest delay of one in a hundred.
    pub(crate) delay_rare_us: u64,
    /// Faults and operators stop then.
    pub(crate) faults_until: At,
}

/// What a model takes, in bytes.
pub(crate) fn memory_of(model: usize) -> u64 {
    4 + model as u64
}

impl NodePlan {
    fn new(old: bool) -> Self {
        NodePlan { models: Vec::new(), catalogue: Vec::new(), budget: 0, old }
    }
}

impl Plan {
    /// Draws a plan.
    pub(crate) fn draw(rng: &mut SmallRng) -> Self {
        let calm = rng.random_bool(0.25);
        let count = if calm { rng.random_range(3..=4) } else { rng.random_range(2..=4) };
        let models: usize = rng.random_range(1..=3);
        let mixed = !calm && rng.random_bool(0.2);
        let old_nodes = !calm && rng.random_bool(0.2);
        let old_gateways = !calm && rng.random_bool(0.15);
        let mut nodes: Vec<NodePlan> = (0..count).map(|_| NodePlan::new(old_nodes && rng.random_bool(0.4))).collect();
        for model in 0..models {
            let replicas = if calm { count } else { rng.random_range(1..=count) };
            let first = rng.random_range(0..count);
            for i in 0..replicas {
                let reads = u64::from(mixed && rng.random_bool(0.3));
                let build = Build { reads, computes: u64::from(rng.random_bool(0.2)) };
                nodes[(first + i) % count].models.push((model, build));
            }
        }
        let on_demand: usize = rng.random_range(0..=2);
        for model in models..models + on_demand {
            let replicas = if calm { count } else { rng.random_range(1..=count) };
            let first = rng.random_range(0..count);
            for i in 0..replicas {
                let reads = u64::from(mixed && rng.random_bool(0.3));
                nodes[(first + i) % count].catalogue.push((model, Build { reads, computes: 0 }));
            }
        }
        for node in &mut nodes {
            let largest = node.catalogue.iter().map(|(model, _)| memory_of(*model)).max().unwrap_or_default();
            let loaded: u64 = node.models.iter().map(|(model, _)| memory_of(*model)).sum();
            node.budget = loaded + largest + rng.random_range(0..=3);
        }
        // Where nothing fails by itself, nobody who waits for memory is sent away.
        let load_wait = if calm { ms(90_000) } else { ms(rng.random_range(4_000..=12_000)) };
        Plan {
            nodes,
            gateways: (0..rng.random_range(1..=3)).map(|_| old_gateways && rng.random_bool(0.5)).collect(),
            models,
            on_demand,
            load_wait,
            requests: rng.random_range(30..=90),
            calm,
            bad_upgrades: !calm && rng.random_bool(0.5),
            odd_control: if calm || rng.random_bool(0.5) { 0.0 } else { 0.03 },
            delay_us: 2_000,
            delay_rare_us: if calm { 20_000 } else { 400_000 },
            faults_until: At::default().after(ms(45_000)),
        }
    }

    /// Returns the builds of a model that are anywhere in the fleet.
    pub(crate) fn builds(&self, model: usize) -> Vec<u64> {
        let of_node = |node: &NodePlan| {
            let listed = node.models.iter().chain(&node.catalogue).filter(|(known, _)| *known == model);
            listed.map(|(_, build)| build.reads).collect::<Vec<_>>()
        };
        let mut builds: Vec<u64> = self.nodes.iter().flat_map(of_node).collect();
        builds.extend(self.bad_upgrades.then_some(crate::rollouts::BAD_READS));
        builds.sort_unstable();
        builds.dedup();
        builds
    }
}
