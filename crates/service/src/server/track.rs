//! Counting: which connection has a request in flight, and since when another one waits for its headers.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use prometheus::IntGauge;
use tokio::sync::Notify;

use super::Peer;

/// What is known of one connection.
#[derive(Debug)]
pub(super) struct Activity {
    born: Instant,
    in_flight: AtomicUsize,
    requests: AtomicUsize,
    /// Milliseconds since birth plus one when the first byte of an unfinished head came; 0 for none.
    head_since: AtomicU64,
    /// Milliseconds since birth at the last change between busy and idle.
    idle_since: AtomicU64,
    /// Milliseconds since birth plus one when the socket took no more; 0 while it takes.
    blocked_since: AtomicU64,
    /// The same for each stream of HTTP/2, whose peers can also hold a single one back.
    held_back: Mutex<Vec<Weak<AtomicU64>>>,
    pub(super) changed: Notify,
}

impl Activity {
    pub(super) fn new() -> Self {
        Activity {
            born: Instant::now(),
            in_flight: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            head_since: AtomicU64::new(0),
            idle_since: AtomicU64::new(0),
            blocked_since: AtomicU64::new(0),
            held_back: Mutex::default(),
            changed: Notify::new(),
        }
    }

    fn age_ms(&self) -> u64 {
        self.born.elapsed().as_millis() as u64
    }

    pub(super) fn bytes_came(&self) {
        if self.in_flight.load(Ordering::Relaxed) == 0 && self.head_since.load(Ordering::Relaxed) == 0 {
            self.head_since.store(self.age_ms() + 1, Ordering::Relaxed);
        }
    }

    /// Notes a write, and whether the socket took nothing of it.
    pub(super) fn wrote(&self, blocked: bool) {
        let since = self.blocked_since.load(Ordering::Relaxed);
        match (blocked, since) {
            (true, 0) => self.blocked_since.store(self.age_ms() + 1, Ordering::Relaxed),
            (false, 1..) => self.blocked_since.store(0, Ordering::Relaxed),
            _ => {}
        }
    }

    /// Makes the mark of one more stream of HTTP/2.
    fn stream(&self) -> Arc<AtomicU64> {
        let mark = Arc::new(AtomicU64::new(0));
        let mut streams = self.held_back.lock().unwrap_or_else(PoisonError::into_inner);
        streams.retain(|stream| stream.strong_count() > 0);
        streams.push(Arc::downgrade(&mark));
        mark
    }

    /// Returns for how long the peer has taken nothing of an answer that is there, in milliseconds.
    pub(super) fn stalled_ms(&self) -> u64 {
        let streams = self.held_back.lock().unwrap_or_else(PoisonError::into_inner);
        let marks = streams.iter().filter_map(Weak::upgrade).map(|mark| mark.load(Ordering::Relaxed));
        let marks = marks.chain([self.blocked_since.load(Ordering::Relaxed)]);
        let oldest = marks.filter(|since| *since > 0).min();
        oldest.map_or(0, |since| (self.age_ms() + 1).saturating_sub(since))
    }

    /// Returns for how long headers have been coming, in milliseconds.
    pub(super) fn head_ms(&self) -> Option<u64> {
        match self.head_since.load(Ordering::Relaxed) {
            0 => None,
            since => Some((self.age_ms() + 1).saturating_sub(since)),
        }
    }

    /// Returns for how long nothing has been in flight, in milliseconds.
    pub(super) fn idle_ms(&self) -> Option<u64> {
        let idle = self.in_flight.load(Ordering::Relaxed) == 0;
        idle.then(|| self.age_ms().saturating_sub(self.idle_since.load(Ordering::Relaxed)))
    }

    pub(super) fn busy(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) > 0
    }

    pub(super) fn had_requests(&self) -> bool {
        self.requests.load(Ordering::Relaxed) > 0
    }
}

/// One request in flight, from its headers to the end of its response's body.
struct InFlight {
    activity: Arc<Activity>,
    gauge: IntGauge,
}

impl InFlight {
    fn enter(activity: &Arc<Activity>, gauge: &IntGauge) -> Self {
        activity.in_flight.fetch_add(1, Ordering::Relaxed);
        activity.requests.fetch_add(1, Ordering::Relaxed);
        activity.head_since.store(0, Ordering::Relaxed);
        activity.changed.notify_one();
        gauge.inc();
        InFlight { activity: activity.clone(), gauge: gauge.clone() }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.activity.idle_since.store(self.activity.age_ms(), Ordering::Relaxed);
        self.activity.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.activity.changed.notify_one();
        self.gauge.dec();
    }
}

/// A service that counts.
#[derive(Clone)]
pub(super) struct Tracked<S> {
    pub(super) service: S,
    pub(super) peer: Peer,
    pub(super) h2: bool,
    pub(super) activity: Arc<Activity>,
    pub(super) gauge: IntGauge,
}

impl<S, B> hyper::service::Service<Request<Incoming>> for Tracked<S>
where
    S: hyper::service::Service<Request<Incoming>, Response = Response<B>>,
{
    type Response = Response<TrackedBody<B>>;
    type Error = S::Error;
    type Future = TrackedFuture<S::Future>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let flight = Some(InFlight::enter(&self.activity, &self.gauge));
        request.extensions_mut().insert(self.peer);
        let mark = self.h2.then(|| self.activity.stream());
        TrackedFuture { future: self.service.call(request), flight, mark }
    }
}

pin_project! {
    pub(super) struct TrackedFuture<F> {
        #[pin]
        future: F,
        flight: Option<InFlight>,
        mark: Option<Arc<AtomicU64>>,
    }
}

impl<F, B, E> Future for TrackedFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<TrackedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.future.poll(cx))?;
        let (flight, mark) = (this.flight.take(), this.mark.take());
        Poll::Ready(Ok(response.map(|body| TrackedBody { body, flight, mark })))
    }
}

pin_project! {
    pub(super) struct TrackedBody<B> {
        #[pin]
        body: B,
        flight: Option<InFlight>,
        // When this gave a frame and was not asked for another one since.
        mark: Option<Arc<AtomicU64>>,
    }
}

impl<B: Body<Data = Bytes>> Body for TrackedBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        if let Some(mark) = this.mark {
            mark.store(0, Ordering::Relaxed);
        }
        let frame = ready!(this.body.poll_frame(cx));
        if frame.is_none() {
            this.flight.take();
        } else if let (Some(mark), Some(flight)) = (this.mark, this.flight) {
            mark.store(flight.activity.age_ms() + 1, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
