//! `cortex status`: the fleet as a running gateway sees it.

use clap::Args;
use service::exit;
use words::{Intent, NodeState, NodeStatus};

use super::admin::{Admin, AdminArgs, FleetStatus, NodeView};

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

fn tell_problem(node: &NodeView) {
    if let Some(problem) = &node.problem {
        service::say!("{:<24} can't be heard: {problem}", "");
    }
}

pub(super) async fn status(args: StatusArgs) -> anyhow::Result<u8> {
    let admin = Admin::new(&args.admin)?;
    if args.json {
        service::say!("{:#}", admin.get::<serde_json::Value>("/api/status").await?);
        return Ok(exit::CLEAN);
    }
    let fleet: FleetStatus = admin.get("/api/status").await?;
    service::say!("gateway {}  ready {}", fleet.gateway, fleet.ready);
    service::say!(
        "{:<24} {:<16} {:<18} {:<8} {:<8} {:>8} MODELS",
        "CONTROL",
        "NODE",
        "STATE",
        "INTENT",
        "ROUTABLE",
        "RUNNING"
    );
    for node in &fleet.nodes {
        let Some(status) = &node.status else {
            service::say!("{:<24} {:<16} {:<18} {:<8} {:<8} {:>8}", node.control, "never heard", "-", "-", false, 0);
            tell_problem(node);
            continue;
        };
        let models = status.models.iter().map(|model| format!("{} ({})", model.id, word(&model.state)));
        let intent = if status.intent == Intent::None { "-".into() } else { word(&status.intent) };
        service::say!(
            "{:<24} {:<16} {:<18} {:<8} {:<8} {:>8} {}",
            node.control,
            status.node.as_str(),
            state_text(status.state),
            intent,
            node.routable,
            status.in_flight,
            models.collect::<Vec<_>>().join(", "),
        );
        tell_problem(node);
        if let Some(progress) = progress_text(status) {
            service::say!("{:<24} {progress}", "");
        }
        for model in &status.models {
            if let Some(failure) = &model.failure {
                service::say!("{:<24} {} ({}): {failure}", "", model.id, word(&model.state));
            }
        }
        if let Some(upgrade) = status.upgrade.as_ref().filter(|upgrade| !upgrade.ok) {
            service::say!("{:<24} the upgrade '{}' failed: {}", "", upgrade.name, upgrade.detail);
        }
    }
    Ok(exit::CLEAN)
}
