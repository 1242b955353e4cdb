//! Models from a hub: what is told of a download while it runs, and that it ends with those who want it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hub::{Hub, HubError, Pulled, Reference, Settings, Source};
use service::clock::Clock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use words::{Code, Error, Moment};

use crate::harness::{DEFAULT_HARNESS, LoadFailure};
use crate::metrics::Metrics;
use crate::options::{CandleOptions, ModelEntry};

/// A log line comes at least this often while a download gets on, and at each tenth of it.
const LOG_EVERY: Duration = Duration::from_secs(10);
/// How often the status follows a download, and a load looks whether anybody still wants it.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Most pulls at once.
const PULLS_MAX: usize = 4;

/// What fetches models; cheap to clone.
#[derive(Clone)]
pub(crate) struct Downloads {
    hub: Hub,
    clock: Clock,
    metrics: Metrics,
    /// Pulls that may still begin. Loads need none: they are bounded by their models.
    places: Arc<Semaphore>,
}

impl From<HubError> for LoadFailure {
    fn from(error: HubError) -> Self {
        LoadFailure { transient: error.is_transient(), error: error.into() }
    }
}

/// Puts the configured folder over that of the surroundings.
pub(crate) fn settings(surroundings: Settings, options: &CandleOptions) -> Settings {
    Settings { cache: options.hf_cache.clone().or(surroundings.cache), ..surroundings }
}

/// Finds where an entry's files are; none for an engine without any. A model without a path may be one by its id.
///
/// # Errors
/// `InvalidRequest` for a reference that is none.
pub(crate) fn source_of(entry: &ModelEntry) -> Result<Option<Source>, Error> {
    let own_harness = entry.harness.as_deref().unwrap_or(DEFAULT_HARNESS) == DEFAULT_HARNESS;
    let source = match entry.path.as_ref().map(|path| (path, path.to_str())) {
        Some((_, Some(text))) => Some(Source::parse(text, std::path::Path::exists)?),
        Some((path, None)) => Some(Source::Path(path.clone())),
        None if own_harness => Reference::parse(&entry.id).ok().map(Source::Hub),
        None => None,
    };
    Ok(match source {
        Some(Source::Hub(reference)) => Some(Source::Hub(reference.with_quant(entry.quant.as_deref())?)),
        source => source,
    })
}

/// Says when a download's progress is worth a line.
#[derive(Debug)]
struct Lines {
    tenths: u64,
    last_at: Moment,
}

impl Lines {
    fn due(&mut self, pulled: Pulled, now: Moment) -> bool {
        let tenths = pulled.done.saturating_mul(10) / pulled.total.max(1);
        let due = tenths > self.tenths || now.since(self.last_at) >= LOG_EVERY;
        if due {
            (self.tenths, self.last_at) = (tenths.max(self.tenths), now);
        }
        due
    }
}

fn permille(pulled: Pulled) -> u64 {
    pulled.done.saturating_mul(1000) / pulled.total.max(1)
}

impl Downloads {
    pub(crate) fn new(settings: Settings, clock: Clock, metrics: Metrics) -> Self {
        Downloads { hub: Hub::new(settings), clock, metrics, places: Arc::new(Semaphore::new(PULLS_MAX)) }
    }

    /// Takes a place for a pull, given back when it is dropped.
    ///
    /// # Errors
    /// `Overloaded` when none is left.
    pub(crate) fn place(&self) -> Result<OwnedSemaphorePermit, Error> {
        let message = format!("this worker fetches {PULLS_MAX} models already; try again when one is here");
        self.places.clone().try_acquire_owned().map_err(|_| Error::new(Code::Overloaded, message))
    }

