//! How the parts of a node are, judged by what was seen of them.

use std::time::Duration;

use words::{ComponentHealth, Health};

/// An engine with work that has not ended a step for this long should be looked at: even long prompts come in chunks.
pub const STEP_SLOW: Duration = Duration::from_secs(10);
/// After this long it is taken for stuck.
pub const STEP_STUCK: Duration = Duration::from_secs(60);
/// A gateway says something each second.
pub const SESSION_SLOW: Duration = Duration::from_secs(3);

/// What was seen of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthFacts {
    /// The control port: its connections.
    pub control_connections: usize,
    /// The data port, once it is bound: its address and connections.
    pub data: Option<(String, usize)>,
    /// Whether the node is in a state in which its data port is bound.
    pub serves: bool,
    /// The engines of models that serve.
    pub engines: Vec<EngineFacts>,
    /// The KV store.
    pub kv: KvFacts,
    /// Where the state directory is, if there is one, and why it can't be written, if it can't.
    pub state_dir: Option<(String, Option<String>)>,
    /// Downloads in hand.
    pub downloads: Vec<String>,
    /// The gateways that hold a session, and how long each was silent.
    pub sessions: Vec<(String, Duration)>,
    /// Hooks whose last run failed, and why.
    pub failing_hooks: Vec<(String, String)>,
}

/// One model's engine thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineFacts {
    /// The model.
    pub model: String,
    /// Whether the thread is there.
    pub alive: bool,
    /// Requests in the batch.
    pub running: usize,
    /// Requests queued.
    pub waiting: usize,
    /// Since its last step ended, or it began.
    pub step_age: Duration,
}

/// The KV store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvFacts {
    /// Whether anything is to be kept.
    pub wanted: bool,
    /// Blocks and bytes in memory.
    pub ram: (usize, u64),
    /// Blocks and bytes on disk, where the disk can be used.
    pub disk: Option<(usize, u64)>,
    /// Whether a folder is configured.
    pub disk_wanted: bool,
    /// Files that were no longer what was written.
    pub damaged: u64,
}

/// Judges the parts; always in this order, and each is there.
pub fn health(facts: &HealthFacts) -> Vec<ComponentHealth> {
    let part = |name: &str, (health, detail)| ComponentHealth { name: name.to_string(), health, detail };
    let connections = |count: usize| format!("{count} connections");
    let data = match &facts.data {
        Some((address, count)) => (Health::Ok, format!("{address}, {}", connections(*count))),
        None if facts.serves => (Health::Failed, "it should be bound and is not".to_string()),
        None => (Health::Off, "not bound yet".to_string()),
    };
    let mut parts =
        vec![part("control port", (Health::Ok, connections(facts.control_connections))), part("data port", data)];
    parts.extend(facts.engines.iter().map(|engine| part(&format!("engine {}", engine.model), of_engine(engine))));
    parts.push(part("KV store", of_store(&facts.kv)));
    parts.push(part(
        "state directory",
        match &facts.state_dir {
            None => (Health::Off, "node.state_dir is not set: intents do not outlive the process".to_string()),
            Some((path, None)) => (Health::Ok, format!("{path} can be written")),
            Some((path, Some(error))) => (Health::Failed, format!("{path} can't be written: {error}")),
        },
    ));
    parts.push(part(
        "downloads",
        match facts.downloads.as_slice() {
            [] => (Health::Off, "none".to_string()),
            running => (Health::Ok, running.join(", ")),
        },
    ));
    parts.push(part("gateways", of_sessions(&facts.sessions)));
    parts.push(part(
        "hooks",
        match facts.failing_hooks.as_slice() {
            [] => (Health::Ok, "none failed when it ran last".to_string()),
            failing => {
                let failing: Vec<String> = failing.iter().map(|(name, why)| format!("{name}: {why}")).collect();
                (Health::Degraded, failing.join("; "))
            }
        },
    ));
    parts
}

