//! `cortex lifecycle`: what workers run, went through, and how their parts are.

use anyhow::Result;
use clap::Args;
use service::exit;

use super::admin::{Admin, AdminArgs, segment};
use crate::lifecycle::Inspections;

#[derive(Debug, Args)]
pub(super) struct LifecycleArgs {
    /// The worker: its name, or its control address; all of them when absent.
    node: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) async fn show(args: LifecycleArgs) -> Result<u8> {
    let admin = Admin::new(&args.admin)?;
    let query = args.node.map(|node| format!("?node={}", segment(&node))).unwrap_or_default();
    let path = format!("/api/lifecycle{query}");
    if args.json {
        service::say!("{:#}", admin.get::<serde_json::Value>(&path).await?);
        return Ok(exit::CLEAN);
    }
    let seen: Inspections = admin.get(&path).await?;
    let mut failed = false;
    for node in seen.nodes {
        match (node.lifecycle, node.error) {
            (Some(lifecycle), _) => service::terminal::write(format_args!("{lifecycle}")),
            (None, error) => {
                failed = true;
                eprintln!("{}: {}", node.control, error.unwrap_or_default());
            }
        }
    }
    Ok(if failed { exit::FAILURE } else { exit::CLEAN })
}
