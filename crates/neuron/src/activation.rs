//! Activation: one pass over the default models, in order, timed, past failures.

use std::time::Duration;

use hub::Source;
use words::{ActivationProgress, Code, Error, ModelId};

use crate::fetch::source_of;
use crate::harness::{DEFAULT_HARNESS, LoadFailure, LoadSpec};
use crate::models::Models;
use crate::options::ModelEntry;
use crate::publisher::Publisher;

/// First pause before a load that only lacked the network is tried again; doubles up to [`RETRY_MAX`].
const RETRY_FIRST: Duration = Duration::from_millis(500);
/// Longest such pause.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// What a model is asked before it serves, where its entry says nothing.
const WARM_WORDS: &str = "hello";
/// Tokens of the answer.
const WARM_TOKENS: usize = 2;

/// Makes the load of a configured entry.
///
/// # Errors
/// `InvalidRequest` when its id is no id, or its reference none.
pub(crate) fn spec_of(entry: &ModelEntry) -> Result<LoadSpec, Error> {
    let model_id = ModelId::new(entry.id.clone()).map_err(|error| Error::invalid("model_id", error.to_string()))?;
    let (path, reference) = match source_of(entry)? {
        Some(Source::Path(path)) => (Some(path), None),
        Some(Source::Hub(reference)) => (None, Some(reference)),
        None => (None, None),
    };
    let overrides = entry.overrides().map_err(|wrong| Error::invalid(wrong.key, wrong.problem))?;
    Ok(LoadSpec {
        model_id,
        harness: entry.harness.clone().unwrap_or_else(|| DEFAULT_HARNESS.to_string()),
        path,
        reference,
        quant: entry.quant.clone(),
        device: entry.device.clone(),
        overrides,
        process: entry.process.clone().map(std::sync::Arc::new),
        context_length: entry.context_length,
        memory: (entry.memory_mib as u64) << 20,
        sampling: entry.sampling.unwrap_or_default(),
        warmup: (
            entry.warmup.clone().unwrap_or_else(|| WARM_WORDS.to_string()),
            entry.warmup_tokens.map_or(WARM_TOKENS, |tokens| tokens as usize),
        ),
    })
}

/// Loads the entries one after another. Entries that only lacked the network are retried in the background.
///
/// # Errors
/// The failure of an entry that is `required`.
pub(crate) async fn activate(entries: &[ModelEntry], models: &Models, publisher: &Publisher) -> Result<(), Error> {
    let total = entries.len() as u32;
    publisher.change(|status| status.activation = ActivationProgress { total, ..ActivationProgress::default() });
    let begun = tokio::time::Instant::now();
    let mut failed = 0u32;
    for entry in entries {
        let spec = spec_of(entry)?;
        publisher.change(|status| status.activation.current = Some(spec.model_id.clone()));
        let started = tokio::time::Instant::now();
        let result = models.load_default(spec.clone()).await;
        let seconds = started.elapsed().as_secs_f64();
        let ok = result.is_ok();
        match result {
            Ok(()) => tracing::info!(model = %spec.model_id, seconds, "default model loaded"),
            Err(LoadFailure { error, .. }) if entry.required => {
                tracing::error!(model = %spec.model_id, seconds, %error, "required model failed");
                return Err(error);
            }
            Err(LoadFailure { error, transient }) => {
                tracing::warn!(model = %spec.model_id, seconds, %error, transient, "default model failed; going on");
                failed += 1;
                if transient {
                    tokio::spawn(retry(spec, models.clone()));
                }
            }
        }
        publisher.change(|status| {
            status.activation.done += 1;
            status.activation.failed += u32::from(!ok);
            status.activation.current = None;
        });
    }
    let seconds = begun.elapsed().as_secs_f64();
    tracing::info!(models = entries.len(), failed, seconds, "activation complete");
    Ok(())
}

/// Tries again until the load succeeds or fails for another reason than the network. A node that loads nothing now may
/// do so later.
async fn retry(spec: LoadSpec, models: Models) {
    let mut pause = RETRY_FIRST;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
        match models.load(spec.clone(), false).await {
            Ok(()) => return tracing::info!(model = %spec.model_id, "default model loaded after a retry"),
            Err(LoadFailure { error, transient }) if transient || error.code() == Code::Draining => {
                tracing::warn!(model = %spec.model_id, %error, "default model failed again; will retry");
            }
            Err(LoadFailure { error, .. }) => {
                return tracing::warn!(model = %spec.model_id, %error, "default model failed for good");
            }
        }
    }
}
