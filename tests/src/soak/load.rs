//! Clients that stream without end, one request after another, and check each text whole against the oracle.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::{Client, chat_body, fake_answer};

/// What clients saw.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Requests that ended.
    pub requests: u64,
    /// Those that were not one whole answer with one proper finish, equal to the oracle's.
    pub failed: u64,
    /// Those whose text broke off without an error.
    pub truncated: u64,
    /// Those refused because workers crashed on them.
    pub quarantined: u64,
    /// The first few failures in words.
    pub reasons: Vec<String>,
    /// From request to first text.
    pub first: Vec<Duration>,
    /// Between two pieces of text.
    pub between: Vec<Duration>,
    /// The longest of those, of each request.
    pub longest: Vec<Duration>,
}

const REASONS_MAX: usize = 10;

/// Clients at work.
pub struct Load {
    tally: Arc<Mutex<Tally>>,
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `clients` clients that spread over the APIs; each asks for `tokens` tokens at a time.
    ///
    /// # Errors
    /// When the system gives no client.
    pub fn start(apis: &[String], clients: usize, tokens: u32) -> anyhow::Result<Load> {
        let (tally, stop) = (Arc::new(Mutex::new(Tally::default())), Arc::new(AtomicBool::new(false)));
        let (next, mut tasks) = (Arc::new(AtomicU64::new(0)), Vec::new());
        for i in 0..clients {
            let client = Client::new(&apis[i % apis.len()])?;
            let (tally, stop, next) = (tally.clone(), stop.clone(), next.clone());
            tasks.push(tokio::spawn(async move {
                // Not all at once, so that streams of every age run at any time.
                tokio::time::sleep(Duration::from_millis(i as u64 * 97 % 5_000)).await;
                while !stop.load(Ordering::Acquire) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    one(&client, &format!("soak {number}"), tokens, &tally).await;
                }
            }));
        }
        Ok(Load { tally, stop, clients: tasks })
    }

    /// Takes what was tallied since the last call, without the requests that still run.
    pub fn take(&self) -> Tally {
        std::mem::take(&mut *self.tally.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets every client finish its request, and returns the rest of the tally.
    pub async fn finish(self) -> Tally {
        self.stop.store(true, Ordering::Release);
        for client in self.clients {
            if let Err(error) = client.await {
                let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
                tally.failed += 1;
                tally.reasons.push(format!("a client ended: {error}"));
            }
        }
        std::mem::take(&mut *self.tally.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn one(client: &Client, prompt: &str, tokens: u32, tally: &Mutex<Tally>) {
    let (mut between, mut last, mut pieces) = (Vec::new(), None::<Instant>, 0);
    let result = client
        .stream(&chat_body("m", prompt, tokens), |answer| {
            if answer.pieces > pieces {
                let now = Instant::now();
                between.extend(last.map(|last| now - last));
                (pieces, last) = (answer.pieces, Some(now));
            }
        })
        .await;
    let wanted = fake_answer(prompt, tokens);
    let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
    tally.requests += 1;
    let reason = match result {
        Ok(answer) if answer.whole() && answer.text == wanted && answer.raw.matches("[DONE]").count() == 1 => {
            tally.first.extend(answer.first);
            tally.longest.extend(between.iter().max());
            tally.between.extend(between);
            return;
        }
        Ok(answer) => {
            let code = answer.error.as_ref().and_then(|error| error["code"].as_str().map(str::to_string));
            tally.quarantined += u64::from(code.as_deref() == Some("request_crashes_workers"));
            tally.truncated += u64::from(answer.error.is_none() && !answer.done);
            let at = answer.text.len();
            format!("{prompt}: status {}, {code:?} after {at} bytes of {}", answer.status, wanted.len())
        }
        Err(error) => format!("{prompt}: {error:#}"),
    };
    tally.failed += 1;
    if tally.reasons.len() < REASONS_MAX {
        tally.reasons.push(reason);
    }
}
