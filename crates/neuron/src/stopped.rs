//! Who hears of cancelled requests: the metrics at once; the hooks of one request after another, and nobody waits for them.

use serde_json::json;
use tokio::sync::mpsc;
use words::ModelId;

use crate::metrics::Metrics;
use crate::models::Models;
use crate::streams::Reason;
use crate::turns::Turns;
use lifecycle::HookEvent;

/// Requests that wait to be told of; of further ones only the log tells.
const QUEUE: usize = 256;

/// A request that was cancelled, at its end.
#[derive(Debug)]
pub(crate) struct Stopped {
    pub(crate) model: ModelId,
    pub(crate) request_id: String,
    pub(crate) completion_id: String,
    pub(crate) reason: Reason,
    /// Tokens that it was told here; those of earlier attempts are not among them.
    pub(crate) tokens: u32,
    /// From its arrival to its end.
    pub(crate) seconds: f64,
}

/// The way to metrics and hooks; cheap to clone.
#[derive(Clone)]
pub(crate) struct StopTeller {
    queue: mpsc::Sender<Stopped>,
    metrics: Metrics,
}

impl StopTeller {
    /// Begins to tell the hooks of `stop_generation`; ends with its last clone.
    pub(crate) fn start(turns: Turns, models: Models, metrics: Metrics) -> Self {
        let (queue, mut stopped) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            while let Some(request) = stopped.recv().await {
                tell(&turns, &models, request).await;
            }
        });
        StopTeller { queue, metrics }
    }

    /// Tells of a request; never waits.
    pub(crate) fn tell(&self, stopped: Stopped) {
        self.metrics.cancelled(stopped.model.as_str(), stopped.reason.name());
        if let Err(error) = self.queue.try_send(stopped) {
            tracing::warn!(%error, "hooks are too slow to hear of every cancelled request");
        }
    }
}

async fn tell(turns: &Turns, models: &Models, request: Stopped) {
    let harness = models.status(&request.model).map(|status| status.harness).unwrap_or_default();
    let detail = json!({
        "request_id": request.request_id,
        "completion_id": request.completion_id,
        "reason": request.reason.name(),
        "tokens": request.tokens,
        "seconds": request.seconds,
    });
    // Their failure stops nothing.
    let _ = turns.of_model(HookEvent::StopGeneration, &request.model, &harness, detail).await;
}
