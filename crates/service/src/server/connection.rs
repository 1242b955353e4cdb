//! One connection, from its first byte to its end.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::track::{Activity, Tracked};
use super::{Peer, Phase, ServerOptions, Shared};

/// How HTTP/2 begins; HTTP/1 has no such method.
const H2_PREFACE: &[u8] = b"PRI";
/// How long a connection whose last response is complete may take to flush it once the server stops.
const FLUSH_MAX: Duration = Duration::from_millis(500);

/// A stream that notes when bytes come, and when they don't go.
struct Watched {
    stream: TcpStream,
    activity: Arc<Activity>,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.activity.bytes_came();
        }
        result
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.activity.wrote(result.is_pending());
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.activity.wrote(result.is_pending());
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn builder(options: &ServerOptions) -> Builder<TokioExecutor> {
    let ms = Duration::from_millis;
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // Our own clock watches the headers, and tells them from idleness.
        .header_read_timeout(None)
        .max_buf_size(options.max_header_bytes.max(8192))
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(options.max_header_bytes as u32)
        .max_concurrent_streams(options.h2_max_streams)
        .keep_alive_interval(ms(options.h2_keepalive_interval_ms))
        .keep_alive_timeout(ms(options.h2_keepalive_timeout_ms));
    builder
}

/// A connection without a request is kept for this long as long as others wait for a place.
const CROWDED_IDLE: Duration = Duration::from_secs(1);

/// Waits until others have waited for a place for as long as this connection may be idle then.
async fn crowded(shared: &Shared) {
    let mut crowded = shared.crowded.subscribe();
    loop {
        if crowded.wait_for(|crowded| *crowded).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(CROWDED_IDLE).await;
        if *crowded.borrow() {
            return;
        }
    }
}

/// Waits for the first bytes; `None` when there are none in time, or the server stops first.
async fn sniff(stream: &TcpStream, shared: &Shared) -> Option<bool> {
    let mut phase = shared.phase.subscribe();
    let mut first = [0; H2_PREFACE.len()];
    let patience = Duration::from_millis(shared.options.sniff_timeout_ms);
    tokio::select! {
        read = tokio::time::timeout(patience, stream.peek(&mut first)) => match read {
            Ok(Ok(length)) if length > 0 => Some(H2_PREFACE.starts_with(&first[..length])),
            _ => None,
        },
        _ = phase.wait_for(|phase| *phase >= Phase::Stopping) => None,
        () = crowded(shared) => None,
    }
}

pub(super) async fn serve<S, B>(stream: TcpStream, peer: Peer, shared: Arc<Shared>, service: S)
where
    S: hyper::service::Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Some(h2) = sniff(&stream, &shared).await else { return };
    let activity = Arc::new(Activity::new());
    let gauge = shared.metrics.in_flight.clone();
    let service = Tracked { service, peer, h2, activity: activity.clone(), gauge };
    let io = TokioIo::new(Watched { stream, activity: activity.clone() });
    let builder = builder(&shared.options);
    let mut connection = pin!(builder.serve_connection(io, service));
    let mut phase = shared.phase.subscribe();
    let mut graceful = false;
    let mut check = tokio::time::interval(check_every(&shared.options));
    check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let now = *phase.borrow_and_update();
        if now == Phase::Cut || (now == Phase::Stopping && !activity.busy() && !activity.had_requests()) {
            return;
        }
        // A connection that has not asked anything yet is left to ask once: its answer then ends it.
        if now >= Phase::Closing && !graceful && activity.had_requests() {
            connection.as_mut().graceful_shutdown();
            graceful = true;
        }
        let flushing = now == Phase::Stopping && !activity.busy();
        tokio::select! {
            biased;
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended with an error");
                }
                return;
            }
            _ = phase.changed() => {}
            () = activity.changed.notified(), if now >= Phase::Closing => {}
            () = tokio::time::sleep(FLUSH_MAX), if flushing => return,
            _ = check.tick() => {
                if activity.stalled_ms() > shared.options.write_stall_ms {
                    shared.metrics.stalled.inc();
                    tracing::debug!(peer = %peer.0, "a client takes nothing of its answer; it is cut off");
                    return;
                }
                if overdue(&activity, &shared, h2) {
                    return;
                }
            }
        }
    }
}

/// Often enough that a timeout is late by a quarter at most.
fn check_every(options: &ServerOptions) -> Duration {
    let shortest = options.header_timeout_ms.min(options.idle_timeout_ms).min(options.write_stall_ms);
    Duration::from_millis((shortest / 4).clamp(20, 5_000))
}

/// Whether the peer has let a timeout pass. HTTP/2 frames that are no headers also bring bytes, so there only
/// idleness counts.
fn overdue(activity: &Activity, shared: &Shared, h2: bool) -> bool {
    let options = &shared.options;
    let late_head = !h2 && activity.head_ms().is_some_and(|ms| ms > options.header_timeout_ms);
    let crowded = *shared.crowded.borrow();
    let idle_max = if crowded { CROWDED_IDLE.as_millis() as u64 } else { options.idle_timeout_ms };
    late_head || activity.idle_ms().is_some_and(|ms| ms > idle_max.min(options.idle_timeout_ms))
}
