//! Clients of the plainest kind: one socket each, HTTP/1.1 with keep-alive, answers checked and thrown away.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::process::Program;
use super::worker::MODEL;

/// Longest wait for anything of an answer.
const ANSWER_MAX: Duration = Duration::from_secs(20);
const DONE: &[u8] = b"data: [DONE]\n\n";

/// Makes a request of `max_tokens` tokens, `pace` apart, with a prompt of so many bytes.
pub(super) fn request(stream: bool, max_tokens: usize, pace: Duration, prompt: usize) -> Arc<[u8]> {
    let body = serde_json::json!({
        "model": MODEL, "stream": stream, "max_tokens": max_tokens, "pace_us": pace.as_micros() as u64,
        "messages": [{"role": "user", "content": "word ".repeat(prompt.div_ceil(5))}],
    });
    let body = body.to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\nuser-agent: bench\r\n\
         authorization: Bearer none\r\naccept: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    (head + &body).into_bytes().into()
}

/// What the load alone is told.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Whom to ask.
    #[arg(long)]
    to: SocketAddr,
    /// Connections.
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Bytes of each prompt.
    #[arg(long, default_value_t = 20)]
    prompt: usize,
    /// Streams instead of whole answers.
    #[arg(long)]
    stream: bool,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 16)]
    tokens: usize,
    /// Microseconds between two tokens.
    #[arg(long, default_value_t = 0)]
    pace_us: u64,
    /// For how long.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

/// Asks for a while, and says how many answers and events there were.
#[allow(clippy::print_stdout)]
pub(crate) fn load(args: &LoadArgs) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let request = request(args.stream, args.tokens, Duration::from_micros(args.pace_us), args.prompt);
        let mut crowd = Crowd::gather(args.to, args.connections, &request).await?;
        tokio::time::sleep(Duration::from_secs_f64(args.seconds.max(0.0))).await;
        crowd.check().await?;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        println!("{} answers, {} events", count(&crowd.seen.answers), count(&crowd.seen.events));
        Ok(())
    })
}

/// What all clients have seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Whole answers.
    pub(super) answers: AtomicU64,
    /// Events of streams.
    pub(super) events: AtomicU64,
    /// Streams that have their first event.
    pub(super) begun: AtomicU64,
}

/// One connection.
pub(super) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

impl Client {
    pub(super) async fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Client { stream, buffer: Vec::with_capacity(16 << 10) })
    }

    async fn more(&mut self) -> Result<()> {
        let read = tokio::time::timeout(ANSWER_MAX, self.stream.read_buf(&mut self.buffer)).await;
        ensure!(read.context("no answer came in time")?? > 0, "the connection ended in the middle of an answer");
        Ok(())
    }

    /// Asks, and returns how long the first byte of the answer's body took.
    ///
    /// # Errors
    /// When the answer is not a whole one with status 200.
    pub(super) async fn ask(&mut self, request: &[u8], seen: &Seen) -> Result<Duration> {
        let asked = Instant::now();
        self.stream.write_all(request).await?;
        let end = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break end + 4;
            }
            self.more().await?;
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
        let status = head.lines().next().unwrap_or_default();
        ensure!(head.starts_with("http/1.1 200"), "{status}: {}", String::from_utf8_lossy(&self.buffer[end..]));
        let field = |name: &str| {
            head.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(|value| value.trim().to_string()))
        };
        let (length, chunked) = (field("content-length"), field("transfer-encoding").is_some());
        self.buffer.drain(..end);
        let first = match length {
            Some(length) => {
                let length: usize = length.parse()?;
                while self.buffer.len() < length {
                    self.more().await?;
                }
                self.buffer.drain(..length);
                asked.elapsed()
            }
            None if chunked => self.chunks(asked, seen).await?,
            None => bail!("the answer has neither a length nor chunks: {head}"),
        };
        seen.answers.fetch_add(1, Ordering::Relaxed);
        Ok(first)
    }

    /// Reads the chunks of one answer.
    async fn chunks(&mut self, asked: Instant, seen: &Seen) -> Result<Duration> {
        let (mut first, mut tail) = (None, Vec::new());
        loop {
            let mut at = 0;
            let mut events = 0;
            while let Some(line) = find(&self.buffer[at..], b"\r\n") {
                let size = usize::from_str_radix(std::str::from_utf8(&self.buffer[at..at + line])?, 16)?;
                let start = at + line + 2;
                let Some(chunk) = self.buffer.get(start..start + size) else { break };
                if self.buffer.len() < start + size + 2 {
                    break;
                }
                at = start + size + 2;
                if size == 0 {
                    self.buffer.drain(..at);
                    ensure!(tail.ends_with(DONE), "the stream ended early");
                    return first.context("the stream was empty");
                }
                if first.is_none() {
                    first = Some(asked.elapsed());
                    seen.begun.fetch_add(1, Ordering::Relaxed);
                }
                // No event is cut in two by a chunk's end here, and it would be counted by its end.
                events += chunk.windows(2).filter(|pair| pair == b"\n\n").count() as u64;
                tail.extend_from_slice(chunk);
                tail.drain(..tail.len().saturating_sub(DONE.len()));
            }
            self.buffer.drain(..at);
            seen.events.fetch_add(events, Ordering::Relaxed);
            self.more().await?;
        }
    }
}

