//! One try of a request on one worker: whole events in order, private lines apart.

use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fleet::{Ending, Target};
use http::{HeaderMap, header};
use http_body::Body;
use http_body_util::{BodyExt, Limited};
use service::traces::Span;
use tokio::time::{Instant, Sleep};
use wire::EventSplitter;
use wire::private::{self, Line, Refusal};
use words::{Code, Error};

use super::http1::RequestHead;
use super::upstream::Answer;
use super::vigil::Watch;
use super::{Order, Proxy};

/// Most bytes of a worker's refusal.
const REFUSAL_BYTES_MAX: usize = 64 << 10;

/// An open attempt.
pub(super) struct Attempt {
    pub(super) target: Target,
    body: Answer,
    splitter: EventSplitter,
    /// Kept over the attempt: a timer that is made or set anew for each event costs more than the event.
    timer: Pin<Box<Sleep>>,
    /// Events that count only with the one that follows them.
    held: BytesMut,
    held_max: usize,
}

/// Why there is no attempt.
pub(super) struct Unopened {
    pub(super) ending: Ending,
    /// The worker has the request, or had it.
    pub(super) sent: bool,
}

/// What comes next.
pub(super) enum Next {
    /// A whole event: its private lines are in the caller's vector, this is the client's part, maybe empty.
    Event(Bytes),
    /// Nothing came in time.
    Quiet,
    /// The stream is over, properly or not.
    End,
}

fn upstream_error(message: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(Code::UpstreamFailed, message).because(source)
}

pub(super) fn silent() -> Error {
    Error::new(Code::UpstreamTimeout, "the worker was silent for too long")
}

impl Attempt {
    /// Sends the request and waits for the response's head, as long as the watch allows.
    ///
    /// # Errors
    /// `UpstreamFailed` or `UpstreamTimeout` when the worker can't be reached or does not answer; its own error
    /// when it refuses; `ModelLoading` when the wait for a load is over.
    pub(super) async fn open(
        proxy: &Proxy,
        order: &Order,
        body: Bytes,
        target: Target,
        number: u32,
        span: &Span,
        watch: &mut Watch,
    ) -> Result<Self, Unopened> {
        // What the client says of its trace, or what this gateway does.
        let mut trace = HeaderMap::new();
        for (name, value) in &order.trace {
            value.iter().for_each(|value| _ = trace.insert(name, value.clone()));
        }
        span.write(&mut trace);
        let head = RequestHead::post(order.endpoint.path(), &target.data_address)
            .field("content-type", b"application/json")
            .field(private::REQUEST_ID_HEADER, order.request_id.as_bytes())
            .number(private::ATTEMPT_HEADER, number.into())
            .field(private::GATEWAY_HEADER, proxy.gateway.as_str().as_bytes())
            .number(private::SEED_HEADER, order.seed)
            .field(private::COMPLETION_ID_HEADER, order.completion_id.as_bytes())
            .number(private::CREATED_HEADER, order.created);
        let head = trace.iter().fold(head, |head, (name, value)| head.field(name.as_str(), value.as_bytes()));
        let head = head.end(body.len());
        let unsent = |error| Unopened { ending: Ending::Failed(error), sent: false };
        let sent = |error| Unopened { ending: Ending::Failed(error), sent: true };
        let mut timer = Box::pin(tokio::time::sleep_until(proxy.clock.instant(watch.look_at())));
        let response = {
            let mut answer = pin!(proxy.upstream.request(&target.data_address, &head, &body));
            loop {
                tokio::select! {
                    biased;
                    response = &mut answer => break response,
                    () = &mut timer => {}
                }
                let judged = watch.look(proxy, &order.model, target.slot, false);
                judged.map_err(|ending| Unopened { ending, sent: true })?;
                timer.as_mut().reset(proxy.clock.instant(watch.look_at()));
            }
        };
        let response = response.map_err(|error| match error.is_connect() {
            true => unsent(upstream_error("the worker could not be reached", error)),
            false => sent(upstream_error("the worker broke off before its answer", error)),
        })?;
        if !response.status().is_success() {
            return Err(sent(refusal(response).await));
        }
        let held_max = proxy.options.proxy.event_bytes_max;
        let splitter = EventSplitter::new(held_max);
        watch.answered(&proxy.options.proxy, proxy.clock.now());
        Ok(Attempt { target, body: response.into_body(), splitter, timer, held: BytesMut::new(), held_max })
    }

    /// Returns the next event, together with those that only count with it. Safe to cancel.
    ///
    /// # Errors
    /// `UpstreamFailed` when the connection broke.
    pub(super) async fn next(&mut self, until: Instant, lines: &mut Vec<Line>) -> Result<Next, Error> {
        loop {
            let event = self.splitter.next_event();
            if let Some(event) = event.map_err(|error| upstream_error("the worker spoke nonsense", error))? {
                let public = private::strip(&event, lines);
                if lines.last() != Some(&Line::More) {
                    return Ok(Next::Event(self.whole(public)));
                }
                lines.pop();
                self.held.extend_from_slice(&public);
                if self.held.len() > self.held_max {
                    return Err(upstream_error("the worker spoke nonsense", "events without an end"));
                }
                continue;
            }
            let frame = std::future::poll_fn(|cx| {
                if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
                    return Poll::Ready(Some(frame));
                }
                // Set only where it has to be waited for.
                if self.timer.deadline() != until {
                    self.timer.as_mut().reset(until);
                }
                self.timer.as_mut().poll(cx).map(|()| None)
            });
            let Some(frame) = frame.await else { return Ok(Next::Quiet) };
            match frame {
                Some(Ok(frame)) => {
                    if let Ok(chunk) = frame.into_data() {
                        self.splitter.push(chunk);
                    }
                }
                Some(Err(error)) => {
                    self.splitter.discard_partial();
                    return Err(upstream_error("the worker's connection broke", error));
                }
                None => {
                    self.splitter.discard_partial();
                    return Ok(Next::End);
                }
            }
        }
    }
}

impl Attempt {
    fn whole(&mut self, last: Bytes) -> Bytes {
        if self.held.is_empty() {
            return last;
        }
        let mut whole = self.held.split();
        whole.extend_from_slice(&last);
        whole.freeze()
    }
}

/// Reads a worker's error response. One without our code is no answer of a worker.
async fn refusal(response: http::Response<Answer>) -> Error {
    let status = response.status();
    let code = response.headers().get(private::ERROR_HEADER).and_then(|value| value.to_str().ok()).map(str::to_string);
    let retry_after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|text| text.parse::<u64>().ok());
    let read = Limited::new(response.into_body(), REFUSAL_BYTES_MAX).collect();
    let body = tokio::time::timeout(Duration::from_secs(5), read).await;
    let body = body.ok().and_then(Result::ok).map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let Some(code) = code else {
        let source = format!("status {status} without a code");
        return upstream_error("something that is no worker answered at a worker's address", source);
    };
    let envelope: Option<wire::ErrorEnvelope> = serde_json::from_slice(&body).ok();
    let (message, param, loading) = match envelope {
        Some(envelope) => (envelope.error.message, envelope.error.param, envelope.error.loading),
        None => (format!("the worker refused the request with {code}"), None, None),
    };
    let error = Error::from(Refusal { code, message, param });
    let error = loading.into_iter().fold(error, |error, loading| error.while_loading(loading.into()));
    match retry_after {
        Some(seconds) if matches!(error.retry(), words::Retry::After(_)) => {
            error.retry_after(Duration::from_secs(seconds.min(3600)))
        }
        _ => error,
    }
}
