//! `ModelLogs`: the last lines of a log, and those that come.

use std::pin::Pin;
use std::time::Duration;

use control::proto;
use futures_util::{Stream, StreamExt};
use service::ring::{LogLine, LogRing};
use tokio::sync::mpsc;
use tonic::Status;
use words::{Code, Error, ModelId};

use crate::publisher::Publisher;
use crate::turns::Turns;

/// Most lines of one message.
const LINES_MAX: usize = 256;
/// Messages that wait for a reader. What comes while it is behind waits in the ring, which forgets.
const QUEUE: usize = 2;
/// A reader that takes nothing for this long is gone.
const STALL_MAX: Duration = Duration::from_secs(60);

/// The messages of one call.
pub(crate) type LogStream = Pin<Box<dyn Stream<Item = Result<proto::LogLines, Status>> + Send>>;

/// Begins to tell a log. It ends with its reader.
///
/// # Errors
/// `ModelNotFound` for a model that this node does not know.
pub(crate) fn begin(turns: &Turns, publisher: &Publisher, asked: &proto::ModelLogsRequest) -> Result<LogStream, Error> {
    let ring = if asked.model_id.is_empty() { turns.node_log() } else { find(turns, publisher, &asked.model_id)? };
    let (out, messages) = mpsc::channel(QUEUE);
    tokio::spawn(tell(ring, asked.lines as usize, asked.follow, out));
    Ok(tokio_stream::wrappers::ReceiverStream::new(messages).map(Ok).boxed())
}

fn find(turns: &Turns, publisher: &Publisher, name: &str) -> Result<LogRing, Error> {
    let id = ModelId::new(name).map_err(|error| Error::invalid("model_id", error.to_string()))?;
    if let Some(ring) = turns.known_log(&id) {
        return Ok(ring);
    }
    let status = publisher.snapshot();
    if status.models.iter().any(|model| model.id == id) {
        return Ok(turns.log(&id));
    }
    let known: Vec<&str> = status.models.iter().map(|model| model.id.as_str()).collect();
    let message = format!("the model '{id}' has no log on this worker; it has {}", known.join(", "));
    Err(Error::new(Code::ModelNotFound, message).at("model_id"))
}

async fn tell(ring: LogRing, lines: usize, follow: bool, out: mpsc::Sender<proto::LogLines>) {
    let mut newest = ring.watch();
    // What is asked for and not there any more is no loss of this reader's.
    let mut after = newest.borrow_and_update().saturating_sub(lines as u64);
    after = after.max(ring.tail(lines).first().map_or(after, |line| line.sequence.saturating_sub(1)));
    loop {
        let read = ring.read(after, LINES_MAX);
        if let (Some(first), Some(last)) = (read.first(), read.last()) {
            let message = message(first.sequence.saturating_sub(after + 1), &read);
            after = last.sequence;
            if !matches!(tokio::time::timeout(STALL_MAX, out.send(message)).await, Ok(Ok(()))) {
                return;
            }
            continue;
        }
        if !follow {
            return;
        }
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            () = out.closed() => return,
        }
    }
}

fn message(missed: u64, lines: &[LogLine]) -> proto::LogLines {
    let line = |line: &LogLine| proto::LogLine {
        sequence: line.sequence,
        at_unix_ms: line.at_ms,
        source: line.source.to_string(),
        text: line.text.clone(),
    };
    proto::LogLines { lines: lines.iter().map(line).collect(), missed }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;

    fn push(ring: &LogRing, range: std::ops::Range<usize>) {
        range.for_each(|i| ring.push(0, &Arc::from("hook"), &format!("line {i:05}")));
    }

    #[tokio::test]
    async fn a_reader_gets_the_last_lines_then_those_that_come_and_hears_what_it_missed() {
        let ring = LogRing::new(16 << 10);
        push(&ring, 0..100);
        let (out, mut messages) = mpsc::channel(QUEUE);
        let told = tokio::spawn(tell(ring.clone(), 3, true, out));
        let first = messages.recv().await.unwrap();
        assert_eq!((first.missed, first.lines.len(), first.lines[0].text.as_str()), (0, 3, "line 00097"));
        // It reads nothing for a while: what waits for it is bounded, and the rest is counted.
        push(&ring, 100..200);
        tokio::task::yield_now().await;
        push(&ring, 200..20_000);
        let (mut seen, mut missed, mut last) = (0, 0, 0);
        while last < 20_000 {
            let message = messages.recv().await.unwrap();
            assert!(message.lines.len() <= LINES_MAX);
            missed += message.missed;
            seen += message.lines.len() as u64;
            last = message.lines.last().unwrap().sequence;
        }
        assert_eq!(seen + missed, 19_900);
        assert!(missed > 0 && seen < 5_000, "{seen}");
        drop(messages);
        told.await.unwrap();
    }

    #[tokio::test]
    async fn without_following_it_ends_with_what_is_there() {
        let ring = LogRing::new(16 << 10);
        push(&ring, 0..600);
        let (out, mut messages) = mpsc::channel(QUEUE);
        tokio::spawn(tell(ring, 1000, false, out));
        let mut seen = 0;
        while let Some(message) = messages.recv().await {
            assert_eq!(message.missed, 0);
            seen += message.lines.len();
        }
        assert_eq!(seen, 600);
    }
}