/// Asks once: a gateway listens before it knows its workers.
pub(super) async fn warm(address: SocketAddr) -> Result<()> {
    let request = request(false, 1, Duration::ZERO, 20);
    Client::connect(address).await?.ask(&request, &Seen::default()).await.map(drop)
}

/// Clients that ask again and again until they are dropped.
pub(super) struct Crowd {
    tasks: JoinSet<Result<()>>,
    pub(super) seen: Arc<Seen>,
}

impl Crowd {
    /// Connects `count` clients; each asks the same.
    pub(super) async fn gather(address: SocketAddr, count: usize, request: &Arc<[u8]>) -> Result<Self> {
        let seen = Arc::new(Seen::default());
        let mut tasks = JoinSet::new();
        for _ in 0..count {
            let mut client = Client::connect(address).await?;
            let (request, seen) = (request.clone(), seen.clone());
            tasks.spawn(async move {
                loop {
                    client.ask(&request, &seen).await?;
                }
            });
        }
        Ok(Crowd { tasks, seen })
    }

    /// Waits until every stream has begun.
    pub(super) async fn begun(&mut self) -> Result<()> {
        let count = self.tasks.len() as u64;
        while self.seen.begun.load(Ordering::Relaxed) < count {
            self.check().await?;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Fails where one of the clients has.
    async fn check(&mut self) -> Result<()> {
        match self.tasks.try_join_next() {
            Some(ended) => ended?,
            None => Ok(()),
        }
    }

    /// Watches for `time`: what one unit costs, and how many there are in a second.
    pub(super) async fn watch(
        &mut self,
        program: &Program,
        time: Duration,
        units: fn(&Seen) -> &AtomicU64,
    ) -> Result<Sample> {
        let count = || units(&self.seen).load(Ordering::Relaxed) as f64;
        let (begun, before, cpu) = (Instant::now(), count(), program.cpu()?);
        tokio::time::sleep(time).await;
        let (after, cpu_after, seconds) = (count(), program.cpu()?, begun.elapsed().as_secs_f64());
        self.check().await?;
        let done = after - before;
        ensure!(done > 0.0, "nothing was answered");
        Ok(Sample { cpu_us: (cpu_after - cpu) / done * 1e6, a_second: done / seconds })
    }
}

/// One round of one cell.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Microseconds of processor time a unit.
    pub(super) cpu_us: f64,
    /// Units a second.
    pub(super) a_second: f64,
}
