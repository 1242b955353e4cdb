//! `bench engine` times the engine beside its peer; `bench gguf` writes a random-weight model of a known shape; `bench logprobs` compares the engine with another
//! program on it.

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
    /// Compare the engine's logprobs on a generated file with those that another program gave; fails where the top
    /// five differ by more than 0.01.
    Logprobs {
        /// The generated file.
        #[arg(long)]
        model: PathBuf,
        /// What the other program gave.
        #[arg(long, default_value = "tests/goldens/qwen3-0.6b-f16-600.json")]
        golden: PathBuf,
        /// Threads.
        #[arg(long, default_value_t = 2)]
        threads: usize,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Gguf { shape, quant, seed, out } => gguf::write(shape, quant, seed, &out),
        Command::Engine(args) => engine::bench(&args),
        Command::Logprobs { model, golden, threads } => logprobs::compare(&model, &golden, threads),
    }
}