fn of_engine(engine: &EngineFacts) -> (Health, String) {
    let busy = engine.running + engine.waiting > 0;
    let detail = format!(
        "{} running, {} waiting, last step {:.1} s ago",
        engine.running,
        engine.waiting,
        engine.step_age.as_secs_f64()
    );
    match engine {
        EngineFacts { alive: false, .. } => (Health::Failed, "its thread has ended".to_string()),
        _ if busy && engine.step_age >= STEP_STUCK => (Health::Failed, format!("stuck: {detail}")),
        _ if busy && engine.step_age >= STEP_SLOW => (Health::Degraded, format!("slow: {detail}")),
        _ => (Health::Ok, detail),
    }
}

fn of_store(kv: &KvFacts) -> (Health, String) {
    let mib = |(blocks, bytes): (usize, u64)| format!("{blocks} blocks ({} MiB)", bytes >> 20);
    let disk = match kv.disk {
        Some(disk) => format!(", {} on disk", mib(disk)),
        None => String::new(),
    };
    let detail = format!("{} in memory{disk}", mib(kv.ram));
    match kv {
        KvFacts { wanted: false, .. } => (Health::Off, "nothing is to be kept".to_string()),
        KvFacts { disk_wanted: true, disk: None, .. } => {
            (Health::Degraded, format!("{detail}; its folder can't be used"))
        }
        KvFacts { damaged, .. } if *damaged > 0 => {
            (Health::Degraded, format!("{detail}; {damaged} files were damaged"))
        }
        _ => (Health::Ok, detail),
    }
}

fn of_sessions(sessions: &[(String, Duration)]) -> (Health, String) {
    let say = |(name, silent): &(String, Duration)| format!("{name} heard {:.1} s ago", silent.as_secs_f64());
    let detail = sessions.iter().map(say).collect::<Vec<_>>().join(", ");
    match sessions {
        [] => (Health::Off, "none is attached".to_string()),
        _ if sessions.iter().any(|(_, silent)| *silent >= SESSION_SLOW) => (Health::Degraded, detail),
        _ => (Health::Ok, detail),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(facts: &HealthFacts, name: &str) -> (Health, String) {
        let part = health(facts).into_iter().find(|part| part.name == name).unwrap();
        (part.health, part.detail)
    }

    #[test]
    fn a_node_that_has_just_begun_is_off_where_it_has_nothing_to_do_and_failed_nowhere() {
        let parts = health(&HealthFacts::default());
        assert!(parts.iter().all(|part| part.health <= Health::Ok), "{parts:?}");
        assert_eq!(of(&HealthFacts { serves: true, ..HealthFacts::default() }, "data port").0, Health::Failed);
    }

    #[test]
    fn an_engine_is_judged_by_its_last_step_only_while_it_has_work() {
        let engine = |alive, running, seconds| {
            let step_age = Duration::from_secs(seconds);
            let engines = vec![EngineFacts { model: "m".into(), alive, running, step_age, ..EngineFacts::default() }];
            of(&HealthFacts { engines, ..HealthFacts::default() }, "engine m").0
        };
        assert_eq!(engine(true, 0, 3600), Health::Ok);
        assert_eq!(
            [engine(true, 1, 9), engine(true, 1, 10), engine(true, 1, 60)],
            [Health::Ok, Health::Degraded, Health::Failed]
        );
        assert_eq!(engine(false, 0, 0), Health::Failed);
    }

    #[test]
    fn what_is_broken_is_named() {
        let facts = HealthFacts {
            kv: KvFacts { wanted: true, disk_wanted: true, ..KvFacts::default() },
            state_dir: Some(("/state".into(), Some("read-only".into()))),
            sessions: vec![("g".into(), SESSION_SLOW)],
            failing_hooks: vec![("pager".into(), "exit 1".into())],
            ..HealthFacts::default()
        };
        assert_eq!(
            of(&facts, "KV store"),
            (Health::Degraded, "0 blocks (0 MiB) in memory; its folder can't be used".into())
        );
        assert_eq!(of(&facts, "state directory"), (Health::Failed, "/state can't be written: read-only".into()));
        assert_eq!(of(&facts, "gateways").0, Health::Degraded);
        assert_eq!(of(&facts, "hooks"), (Health::Degraded, "pager: exit 1".into()));
        let damaged = KvFacts { wanted: true, damaged: 2, ..KvFacts::default() };
        assert_eq!(of(&HealthFacts { kv: damaged, ..HealthFacts::default() }, "KV store").0, Health::Degraded);
    }
}
