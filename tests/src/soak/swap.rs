//! More models than memory: workers swap them under a mixed load, and every answer is compared with the oracle's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::quantile_ms;
use crate::{Client, Fleet, chat_body, fake_answer};

/// How long, how many, how dear.
#[derive(Clone, Copy, Debug)]
pub struct SwapOptions {
    /// How long clients ask.
    pub span: Duration,
    /// Workers.
    pub neurons: usize,
    /// Models in the catalogue of each.
    pub models: usize,
    /// Models that each has memory for.
    pub resident: usize,
    /// Time a load takes.
    pub load: Duration,
    /// How long a model that is never without work serves on while another waits for its memory.
    pub turn: Duration,
    /// Gateways; each knows the workers in another order. What one sends, it sends to one worker; that several agree rests on
    /// their views, which may be some milliseconds apart.
    pub gateways: usize,
    /// Clients at once, over all gateways.
    pub clients: usize,
    /// Most tokens of an answer; one takes 10 ms.
    pub tokens: u32,
    /// Chooses models, lengths and pauses.
    pub seed: u64,
}

/// Memory of one model, in MiB.
const MODEL_MIB: usize = 100;
/// How often the fleet is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const REASONS_MAX: usize = 10;
/// Of so many loads one may be begun at two workers, where there is more than one gateway.
const DOUBLED_SHARE: u64 = 50;

/// What was seen of the fleet.
#[derive(Default)]
struct Seen {
    /// Models that served somewhere at the last look.
    ready: BTreeSet<String>,
    /// When each load that runs was first seen, by worker and model, in Unix milliseconds.
    loading: BTreeMap<(String, String), u64>,
    /// How long loads took.
    loads: Vec<Duration>,
    /// Models that were at two workers at once, counted once as long as they were.
    doubled: BTreeSet<String>,
    violations: u64,
    /// The first few of them in words.
    doubles: Vec<String>,
    /// Most bytes that a worker said to hold beyond its budget.
    overcommitted: u64,
}

impl Seen {
    /// Takes a look at a gateway's view.
    fn look(&mut self, status: &Value) {
        let mut at: BTreeMap<String, Vec<String>> = BTreeMap::new();
        self.ready.clear();
        for node in status["nodes"].as_array().into_iter().flatten().map(|node| &node["status"]) {
            let name = node["node"].as_str().unwrap_or_default();
            let figure = |key: &str| node["memory"][key].as_u64().unwrap_or(0);
            self.overcommitted = self.overcommitted.max(figure("used").saturating_sub(figure("budget")));
            for model in node["models"].as_array().into_iter().flatten() {
                let id = model["id"].as_str().unwrap_or_default().to_string();
                let key = (name.to_string(), id.clone());
                let since = model["since_unix_ms"].as_u64().unwrap_or(0);
                let state = model["state"].as_str().unwrap_or_default();
                let place = format!("{state} at {name} since {since}");
                match state {
                    "fetching" | "loading" | "warming" => {
                        self.loading.entry(key).or_insert(since);
                        at.entry(id).or_default().push(place);
                    }
                    "ready" => {
                        let begun = self.loading.remove(&key);
                        self.loads.extend(begun.map(|begun| Duration::from_millis(since.saturating_sub(begun))));
                        at.entry(id.clone()).or_default().push(place);
                        self.ready.insert(id);
                    }
                    _ => drop(self.loading.remove(&key)),
                }
            }
        }
        at.retain(|_, places| places.len() > 1);
        for (id, places) in at.iter().filter(|(id, _)| !self.doubled.contains(*id)) {
            self.violations += 1;
            if self.doubles.len() < REASONS_MAX {
                self.doubles.push(format!("{id}: {}", places.join(", ")));
            }
        }
        self.doubled = at.into_keys().collect();
    }
}

