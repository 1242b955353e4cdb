//! Who may import whom: ARCHITECTURE.md's table, checked against what cargo resolves.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cargo;

/// What each crate may import of this workspace.
const INTERNAL: &[(&str, &[&str])] = &[
    ("words", &[]),
    ("lifecycle", &["words"]),
    ("fleet", &["words", "lifecycle"]),
    ("wire", &["words"]),
    ("inference", &["words"]),
    ("model-files", &["words"]),
    ("grammar", &["words", "inference"]),
    ("kernels", &[]),
    ("engine-candle", &["words", "inference", "model-files", "kernels"]),
    ("control", &["words", "lifecycle"]),
    ("service", &["words"]),
    ("hub", &["words", "service"]),
    ("hooks", &["words", "lifecycle", "service"]),
    ("kv-store", &["words", "inference"]),
    ("cortex", &["words", "lifecycle", "fleet", "wire", "control", "service"]),
    (
        "neuron",
        &[
            "words",
            "lifecycle",
            "wire",
            "inference",
            "grammar",
            "model-files",
            "engine-candle",
            "control",
            "service",
            "hub",
            "hooks",
            "kv-store",
        ],
    ),
    ("fleet-sim", &["words", "lifecycle", "fleet", "inference"]),
    ("bench", &["words", "wire", "control", "inference", "model-files", "engine-candle"]),
    ("xtask", &[]),
    ("demo-model", &["model-files"]),
    ("fleet-tests", &["cortex", "neuron", "service", "inference", "control", "words"]),
];

/// Crates that decide and never wait, and the simulation of those that do.
const PURE: &[&str] =
    &["words", "lifecycle", "fleet", "wire", "inference", "grammar", "model-files", "kernels", "fleet-sim"];
/// What those never see, however far down.
const WAITING: &[&str] = &["tokio", "axum", "tonic", "hyper", "reqwest", "candle-core"];
/// The only ones that name candle.
const HEAVY: &[&str] = &["engine-candle", "demo-model"];

/// What cargo knows: direct dependencies by kind, and all that is below.
pub(super) struct Graph {
    /// Normal dependencies, by crate.
    direct: BTreeMap<String, BTreeSet<String>>,
    /// Crates of this workspace.
    members: BTreeSet<String>,
}

/// Asks cargo.
pub(super) fn metadata() -> Result<Graph> {
    let output = cargo().args(["metadata", "--format-version", "1", "--locked"]).output()?;
    anyhow::ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    graph(&serde_json::from_slice(&output.stdout)?).context("cargo metadata has another shape")
}

fn graph(metadata: &Value) -> Option<Graph> {
    let packages = metadata["packages"].as_array()?;
    let names: BTreeMap<&str, &str> =
        packages.iter().filter_map(|package| Some((package["id"].as_str()?, package["name"].as_str()?))).collect();
    let members = metadata["workspace_members"].as_array()?;
    let members = members.iter().filter_map(|id| names.get(id.as_str()?).map(|name| name.to_string())).collect();
    let mut direct: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in metadata["resolve"]["nodes"].as_array()? {
        let entry = direct.entry(names.get(node["id"].as_str()?)?.to_string()).or_default();
        for dependency in node["deps"].as_array()? {
            let normal = dependency["dep_kinds"].as_array()?.iter().any(|kind| kind["kind"].is_null());
            if normal {
                entry.insert(names.get(dependency["pkg"].as_str()?)?.to_string());
            }
        }
    }
    Some(Graph { direct, members })
}

impl Graph {
    fn below(&self, name: &str) -> BTreeSet<&str> {
        let (mut found, mut open) = (BTreeSet::new(), vec![name]);
        while let Some(name) = open.pop() {
            for next in self.direct.get(name).into_iter().flatten() {
                if found.insert(next.as_str()) {
                    open.push(next);
                }
            }
        }
        found
    }
}

/// Names every breach.
pub(super) fn check(graph: &Graph) -> Vec<String> {
    let mut breaches = Vec::new();
    for member in &graph.members {
        let Some((_, allowed)) = INTERNAL.iter().find(|(name, _)| name == member) else {
            breaches.push(format!("the crate '{member}' has no row in the layer table"));
            continue;
        };
        for import in graph.direct.get(member).into_iter().flatten() {
            if graph.members.contains(import) && !allowed.contains(&import.as_str()) {
                breaches.push(format!("'{member}' imports '{import}', which its layer may not"));
            }
            if import.starts_with("candle") && !HEAVY.contains(&member.as_str()) {
                breaches.push(format!("'{member}' names {import}; only {HEAVY:?} may"));
            }
        }
        if PURE.contains(&member.as_str()) {
            let below = graph.below(member);
            breaches.extend(
                WAITING
                    .iter()
                    .filter(|name| below.contains(*name))
                    .map(|name| format!("'{member}' is pure, and {name} is somewhere below it")),
            );
        }
    }
    breaches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(edges: &[(&str, &str)]) -> Graph {
        let mut direct: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, to) in edges {
            direct.entry(from.to_string()).or_default().insert(to.to_string());
        }
        let members = INTERNAL.iter().map(|(name, _)| name.to_string()).collect();
        Graph { direct, members }
    }

    #[test]
    fn a_pure_crate_may_not_wait_however_far_down() {
        let breaches = check(&graph(&[("fleet", "helper"), ("helper", "tokio")]));
        assert_eq!(breaches, ["'fleet' is pure, and tokio is somewhere below it"]);
    }

    #[test]
    fn the_two_programs_never_import_each_other() {
        assert_eq!(check(&graph(&[("cortex", "neuron")])).len(), 1);
        assert_eq!(check(&graph(&[("neuron", "candle-core")])).len(), 1);
        assert!(check(&graph(&[("neuron", "engine-candle"), ("fleet", "words")])).is_empty());
    }
}
