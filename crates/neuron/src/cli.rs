//! The command line of `neuron`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use service::exit;
use service::notify::Notifier;
use service::program::{ConfigArgs, Document, document, options, run};
use service::signals::Signals;
use tokio::net::TcpListener;

use crate::activation::spec_of;
use crate::harness::Harnesses;
use crate::node::{self, NodeError, Surroundings};
use crate::options::Options;

/// Runs models in process and serves them to a fleet.
#[derive(Debug, Parser)]
#[command(name = "neuron", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve models until SIGTERM, then drain and exit.
    Serve(ConfigArgs),
    /// Check the configuration and what it names, without serving.
    Check(ConfigArgs),
    /// Print what there is to know about the configuration.
    Config {
        /// What to print.
        #[arg(value_enum)]
        what: Document,
    },
}

/// The program.
#[allow(clippy::print_stdout)]
pub fn main() -> ExitCode {
    let code = match Cli::parse().command {
        Command::Serve(args) => options("neuron", &args, Options::check).map(|options| {
            let log = options.log.clone();
            run("neuron", &log, serve(options), code_of)
        }),
        Command::Check(args) => options("neuron", &args, Options::check).map(|options| check(&options)),
        Command::Config { what } => {
            print!("{}", document::<Options>("neuron", what));
            Ok(exit::CLEAN)
        }
    };
    ExitCode::from(code.unwrap_or_else(|code| code))
}

/// A configuration that can't work must not be restarted into.
fn code_of(error: &NodeError) -> u8 {
    match error {
        NodeError::Token(_) | NodeError::Name(_) | NodeError::Record(_) => exit::CONFIG,
        _ => exit::FAILURE,
    }
}

#[allow(clippy::print_stdout)]
fn check(options: &Options) -> u8 {
    let harnesses = Harnesses::new(&options.harness);
    let mut failed = 0;
    for entry in &options.default_models {
        let result = spec_of(entry).and_then(|spec| harnesses.find(&spec.harness)?.check(&spec));
        match result {
            Ok(()) => println!("{}: ok", entry.id),
            Err(error) => {
                println!("{}: {error}", entry.id);
                failed += 1;
            }
        }
    }
    println!("an exit takes at most {} s", options.drain.exit_budget().as_secs_f64());
    if failed > 0 { exit::CONFIG } else { exit::CLEAN }
}

async fn serve(options: Options) -> Result<u8, NodeError> {
    let bind = options.control.bind;
    let bound = |source| NodeError::Bind { what: "the control port", address: bind.to_string(), source };
    // Before anything is bound: `run` checks again, for those who embed it.
    node::guard_control(&options)?;
    let control = TcpListener::bind(bind).await.map_err(bound)?;
    let around = Surroundings {
        control,
        signals: Signals::listen().map_err(bound)?.forward(),
        notifier: Notifier::new(std::env::var_os("NOTIFY_SOCKET").as_deref()),
        host_name: host_name(),
        on_data_address: None,
    };
    node::run(options, around).await
}

/// The host's name as far as it can be a node id.
fn host_name() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let allowed = |c: &char| c.is_ascii_alphanumeric() || "-_.".contains(*c);
    let name: String = text.trim().chars().filter(allowed).take(64).collect();
    if name.is_empty() { "neuron".into() } else { name }
}
