//! Trains the demo model: `demo-model train CHECKPOINT`, then `demo-model export CHECKPOINT`.

mod corpus;
mod export;
mod model;
mod score;
mod tokenizer;
mod train;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let home = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["train", checkpoint] => train::run(&home, checkpoint.as_ref(), train::STEPS),
        ["train", checkpoint, steps] => {
            train::run(&home, checkpoint.as_ref(), steps.parse().context("STEPS must be a number")?)
        }
        ["score", checkpoint] => score::run(&home, checkpoint.as_ref()),
        ["export", checkpoint] => export::run(&home, checkpoint.as_ref()),
        _ => bail!("usage: demo-model train CHECKPOINT [STEPS] | score CHECKPOINT | export CHECKPOINT"),
    }
}
