//! `bench engine` times the engine beside its peer; `bench gguf` writes a random-weight model of a known shape;
//! `bench logprobs` compares the engine with another program on it.

mod engine;
mod gguf;
mod logprobs;

use std::path::PathBuf;

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
        out: PathBuf,
    },
    /// Time the engine beside llama.cpp, candle and the memory's speed.
    Engine(engine::EngineArgs),
    /// Compare the engine's logprobs with those of llama.cpp; fails where they differ by more than is explained there.
    Logprobs(logprobs::LogprobsArgs),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Gguf { shape, quant, seed, out } => gguf::write(shape, quant, seed, &out),
        Command::Engine(args) => engine::bench(&args),
        Command::Logprobs(args) => logprobs::compare(&args),
    }
}
