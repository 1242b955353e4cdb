//! `bench engine` times the engine beside its peer; `bench gateway` times the gateway beside a bare forwarder; `bench
//! hostile` attacks it; `bench kv` times what stored KV saves; `bench gguf` writes a random-weight model of a known shape; `bench logprobs` compares the engine with another program on it.

#[cfg(feature = "engine")]
mod engine;
mod gateway;
#[cfg(feature = "engine")]
mod gguf;
#[cfg(feature = "engine")]
mod kv;
#[cfg(feature = "engine")]
mod logprobs;
mod report;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "bench", about = "Generators of load and files")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a random-weight GGUF file; equal arguments give equal bytes on every machine.
    #[cfg(feature = "engine")]
    Gguf {
        /// The shape.
        #[arg(long, value_enum, default_value = "qwen3-0.6b")]
        shape: gguf::Shape,
        /// How weights are stored.
        #[arg(long, value_enum, default_value = "f16")]
        quant: gguf::Quant,
        /// Seeds the weights.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Where to.
        #[arg(long)]
        out: std::path::PathBuf,
    },
    /// Time the engine beside llama.cpp, candle and the memory's speed.
    #[cfg(feature = "engine")]
    Engine(engine::EngineArgs),
    /// Time the first token of a prompt whose beginning was computed before: by this engine, before a swap, a restart, a kill.
    #[cfg(feature = "engine")]
    Kv(kv::KvArgs),
    /// Compare the engine's logprobs with those of llama.cpp; fails where they differ by more than is explained there.
    #[cfg(feature = "engine")]
    Logprobs(logprobs::LogprobsArgs),
    /// Time the gateway beside a bare hyper forwarder, and nginx, in front of one paced worker.
    Gateway(gateway::GatewayArgs),
    /// Attack the gateway, and say what a good client and its memory feel of it.
    Hostile(gateway::HostileArgs),
    /// The paced worker.
    #[command(hide = true)]
    GatewayWorker(gateway::WorkerArgs),
    /// The bare forwarder.
    #[command(hide = true)]
    GatewayPeer(gateway::PeerArgs),
    /// The load alone, for whoever looks at a program with other tools.
    #[command(hide = true)]
    GatewayLoad(gateway::LoadArgs),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        #[cfg(feature = "engine")]
        Command::Gguf { shape, quant, seed, out } => gguf::write(shape, quant, seed, &out),
        #[cfg(feature = "engine")]
        Command::Engine(args) => engine::bench(&args),
        #[cfg(feature = "engine")]
        Command::Kv(args) => kv::bench(&args),
        #[cfg(feature = "engine")]
        Command::Logprobs(args) => logprobs::compare(&args),
        Command::Gateway(args) => gateway::bench(&args),
        Command::Hostile(args) => gateway::attack(&args),
        Command::GatewayWorker(args) => gateway::work(&args),
        Command::GatewayPeer(args) => gateway::forward(&args),
        Command::GatewayLoad(args) => gateway::load(&args),
    }
}
