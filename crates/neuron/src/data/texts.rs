//! Texts become tokens, and tokens texts, off the runtime; long ones only a few at a time.

use std::sync::Arc;

use tokio::sync::Semaphore;
use words::Error;

/// A body of more bytes than this is a long one: it takes ten milliseconds and more of pure computing.
const LONG_BYTES: usize = 64 << 10;

/// Where that is done; cheap to clone. Short texts never wait. Of long ones so many are worked on at once, and the others
/// wait in the order they came: megabytes of text that no context can hold would take the processors from the engine
/// otherwise. The connections bound how many wait.
#[derive(Clone, Debug)]
pub(crate) struct Texts {
    long: Arc<Semaphore>,
}

impl Texts {
    /// Makes room for so many long texts at once; at least one.
    pub(crate) fn new(at_once: usize) -> Self {
        Texts { long: Arc::new(Semaphore::new(at_once.max(1))) }
    }

    /// Runs work on the text of a body of so many bytes. Whoever gives up waiting leaves the queue; work that has begun is
    /// ended, and has its place until then.
    ///
    /// # Errors
    /// Those of the work; `Internal` when it panics.
    pub(super) async fn work<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let place = match bytes > LONG_BYTES {
            true => Some(self.long.clone().acquire_owned().await.map_err(Error::internal)?),
            false => None,
        };
        let work = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(place);
            done
        });
        work.await.map_err(Error::internal)?
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn long_texts_wait_for_one_another_and_short_ones_for_nobody() {
        let texts = Texts::new(1);
        let (begun, mut begins) = mpsc::unbounded_channel();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        let long = |name: &'static str, wait: Option<std::sync::mpsc::Receiver<()>>| {
            let (texts, begun) = (texts.clone(), begun.clone());
            tokio::spawn(async move {
                let work = move || {
                    begun.send(name).map_err(Error::internal)?;
                    wait.map_or(Ok(()), |wait| wait.recv().map_err(Error::internal))
                };
                texts.work(LONG_BYTES + 1, work).await
            })
        };
        let first = long("first", Some(ends));
        let soon = Duration::from_secs(5);
        assert_eq!(tokio::time::timeout(soon, begins.recv()).await, Ok(Some("first")));
        let (second, gone) = (long("second", None), long("gone", None));
        tokio::task::yield_now().await;
        // Whoever leaves the queue does not begin.
        gone.abort();
        assert!(texts.work(LONG_BYTES, || Ok(())).await.is_ok());
        assert!(begins.try_recv().is_err(), "the second one has to wait");
        assert!(end.send(()).is_ok());
        assert!(first.await.is_ok_and(|done| done.is_ok()));
        assert!(second.await.is_ok_and(|done| done.is_ok()));
        assert_eq!(begins.try_recv(), Ok("second"));
        assert!(gone.await.is_err() && begins.try_recv().is_err());
    }
}
