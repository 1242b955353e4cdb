//! `cortex rollout ...`: an operator's words to a running gateway.

use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;
use service::exit;
use words::{HandoffPolicy, ModelId, NodeId};

use super::ask::Ask;
use crate::cli::admin::{Admin, AdminArgs};

/// Longest time for an answer of the gateway.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Where rollouts are on the admin port.
const PATH: &str = "/api/rollout";
const LATE: &str = "the gateway did not answer in time";
/// How often `watch` looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often `watch` finds the gateway gone before it gives up.
const GONE_MAX: u32 = 20;

/// Restart the fleet node by node, without taking a model away.
#[derive(Debug, Args)]
pub(crate) struct RolloutArgs {
    #[command(subcommand)]
    command: Command,
    /// Any gateway that shares the store will do.
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Begin a rolling restart.
    Restart(Box<RestartArgs>),
    /// Show the last rollout.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show each change until the rollout is over or paused; fails unless it is done.
    Watch,
    /// Give no more orders.
    Pause,
    /// Go on; nodes that failed are looked at again.
    Resume,
    /// End it: permits are taken back, nodes under way come back and are opened.
    Abort,
}

#[derive(Debug, Args)]
struct RestartArgs {
    /// Nodes that may be out of service at once, for whatever reason: a number, or a share of the fleet like 25%.
    #[arg(long, value_name = "N|P%", default_value = "1")]
    max_unavailable: String,
    /// Replicas of a model that stay routable for every gateway; without MODEL= for all models. 1 by default. Of a model on
    /// demand a node that would load it counts as well.
    #[arg(long, value_name = "[MODEL=]N", value_parser = floor)]
    min_available: Vec<(Option<ModelId>, u32)>,
    /// A model that may have no replica for a while.
    #[arg(long, value_name = "MODEL")]
    allow_dark: Vec<ModelId>,
    /// The nodes to restart, in this order; all of them, as configured, when absent.
    #[arg(long, value_name = "NODE,...", value_delimiter = ',')]
    order: Vec<NodeId>,
    /// What each node that had the model must answer before it is opened, at temperature 0. The answer comes after
    /// the last '=' and need only be part of what the model says. MODEL: may be left out when the fleet has one model.
    #[arg(long, value_name = "[MODEL:]PROMPT=ANSWER")]
    canary: Option<String>,
    /// The [upgrade.NAME] of each node's own configuration to run before its restart.
    #[arg(long, value_name = "NAME")]
    upgrade: Option<String>,
    /// From the order to the cut of what still runs, in seconds; each node's own when absent.
    #[arg(long, value_name = "SECONDS")]
    deadline: Option<f64>,
    /// When running streams are handed over to other nodes.
    #[arg(long, value_enum, default_value = "soft")]
    handoff: Handoff,
    /// How long a node may take to come back with its models, in seconds; 600 by default.
    #[arg(long, value_name = "SECONDS")]
    back_within: Option<f64>,
    /// How long a node is healthy before the next one goes, in seconds; 10 by default.
    #[arg(long, value_name = "SECONDS")]
    health: Option<f64>,
    /// How long a node that came back waits for the coordinator before it looks after itself, in seconds; 60 by
    /// default.
    #[arg(long, value_name = "SECONDS")]
    hold_ttl: Option<f64>,
    /// How long the rollout waits for capacity before it pauses, in seconds; 300 by default.
    #[arg(long, value_name = "SECONDS")]
    wait: Option<f64>,
    /// Only print what would be done.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Handoff {
    /// As soon as the node is closed.
    Now,
    /// At the soft deadline.
    Soft,
    /// Never: what does not finish is cut at the deadline.
    Never,
}

fn floor(text: &str) -> Result<(Option<ModelId>, u32), String> {
    let number = |text: &str| text.parse().map_err(|_| format!("'{text}' is no number"));
    match text.rsplit_once('=') {
        Some((model, count)) => Ok((Some(ModelId::new(model).map_err(|error| error.to_string())?), number(count)?)),
        None => Ok((None, number(text)?)),
    }
}

impl RestartArgs {
    fn ask(self) -> Ask {
        let (named, rest): (Vec<_>, Vec<_>) = self.min_available.into_iter().partition(|(model, _)| model.is_some());
        Ask {
            order: self.order,
            max_unavailable: Some(self.max_unavailable),
            min_available: named.into_iter().filter_map(|(model, count)| Some((model?, count))).collect(),
            min_available_default: rest.last().map(|(_, count)| *count),
            allow_dark: self.allow_dark.into_iter().collect(),
            canary: self.canary,
            upgrade: self.upgrade,
            deadline_s: self.deadline,
            handoff: match self.handoff {
                Handoff::Now => HandoffPolicy::Now,
                Handoff::Soft => HandoffPolicy::Soft,
                Handoff::Never => HandoffPolicy::Never,
            },
            back_within_s: self.back_within,
            health_s: self.health,
            hold_ttl_s: self.hold_ttl,
            wait_s: self.wait,
            dry_run: self.dry_run,
        }
    }
}

/// The gateway's side of rollouts.
struct Remote(Admin);

impl Remote {
    async fn get(&self) -> anyhow::Result<Value> {
        tokio::time::timeout(ANSWER_MAX, self.0.get(PATH)).await.context(LATE)?
    }

    async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let path = format!("{PATH}{path}");
        tokio::time::timeout(ANSWER_MAX, self.0.post(&path, body)).await.context(LATE)?
    }
}

