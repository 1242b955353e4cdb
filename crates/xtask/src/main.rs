//! The project's chores, by running other programs: `cargo xtask demo | gen | tidy | sim | soak | bench | rpm`.

mod demo;
mod generate;
mod rpm;
mod tidy;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The project's chores")]
struct Cli {
    #[command(subcommand)]
    command: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Start a gateway and two workers on the demo model, ask a question, and serve until Ctrl-C.
    Demo {
        /// Exit after the answer; 0 only if it is the trained one.
        #[arg(long)]
        once: bool,
    },
    /// Write the generated files anew: examples, schemas and references of the configurations, metrics, gRPC code.
    Gen {
        /// Write nothing; fail where a file is stale.
        #[arg(long)]
        check: bool,
    },
    /// Check the house rules.
    Tidy,
    /// Run real processes for long while workers are killed or restarted, or swap models: soak kill | rollout | swap
    /// [--json].
    Soak {
        /// Passed on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run the simulated fleet over many seeds, in release mode; say what happened and what broke.
    Sim {
        /// Seeds to run.
        #[arg(long, default_value_t = 2_000)]
        seeds: u64,
        /// The first one.
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// Run this one alone and print all that happens.
        #[arg(long)]
        replay: Option<u64>,
        /// Print the counts as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make RPMs of the gateway, of the worker's cpu flavour, and of those for GPUs whose binaries are named.
    Rpm(rpm::RpmArgs),
    /// Run the load and file generators, in release mode.
    Bench {
        /// Passed on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

/// Returns the repository's root.
fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Returns cargo, as it runs this program.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command to its end.
fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

/// Builds both programs together, so that every chore shares what is built; returns the folder they are in.
fn build_programs() -> Result<PathBuf> {
    run(cargo().args(["build", "-p", "cortex", "-p", "neuron"]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join("debug"))
}

/// Builds the programs without the heavy engine, which a paced one stands for, and runs them.
fn soak(arguments: &[String]) -> Result<()> {
    let build = ["-p", "fleet-tests", "--no-default-features"];
    run(cargo().arg("build").args(build).arg("--bins"))?;
    run(cargo().arg("run").arg("--quiet").args(build).args(["--bin", "soak", "--"]).args(arguments))
}

/// Runs a benchmark. The gateway's needs the gateway beside it, and no engine, which takes long to build; that of stored
/// KV needs the worker.
fn bench(arguments: &[String]) -> Result<()> {
    let mut command = cargo();
    command.args(["run", "--release", "-p", "bench"]);
    if arguments.first().is_some_and(|name| ["gateway", "hostile"].contains(&name.as_str())) {
        run(cargo().args(["build", "--release", "-p", "cortex"]))?;
        command.arg("--no-default-features");
    }
    if arguments.first().is_some_and(|name| name == "kv") {
        run(cargo().args(["build", "--release", "-p", "neuron"]))?;
    }
    run(command.arg("--").args(arguments))
}

fn sim(seeds: u64, from: u64, replay: Option<u64>, json: bool) -> Result<()> {
    let mut command = cargo();
    command.args(["run", "--release", "--quiet", "-p", "fleet-sim", "--"]);
    command.args(["--seeds", &seeds.to_string(), "--from", &from.to_string()]);
    if let Some(seed) = replay {
        command.args(["--replay", &seed.to_string()]);
    }
    if json {
        command.arg("--json");
    }
    run(&mut command)
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Chore::Demo { once } => demo::run(once),
        Chore::Gen { check } => generate::run_chore(check),
        Chore::Tidy => tidy::run(),
        Chore::Soak { arguments } => soak(&arguments),
        Chore::Sim { seeds, from, replay, json } => sim(seeds, from, replay, json),
        Chore::Rpm(args) => rpm::make(&args),
        Chore::Bench { arguments } => bench(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
