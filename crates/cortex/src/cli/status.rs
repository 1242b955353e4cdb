//! `cortex status`: the fleet as a running gateway sees it.

use clap::Args;
use service::exit;
use words::{Intent, NodeState, NodeStatus};

use super::admin::{Admin, AdminArgs, FleetStatus};
use super::table::Table;

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A word of the vocabulary as JSON writes it.
pub(super) fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_string)).unwrap_or_else(|| "?".into())
}

/// `draining:closed`, `ready`.
pub(super) fn state_text(state: NodeState) -> String {
    let value = serde_json::to_value(state).unwrap_or_default();
    let words = [value["state"].as_str(), value["phase"].as_str()];
    words.into_iter().flatten().collect::<Vec<_>>().join(":")
}

/// What the node waits for, and how long at most.
pub(super) fn progress_text(status: &NodeStatus) -> Option<String> {
    let progress = status.drain.as_ref()?;
    let left = std::time::Duration::from_millis(progress.deadline_ms).as_secs();
    Some(format!("waits {left} s at most for {}", progress.waiting_for))
}

pub(super) async fn status(args: StatusArgs) -> anyhow::Result<u8> {
    let admin = Admin::new(&args.admin)?;
    if args.json {
        service::say!("{:#}", admin.get::<serde_json::Value>("/api/status").await?);
        return Ok(exit::CLEAN);
    }
    let fleet: FleetStatus = admin.get("/api/status").await?;
    service::say!("gateway {}  ready {}", fleet.gateway, fleet.ready);
    let mut table = Table::new(&["CONTROL", "NODE", "STATE", "INTENT", "ROUTABLE", ">RUNNING", "MODELS"]);
    for node in &fleet.nodes {
        let problem = node.problem.as_ref().map(|problem| format!("can't be heard: {problem}"));
        let (control, routable) = (node.control.clone(), node.routable.to_string());
        let Some(status) = &node.status else {
            let dash = || "-".to_string();
            table.row([control, "never heard".into(), dash(), dash(), routable, "0".into(), String::new()]);
            problem.into_iter().for_each(|problem| table.note(problem));
            continue;
        };
        let models = status.models.iter().map(|model| format!("{} ({})", model.id, word(&model.state)));
        let models = models.collect::<Vec<_>>().join(", ");
        let intent = if status.intent == Intent::None { "-".into() } else { word(&status.intent) };
        let (name, running) = (status.node.to_string(), status.in_flight.to_string());
        table.row([control, name, state_text(status.state), intent, routable, running, models]);
        let conflict = "another worker has the same name, so neither gets requests: set node.id";
        let conflict = node.conflicted.then(|| conflict.to_string());
        let twice =
            node.same_as.as_ref().map(|first| format!("the same worker as {first}: list it once in [[neurons]]"));
        problem.into_iter().chain(conflict).chain(twice).chain(progress_text(status)).for_each(|note| table.note(note));
        for model in &status.models {
            if let Some(failure) = &model.failure {
                table.note(format!("{} ({}): {failure}", model.id, word(&model.state)));
            }
        }
        if let Some(upgrade) = status.upgrade.as_ref().filter(|upgrade| !upgrade.ok) {
            table.note(format!("the upgrade '{}' failed: {}", upgrade.name, upgrade.detail));
        }
    }
    table.print();
    Ok(exit::CLEAN)
}
