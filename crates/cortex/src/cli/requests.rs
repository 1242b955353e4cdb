//! `cortex requests` and `cortex cancel`: what runs, and its end before its time.

use anyhow::{Result, bail};
use clap::Args;
use serde_json::json;
use service::exit;

use super::admin::{Admin, AdminArgs, segment};
use super::table::Table;
use crate::requests::{Cancelled, Request, Running};

#[derive(Debug, Args)]
pub(super) struct RequestsArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct CancelArgs {
    /// The request: its x-request-id, or the id of its answer.
    #[arg(required_unless_present = "model", conflicts_with = "model")]
    id: Option<String>,
    /// All requests of this model.
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) async fn list(args: RequestsArgs) -> Result<u8> {
    let admin = Admin::new(&args.admin)?;
    if args.json {
        service::say!("{:#}", admin.get::<serde_json::Value>("/api/requests").await?);
        return Ok(exit::CLEAN);
    }
    let running: Running = admin.get("/api/requests").await?;
    let mut table = Table::new(&["REQUEST", "MODEL", "NODE", ">ATTEMPT", ">TOKENS", ">SECONDS"]);
    for Request { request_id, model, node, attempt, tokens, seconds, .. } in &running.requests {
        let node = node.clone().unwrap_or_else(|| "-".into());
        let (attempt, tokens) = (attempt.to_string(), tokens.to_string());
        table.row([request_id.clone(), model.clone(), node, attempt, tokens, format!("{seconds:.1}")]);
    }
    table.print();
    if running.total > running.requests.len() {
        service::say!("and {} newer ones", running.total - running.requests.len());
    }
    Ok(exit::CLEAN)
}

pub(super) async fn cancel(args: CancelArgs) -> Result<u8> {
    let admin = Admin::new(&args.admin)?;
    let path = match (&args.id, &args.model) {
        (Some(id), None) => format!("/api/requests/{}/cancel", segment(id)),
        (None, Some(model)) => format!("/api/models/{}/cancel", segment(model)),
        _ => bail!("say a request's id, or --model"),
    };
    let ended: Cancelled = admin.post(&path, &json!({})).await?;
    for request in &ended.requests {
        let node = request.node.as_deref().unwrap_or("no worker yet");
        service::say!("{} of {} ({node}): cancelled", request.request_id, request.model);
    }
    if !ended.unreachable.is_empty() {
        service::say!("no answer of {}: what came to them another way may still run", ended.unreachable.join(", "));
    }
    service::say!("{} cancelled", ended.cancelled);
    Ok(exit::CLEAN)
}
