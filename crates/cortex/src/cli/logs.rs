//! `cortex logs`: what hooks, engines and the workers themselves said, and say.

use anyhow::{Result, bail};
use clap::Args;
use service::exit;
use service::telemetry::time_text;

use super::admin::{Admin, AdminArgs, segment};
use super::pull::lines;
use crate::logs::{LINES_DEFAULT, Line};

#[derive(Debug, Args)]
pub(super) struct LogsArgs {
    /// The model; the worker's own log when absent.
    #[arg(required_unless_present = "node")]
    model: Option<String>,
    /// The worker: its name, or its control address; every one that has the model when absent.
    #[arg(long)]
    node: Option<String>,
    /// Go on with lines that come.
    #[arg(long, short)]
    follow: bool,
    /// Most lines of those that are there.
    #[arg(long, short = 'n', default_value_t = LINES_DEFAULT)]
    lines: u32,
    /// Begin each line with its time.
    #[arg(long, short)]
    times: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) async fn logs(args: LogsArgs) -> Result<u8> {
    let admin = Admin::new(&args.admin)?;
    let query = format!("follow={}&lines={}", args.follow, args.lines);
    let path = match (&args.model, &args.node) {
        (Some(model), None) => format!("/api/models/{}/logs?{query}", segment(model)),
        (Some(model), Some(node)) => format!("/api/models/{}/logs?{query}&node={}", segment(model), segment(node)),
        (None, Some(node)) => format!("/api/nodes/{}/logs?{query}", segment(node)),
        (None, None) => bail!("say a model, or --node"),
    };
    let mut answer = admin.get_stream(&path).await?;
    let (mut buffer, mut failed) = (Vec::new(), false);
    while let Some(chunk) = answer.chunk().await? {
        buffer.extend_from_slice(&chunk);
        for Line { node, source, text, missed, error, at_unix_ms, .. } in lines(&mut buffer)? {
            if missed > 0 {
                eprintln!("{node}: {missed} lines were missed");
            }
            match error {
                Some(error) => {
                    failed = true;
                    eprintln!("{node}: {error}");
                }
                None if args.times => service::say!("{} {node} {source}: {text}", time_text(at_unix_ms)),
                None => service::say!("{node} {source}: {text}"),
            }
        }
    }
    Ok(if failed { exit::FAILURE } else { exit::CLEAN })
}
