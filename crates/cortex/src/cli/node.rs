//! `cortex drain|undrain|cordon|uncordon|restart|upgrade`: one order to one worker, watched to its end.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};
use service::exit;
use words::{Epoch, HandoffPolicy, Incarnation, Intent, NodeState, NodeStatus};

use super::admin::{Admin, AdminArgs, FleetStatus, segment};
use super::status::{progress_text, state_text};

/// How often the gateway is asked how far it has come.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A line is printed at least this often, also when nothing but the time has changed.
const SAY_EVERY: Duration = Duration::from_secs(5);
/// A gateway that doesn't answer for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    /// The worker: its name, or its control address.
    node: String,
    #[command(flatten)]
    admin: AdminArgs,
    /// Return as soon as the worker has taken the order.
    #[arg(long)]
    no_wait: bool,
    /// Longest wait until it is done, such as 90s, 10m or 2h.
    #[arg(long, value_name = "SPAN", value_parser = span, default_value = "2h")]
    wait_max: Duration,
}

#[derive(Debug, Args)]
pub(super) struct OrderArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Time that running requests have before they are cut, such as 30, 30s or 10m; the worker's own when absent.
    #[arg(long, value_name = "SPAN", value_parser = span)]
    deadline: Option<Duration>,
    /// When running requests are handed over to other workers.
    #[arg(long, value_enum, default_value = "soft")]
    handoff: Handoff,
}

#[derive(Debug, Args)]
pub(super) struct UpgradeArgs {
    /// The name of the command: [upgrade.NAME] in the worker's configuration.
    name: String,
    #[command(flatten)]
    order: OrderArgs,
}

/// When running requests are handed over.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Handoff {
    /// At once.
    Now,
    /// At the worker's soft deadline.
    Soft,
    /// Never: what does not end in time is cut.
    Never,
}

/// What is asked; also the last part of its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Drain,
    Undrain,
    Cordon,
    Uncordon,
    Restart,
}

impl Action {
    fn path(self) -> &'static str {
        match self {
            Action::Drain => "drain",
            Action::Undrain => "undrain",
            Action::Cordon => "cordon",
            Action::Uncordon => "uncordon",
            Action::Restart => "restart",
        }
    }
}

/// Reads `30`, `30s`, `500ms`, `10m`, `2h`.
fn span(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        other => return Err(format!("'{other}' is no unit; use ms, s, m or h")),
    };
    let number: f64 = digits.parse().map_err(|_| format!("'{text}' is no span of time such as 30s"))?;
    Duration::try_from_secs_f64(number * unit).map_err(|error| error.to_string())
}

/// What the gateway answers to an order.
#[derive(Debug, serde::Deserialize)]
struct Taken {
    /// The life that the order was given to.
    incarnation: Incarnation,
    /// The worker, as it published the order.
    status: NodeStatus,
}

pub(super) async fn lift(action: Action, args: NodeArgs) -> Result<u8> {
    give(action, args, serde_json::json!({}), None).await
}

pub(super) async fn order(action: Action, args: OrderArgs) -> Result<u8> {
    let body = body(&args);
    give(action, args.node, body, None).await
}

pub(super) async fn upgrade(args: UpgradeArgs) -> Result<u8> {
    let mut body = body(&args.order);
    body["upgrade"] = args.name.clone().into();
    give(Action::Restart, args.order.node, body, Some(&args.name)).await
}

fn body(args: &OrderArgs) -> serde_json::Value {
    let handoff = match args.handoff {
        Handoff::Now => HandoffPolicy::Now,
        Handoff::Soft => HandoffPolicy::Soft,
        Handoff::Never => HandoffPolicy::Never,
    };
    let mut body = serde_json::json!({ "handoff": handoff });
    if let Some(deadline) = args.deadline {
        body["deadline_s"] = deadline.as_secs_f64().into();
    }
    body
}

