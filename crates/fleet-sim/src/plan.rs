//! What a seed decides before anything runs: the size of the fleet, its versions, its traffic, its weather.

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
    /// It runs the version before: it offers no hand-over, continues nothing and takes no orders.
    pub(crate) old: bool,
}

/// The plan of one run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) nodes: Vec<NodePlan>,
    /// Whether each gateway is of the version before: it continues nothing and knows no new states.
    pub(crate) gateways: Vec<bool>,
    pub(crate) models: usize,
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

impl Plan {
    /// Draws a plan.
    pub(crate) fn draw(rng: &mut SmallRng) -> Self {
        let calm = rng.random_bool(0.25);
        let count = if calm { rng.random_range(3..=4) } else { rng.random_range(2..=4) };
        let models: usize = rng.random_range(1..=3);
        let mixed = !calm && rng.random_bool(0.2);
        let old_nodes = !calm && rng.random_bool(0.2);
        let old_gateways = !calm && rng.random_bool(0.15);
        let mut nodes: Vec<NodePlan> =
            (0..count).map(|_| NodePlan { models: Vec::new(), old: old_nodes && rng.random_bool(0.4) }).collect();
        for model in 0..models {
            let replicas = if calm { count } else { rng.random_range(1..=count) };
            let first = rng.random_range(0..count);
            for i in 0..replicas {
                let reads = u64::from(mixed && rng.random_bool(0.3));
                let build = Build { reads, computes: u64::from(rng.random_bool(0.2)) };
                nodes[(first + i) % count].models.push((model, build));
            }
        }
        Plan {
            nodes,
            gateways: (0..rng.random_range(1..=3)).map(|_| old_gateways && rng.random_bool(0.5)).collect(),
            models,
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
            node.models.iter().filter(|(known, _)| *known == model).map(|(_, build)| build.reads).collect::<Vec<_>>()
        };
        let mut builds: Vec<u64> = self.nodes.iter().flat_map(of_node).collect();
        builds.extend(self.bad_upgrades.then_some(crate::rollouts::BAD_READS));
        builds.sort_unstable();
        builds.dedup();
        builds
    }
}