    /// Fetches what is missing of a model that is to be loaded, until it is here or `cancelled`; `show` gets thousandths.
    ///
    /// # Errors
    /// The hub's; `InvalidModelFile` for a model in parts, before they are fetched, because no engine here reads those;
    /// `Conflict` when it was cancelled.
    pub(crate) async fn for_load(
        &self,
        model: &str,
        reference: &Reference,
        cancelled: &watch::Receiver<bool>,
        show: impl Fn(u32),
    ) -> Result<PathBuf, LoadFailure> {
        let seen = AtomicU64::new(0);
        let work = self.fetch(model, reference, false, |pulled| seen.store(permille(pulled), Ordering::Relaxed));
        let look = async {
            let mut shown = 0;
            while !*cancelled.borrow() {
                let now = seen.load(Ordering::Relaxed);
                if now != shown {
                    show(now as u32);
                    shown = now;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::select! {
            outcome = work => outcome,
            () = look => Err(Error::new(Code::Conflict, "the load was cancelled").into()),
        }
    }

    /// Fetches what is missing of a model; `watch` hears of each piece.
    ///
    /// # Errors
    /// The hub's; `InvalidModelFile` for a model in parts unless `parts` are wanted.
    pub(crate) async fn fetch(
        &self,
        model: &str,
        reference: &Reference,
        parts: bool,
        watch: impl Fn(Pulled) + Send + Sync,
    ) -> Result<PathBuf, LoadFailure> {
        let begun = self.clock.now();
        let found = self.hub.find(reference).await?;
        let (commit, files) = (found.commit(), found.model().len());
        if files > 1 && !parts {
            let message = format!(
                "'{reference}' is split into {files} files, which the engine does not read; merge them with \
                 llama-gguf-split --merge and name the file"
            );
            return Err(Error::new(Code::InvalidModelFile, message).into());
        }
        let lines = Mutex::new(Lines { tenths: 0, last_at: begun });
        let fetched = AtomicU64::new(0);
        let report = |pulled: Pulled| {
            self.metrics.downloaded(model, pulled.fresh);
            fetched.fetch_add(pulled.fresh, Ordering::Relaxed);
            let now = self.clock.now();
            if lines.lock().unwrap_or_else(PoisonError::into_inner).due(pulled, now) {
                let (done_mib, total_mib) = (pulled.done >> 20, pulled.total >> 20);
                let rate = fetched.load(Ordering::Relaxed) as f64 / now.since(begun).as_secs_f64().max(0.001);
                let mib_per_s = (rate / (1 << 20) as f64 * 10.0).round() / 10.0;
                tracing::info!(model, %reference, percent = permille(pulled) / 10, done_mib, total_mib, mib_per_s, "fetching");
            }
            watch(pulled);
        };
        let outcome = self.hub.fetch(&found, &report).await;
        let seconds = self.clock.now().since(begun).as_secs_f64();
        self.metrics.download_ended(model, outcome.is_ok(), seconds);
        let path = outcome?;
        let bytes = fetched.load(Ordering::Relaxed);
        tracing::info!(model, %reference, commit, path = %path.display(), bytes, seconds, "files are here");
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn entry(id: &str, harness: Option<&str>, path: Option<&str>, quant: Option<&str>) -> ModelEntry {
        let own = |text: &str| text.to_string();
        let (harness, quant) = (harness.map(own), quant.map(own));
        ModelEntry { id: id.into(), harness, path: path.map(PathBuf::from), quant, ..ModelEntry::default() }
    }

    fn reference(entry: &ModelEntry) -> Option<String> {
        match source_of(entry).unwrap()? {
            Source::Hub(reference) => Some(reference.to_string()),
            Source::Path(_) => None,
        }
    }

    #[test]
    fn a_path_may_be_a_reference_and_so_may_an_id_without_a_path() {
        for (entry, wanted) in [
            (entry("m", None, Some("org/repo:Q8_0"), None), Some("org/repo:Q8_0")),
            (entry("m", Some("fake"), Some("org/repo"), Some("F16")), Some("org/repo:F16")),
            (entry("org/repo", None, None, Some("Q8_0")), Some("org/repo:Q8_0")),
            (entry("org/repo", Some("fake"), None, None), None),
            (entry("org/repo", None, Some("/srv/m.gguf"), None), None),
            (entry("m", None, None, None), None),
        ] {
            assert_eq!(reference(&entry).as_deref(), wanted, "{entry:?}");
        }
        assert!(source_of(&entry("m", None, Some("hf://m"), None)).is_err());
        assert!(source_of(&entry("m", None, Some("org/repo:F16"), Some("Q8_0"))).is_err());
    }

    #[test]
    fn a_line_comes_at_each_tenth_and_every_ten_seconds() {
        let at = |ms: u64| Moment::after_start(Duration::from_millis(ms));
        let mut lines = Lines { tenths: 0, last_at: at(0) };
        let mut log = |done: u64, ms: u64| lines.due(Pulled { done, total: 1000, fresh: 1 }, at(ms));
        let due = [log(50, 1), log(100, 2), log(150, 3), log(160, 10_003), log(170, 10_004), log(999, 10_005)];
        assert_eq!(due, [false, true, false, true, false, true]);
    }
}
