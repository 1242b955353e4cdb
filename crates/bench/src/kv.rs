//! `bench kv`: what KV that outlives its model and its process is worth to whoever asks again.
//!
//! A real worker, asked over HTTP: prompts share a long beginning and differ in their end. The first one is cold, the
//! second finds the beginning in the engine; later ones find it after a swap in memory, after a restart on disk, and
//! after a kill in the middle of a write on what was whole by then. A ratio is the cold time over this one.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::gguf;
use crate::report::{Report, median};

/// What `bench kv` is told.
#[derive(Debug, Args)]
pub(crate) struct KvArgs {
    /// The worker; by default the one that was built beside this program.
    #[arg(long)]
    neuron: Option<PathBuf>,
    /// Where the model is, or is made: served-qwen3-0.6b-q8_0.gguf.
    #[arg(long, default_value = "target/bench")]
    models: PathBuf,
    /// Tokens that all prompts begin with.
    #[arg(long, default_value_t = 1000)]
    shared: usize,
    /// Threads of the engine.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Lives of a worker, each with a folder of its own.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// One line of JSON a cell.
    #[arg(long)]
    json: bool,
}

/// Tokens in which prompts differ.
const OWN: usize = 24;
/// Longest wait for a start, an end or an answer: a load reads the whole file, a cold prompt is computed.
const PATIENCE: Duration = Duration::from_secs(300);
/// Turns in which a kill may find no write.
const KILLS_MAX: usize = 8;
/// How the store calls files that are not whole yet.
const UNFINISHED: &str = ".part-";

/// The cells, in the order of a worker's lives.
const CELLS: [&str; 5] = ["cold", "warm", "after a swap", "after a restart", "after a kill"];

