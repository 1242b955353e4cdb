//! `bench engine`: the engine beside llama.cpp, beside candle's own operations, and beside the memory's speed, in one run.
//!
//! Each cell is timed in turns, ours and the peers', and medians are compared; the peer of a cell is the faster of
//! llama.cpp with flash attention and without. A ratio above 1 means that we are faster.

mod peer;
mod run;
mod serving;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use engine_candle::{Arithmetic, KernelOptions, KvType};
use serde_json::json;

use crate::gguf;
use crate::report::{Report, median};
pub(crate) use peer::Peer;
pub(crate) use run::{BLOCK_TOKENS, load, token};
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
    /// Only these types of weights.
    #[arg(long, value_delimiter = ',', default_value = "q4_k_m,q8_0")]
    quants: Vec<String>,
    /// Threads of both.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Turns a cell.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Fewer cells, and no candle.
    #[arg(long)]
    quick: bool,
    /// One line of JSON a cell.
    #[arg(long)]
    json: bool,
    /// Only the cells whose name has this in it.
    #[arg(long, default_value = "")]
    only: String,
    /// Not the cells of a whole scheduler: mixed load and second turns.
    #[arg(long)]
    no_serving: bool,
}

/// One thing that is timed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
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

const WORK: [Work; 11] = [
    Work::Prefill(128),
    Work::Prefill(512),
    Work::Prefill(2048),
    Work::Decode(32, 0),
    Work::Decode(32, 512),
    Work::Decode(16, 4096),
    Work::Decode(12, 8192),
    Work::Batch(24, 2),
    Work::Batch(24, 4),
    Work::Batch(16, 8),
    Work::Batch(12, 16),
];
const QUICK: [Work; 4] = [Work::Prefill(128), Work::Decode(24, 0), Work::Decode(12, 512), Work::Batch(8, 16)];
/// Positions that every context has room for.
const CONTEXT: usize = 8192 + 64;

/// Finds or makes a model's file; `None`, and loudly, where only the peer could make it.
pub(crate) fn model(folder: &Path, quant: &str, peer: Option<&mut Peer>) -> Result<Option<PathBuf>> {
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
    // llama.cpp's numbers of its own types.
    let file_type = match quant {
        "f16" => return write(gguf::Quant::F16, &path("f16")).map(|()| Some(path("f16"))),
        "q8_0" => 7,
        "q4_k_m" => 15,
        other => anyhow::bail!("quants are q4_k_m, q8_0 and f16, not '{other}'"),
    };
    let Some(peer) = peer else {
        eprintln!("SKIPPED: {quant} needs --peer to be made");
        return Ok(None);
    };
    if !path("f16").exists() {
        write(gguf::Quant::F16, &path("f16"))?;
    }
    peer.quantize(&path("f16"), &path(quant), file_type)?;
    Ok(Some(path(quant)))
}

fn time_peer(peer: &mut Peer, work: Work) -> Result<f64> {
    match work {
        Work::Prefill(tokens) => peer.prefill(tokens),
        Work::Decode(tokens, _) => peer.decode(tokens),
        Work::Batch(tokens, rows) => peer.batch(rows, tokens),
    }
}

/// Both ways to run llama.cpp, each in a process of its own.
struct Peers([Peer; 2]);

impl Peers {
    fn start(python: &Path) -> Result<Self> {
        Ok(Peers([Peer::start(python)?, Peer::start(python)?]))
    }

    fn open(&mut self, path: &Path, threads: usize) -> Result<()> {
        let [plain, flash] = &mut self.0;
        plain.open(path, threads, CONTEXT, false)?;
        flash.open(path, threads, CONTEXT, true)
    }
}

/// A cell in tokens a second.
#[allow(clippy::print_stdout)]
fn cell(report: &Report, quant: &str, work: Work, [ours, plain, flash, candle]: [f64; 4], limit: f64) {
    let peer = plain.max(flash);
    let ratio = ours / peer;
    let of_limit = if matches!(work, Work::Decode(..)) { ours / limit } else { f64::NAN };
    if report.json {
        let cell = format!("{quant} {}", work.name());
        println!(
            "{}",
            json!({"cell": cell, "ours": ours, "peer": peer, "ratio": ratio, "candle": candle, "of_limit": of_limit})
        );
    } else {
        println!(
            "{:<16} {ours:>8.1} {plain:>8.1} {flash:>8.1} {ratio:>7.2} {candle:>8.1} {of_limit:>9.2}",
            work.name()
        );
    }
}

/// One model's cells.
fn compare(args: &EngineArgs, report: &Report, path: &Path, quant: &str, peers: &mut Option<Peers>) -> Result<()> {
    let file = std::fs::metadata(path)?.len() as f64;
    let (before, bytes_a_second) = (resident()?, bandwidth(args.threads));
    let arithmetic = Arithmetic::Auto(KernelOptions { threads: args.threads, kv: KvType::F16, level: None });
    let mut ours = Runner::load(path, arithmetic, CONTEXT)?;
    let grown = resident()? - before;
    let limit = bytes_a_second / ours.read_per_token();
    report.text(&format!(
        "\n{quant}: {} on {} threads; memory reads {:.1} GB/s, so one sequence gets {limit:.0} tokens a second at most",
        ours.arithmetic(),
        args.threads,
        bytes_a_second / 1e9
    ));
    report.less(&format!("{quant} memory after the load, of the file"), grown / 1e6, file / 1e6, "MB");
    let mut candle = if args.quick { None } else { Some(Runner::load(path, Arithmetic::Candle, CONTEXT)?) };
    if let Some(peers) = peers {
        peers.open(path, args.threads)?;
    }
    report.text("tokens a second      ours    plain    flash   ratio   candle  of limit");
    let work = if args.quick { QUICK.as_slice() } else { WORK.as_slice() };
    for work in work.iter().copied().filter(|work| work.name().contains(&args.only)) {
        if let Work::Decode(_, depth) = work {
            ours.fill(depth)?;
            candle.as_mut().map(|candle| candle.fill(depth)).transpose()?;
            for peer in peers.iter_mut().flat_map(|peers| &mut peers.0) {
                peer.fill(depth)?;
            }
        }
        let mut seconds: [Vec<f64>; 4] = Default::default();
        for _ in 0..args.rounds.max(1) {
            seconds[0].push(ours.time(work)?);
            for (i, peer) in peers.iter_mut().flat_map(|peers| &mut peers.0).enumerate() {
                seconds[1 + i].push(time_peer(peer, work)?);
            }
            // Its own pool would spin beside ours: it is timed last, and the threads above are asleep by then.
            // Once is enough for what takes longest and is nobody's rival.
            if let Some(candle) = candle.as_mut().filter(|_| seconds[3].is_empty()) {
                seconds[3].push(candle.time(work)?);
            }
        }
        cell(report, quant, work, seconds.map(|seconds| work.tokens() / median(seconds)), limit);
    }
    Ok(())
}

/// Runs it all.
pub(crate) fn bench(args: &EngineArgs) -> Result<()> {
    let mut peers = args.peer.as_deref().map(Peers::start).transpose().context("the peer")?;
    if peers.is_none() {
        eprintln!("SKIPPED: without --peer there is nothing to compare with");
    }
    let report = Report { json: args.json };
    for quant in &args.quants {
        let Some(path) = model(&args.models, quant, peers.as_mut().map(|peers| &mut peers.0[0]))? else { continue };
        compare(args, &report, &path, quant, &mut peers)?;
        if !args.no_serving {
            serving::mixed_load(&report, &path, quant, args.threads)?;
            serving::second_turn(&report, &path, quant, args.threads)?;
        }
    }
    Ok(())
}