/// What clients saw.
#[derive(Default)]
struct Tally {
    requests: u64,
    streamed: u64,
    failed: u64,
    truncated: u64,
    reasons: Vec<String>,
    /// From request to first text, of models that served when they were asked.
    ready: Vec<Duration>,
    /// The same, of those that did not.
    swapped: Vec<Duration>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A model by chance: each one is asked for twice as often as the next.
fn choose(models: usize, rng: &mut SmallRng) -> usize {
    (0..models.saturating_sub(1)).find(|_| rng.random_bool(0.5)).unwrap_or(models.saturating_sub(1))
}

struct Clients {
    tally: Arc<Mutex<Tally>>,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    next: Arc<AtomicU64>,
    options: SwapOptions,
}

impl Clients {
    fn start(&self, client: Client, number: u64) -> JoinHandle<()> {
        let (tally, seen, stop, next) = (self.tally.clone(), self.seen.clone(), self.stop.clone(), self.next.clone());
        let options = self.options;
        tokio::spawn(async move {
            let mut rng = SmallRng::seed_from_u64(options.seed.wrapping_mul(1_000) + number);
            while !stop.load(Ordering::Acquire) {
                let model = format!("m{}", choose(options.models, &mut rng));
                let prompt = format!("swap {}", next.fetch_add(1, Ordering::Relaxed));
                let tokens = rng.random_range(1..=options.tokens);
                one(&client, &model, &prompt, tokens, rng.random_bool(0.5), &seen, &tally).await;
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..200))).await;
            }
        })
    }
}

async fn one(
    client: &Client,
    model: &str,
    prompt: &str,
    tokens: u32,
    streams: bool,
    seen: &Mutex<Seen>,
    tally: &Mutex<Tally>,
) {
    let served = lock(seen).ready.contains(model);
    let (begun, wanted) = (Instant::now(), fake_answer(prompt, tokens));
    let mut body = chat_body(model, prompt, tokens);
    let mut truncated = false;
    let outcome = if streams {
        match client.stream(&body, |_| {}).await {
            Ok(answer) if answer.whole() && answer.text == wanted => Ok(answer.first),
            Ok(answer) => {
                truncated = answer.error.is_none() && !answer.done;
                let bytes = answer.text.len();
                Err(format!("status {}, {:?} after {bytes} bytes", answer.status, answer.error))
            }
            Err(error) => Err(format!("{error:#}")),
        }
    } else {
        body["stream"] = json!(false);
        match client.json(&body).await {
            Ok((200, answer)) if answer["choices"][0]["message"]["content"] == wanted.as_str() => Ok(None),
            Ok((status, answer)) => Err(format!("status {status}, {answer}")),
            Err(error) => Err(format!("{error:#}")),
        }
    };
    let mut tally = lock(tally);
    tally.requests += 1;
    tally.streamed += u64::from(streams);
    tally.truncated += u64::from(truncated);
    match outcome {
        Ok(first) => {
            let first_of = if served { &mut tally.ready } else { &mut tally.swapped };
            first_of.extend(first);
        }
        Err(reason) => {
            tally.failed += 1;
            if tally.reasons.len() < REASONS_MAX {
                tally.reasons.push(format!("{model}, {prompt} after {:.1} s: {reason}", begun.elapsed().as_secs_f64()));
            }
        }
    }
}