/// A worker's process; killed when dropped.
struct Worker {
    child: Child,
    data: SocketAddr,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Worker {
    /// Starts one, and waits until it serves.
    fn start(program: &Path, folder: &Path, config: &str) -> Result<Worker> {
        let [data, control] = [free_address()?, free_address()?];
        let file = folder.join("neuron.toml");
        std::fs::write(&file, format!("{config}[data]\nbind = \"{data}\"\n[control]\nbind = \"{control}\"\n"))?;
        let log = folder.join("neuron.log");
        let mut command = Command::new(program);
        command.args(["serve", "--config"]).arg(&file).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(std::fs::File::create(&log)?).spawn();
        let child = child.with_context(|| format!("starting {}", program.display()))?;
        let mut worker = Worker { child, data };
        let until = Instant::now() + PATIENCE;
        // The data port is bound once the model is there.
        while TcpStream::connect(data).is_err() {
            if worker.child.try_wait()?.is_some() || Instant::now() > until {
                bail!("the worker does not serve: {}", std::fs::read_to_string(log)?);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(worker)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id() as i32).context("the worker has no id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Ends it as a service manager does.
    fn stop(mut self) -> Result<()> {
        self.signal(Signal::TERM)?;
        let until = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < until, "the worker does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Ends it as a service manager does, and kills it as soon as a block is being written; `false` when it came too
    /// late for that.
    fn kill_in_a_write(mut self, folder: &Path) -> Result<bool> {
        self.signal(Signal::TERM)?;
        let until = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() && Instant::now() < until {
            if unfinished(folder) > 0 {
                self.child.kill()?;
                self.child.wait()?;
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(unfinished(folder) > 0)
    }

    fn post(&self, path: &str, body: &Value) -> Result<BufReader<TcpStream>> {
        let mut stream = TcpStream::connect(self.data)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let body = body.to_string();
        // Of this version of HTTP, so that a body comes as it is and ends with its connection.
        let head = format!("POST {path} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {}", body.len());
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes())?;
        let mut reader = BufReader::new(stream);
        let mut status = String::new();
        reader.read_line(&mut status)?;
        if status.split_whitespace().nth(1) == Some("200") {
            return Ok(reader);
        }
        let rest: Vec<String> = reader.lines().collect::<std::io::Result<_>>()?;
        bail!("{path}: {status} {}", rest.join("\n"))
    }

    fn done(&self, path: &str) -> Result<()> {
        Ok(self.post(path, &json!({"model_id": "m"}))?.lines().try_for_each(|line| line.map(drop))?)
    }

    /// Asks; returns the seconds to the first token, and how many tokens came from a cache.
    fn ask(&self, prompt: &[u32]) -> Result<(f64, usize)> {
        let body = json!({
            "model": "m", "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true},
        });
        let begun = Instant::now();
        let (mut first, mut cached) = (None, None);
        for line in self.post("/v1/completions", &body)?.lines() {
            let line = line?;
            let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") else { continue };
            let event: Value = serde_json::from_str(data)?;
            ensure!(event["error"].is_null(), "{data}");
            first.get_or_insert_with(|| begun.elapsed().as_secs_f64());
            cached = event["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().or(cached);
        }
        let (first, cached) = (first.context("no token came")?, cached.context("no usage came")?);
        Ok((first, cached as usize))
    }
}

fn free_address() -> Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Counts the blocks in the store's folder whose name begins so.
fn files(folder: &Path, which: impl Fn(&str) -> bool) -> usize {
    let inside = |path: PathBuf| std::fs::read_dir(path).into_iter().flatten().flatten();
    let engines = inside(folder.into()).map(|entry| entry.path());
    engines.flat_map(inside).filter(|entry| entry.file_name().to_str().is_some_and(&which)).count()
}

fn unfinished(folder: &Path) -> usize {
    files(folder, |name| name.starts_with(UNFINISHED))
}

/// Prompts of one beginning.
struct Prompts {
    shared: Vec<u32>,
    asked: usize,
}

impl Prompts {
    fn new(shared: usize, salt: usize) -> Self {
        Prompts { shared: (0..shared).map(|i| token(i + salt * 100_003)).collect(), asked: 0 }
    }

    /// The next one; its end is its own.
    fn next(&mut self) -> Vec<u32> {
        self.asked += 1;
        let own = (0..OWN).map(|i| token(i * 31 + self.asked * 7_000_003));
        self.shared.iter().copied().chain(own).collect()
    }
}

/// A word of the served model: none of the bytes that come first.
fn token(i: usize) -> u32 {
    300 + ((i as u64 * 7919 + 13) % 100_000) as u32
}

/// The lives of one worker; seconds to the first token and cached tokens, by cell.
fn round(program: &Path, model: &Path, args: &KvArgs) -> Result<[(f64, usize); 5]> {
    let folder = tempfile::tempdir()?;
    let kv = folder.path().join("kv");
    let threads = args.threads;
    let config = format!(
        "[[default_models]]\nid = \"m\"\npath = {model:?}\n[harness.candle]\nthreads = {threads}\nmax_context_length = 4096\n\
         [kv_store]\nfolder = {kv:?}\nram_mib = 4096\n"
    );
    let start = || Worker::start(program, folder.path(), &config);
    let mut prompts = Prompts::new(args.shared, 1);
    let worker = start()?;
    let cold = worker.ask(&prompts.next())?;
    let warm = worker.ask(&prompts.next())?;
    worker.done("/models/unload")?;
    worker.done("/models/load")?;
    let swapped = worker.ask(&prompts.next())?;
    worker.stop()?;
    let whole = files(&kv, |name| name.ends_with(".kv"));
    ensure!(whole > 0, "nothing was written");

    let mut worker = start()?;
    let restarted = worker.ask(&prompts.next())?;
    for turn in 0..KILLS_MAX {
        // Another beginning, so that there is something new to write.
        worker.ask(&Prompts::new(args.shared, 2 + turn).next())?;
        if worker.kill_in_a_write(&kv)? {
            worker = start()?;
            ensure!(unfinished(&kv) == 0, "what was not whole is still there");
            let killed = worker.ask(&prompts.next())?;
            return Ok([cold, warm, swapped, restarted, killed]);
        }
        worker = start()?;
    }
    bail!("no kill of {KILLS_MAX} came in the middle of a write")
}

fn model(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("served-qwen3-0.6b-q8_0.gguf");
    if !path.exists() {
        std::fs::create_dir_all(folder)?;
        let part = path.with_extension("part");
        gguf::write(gguf::Shape::Qwen3Small, gguf::Quant::Q8_0, 1, &part)?;
        std::fs::rename(part, &path)?;
    }
    Ok(std::fs::canonicalize(path)?)
}

/// Runs the bench.
pub(crate) fn bench(args: &KvArgs) -> Result<()> {
    let beside = || Ok::<_, anyhow::Error>(std::env::current_exe()?.with_file_name("neuron"));
    let program = args.neuron.clone().map_or_else(beside, Ok)?;
    ensure!(program.exists(), "there is no {}; cargo xtask bench builds it", program.display());
    let (report, model) = (Report { json: args.json }, model(&args.models)?);
    report.text(&format!("time to the first token; {} tokens shared, {OWN} of its own", args.shared));
    let mut rounds = Vec::new();
    for _ in 0..args.rounds.max(1) {
        rounds.push(round(&program, &model, args)?);
    }
    let of = |cell: usize| median(rounds.iter().map(|round| round[cell].0 * 1e3).collect());
    for (i, cell) in CELLS.iter().enumerate() {
        let cached: Vec<usize> = rounds.iter().map(|round| round[i].1).collect();
        let cell = format!("{cell}, {} cached tokens", cached.iter().min().unwrap_or(&0));
        report.less(&cell, of(i), of(0), "ms");
    }
    Ok(())
}
