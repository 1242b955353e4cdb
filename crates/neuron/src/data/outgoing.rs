//! One answer on its way out, whoever makes it: what is said to it, its signs of life, and when its head is sent.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_util::{Stream, StreamExt};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use wire::{HTTP_SSE_CONTENT_TYPE, KEEP_ALIVE_EVENT};
use words::{Code, Error};

use crate::streams::{Reason, Ticket, Word};

/// How often a silent answer shows a sign of life.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// What makes an answer: news of its engine in, bytes out.
pub(super) trait Making: Send + Sized + 'static {
    /// What its engine says.
    type News: Send;

    /// Waits for the next news; `None` when there will be no more. Safe to cancel.
    fn news(&mut self) -> impl Future<Output = Option<Self::News>> + Send;

    /// Turns news into bytes, if they make any.
    ///
    /// # Errors
    /// Whatever ends the answer; nothing is taken after it.
    fn take(&mut self, news: Option<Self::News>) -> Result<Option<Bytes>, Error>;

    /// Returns the last bytes of an answer that is over before its engine says so.
    fn early_end(&mut self) -> Option<Bytes> {
        None
    }

    /// Whether its last bytes are out.
    fn over(&self) -> bool;

    /// Takes note that somebody has cancelled it; its engine knows already, and says its end.
    fn cancelled(&mut self, reason: Reason);

    /// Passes on that another worker may continue it, where one may.
    fn offered(&mut self) -> Option<Bytes>;

    /// Shows life, where nothing else has since the last time.
    fn sign_of_life(&mut self) -> Option<Bytes>;

    /// Takes its end by an error, which it returns.
    fn ended(&mut self, error: Error) -> Error;

    /// Turns a failure into the last bytes of a stream.
    fn fail(&mut self, error: &Error) -> Bytes;
}

/// The answer. Dropping it cancels the request, and then ends what makes it.
pub(super) struct Outgoing<M> {
    /// Its place among the running requests; holds what cancels it.
    ticket: Ticket,
    making: M,
    ticker: Interval,
}

impl<M: Making> Outgoing<M> {
    pub(super) fn new(ticket: Ticket, making: M) -> Self {
        let mut ticker = tokio::time::interval_at(Instant::now() + SIGN_OF_LIFE, SIGN_OF_LIFE);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Outgoing { ticket, making, ticker }
    }

    /// Sends it out: to a gateway always as a stream with private lines, committed at once; to a client as OpenAI does,
    /// where a stream commits at its first bytes or after `patience`, and what fails from then on becomes an event.
    ///
    /// # Errors
    /// Whatever ends the request before its head is sent.
    pub(super) async fn respond(mut self, inside: bool, stream: bool, patience: Duration) -> Result<Response, Error> {
        if inside {
            return Ok(self.event_stream(None));
        }
        if !stream {
            let whole = self.first().await?.unwrap_or_default();
            return Ok(response("application/json", Body::from(whole)));
        }
        let first = match tokio::time::timeout(patience, self.first()).await {
            Ok(first) => first?,
            Err(_) => Some(Bytes::from_static(KEEP_ALIVE_EVENT)),
        };
        Ok(self.event_stream(first))
    }

    fn event_stream(self, first: Option<Bytes>) -> Response {
        let rest = futures_util::stream::unfold(self, |mut answer| async move {
            let bytes = answer.next().await?;
            Some((bytes, answer))
        });
        events(first, rest)
    }

    /// Waits for the first bytes, which of an answer in one piece are all; nobody but its own worker can end it meanwhile.
    /// Safe to cancel, and to call `next` afterwards.
    async fn first(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if let Some(end) = self.making.early_end() {
                return Ok(Some(end));
            }
            let news = tokio::select! {
                biased;
                word = self.ticket.told() => {
                    if let Word::Cancelled(reason) = word {
                        self.making.cancelled(reason);
                    }
                    continue;
                }
                news = self.making.news() => news,
            };
            if let Some(bytes) = self.making.take(news)? {
                return Ok(Some(bytes));
            }
            if self.making.over() {
                return Ok(None);
            }
        }
    }

    /// Returns the next bytes of a stream; `None` at its end.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.making.over() {
            if let Some(end) = self.making.early_end() {
                return Some(end);
            }
            let bytes = tokio::select! {
                biased;
                // First, so that a flood of tokens can't drown it.
                word = self.ticket.told() => match word {
                    Word::GoOn => None,
                    Word::Offered => self.making.offered(),
                    Word::Cancelled(reason) => {
                        self.making.cancelled(reason);
                        None
                    }
                    Word::Orphaned => {
                        self.making.ended(Error::new(Code::ClientClosed, "the gateway's session is lost"));
                        None
                    }
                },
                news = self.making.news() => match self.making.take(news) {
                    Ok(bytes) => bytes,
                    Err(error) => Some(self.making.fail(&error)),
                },
                _ = self.ticker.tick() => self.making.sign_of_life(),
            };
            if bytes.is_some() {
                return bytes;
            }
        }
        None
    }
}

/// Makes a response of one type.
pub(super) fn response(kind: &'static str, body: Body) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// Makes the response of an event stream.
fn events(
    first: impl IntoIterator<Item = Bytes, IntoIter: Send + 'static>,
    rest: impl Stream<Item = Bytes> + Send + 'static,
) -> Response {
    let whole = futures_util::stream::iter(first).chain(rest).map(Ok::<_, std::convert::Infallible>);
    let mut response = response(HTTP_SSE_CONTENT_TYPE, Body::from_stream(whole));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
