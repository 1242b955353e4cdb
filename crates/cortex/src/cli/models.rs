//! `cortex models|ps|load|unload`: the fleet's catalogue, what is loaded where, and orders that change it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use service::exit;
use words::ModelState;

use super::admin::{Admin, AdminArgs};
use super::pull::lines;
use super::status::word;
use super::table::Table;
use crate::models::{FleetModel, FleetModels, Line, Replica, SILENCE_MAX, Wanted};

/// A line is printed at least this often, also when nothing but the time has changed.
const SAY_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct LoadArgs {
    /// The model's id, or another name of it.
    model: String,
    /// The worker: its name, or its control address; the gateway chooses one when absent.
    #[arg(long, value_name = "NODE")]
    on: Option<String>,
    /// Load it only where memory is free: no idle model is unloaded for it.
    #[arg(long)]
    no_evict: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Debug, Args)]
pub(super) struct UnloadArgs {
    /// The model's id, or another name of it.
    model: String,
    /// The worker: its name, or its control address; all that have it when absent.
    #[arg(long, value_name = "NODE")]
    on: Option<String>,
    #[command(flatten)]
    admin: AdminArgs,
}

/// `512 MiB`, `1.5 GiB`; `-` for nothing.
fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    match bytes {
        0 => "-".into(),
        _ if mib < 1024.0 => format!("{mib:.0} MiB"),
        _ => format!("{:.1} GiB", mib / 1024.0),
    }
}

/// `45 s`, `12 min`, `3 h`.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

fn dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

/// `loading 42 %, 12 s left`.
fn state_text(state: ModelState, progress: f64, eta_s: Option<f64>) -> String {
    let left = eta_s.map(|eta| format!(", {eta:.0} s left")).unwrap_or_default();
    match state {
        ModelState::Fetching | ModelState::Loading | ModelState::Warming | ModelState::Recovering => {
            format!("{} {:.0} %{left}", word(&state), progress * 100.0)
        }
        _ => word(&state),
    }
}

pub(super) async fn models(args: ListArgs) -> Result<u8> {
    let admin = Admin::new(&args.admin)?;
    if args.json {
        service::say!("{:#}", admin.get::<serde_json::Value>("/api/models").await?);
        return Ok(exit::CLEAN);
    }
    let fleet: FleetModels = admin.get("/api/models").await?;
    let mut table = Table::new(&["MODEL", "STATE", ">CONTEXT", "ALIASES", "NODES", "DESCRIPTION"]);
    for FleetModel { id, state, card, context_length, replicas } in &fleet.models {
        let there = |replica: &&Replica| !matches!(replica.state, ModelState::Absent | ModelState::Failed);
        let nodes = replicas.iter().filter(there).map(|replica| replica.node.as_str()).collect::<Vec<_>>().join(", ");
        let aliases = card.aliases.iter().map(|alias| alias.as_str()).collect::<Vec<_>>().join(", ");
        let context = if *context_length == 0 { "-".into() } else { context_length.to_string() };
        let description = card.description.clone().unwrap_or_default();
        table.row([id.to_string(), word(state), context, dash(aliases), dash(nodes), dash(description)]);
        for failed in replicas.iter().filter(|replica| replica.state == ModelState::Failed) {
            table.note(format!(
                "failed on {}: {}",
                failed.node,
                failed.failure.as_deref().unwrap_or("no reason given")
            ));
        }
    }
    table.print();
    Ok(exit::CLEAN)
}

pub(super) async fn ps(args: ListArgs) -> Result<u8> {
    let admin = Admin::new(&args.admin)?;
    let mut fleet: FleetModels = admin.get("/api/models").await?;
    for model in &mut fleet.models {
        model.replicas.retain(|replica| !matches!(replica.state, ModelState::Absent | ModelState::Failed));
    }
    fleet.models.retain(|model| !model.replicas.is_empty());
    if args.json {
        service::say!("{:#}", serde_json::to_value(&fleet)?);
        return Ok(exit::CLEAN);
    }
    let mut table = Table::new(&["MODEL", "NODE", "STATE", ">MEMORY", ">RUNNING", ">WAITING", ">IDLE", "UNTIL"]);
    for model in &fleet.models {
        for replica in &model.replicas {
            let until = match replica.ttl_left_s {
                _ if replica.pinned => "pinned".into(),
                Some(left) => span(left),
                None => "-".into(),
            };
            let idle = if replica.running + replica.waiting > 0 { "-".into() } else { span(replica.idle_s.into()) };
            table.row([
                model.id.to_string(),
                replica.node.clone(),
                state_text(replica.state, replica.progress, replica.eta_s),
                size(replica.memory_bytes),
                replica.running.to_string(),
                replica.waiting.to_string(),
                idle,
                until,
            ]);
        }
    }
    table.print();
    for node in fleet.nodes.iter().filter(|node| node.memory.budget > 0) {
        service::say!("{}: {} of {} in use", node.node, size(node.memory.used), size(node.memory.budget));
    }
    Ok(exit::CLEAN)
}

/// Follows an order to its end at every worker.
async fn follow(admin: &Admin, path: &str, wanted: &Wanted, done: &str) -> Result<u8> {
    let mut answer = admin.post_stream(path, wanted).await?;
    let (begun, mut said) = (Instant::now(), (String::new(), Instant::now()));
    let (mut buffer, mut failed, mut ended) = (Vec::new(), 0, 0);
    while let Some(chunk) =
        tokio::time::timeout(SILENCE_MAX, answer.chunk()).await.context("the gateway has fallen silent")??
    {
        buffer.extend_from_slice(&chunk);
        for line in lines::<Line>(&mut buffer)? {
            let seconds = begun.elapsed().as_secs_f64();
            if let Some(error) = &line.error {
                eprintln!("{seconds:>6.1} s  {}: {error}", line.node);
                failed += 1;
            } else if line.done {
                service::say!("{seconds:>6.1} s  {}: {done}", line.node);
                ended += 1;
            } else {
                let text = format!("{}: {}", line.node, state_text(line.state, line.progress, line.eta_s));
                if text != said.0 || said.1.elapsed() > SAY_EVERY {
                    service::say!("{seconds:>6.1} s  {text}");
                    said = (text, Instant::now());
                }
            }
        }
    }
    match (failed, ended) {
        (0, 0) => bail!("the gateway ended the answer before the order was carried out; it stands"),
        (0, _) => Ok(exit::CLEAN),
        _ => Ok(exit::FAILURE),
    }
}

pub(super) async fn load(args: LoadArgs) -> Result<u8> {
    let wanted = Wanted { model: args.model, node: args.on, make_room: Some(!args.no_evict) };
    follow(&Admin::new(&args.admin)?, "/api/models/load", &wanted, "ready").await
}

pub(super) async fn unload(args: UnloadArgs) -> Result<u8> {
    let wanted = Wanted { model: args.model, node: args.on, make_room: None };
    follow(&Admin::new(&args.admin)?, "/api/models/unload", &wanted, "unloaded").await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans_are_told_in_units_that_fit() {
        let mib = 1 << 20;
        assert_eq!([size(0), size(300 * mib), size(1536 * mib)], ["-", "300 MiB", "1.5 GiB"]);
        assert_eq!([span(7), span(600), span(9000)], ["7 s", "10 min", "2 h"]);
        assert_eq!(state_text(ModelState::Loading, 0.42, Some(3.2)), "loading 42 %, 3 s left");
        assert_eq!(state_text(ModelState::Ready, 1.0, None), "ready");
    }
}
