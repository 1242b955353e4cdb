//! The client's side of a relay: when status 200 is committed, keep-alives, and how failures are said.

use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{Stream, StreamExt, unfold};
use http::{HeaderName, HeaderValue, Response, header};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use service::addresses::AddressGuard;
use service::gate::Admission;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};
use wire::{HTTP_SSE_CONTENT_TYPE, KEEP_ALIVE_EVENT, error_event};
use words::{Code, Error};

use super::Relay;

/// Any response body of the gateway.
pub(crate) type BoxBody = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

/// Makes a body of bytes.
pub(crate) fn full(bytes: impl Into<Bytes>) -> BoxBody {
    Full::new(bytes.into()).boxed_unsync()
}

const UNBUFFERED: HeaderName = HeaderName::from_static("x-accel-buffering");

type Events = Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send>>;

/// What a request holds until its last byte: its admission, and its place among those of its address.
pub(crate) type Place = (Admission, Option<AddressGuard>);

/// When a stream commits and how it is kept alive.
pub(crate) struct Pace {
    pub(crate) commit_after: Duration,
    pub(crate) keep_alive: Duration,
}

/// The relay is boxed, for the stream moves it at each event.
fn events(relay: Box<Relay>) -> Events {
    Box::pin(unfold(relay, |mut relay| async move {
        let next = relay.next().await?;
        Some((next, relay))
    }))
}

/// Answers a request. A stream commits at its first event, or after `commit_after`; an answer that is not streamed
/// commits at its end.
///
/// # Errors
/// Whatever ends the request before its status is committed.
pub(crate) async fn respond(
    relay: Box<Relay>,
    stream: bool,
    pace: Pace,
    cut: watch::Receiver<bool>,
    place: Place,
) -> Result<Response<BoxBody>, Error> {
    let mut events = events(relay);
    if !stream {
        return whole(events, cut).await;
    }
    let first = tokio::time::timeout(pace.commit_after, uncut(&mut events, cut.clone())).await;
    let first = match first {
        Ok(Some(Ok(bytes))) => bytes,
        Ok(Some(Err(error))) => return Err(error),
        Ok(None) => return Err(Error::new(Code::UpstreamFailed, "the worker sent an empty answer")),
        Err(_) => Bytes::from_static(KEEP_ALIVE_EVENT),
    };
    let flow = Flow {
        first: Some(first),
        events,
        cut: when_cut(cut),
        keep_alive: pace.keep_alive,
        spoke_at: Instant::now(),
        timer: Box::pin(tokio::time::sleep(pace.keep_alive)),
        over: false,
        _place: place,
    };
    let frames = unfold(Box::new(flow), |mut flow| async move {
        let bytes = flow.next().await?;
        Some((Ok(Frame::data(bytes)), flow))
    });
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(HTTP_SSE_CONTENT_TYPE));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx keeps events back otherwise, until they fill a buffer.
    headers.insert(UNBUFFERED, HeaderValue::from_static("no"));
    Ok(response)
}

fn cut_error() -> Error {
    Error::new(Code::StreamCut, "the gateway is leaving and its time to finish this answer is over")
}

/// Returns the next event, or the error of a drain's deadline.
async fn uncut(events: &mut Events, mut cut: watch::Receiver<bool>) -> Option<Result<Bytes, Error>> {
    tokio::select! {
        biased;
        event = events.next() => event,
        Ok(_) = cut.wait_for(|cut| *cut) => Some(Err(cut_error())),
    }
}

/// Unwraps the one event of an answer that is not streamed.
async fn whole(mut events: Events, cut: watch::Receiver<bool>) -> Result<Response<BoxBody>, Error> {
    let mut answer = Bytes::new();
    while let Some(event) = uncut(&mut events, cut.clone()).await {
        answer = event?;
    }
    let json = answer.strip_prefix(b"data: ").and_then(|rest| rest.strip_suffix(b"\n\n"));
    let Some(json) = json else {
        return Err(Error::new(Code::UpstreamFailed, "the worker's answer is not one"));
    };
    let mut response = Response::new(full(answer.slice_ref(json)));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

type Cut = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Waits for the drain's deadline; for ever where none comes.
fn when_cut(mut cut: watch::Receiver<bool>) -> Cut {
    Box::pin(async move {
        if cut.wait_for(|cut| *cut).await.is_err() {
            std::future::pending().await
        }
    })
}

/// A committed stream. What it waits for besides events is kept over them: to wait anew at each costs more than they do.
struct Flow {
    first: Option<Bytes>,
    events: Events,
    cut: Cut,
    keep_alive: Duration,
    /// When the client got something last.
    spoke_at: Instant,
    timer: Pin<Box<Sleep>>,
    over: bool,
    _place: Place,
}

impl Flow {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        if self.over {
            return None;
        }
        let event = loop {
            tokio::select! {
                biased;
                event = self.events.next() => break event,
                () = &mut self.cut => break Some(Err(cut_error())),
                () = &mut self.timer => {
                    let due = self.spoke_at + self.keep_alive;
                    let now = Instant::now();
                    if due > now {
                        self.timer.as_mut().reset(due);
                        continue;
                    }
                    self.spoke_at = now;
                    self.timer.as_mut().reset(now + self.keep_alive);
                    return Some(Bytes::from_static(KEEP_ALIVE_EVENT));
                }
            }
        };
        self.spoke_at = Instant::now();
        match event {
            Some(Ok(bytes)) => Some(bytes),
            Some(Err(error)) => {
                // Never [DONE] after a failure: clients would read it as success.
                self.over = true;
                Some(error_event(&error))
            }
            None => None,
        }
    }
}
