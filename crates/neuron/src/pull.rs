//! `PullModel`: files fetched for later, told of as they come.

use std::pin::Pin;
use std::time::Duration;

use control::{proto, status_from_error};
use futures_util::{Stream, StreamExt};
use hub::{Pulled, Reference, Source};
use tokio::sync::{mpsc, watch};
use tonic::Status;
use words::{Code, Error};

use crate::fetch::{Downloads, source_of};
use crate::options::Options;

/// How often a caller hears of it.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// Messages that wait for a caller that reads slowly.
const QUEUE: usize = 4;

/// The messages of one call.
pub(crate) type PullStream = Pin<Box<dyn Stream<Item = Result<proto::PullProgress, Status>> + Send>>;

/// Finds what a name means: the configured entry of that id, else a reference.
///
/// # Errors
/// `InvalidRequest` when it is neither, or the entry's files are none of a hub.
pub(crate) fn reference(options: &Options, model: &str) -> Result<Reference, Error> {
    let Some(entry) = options.entry(model) else {
        return Ok(Reference::parse(model)?);
    };
    match source_of(entry)? {
        Some(Source::Hub(reference)) => Ok(reference),
        Some(Source::Path(path)) => {
            let message = format!("the model '{model}' is configured to be at {}, on no hub", path.display());
            Err(Error::invalid("model", message))
        }
        None => Err(Error::invalid("model", format!("the model '{model}' has no files to fetch"))),
    }
}

/// Begins to fetch. The download ends with the caller.
///
/// # Errors
/// As [`reference`], and `Overloaded` while as many run as may.
pub(crate) fn begin(downloads: &Downloads, options: &Options, model: &str) -> Result<PullStream, Error> {
    let reference = reference(options, model)?;
    let place = downloads.place()?;
    let (out, messages) = mpsc::channel(QUEUE);
    let downloads = downloads.clone();
    tokio::spawn(async move {
        run(&downloads, &reference, out).await;
        drop(place);
    });
    Ok(tokio_stream::wrappers::ReceiverStream::new(messages).boxed())
}

async fn run(downloads: &Downloads, reference: &Reference, out: mpsc::Sender<Result<proto::PullProgress, Status>>) {
    let (seen, last) = watch::channel(Pulled::default());
    let see = |pulled: Pulled| {
        seen.send_replace(pulled);
    };
    let work = downloads.fetch(reference.repo(), reference, true, see);
    tokio::pin!(work);
    let mut every = tokio::time::interval(TELL_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let message = |path: String| {
        let pulled = *last.borrow();
        proto::PullProgress { bytes_done: pulled.done, bytes_total: pulled.total, path }
    };
    loop {
        let outcome = tokio::select! {
            outcome = &mut work => outcome,
            () = out.closed() => return tracing::info!(%reference, "nobody waits for these files any more"),
            _ = every.tick() => {
                // One that reads slowly misses some; the next has it all.
                let _ = out.try_send(Ok(message(String::new())));
                continue;
            }
        };
        let end = match outcome {
            Ok(path) => Ok(message(path.display().to_string())),
            Err(failure) if failure.error.code() == Code::Internal => {
                tracing::error!(%reference, error = %failure.error, "files could not be fetched");
                Err(status_from_error(&failure.error))
            }
            Err(failure) => Err(status_from_error(&failure.error)),
        };
        let _ = tokio::time::timeout(TELL_EVERY * 10, out.send(end)).await;
        return;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::options::ModelEntry;

    #[test]
    fn a_configured_name_means_its_entry_and_every_other_a_reference() {
        let entry =
            |id: &str, path: &str| ModelEntry { id: id.into(), path: Some(path.into()), ..ModelEntry::default() };
        let models = vec![entry("m", "org/repo:Q8_0"), entry("org/local", "/srv/m.gguf")];
        let options = Options { models, ..Options::default() };
        assert_eq!(reference(&options, "m").unwrap().to_string(), "org/repo:Q8_0");
        assert_eq!(reference(&options, "org/other").unwrap().to_string(), "org/other");
        for nothing in ["org/local", "x", ""] {
            assert_eq!(reference(&options, nothing).unwrap_err().code(), Code::InvalidRequest, "{nothing}");
        }
    }
}
