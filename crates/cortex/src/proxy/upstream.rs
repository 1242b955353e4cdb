//! The client towards the workers' data planes: HTTP/1.1, polled where the answer is read.
//!
//! There is no task of a connection's own: its socket is read by whoever waits for the answer, so that an event wakes one
//! task and not two, and a client that leaves ends its worker's request by that alone.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::Response;
use http_body::Frame;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::http1::{Framing, Head, Malformed, Taken, take_head};

/// How long an idle connection is kept: below the workers' own idle timeout, so that none is used just as it is closed.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// How often idle connections of workers that are asked no more are looked through.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// What a fresh buffer takes.
const READ_BYTES: usize = 8 << 10;
/// A buffer with less room than this is not read into any more. What was read of it may still be on its way to the client,
/// so that a new one is memory of its own.
const ROOM_MIN: usize = 2 << 10;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// The worker could not be reached; it has nothing of the request.
    #[error("no connection: {0}")]
    Connect(io::Error),
    /// It may have the request.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    /// It speaks something else.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl RequestError {
    /// Returns whether the worker has nothing of the request.
    pub(crate) fn is_connect(&self) -> bool {
        matches!(self, RequestError::Connect(_))
    }
}

struct Idle {
    stream: TcpStream,
    /// Empty, and kept for its memory.
    buffer: BytesMut,
    since: Instant,
}

impl Idle {
    fn usable(&self, now: Instant) -> bool {
        // A worker that says anything now ends the connection.
        let quiet = matches!(self.stream.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        quiet && now.duration_since(self.since) < IDLE_MAX
    }
}

#[derive(Default)]
struct Pool {
    /// By address; the freshest last.
    idle: HashMap<String, Vec<Idle>>,
    swept: Option<Instant>,
}

struct Shared {
    /// Held for a look-up.
    pool: Mutex<Pool>,
    connect_timeout: Duration,
    idle_connections: usize,
}

/// The client; cheap to clone.
#[derive(Clone)]
pub(crate) struct Upstream(Arc<Shared>);

impl Upstream {
    /// Makes a client that keeps at most so many idle connections to each worker.
    pub(crate) fn new(connect_timeout: Duration, idle_connections: usize) -> Self {
        Upstream(Arc::new(Shared { pool: Mutex::default(), connect_timeout, idle_connections }))
    }

    fn take(&self, address: &str) -> Option<(TcpStream, BytesMut)> {
        let now = Instant::now();
        let mut pool = self.0.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = pool.idle.get_mut(address)?;
        std::iter::from_fn(|| idle.pop()).find(|idle| idle.usable(now)).map(|idle| (idle.stream, idle.buffer))
    }

    fn put(&self, address: String, stream: TcpStream, buffer: BytesMut) {
        let now = Instant::now();
        let mut pool = self.0.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.swept.is_none_or(|swept| now.duration_since(swept) > SWEEP_EVERY) {
            pool.swept = Some(now);
            pool.idle.retain(|_, idle| {
                idle.retain(|idle| idle.usable(now));
                !idle.is_empty()
            });
        }
        let idle = pool.idle.entry(address).or_default();
        if idle.len() < self.0.idle_connections {
            idle.push(Idle { stream, buffer, since: now });
        }
    }

    async fn connect(&self, address: &str) -> Result<TcpStream, RequestError> {
        let connected = tokio::time::timeout(self.0.connect_timeout, TcpStream::connect(address)).await;
        let stream =
            connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(RequestError::Connect)?;
        // Without it a request waits for the acknowledgement of the one before: 40 ms.
        stream.set_nodelay(true).map_err(RequestError::Connect)?;
        Ok(stream)
    }

    /// Sends a request to an address and waits for the answer's head. Dropping the future, or the answer's body before its
    /// end, closes the connection.
    ///
    /// # Errors
    /// [`RequestError`]; a worker that answers before it has the whole request is heard all the same.
    pub(crate) async fn request(
        &self,
        address: &str,
        head: &[u8],
        body: &[u8],
    ) -> Result<Response<Answer>, RequestError> {
        let (mut stream, mut buffer) = match self.take(address) {
            Some(known) => known,
            None => (self.connect(address).await?, BytesMut::new()),
        };
        let (whole, Head { response, framing, reusable }) = exchange(&mut stream, head, body, &mut buffer).await?;
        let home = (whole && reusable).then(|| (self.clone(), address.to_string()));
        let connection = Some(Connection { stream, home });
        Ok(response.map(|()| Answer { connection, buffer, framing }))
    }
}

/// Sends a request and reads the answer's head; returns whether all of the request went out.
async fn exchange(
    stream: &mut TcpStream,
    head: &[u8],
    body: &[u8],
    buffer: &mut BytesMut,
) -> Result<(bool, Head), RequestError> {
    let mut written = 0;
    let whole = head.len() + body.len();
    let mut unwritten = None;
    loop {
        while written < whole && unwritten.is_none() {
            let rest = &body[written.saturating_sub(head.len())..];
            let parts = [IoSlice::new(&head[written.min(head.len())..]), IoSlice::new(rest)];
            match stream.try_write_vectored(&parts) {
                Ok(length) => written += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // It may have answered before it closed.
                Err(error) => unwritten = Some(error),
            }
        }
        let blocked = written < whole && unwritten.is_none();
        let came = std::future::poll_fn(|cx| match poll_read(stream, buffer, cx) {
            Poll::Pending if blocked => stream.poll_write_ready(cx).map_ok(|()| None),
            read => read.map_ok(Some),
        });
        match came.await {
            Ok(None) => {}
            Ok(Some(0)) => return Err(unwritten.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into()).into()),
            Ok(Some(_)) => {
                while let Some(head) = take_head(buffer)? {
                    if !head.response.status().is_informational() {
                        return Ok((written == whole, head));
                    }
                }
            }
            Err(error) => return Err(unwritten.unwrap_or(error).into()),
        }
    }
}

/// Reads what is there. By the runtime's own read, which knows from a short one that there is no more.
fn poll_read(stream: &mut TcpStream, buffer: &mut BytesMut, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    if buffer.capacity() - buffer.len() < ROOM_MIN {
        buffer.reserve(READ_BYTES);
    }
    pin!(stream.read_buf(buffer)).poll(cx)
}

struct Connection {
    stream: TcpStream,
    /// Where it goes after the answer's end, if it may be used again.
    home: Option<(Upstream, String)>,
}

/// The body of an answer.
pub(crate) struct Answer {
    connection: Option<Connection>,
    buffer: BytesMut,
    framing: Framing,
}

impl Answer {
    fn over(&mut self) {
        if let Some(Connection { stream, home: Some((upstream, address)) }) = self.connection.take()
            && self.buffer.is_empty()
        {
            upstream.put(address, stream, std::mem::take(&mut self.buffer));
        }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = RequestError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RequestError>>> {
        let this = &mut *self;
        loop {
            match this.framing.take(&mut this.buffer) {
                Ok(Taken::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Taken::End) => {
                    this.over();
                    return Poll::Ready(None);
                }
                Ok(Taken::Nothing) => {}
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
            let Some(connection) = &mut this.connection else { return Poll::Ready(None) };
            match ready!(poll_read(&mut connection.stream, &mut this.buffer, cx)) {
                Ok(0) if this.framing == Framing::Close => this.framing = Framing::Over,
                Ok(0) => return Poll::Ready(Some(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
        }
    }
}
