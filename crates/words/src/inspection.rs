//! What a node runs, what it went through, and how its parts are: the inspector's snapshot.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Incarnation, ModelId, NodeId};

/// A node as its inspector sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// Its name.
    pub node: NodeId,
    /// Which of its lives.
    pub incarnation: Incarnation,
    /// When it was looked at, in milliseconds of Unix time.
    pub at_unix_ms: u64,
    /// Hooks on the way in, in the order in which they run.
    pub startup: Vec<LaneItem>,
    /// What a request to the data port passes, in order.
    pub middleware: Vec<LaneItem>,
    /// Hooks on the way out, in the order in which they run.
    pub shutdown: Vec<LaneItem>,
    /// The node's own states, the oldest first; the last 64.
    pub states: Vec<StateChange>,
    /// Its models', by id.
    pub models: Vec<ModelHistory>,
    /// How its parts are.
    pub health: Vec<ComponentHealth>,
}

/// One thing of a lane.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LaneItem {
    /// Its name.
    pub name: String,
    /// What it is for; may be empty.
    pub description: String,
    /// Where it comes from: a key of the configuration, a file, or the program.
    pub source: String,
    /// The turn of a hook; empty for middleware.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub event: String,
    /// Whether it can refuse what passes it.
    pub guard: bool,
    /// The longest that it takes or waits, in milliseconds, where time bounds it.
    pub timeout_ms: Option<u64>,
    /// How often a hook ran.
    pub runs: u64,
    /// How often it failed.
    pub failures: u64,
    /// Its last run.
    pub last: Option<ItemRun>,
}

/// How a run ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ItemRun {
    /// Why it failed; `None` for a success.
    pub failure: Option<String>,
    /// How long it took.
    pub seconds: f64,
    /// When it ended, in Unix seconds.
    pub at_unix_s: u64,
    /// The model it was for.
    pub model: Option<String>,
}

/// One step of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateChange {
    /// The state that it came into, as the status writes it.
    pub state: String,
    /// When, in milliseconds of Unix time.
    pub at_unix_ms: u64,
    /// Why, where the state does not say it all.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
}

/// What a model went through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelHistory {
    /// Which model.
    pub model: ModelId,
    /// The oldest first; the last 64.
    pub states: Vec<StateChange>,
}

/// How a part is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// It is not meant to run now.
    Off,
    /// As it should be.
    Ok,
    /// It works, and somebody should look.
    Degraded,
    /// It does not work, or nobody knows.
    #[default]
    Failed,
}

impl Health {
    /// Returns its word.
    pub fn name(self) -> &'static str {
        match self {
            Health::Off => "off",
            Health::Ok => "ok",
            Health::Degraded => "degraded",
            Health::Failed => "failed",
        }
    }
}

/// One part of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentHealth {
    /// Which part.
    pub name: String,
    /// How it is.
    pub health: Health,
    /// What was seen of it.
    pub detail: String,
}

fn lane(f: &mut fmt::Formatter<'_>, title: &str, items: &[LaneItem]) -> fmt::Result {
    writeln!(f, "{title}")?;
    if items.is_empty() {
        writeln!(f, "  (nothing)")?;
    }
    for item in items {
        let what = if item.event.is_empty() { String::new() } else { format!("{} ", item.event) };
        let guard = if item.guard { " [guard]" } else { "" };
        let bound = item.timeout_ms.map(|ms| format!(", {} s at most", ms as f64 / 1000.0)).unwrap_or_default();
        let said = if item.description.is_empty() { String::new() } else { format!(": {}", item.description) };
        writeln!(f, "  {what}{}{guard} ({}{bound}){said}", item.name, item.source)?;
        if let Some(last) = &item.last {
            let how = last.failure.as_deref().unwrap_or("ok");
            let of = last.model.as_ref().map(|model| format!(" for {model}")).unwrap_or_default();
            let (runs, failures) = (item.runs, item.failures);
            writeln!(f, "    last run{of}: {how} after {:.3} s; {runs} runs, {failures} failed", last.seconds)?;
        }
    }
    Ok(())
}

fn states(f: &mut fmt::Formatter<'_>, whose: &str, states: &[StateChange], now_ms: u64) -> fmt::Result {
    writeln!(f, "  {whose}")?;
    for change in states {
        let ago = now_ms.saturating_sub(change.at_unix_ms) as f64 / 1000.0;
        let why = if change.why.is_empty() { String::new() } else { format!(": {}", change.why) };
        writeln!(f, "    {ago:>10.1} s ago  {}{why}", change.state)?;
    }
    Ok(())
}

/// As a tree for a terminal.
impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} (incarnation {})", self.node, self.incarnation)?;
        lane(f, "startup", &self.startup)?;
        lane(f, "middleware", &self.middleware)?;
        lane(f, "shutdown", &self.shutdown)?;
        writeln!(f, "states")?;
        states(f, "node", &self.states, self.at_unix_ms)?;
        for model in &self.models {
            states(f, model.model.as_str(), &model.states, self.at_unix_ms)?;
        }
        writeln!(f, "health")?;
        for part in &self.health {
            writeln!(f, "  {:<9} {}: {}", part.health.name(), part.name, part.detail)?;
        }
        Ok(())
    }
}
