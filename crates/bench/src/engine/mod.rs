//! `bench engine`: the engine beside llama.cpp, beside candle, and beside the memory's speed, in one run.
//!
//! Each cell is timed in turns, ours and the peer's, and medians are compared; a ratio above 1 means that we are faster.

mod peer;
mod run;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use engine_candle::{Arithmetic, KernelOptions, KvType};

use crate::gguf;
use peer::Peer;
use run::{Runner, bandwidth, resident};

/// What `bench engine` is told.
#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    /// A Python with llama-cpp-python and numpy (see crates/bench/peers/llama_peer.py); without it there is no ratio.
    #[arg(long)]
    peer: Option<PathBuf>,
    /// Where the models are, or are made: qwen3-0.6b-{q4_k_m,q8_0,f16}.gguf. Q4_K_M needs the peer to be made.
    #[arg(long, default_value = "target/bench")]
    models: PathBuf,
    /// Only these files' types.
    #[arg(long, value_delimiter = ',', default_value = "q4_k_m,q8_0,f16")]
    quants: Vec<String>,
    /// Threads of both.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Turns a cell.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Fewer cells and turns.
    #[arg(long)]
    quick: bool,
    /// One line of JSON a cell.
    #[arg(long)]
    json: bool,
    /// Time plain candle too.
    #[arg(long)]
    candle: bool,
    /// The peer with flash attention.
    #[arg(long)]
    flash: bool,
}

/// One thing that is timed.
#[derive(Clone, Copy, Debug)]
enum Work {
    Prefill(usize),
    /// Tokens, after a context of so many.
    Decode(usize, usize),
    /// Tokens, for so many rows at once.
    Batch(usize, usize),
}

impl Work {
    fn name(self) -> String {
        match self {
            Work::Prefill(tokens) => format!("prefill {tokens}"),
            Work::Decode(_, depth) => format!("decode at {depth}"),
            Work::Batch(_, rows) => format!("batch of {rows}"),
        }
    }

    fn tokens(self) -> f64 {
        match self {
            Work::Prefill(tokens) | Work::Decode(tokens, _) => tokens as f64,
            Work::Batch(tokens, rows) => (tokens * rows) as f64,
        }
    }
}

const WORK: [Work; 9] = [
    Work::Prefill(128),
    Work::Prefill(512),
    Work::Prefill(2048),
    Work::Decode(32, 0),
    Work::Decode(24, 2048),
    Work::Decode(16, 4096),
    Work::Batch(24, 4),
    Work::Batch(16, 8),
    Work::Batch(12, 16),
];
const QUICK: [Work; 4] = [Work::Prefill(128), Work::Decode(24, 0), Work::Decode(12, 2048), Work::Batch(8, 16)];
/// Positions that every context has room for.
const CONTEXT: usize = 4608;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn model(folder: &Path, quant: &str, peer: Option<&mut Peer>) -> Result<Option<PathBuf>> {
    let path = |quant: &str| folder.join(format!("qwen3-0.6b-{quant}.gguf"));
    if path(quant).exists() {
        return Ok(Some(path(quant)));
    }
    std::fs::create_dir_all(folder)?;
    let write = |quant: gguf::Quant, to: &Path| -> Result<()> {
        let part = to.with_extension("part");
        gguf::write(gguf::Shape::Qwen3Small, quant, 1, &part)?;
        Ok(std::fs::rename(part, to)?)
    };
    match (quant, peer) {
        ("f16", _) => write(gguf::Quant::F16, &path("f16"))?,
        ("q8_0", _) => write(gguf::Quant::Q8_0, &path("q8_0"))?,
        ("q4_k_m", Some(peer)) => {
            if !path("f16").exists() {
                write(gguf::Quant::F16, &path("f16"))?;
            }
            peer.quantize(&path("f16"), &path(quant), 15)?;
        }
        ("q4_k_m", None) => {
            eprintln!("SKIPPED: q4_k_m needs --peer to be made");
            return Ok(None);
        }
        (other, _) => anyhow::bail!("quants are q4_k_m, q8_0 and f16, not '{other}'"),
    }
    Ok(Some(path(quant)))
}

