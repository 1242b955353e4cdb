//! The data path: from a parsed request to the client's bytes, over as many attempts as it takes.

mod attempt;
mod body;
mod flights;
mod http1;
mod relay;
mod upstream;
mod vigil;

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use fleet::{Accepted, Ending, Journey, Quarantine, RetryBudget, Step};
use service::clock::Clock;
use service::traces::Traces;
use tokio::sync::watch;
use wire::private::Meta;
use wire::{DONE_EVENT, Encoder, Endpoint, Identity, Usage, with_private};
use words::{Code, Error, Fingerprint, GatewayId, ModelId};

use crate::fleet_task::Fleet;
use crate::metrics::Metrics;
use crate::options::Options;
pub(crate) use body::{BoxBody, Pace, full, respond};
pub(crate) use flights::{Flight, Flights};
pub(crate) use relay::Relay;
pub(crate) use upstream::Upstream;

/// What every request needs. Each thread that serves the API has its own, and with it its own connections to workers;
/// everything else is shared.
pub(crate) struct Proxy {
    pub(crate) fleet: Fleet,
    pub(crate) upstream: Upstream,
    pub(crate) metrics: Metrics,
    pub(crate) traces: Traces,
    pub(crate) clock: Clock,
    pub(crate) options: Arc<Options>,
    pub(crate) gateway: GatewayId,
    /// Held for two additions and a comparison.
    pub(crate) budget: Arc<Mutex<RetryBudget>>,
    /// Held for a look-up.
    pub(crate) quarantine: Arc<Mutex<Quarantine>>,
    /// The requests that run.
    pub(crate) flights: Flights,
    /// True once the drain's deadline has come: open streams end with words.
    pub(crate) cut: watch::Receiver<bool>,
}

/// One request as every attempt sends it.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) endpoint: Endpoint,
    pub(crate) model: ModelId,
    pub(crate) stream: bool,
    pub(crate) body: Bytes,
    pub(crate) request_id: String,
    pub(crate) completion_id: String,
    pub(crate) created: u64,
    pub(crate) seed: u64,
    /// What the client says of its own trace: passed on as it is where this gateway has no traces.
    pub(crate) trace: [(http::HeaderName, Option<http::HeaderValue>); 2],
    /// Answers wanted.
    pub(crate) choices: u32,
    /// Whether the stream ends with its usage.
    pub(crate) include_usage: bool,
}

impl Order {
    /// Puts the model's own id in the place of an alias.
    fn rename(&mut self, id: ModelId) -> Result<(), Error> {
        self.body = wire::with_model(&self.body, &id)?.into();
        self.model = id;
        Ok(())
    }

    /// Says what a worker could not say any more: that choices were cancelled which had not finished, usage and end.
    fn completion(&self, meta: Option<&Meta>, choices: &[Accepted], reasoning: u32) -> Bytes {
        let identity =
            Identity { id: self.completion_id.clone(), created: self.created, model: self.model.to_string() };
        let encoder = Encoder::of(self.endpoint, identity, self.include_usage);
        let mut events = Vec::new();
        for (index, choice) in (0..).zip(choices).filter(|(_, choice)| !choice.finished) {
            if choice.ids.is_empty() {
                events.extend(encoder.begin(index, true, None));
            }
            events.push(encoder.cancelled(index));
        }
        let (prompt, cached) = meta.map_or((0, 0), |meta| (meta.prompt_tokens, meta.cached));
        let completion = choices.iter().map(|choice| choice.ids.len()).sum::<usize>() as u32;
        events.extend(encoder.usage(Usage { prompt, completion, cached, reasoning }));
        events.push(Bytes::from_static(DONE_EVENT));
        with_private(&[], &events)
    }
}

impl Proxy {
    /// Counts a request in for the retry budget.
    pub(crate) fn deposit(&self) {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner).deposit();
    }

    /// Asks the journey what follows.
    fn decide(&self, journey: &mut Journey, ending: Ending) -> Step {
        let now = self.clock.now();
        journey.ended(now, ending, &mut self.budget.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Remembers a request that workers died of.
    fn suspect(&self, order: &Order) {
        let request_id = &order.request_id;
        tracing::error!(request_id, "two workers in a row failed on one request; it is refused if they named it");
        let name = Fingerprint(*blake3::hash(order.completion_id.as_bytes()).as_bytes());
        let mut table = self.quarantine.lock().unwrap_or_else(PoisonError::into_inner);
        table.suspect(self.clock.now(), hash(&order.body), name);
    }

    /// Refuses a request that is known to crash workers.
    ///
    /// # Errors
    /// `PoisonRequest`.
    pub(crate) fn refuse_poison(&self, body: &Bytes) -> Result<(), Error> {
        let table = self.quarantine.lock().unwrap_or_else(PoisonError::into_inner);
        if table.is_empty() {
            return Ok(());
        }
        match table.refuses(self.clock.now(), &hash(body)) {
            None => Ok(()),
            Some(left) => {
                let message =
                    format!("workers failed on this very request; it is refused for {} s", left.as_secs() + 1);
                Err(Error::new(Code::PoisonRequest, message))
            }
        }
    }
}

fn hash(body: &Bytes) -> Fingerprint {
    Fingerprint(*blake3::hash(body).as_bytes())
}

/// Shared by all requests.
pub(crate) type SharedProxy = Arc<Proxy>;
