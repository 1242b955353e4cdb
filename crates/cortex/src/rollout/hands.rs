//! How a step is taken: an order to a control port, or a canary through a data plane.

use std::pin::Pin;
use std::time::Duration;

use fleet::rollout::{Outcome, Step};
use service::token::Token;
use wire::private::CANARY_HEADER;
use words::{Canary, Code, Error, Retry, RolloutId};

use crate::command::{release_hold, set_intent};
use crate::events::{Events, EventsError};

/// Longest time to connect to a data plane.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// Longest time for a canary's answer.
const CANARY_MAX: Duration = Duration::from_secs(60);
/// Most tokens of a canary's answer.
const CANARY_TOKENS_MAX: u32 = 256;
/// Most bytes of one event of a canary's answer.
const CANARY_BYTES_MAX: usize = 256 << 10;

/// A step on its way.
pub(crate) type Doing = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// One step with all that it needs.
#[derive(Clone, Debug)]
pub(crate) struct Errand {
    /// The step.
    pub(crate) step: Step,
    /// Where the node's control port is.
    pub(crate) control_address: String,
    /// On whose behalf.
    pub(crate) rollout: RolloutId,
    /// The fencing token.
    pub(crate) lease_revision: u64,
}

/// Whoever takes the steps.
pub(crate) trait Hands: Send + Sync + 'static {
    /// Takes one, within a bound.
    fn take(&self, errand: Errand) -> Doing;
}

/// The real ones.
#[derive(Clone)]
pub(crate) struct Orders {
    token: Option<Token>,
    http: reqwest::Client,
}

impl Orders {
    /// Makes the client of the data planes.
    ///
    /// # Errors
    /// When the HTTP client can't be made.
    pub(crate) fn new(token: Option<Token>) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder().connect_timeout(CONNECT_MAX).timeout(CANARY_MAX).no_proxy().build()?;
        Ok(Orders { token, http })
    }
}

impl Hands for Orders {
    fn take(&self, errand: Errand) -> Doing {
        let this = self.clone();
        Box::pin(async move { this.run(errand).await })
    }
}

impl Orders {
    async fn run(&self, errand: Errand) -> Outcome {
        let Errand { step, control_address, rollout, lease_revision } = errand;
        let token = self.token.as_ref();
        let taken = match step {
            Step::Restart { order, .. } | Step::Fence { order, .. } => {
                set_intent(&control_address, token, &order).await
            }
            Step::Release { .. } => release_hold(&control_address, token, &rollout, lease_revision, None).await,
            Step::Canary { data_address, canary, .. } => {
                return match self.ask(&data_address, &canary, &rollout).await {
                    Ok(text) => Outcome::Answer { text },
                    // The canary is asked here and nowhere else.
                    Err(error) if matches!(error.code(), Code::ModelNotHere | Code::EngineFailed) => {
                        Outcome::Refused(error)
                    }
                    Err(error) => failed(error),
                };
            }
        };
        taken.map_or_else(failed, |status| Outcome::Taken(Box::new(status)))
    }

    /// Returns what the model says, up to the right answer where it comes.
    async fn ask(&self, data_address: &str, canary: &Canary, rollout: &RolloutId) -> Result<String, Error> {
        let body = serde_json::json!({
            "model": canary.model,
            "stream": true,
            "temperature": 0,
            "max_tokens": CANARY_TOKENS_MAX,
            "messages": [{ "role": "user", "content": canary.prompt }],
        });
        let lost = |error: reqwest::Error| {
            Error::new(Code::UpstreamFailed, "the worker did not answer the canary").because(error)
        };
        let url = format!("http://{data_address}/v1/chat/completions");
        let request = self.http.post(url).header(CANARY_HEADER, rollout.as_str()).json(&body);
        let response = request.send().await.map_err(lost)?;
        if !response.status().is_success() {
            let text = response.text().await.unwrap_or_default();
            return Err(refusal(&serde_json::from_str(&text).unwrap_or_default()));
        }
        let (mut events, mut said) = (Events::new(response, CANARY_BYTES_MAX), String::new());
        let broken = |error| match error {
            EventsError::Lost(error) => lost(error),
            EventsError::TooLarge(_) => Error::new(Code::InvalidRequest, "the canary's answer is over the limit"),
        };
        while let Some(event) = events.next().await.map_err(broken)? {
            let data = event.strip_prefix(b"data: ").unwrap_or_default();
            if data.starts_with(b"[DONE]") {
                return Ok(said);
            }
            let chunk: serde_json::Value = serde_json::from_slice(data).unwrap_or_default();
            if !chunk["error"].is_null() {
                return Err(refusal(&chunk));
            }
            said.push_str(chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
            if said.contains(&canary.answer) {
                return Ok(said);
            }
        }
        Err(Error::new(Code::UpstreamFailed, "the worker broke off before the canary's answer was whole"))
    }
}

/// Reads an error's envelope; a code of a newer version is never retried.
fn refusal(body: &serde_json::Value) -> Error {
    let code = body["error"]["code"].as_str().and_then(Code::from_text).unwrap_or(Code::Internal);
    Error::new(code, body["error"]["message"].as_str().unwrap_or("the worker refused without a word"))
}

/// What may pass is asked again; what nobody answers for may have been taken.
fn failed(error: Error) -> Outcome {
    match error.retry() {
        Retry::Never => Outcome::Refused(error),
        Retry::Elsewhere | Retry::After(_) => Outcome::Lost(error),
    }
}
