//! The engine's logprobs beside those of llama.cpp, on files of random weights of the 0.6B shape.
//!
//! On F16 the five likeliest must agree within 0.01. A quantised file is judged by the one it was made of: over the
//! hundred likeliest, our logprobs are nearer to llama.cpp's than those are to its own on F16. Both programs round
//! activations to 8 bits beside such weights, each in its own way, so they are two draws of one noise.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use engine_candle::{Arithmetic, CandleEngine, KernelOptions, KvType};
use inference::engine::{Batch, BlockId, Engine, Row, RowOutput, SequenceId, Wanted};
use inference::sampling::Sampling;
use serde::{Deserialize, Serialize};

use crate::engine::{BLOCK_TOKENS, Peer, load, model, token};

const LONGEST: usize = 2048;
/// Most that one of the top five logprobs may differ on F16.
const TOLERANCE: f64 = 0.01;
/// Of how many, the likeliest, that is asked.
const TOP: usize = 5;
const LENGTHS: [usize; 4] = [15, 128, 600, 2000];
const QUANTS: [&str; 3] = ["f16", "q8_0", "q4_k_m"];

/// What `bench logprobs` is told.
#[derive(Debug, Args)]
pub(crate) struct LogprobsArgs {
    /// Where the models are, or are made: qwen3-0.6b-{f16,q8_0,q4_k_m}.gguf.
    #[arg(long, default_value = "target/bench")]
    models: PathBuf,
    /// What llama.cpp gave.
    #[arg(long, default_value = "tests/goldens/qwen3-0.6b-logprobs.json")]
    golden: PathBuf,
    /// A Python with llama-cpp-python: makes the golden file anew first.
    #[arg(long)]
    peer: Option<PathBuf>,
    /// Judge candle's own operations in place of the kernels.
    #[arg(long)]
    candle: bool,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// Logprobs of the hundred ids that are likeliest for llama.cpp on F16.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    quant: String,
    length: usize,
    logprobs: Vec<(u32, f64)>,
}

/// The golden file.
#[derive(Debug, Serialize, Deserialize)]
struct Golden {
    generator: String,
    rule: String,
    at: Vec<Entry>,
}

/// The prompt's rule, as the golden file states it.
fn prompt(length: usize) -> Vec<u32> {
    (0..length).map(token).collect()
}

fn make_golden(peer: &mut Peer, args: &LogprobsArgs) -> Result<Golden> {
    let mut at: Vec<Entry> = Vec::new();
    let mut ids: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    for quant in QUANTS {
        let path = model(&args.models, quant, Some(peer))?.context("the peer makes all files")?;
        peer.open_exact(&path, args.threads, LONGEST)?;
        for length in LENGTHS {
            let logprobs = peer.logprobs(&prompt(length), ids.get(&length).map_or(&[], Vec::as_slice))?;
            ids.entry(length).or_insert_with(|| logprobs.iter().map(|(id, _)| *id).collect());
            at.push(Entry { quant: quant.into(), length, logprobs });
        }
    }
    let generator = "bench gguf --shape qwen3-0.6b --quant f16 --seed 1, quantised by llama.cpp".into();
    Ok(Golden { generator, rule: "(i * 7919 + 13) % 151936".into(), at })
}

fn logprobs(engine: &mut CandleEngine, tokens: Vec<u32>) -> Result<Vec<f64>> {
    let blocks = (0..tokens.len().div_ceil(BLOCK_TOKENS) as u32).map(BlockId).collect();
    let row =
        Row { sequence: SequenceId(0), tokens, start: 0, blocks, wanted: Wanted::Token, sampling: Sampling::GREEDY };
    let outputs = engine.step(&Batch { copies: Vec::new(), rows: vec![row] })?;
    let Some(RowOutput::Logits(logits)) = outputs.rows.first() else { anyhow::bail!("the engine gave no logits") };
    let top = logits.iter().fold(f32::NEG_INFINITY, |top, logit| top.max(*logit));
    let total: f64 = logits.iter().map(|logit| f64::from(logit - top).exp()).sum();
    Ok(logits.iter().map(|logit| f64::from(logit - top) - total.ln()).collect())
}

/// Compares at every entry of the golden file and prints a row for each.
#[allow(clippy::print_stdout)]
pub(crate) fn compare(args: &LogprobsArgs) -> Result<()> {
    if let Some(python) = &args.peer {
        let golden = make_golden(&mut Peer::start(python)?, args)?;
        std::fs::write(&args.golden, serde_json::to_string(&golden)? + "\n")?;
    }
    let golden: Golden = serde_json::from_slice(&std::fs::read(&args.golden)?)?;
    let theirs: BTreeMap<(&str, usize), &Entry> =
        golden.at.iter().map(|entry| ((entry.quant.as_str(), entry.length), entry)).collect();
    println!("largest of the top five, then roots of mean squares of the top hundred");
    println!("weights   tokens  top 5, theirs  ours - theirs     ours - F16   theirs - F16");
    for quant in QUANTS {
        let Some(path) = model(&args.models, quant, None)? else { continue };
        let kernels = KernelOptions { threads: args.threads, kv: KvType::F32, level: None };
        let arithmetic = if args.candle { Arithmetic::Candle } else { Arithmetic::Auto(kernels) };
        let mut engine = load(&path, arithmetic, LONGEST, 1, LONGEST)?;
        let (mut top, mut squares, mut count) = (0f64, [0f64; 3], 0.0);
        for length in LENGTHS {
            let ours = logprobs(&mut engine, prompt(length))?;
            let exact = theirs.get(&("f16", length)).context("the golden file lacks an F16 entry")?;
            let same = theirs.get(&(quant, length)).context("the golden file lacks an entry")?;
            let (mut gap, mut here) = (0f64, [0f64; 3]);
            for (i, ((id, of_exact), (_, of_same))) in exact.logprobs.iter().zip(&same.logprobs).enumerate() {
                let own = ours.get(*id as usize).context("an id is outside the vocabulary")?;
                let gaps = [own - of_same, own - of_exact, of_same - of_exact];
                here.iter_mut().zip(gaps).for_each(|(sum, gap)| *sum += gap * gap);
                gap = if i < TOP { gap.max(gaps[0].abs()) } else { gap };
            }
            let number = exact.logprobs.len() as f64;
            let [a, b, c] = here.map(|sum| (sum / number).sqrt());
            println!("{quant:<8} {length:>7} {gap:>14.6} {a:>14.6} {b:>14.6} {c:>14.6}");
            top = top.max(gap);
            squares.iter_mut().zip(here).for_each(|(all, here)| *all += here);
            count += number;
        }
        let [a, b, c] = squares.map(|sum| (sum / count).sqrt());
        println!("{quant:<8} {:>7} {top:>14.6} {a:>14.6} {b:>14.6} {c:>14.6}", "all");
        match quant {
            "f16" => ensure!(top <= TOLERANCE, "F16 differs by {top:.6}, more than {TOLERANCE}"),
            _ => ensure!(a <= c, "{quant} is {a:.6} from llama.cpp's, more than that from its F16, {c:.6}"),
        }
    }
    Ok(())
}