/// Runs one command; returns the exit code.
///
/// # Errors
/// What the gateway refused, in its words.
pub(crate) async fn run(args: RolloutArgs) -> anyhow::Result<u8> {
    let remote = Remote(Admin::new(&args.admin)?);
    let word = |path: &'static str| async {
        let changed = remote.post(path, &Value::Null).await?;
        service::say!("rollout {}: {}", text(&changed["id"]), text(&changed["phase"]));
        Ok(exit::CLEAN)
    };
    match args.command {
        Command::Restart(args) => {
            let begun = remote.post("", &serde_json::to_value(args.ask())?).await?;
            print_waves(&begun["waves"]);
            match begun["id"].as_str() {
                Some(id) => service::say!("rollout {id} has begun; 'cortex rollout watch' shows how it goes"),
                None => service::say!("nothing was done"),
            }
            Ok(exit::CLEAN)
        }
        Command::Status { json: true } => {
            service::say!("{:#}", remote.get().await?);
            Ok(exit::CLEAN)
        }
        Command::Status { json: false } => {
            let seen = remote.get().await?;
            headline(&seen).into_iter().chain(lines(&seen)).for_each(|line| service::say!("{line}"));
            Ok(exit::CLEAN)
        }
        Command::Watch => watch(&remote).await,
        Command::Pause => word("/pause").await,
        Command::Resume => word("/resume").await,
        Command::Abort => word("/abort").await,
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

fn print_waves(waves: &Value) {
    for (i, wave) in waves.as_array().into_iter().flatten().enumerate() {
        let nodes: Vec<_> = wave["nodes"].as_array().into_iter().flatten().map(text).collect();
        let left = wave["left"].as_array().into_iter().flatten();
        let left: Vec<_> = left.map(|entry| format!("{} x{}", text(&entry[0]), entry[1])).collect();
        let stays =
            if left.is_empty() { "they serve nothing".into() } else { format!("elsewhere: {}", left.join(", ")) };
        service::say!("{:>3}. restart {} ({stays})", i + 1, nodes.join(", "));
    }
}

fn headline(seen: &Value) -> Option<String> {
    let rollout = &seen["rollout"];
    if rollout.is_null() {
        return Some("there was no rollout yet".into());
    }
    let why = seen["why"].as_str().map(|why| format!(": {why}")).unwrap_or_default();
    Some(format!(
        "rollout {}  {}{why}  (coordinator {})",
        text(&rollout["id"]),
        text(&rollout["phase"]),
        text(&seen["coordinator"])
    ))
}

fn lines(seen: &Value) -> Vec<String> {
    let nodes = seen["rollout"]["nodes"].as_array().into_iter().flatten();
    let line = |node: &Value| {
        let note = seen["notes"][text(&node["node"])].as_str().unwrap_or_default();
        format!("  {:<20} {:<10} {note}", text(&node["node"]), text(&node["state"])).trim_end().to_string()
    };
    nodes.map(line).collect()
}

async fn watch(remote: &Remote) -> anyhow::Result<u8> {
    let mut shown: Vec<String> = Vec::new();
    let mut gone = 0;
    loop {
        let seen = match remote.get().await {
            Ok(seen) => seen,
            Err(error) if gone >= GONE_MAX => return Err(error),
            Err(_) => {
                gone += 1;
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
        };
        gone = 0;
        let now: Vec<_> = headline(&seen).into_iter().chain(lines(&seen)).collect();
        now.iter().filter(|line| !shown.contains(line)).for_each(|line| service::say!("{line}"));
        shown = now;
        match seen["rollout"]["phase"].as_str() {
            Some("done") => return Ok(exit::CLEAN),
            Some("running" | "aborting") => tokio::time::sleep(LOOK_EVERY).await,
            _ => return Ok(exit::FAILURE),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        rollout: RolloutArgs,
    }

    fn ask(words: &[&str]) -> Ask {
        let words = ["cortex", "restart"].iter().chain(words);
        match Cli::try_parse_from(words).unwrap().rollout.command {
            Command::Restart(args) => args.ask(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_of_a_restart_become_one_request() {
        let asked = ask(&[
            "--max-unavailable",
            "25%",
            "--min-available",
            "m=2",
            "--min-available",
            "0",
            "--allow-dark",
            "n",
            "--order",
            "b,a",
            "--canary",
            "m:x=y",
            "--handoff",
            "now",
            "--deadline",
            "5",
            "--dry-run",
        ]);
        let wanted = serde_json::json!({
            "order": ["b", "a"], "max_unavailable": "25%", "min_available": {"m": 2}, "min_available_default": 0,
            "allow_dark": ["n"], "canary": "m:x=y", "upgrade": null, "deadline_s": 5.0, "handoff": "now",
            "back_within_s": null, "health_s": null, "hold_ttl_s": null, "wait_s": null, "dry_run": true,
        });
        assert_eq!(serde_json::to_value(asked).unwrap(), wanted);
        assert!(Cli::try_parse_from(["cortex", "restart", "--min-available", "m=x"]).is_err());
    }

    #[test]
    fn a_status_shows_each_node_and_what_it_waits_for() {
        let seen = serde_json::json!({
            "rollout": {"id": "r-1", "phase": "paused", "nodes": [{"node": "a", "state": "failed"}]},
            "coordinator": "g1", "why": "a: it is gone", "notes": {"a": "it is gone"},
        });
        assert_eq!(headline(&seen).unwrap(), "rollout r-1  paused: a: it is gone  (coordinator g1)");
        assert_eq!(lines(&seen), ["  a                    failed     it is gone"]);
    }
}
