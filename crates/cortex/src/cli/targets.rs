//! `cortex targets`: the workers for Prometheus' file-based discovery.

use anyhow::Result;
use clap::Args;
use serde_json::Value;
use service::exit;
use service::program::{ConfigArgs, options};

use super::admin::{Admin, AdminArgs};
use crate::options::Options;
use crate::targets::targets;

#[derive(Debug, Args)]
pub(super) struct TargetsArgs {
    /// Print the workers of this configuration file; a running gateway is asked otherwise.
    #[arg(long, short)]
    config: Option<std::path::PathBuf>,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) async fn print(args: TargetsArgs) -> Result<u8> {
    let found: Value = match args.config {
        None => Admin::new(&args.admin)?.get("/api/targets").await?,
        config => {
            let config = ConfigArgs { config, set: Vec::new() };
            match options("cortex", &config, Options::check) {
                Ok(options) => targets(options.neurons.iter().map(|neuron| neuron.control.as_str())),
                Err(code) => return Ok(code),
            }
        }
    };
    service::say!("{found:#}");
    Ok(exit::CLEAN)
}