async fn give(action: Action, args: NodeArgs, body: serde_json::Value, upgrade: Option<&str>) -> Result<u8> {
    let admin = Admin::new(&args.admin)?;
    let path = format!("/api/nodes/{}/{}", segment(&args.node), action.path());
    let taken: Taken = admin.post(&path, &body).await?;
    service::say!("{}: {} ordered, epoch {}", taken.status.node, action.path(), taken.status.epoch.0);
    if args.no_wait {
        return Ok(exit::CLEAN);
    }
    let (begun, mut said, mut heard) = (Instant::now(), (String::new(), Instant::now()), Instant::now());
    while begun.elapsed() < args.wait_max {
        tokio::time::sleep(LOOK_EVERY).await;
        let fleet: FleetStatus = match admin.get("/api/status").await {
            Ok(fleet) => fleet,
            Err(error) if heard.elapsed() > SILENCE_MAX => return Err(error),
            Err(_) => continue,
        };
        heard = Instant::now();
        let Some(node) = fleet.node(taken.status.node.as_str()) else { continue };
        let Some(status) = &node.status else { continue };
        let silent = node.heard_s_ago.filter(|silent| *silent > 2.0);
        let text = match silent {
            Some(_) => "not heard from just now".to_string(),
            None => line(status),
        };
        let words = |text: &str| text.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
        if words(&text) != words(&said.0) || said.1.elapsed() > SAY_EVERY {
            service::say!("{:>6.1} s  {}: {text}", begun.elapsed().as_secs_f64(), status.node);
            said = (text, Instant::now());
        }
        if silent.is_none() && there(action, &taken, status)? {
            if let Some(name) = upgrade {
                check_upgrade(name, status)?;
            }
            service::say!("{}: done after {:.1} s", status.node, begun.elapsed().as_secs_f64());
            return Ok(exit::CLEAN);
        }
    }
    bail!("{} is not there after {} s; the order stands", taken.status.node, args.wait_max.as_secs())
}

/// Where the worker is, and what it waits for.
fn line(status: &NodeStatus) -> String {
    let running = format!("{}, {} running", state_text(status.state), status.in_flight);
    match progress_text(status) {
        Some(progress) => format!("{running}; {progress}"),
        None => running,
    }
}

/// Returns whether the order is carried out.
///
/// # Errors
/// When it never will be: a newer order came.
fn there(action: Action, taken: &Taken, status: &NodeStatus) -> Result<bool> {
    let Epoch(ours) = taken.status.epoch;
    let same_life = status.incarnation == taken.incarnation;
    if same_life && status.epoch.0 > ours {
        bail!("a newer order came, epoch {}: this one was at {ours}", status.epoch.0);
    }
    let fresh = !same_life || status.epoch.0 == ours;
    let alive = matches!(status.state, NodeState::Ready | NodeState::Held | NodeState::Drained);
    Ok(fresh
        && match action {
            Action::Drain => status.state == NodeState::Drained,
            Action::Undrain | Action::Uncordon => status.intent == Intent::None && alive,
            Action::Cordon => {
                status.intent == Intent::Cordon && (status.drain.is_none() || status.state != NodeState::Ready)
            }
            Action::Restart => !same_life && alive,
        })
}

fn check_upgrade(name: &str, status: &NodeStatus) -> Result<()> {
    let Some(upgrade) = status.upgrade.as_ref().filter(|upgrade| upgrade.name == name) else {
        bail!("{} came back without a word of the upgrade '{name}'", status.node);
    };
    ensure!(upgrade.ok, "{} came back, but the upgrade '{name}' failed: {}", status.node, upgrade.detail);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn spans_have_units_and_nothing_else_is_one() {
        for (text, ms) in [("30", 30_000), ("1.5s", 1_500), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(span(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for text in ["", "s", "1d", "-1s", "x2", "1e30h"] {
            assert!(span(text).is_err(), "{text}");
        }
    }
}