/// Runs; returns the report.
///
/// # Errors
/// When the fleet can't be started or stopped; failures of requests are in the report.
pub async fn swap(fleet: &Fleet, options: SwapOptions) -> Result<Value> {
    let mut config = format!(
        "[memory]\nbudget_mib = {}\nturn_s = {}\n[harness.fake]\nload_ms = {}\nstep_ms = 10\n",
        MODEL_MIB * options.resident,
        options.turn.as_secs_f64(),
        options.load.as_millis(),
    );
    for i in 0..options.models {
        config += &format!("[[models]]\nid = \"m{i}\"\nharness = \"fake\"\nmemory_mib = {MODEL_MIB}\n");
    }
    let mut workers = Vec::new();
    for i in 0..options.neurons {
        workers.push(fleet.neuron(&format!("n{i}"), &config).await?);
    }
    let controls: Vec<&str> = workers.iter().map(|worker| worker.control.as_str()).collect();
    let quiet = "[log]\nfilter = \"warn\"\n";
    let mut gateways = Vec::new();
    for i in 0..options.gateways.max(1) {
        let mut turned = controls.clone();
        turned.rotate_left(i % controls.len().max(1));
        gateways.push(fleet.gateway(&turned, quiet).await?);
    }
    let clients =
        Clients { tally: Arc::default(), seen: Arc::default(), stop: Arc::default(), next: Arc::default(), options };
    let begun = Instant::now();
    let mut tasks = Vec::new();
    for i in 0..options.clients {
        tasks.push(clients.start(Client::new(&gateways[i % gateways.len()].api)?, i as u64));
    }
    let http = reqwest::Client::new();
    while begun.elapsed() < options.span {
        let status = http.get(format!("{}/api/status", gateways[0].admin)).send().await?;
        let status: Value = status.json().await?;
        lock(&clients.seen).look(&status);
        tokio::time::sleep(LOOK_EVERY).await;
    }
    clients.stop.store(true, Ordering::Release);
    for task in tasks {
        task.await.context("a client ended")?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let (mut loads, mut evictions) = (0.0, 0.0);
    for worker in &workers {
        let base = format!("http://{}", worker.control);
        loads += fleet.metric(&base, "neuron_model_loads_total", &["outcome=\"ok\""]).await?;
        evictions += fleet.metric(&base, "neuron_model_evictions_total", &[]).await?;
    }
    let mut swaps = 0.0;
    for gateway in &gateways {
        for room in ["room=\"evict\"", "room=\"wait\""] {
            swaps += fleet.metric(&gateway.admin, "cortex_model_loads_total", &[room]).await?;
        }
    }
    for worker in &mut workers {
        worker.process.terminate()?;
    }
    for worker in &mut workers {
        worker.process.wait(Duration::from_secs(30))?;
    }
    for gateway in &mut gateways {
        gateway.process.terminate()?;
        gateway.process.wait(Duration::from_secs(30))?;
    }
    let mut tally = std::mem::take(&mut *lock(&clients.tally));
    let mut seen = std::mem::take(&mut *lock(&clients.seen));
    ensure!(tally.requests > 0, "no request ended");
    for spans in [&mut tally.ready, &mut tally.swapped, &mut seen.loads] {
        spans.sort_unstable();
    }
    // Two gateways whose views are apart may each begin a load; one never begins two.
    let allowed = if options.gateways > 1 { loads as u64 / DOUBLED_SHARE } else { 0 };
    Ok(json!({
        "soak": "swap", "gateways": gateways.len(), "requests": tally.requests, "streamed": tally.streamed, "failed": tally.failed,
        "truncated": tally.truncated, "swaps": swaps as u64, "evictions": evictions as u64, "loads": loads as u64,
        "swap_p50_ms": quantile_ms(&seen.loads, 0.5), "swap_p99_ms": quantile_ms(&seen.loads, 0.99),
        "first_token_p50_ms_ready": quantile_ms(&tally.ready, 0.5),
        "first_token_p99_ms_ready": quantile_ms(&tally.ready, 0.99),
        "first_token_p50_ms_swapped": quantile_ms(&tally.swapped, 0.5),
        "first_token_p99_ms_swapped": quantile_ms(&tally.swapped, 0.99),
        "single_flight_violations": seen.violations, "overcommitted_bytes": seen.overcommitted,
        "seconds": seconds, "reasons": tally.reasons, "doubles": seen.doubles,
        "passed": tally.failed == 0 && evictions > 0.0 && seen.violations <= allowed && seen.overcommitted == 0,
    }))
}
