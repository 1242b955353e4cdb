//! Long runs against real processes; see `cargo xtask soak --help`.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use fleet_tests::{Fleet, programs, soak};
use serde_json::Value;

#[derive(Debug, Parser)]
#[command(name = "soak", about = "Long runs against real processes, checked word by word")]
struct Cli {
    #[command(subcommand)]
    run: Run,
    /// Print one line of JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Run {
    /// kill -9 of a random worker every few seconds, under long streams.
    Kill(KillArgs),
    /// Rolling restarts of the whole fleet under a steady load.
    Rollout(RolloutArgs),
    /// More models than memory under a mixed load.
    Swap(SwapArgs),
}

#[derive(Debug, Args)]
struct SwapArgs {
    /// How long clients ask, in seconds.
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Workers.
    #[arg(long, default_value_t = 2)]
    neurons: usize,
    /// Models in the catalogue of each.
    #[arg(long, default_value_t = 5)]
    models: usize,
    /// Models that each has memory for.
    #[arg(long, default_value_t = 2)]
    resident: usize,
    /// Time a load takes, in milliseconds.
    #[arg(long, default_value_t = 400)]
    load_ms: u64,
    /// How long a model that is never without work serves on while another waits for its memory, in milliseconds.
    #[arg(long, default_value_t = 2_000)]
    turn_ms: u64,
    /// Gateways.
    #[arg(long, default_value_t = 1)]
    gateways: usize,
    /// Clients at once, over all gateways.
    #[arg(long, default_value_t = 12)]
    clients: usize,
    /// Most tokens of an answer; one takes 10 ms.
    #[arg(long, default_value_t = 60)]
    tokens: u32,
    /// Chooses models, lengths and pauses.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Args)]
struct RolloutArgs {
    /// Workers.
    #[arg(long, default_value_t = 8)]
    neurons: usize,
    /// Places of each.
    #[arg(long, default_value_t = 8)]
    slots: usize,
    /// Streams at once, over two gateways.
    #[arg(long, default_value_t = 45)]
    streams: usize,
    /// Tokens of each stream; one takes 20 ms.
    #[arg(long, default_value_t = 500)]
    tokens: u32,
    /// Rolling restarts.
    #[arg(long, default_value_t = 3)]
    rollouts: usize,
    /// Workers that may be out at once.
    #[arg(long, default_value_t = 1)]
    max_unavailable: u32,
    /// The quiet phase before, in seconds.
    #[arg(long, default_value_t = 60)]
    quiet_s: u64,
    /// Longest time for one rolling restart, in seconds.
    #[arg(long, default_value_t = 900)]
    rollout_max_s: u64,
}

#[derive(Debug, Args)]
struct KillArgs {
    /// How long workers are killed, in seconds.
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Time between two kills, in milliseconds.
    #[arg(long, default_value_t = 3_000)]
    every_ms: u64,
    /// Workers.
    #[arg(long, default_value_t = 8)]
    neurons: usize,
    /// Streams at once.
    #[arg(long, default_value_t = 48)]
    streams: usize,
    /// Tokens of each stream; one takes 20 ms.
    #[arg(long, default_value_t = 520)]
    tokens: u32,
    /// Streams that must have gone on at another worker.
    #[arg(long, default_value_t = 500)]
    continued_min: u64,
    /// Chooses the victims.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

async fn run(run: Run) -> anyhow::Result<Value> {
    let beside = std::env::current_exe()?;
    let program = |name: &str| beside.with_file_name(name).to_string_lossy().into_owned();
    let fleet = Fleet::new(programs(&program("test-cortex"), &program("test-neuron")))?;
    match run {
        Run::Rollout(args) => {
            let options = soak::RolloutOptions {
                neurons: args.neurons,
                slots: args.slots,
                streams: args.streams,
                tokens: args.tokens,
                rollouts: args.rollouts,
                max_unavailable: args.max_unavailable,
                quiet: Duration::from_secs(args.quiet_s),
                rollout_max: Duration::from_secs(args.rollout_max_s),
            };
            soak::rollout(&fleet, options).await
        }
        Run::Swap(args) => {
            let options = soak::SwapOptions {
                span: Duration::from_secs(args.seconds),
                neurons: args.neurons,
                models: args.models,
                resident: args.resident,
                load: Duration::from_millis(args.load_ms),
                turn: Duration::from_millis(args.turn_ms),
                gateways: args.gateways,
                clients: args.clients,
                tokens: args.tokens,
                seed: args.seed,
            };
            soak::swap(&fleet, options).await
        }
        Run::Kill(args) => {
            let options = soak::KillOptions {
                span: Duration::from_secs(args.seconds),
                every: Duration::from_millis(args.every_ms),
                neurons: args.neurons,
                streams: args.streams,
                tokens: args.tokens,
                continued_min: args.continued_min,
                seed: args.seed,
            };
            soak::kill(&fleet, options).await
        }
    }
}

#[allow(clippy::print_stdout)]
fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("soak: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(cli.run)) {
        Ok(report) => {
            if cli.json {
                println!("{report}");
            } else {
                println!("{report:#}");
            }
            if report["passed"] == true { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}