fn time_peer(peer: &mut Peer, work: Work) -> Result<f64> {
    match work {
        Work::Prefill(tokens) => peer.prefill(tokens),
        Work::Decode(tokens, _) => peer.decode(tokens),
        Work::Batch(tokens, rows) => peer.batch(rows, tokens),
    }
}

fn time_ours(runner: &mut Runner, work: Work) -> Result<f64> {
    match work {
        Work::Prefill(tokens) => runner.prefill(tokens),
        Work::Decode(tokens, depth) => runner.decode(tokens, depth),
        Work::Batch(tokens, rows) => runner.batch(rows, tokens),
    }
}

/// One model's cells.
#[allow(clippy::print_stdout)]
fn compare(args: &EngineArgs, path: &Path, quant: &str, peer: &mut Option<Peer>, bytes_a_second: f64) -> Result<()> {
    let file = std::fs::metadata(path)?.len() as f64;
    let before = resident()?;
    let arithmetic = Arithmetic::Auto(KernelOptions { threads: args.threads, kv: KvType::F16, level: None });
    let mut ours = Runner::load(path, arithmetic, CONTEXT)?;
    let grown = resident()? - before;
    let limit = bytes_a_second / ours.read_per_token();
    if !args.json {
        println!(
            "\n{quant}: {} on {} threads, weights {:.2} of the file, memory {:.2}, ",
            ours.arithmetic(),
            args.threads,
            ours.weight_bytes() / file,
            grown / file
        );
        println!(
            "  memory reads {:.1} GB/s, so at most {limit:.0} tokens a second for one sequence",
            bytes_a_second / 1e9
        );
        println!(
            "{:<16} {:>9} {:>9} {:>7} {:>9} {:>9}",
            "tokens a second", "ours", "peer", "ratio", "candle", "of limit"
        );
    } else {
        println!(
            "{}",
            serde_json::json!({"cell": format!("{quant} memory"), "ours": grown, "peer": file, "ratio": file / grown})
        );
    }
    let mut candle = match args.candle {
        true => Some(Runner::load(path, Arithmetic::Candle, CONTEXT)?),
        false => None,
    };
    if let Some(peer) = peer {
        peer.open(path, args.threads, 16 * CONTEXT, args.flash)?;
    }
    let (work, rounds) = if args.quick { (QUICK.as_slice(), 3) } else { (WORK.as_slice(), args.rounds.max(1)) };
    for work in work.iter().copied() {
        if let Work::Decode(_, depth) = work {
            ours.fill(depth)?;
            candle.as_mut().map(|candle| candle.fill(depth)).transpose()?;
            peer.as_mut().map(|peer| peer.fill(depth)).transpose()?;
        }
        let mut seconds: [Vec<f64>; 3] = Default::default();
        for _ in 0..rounds {
            seconds[0].push(time_ours(&mut ours, work)?);
            if let Some(peer) = peer {
                seconds[1].push(time_peer(peer, work)?);
            }
            if let Some(candle) = &mut candle {
                seconds[2].push(time_ours(candle, work)?);
            }
        }
        let [ours, peer, candle] = seconds.map(|seconds| work.tokens() / median(seconds));
        let ratio = ours / peer;
        if args.json {
            println!(
                "{}",
                serde_json::json!({"cell": format!("{quant} {}", work.name()), "ours": ours, "peer": peer,
                "ratio": ratio, "candle": candle})
            );
        } else {
            let of_limit = if matches!(work, Work::Decode(..)) { ours / limit } else { f64::NAN };
            println!("{:<16} {ours:>9.1} {peer:>9.1} {ratio:>7.2} {candle:>9.1} {of_limit:>9.2}", work.name());
        }
    }
    Ok(())
}

/// Runs it all.
pub(crate) fn bench(args: &EngineArgs) -> Result<()> {
    let mut peer = args.peer.as_deref().map(Peer::start).transpose().context("the peer")?;
    if peer.is_none() {
        eprintln!("SKIPPED: without --peer there is nothing to compare with");
    }
    let bytes_a_second = bandwidth(args.threads);
    for quant in &args.quants {
        if let Some(path) = model(&args.models, quant, peer.as_mut())? {
            compare(args, &path, quant, &mut peer, bytes_a_second)?;
        }
    }
    Ok(())
}
