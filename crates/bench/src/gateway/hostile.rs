//! `bench hostile`: clients that mean ill, beside one that means well.
//!
//! Each attack comes from other addresses than the good client's, for one address alone has its own bound. The gateway's
//! times are made short and its send buffers small, so that one sees them at work; all other limits are its defaults.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use super::load::{Client, Seen, request, warm};
use super::process::Program;
use super::worker::TOKENS_MAX;
use super::{quantile, raise_open_files, start_cortex, start_worker};

/// What `bench hostile` is told.
#[derive(Debug, Args)]
pub(crate) struct HostileArgs {
    /// The gateway; by default the one that was built beside this program.
    #[arg(long)]
    cortex: Option<PathBuf>,
    /// Seconds an attack.
    #[arg(long, default_value_t = 12.0)]
    seconds: f64,
    /// Only the attacks whose name has this in it.
    #[arg(long, default_value = "")]
    only: String,
    /// One line of JSON an attack.
    #[arg(long)]
    json: bool,
}

const SETTINGS: &str = "body_timeout_ms = 3000\n\
    server = { header_timeout_ms = 3000, sniff_timeout_ms = 3000, write_stall_ms = 3000, send_buffer_bytes = 16384 }";
/// Between two bytes of a slow client: below every timeout between bytes.
const TRICKLE: Duration = Duration::from_millis(500);
/// Connections from one address.
const OF_ONE: usize = 500;

#[derive(Clone, Copy, Debug)]
enum Attack {
    Nobody,
    /// Heads that never end.
    Heads,
    /// Bodies that never end.
    Bodies,
    /// Streams of a hundred tokens a second that nobody reads.
    Unread,
    /// Nothing at all.
    Idle,
}

const ATTACKS: [(&str, Attack, usize); 5] = [
    ("nobody", Attack::Nobody, 0),
    ("1000 slow heads", Attack::Heads, 1000),
    ("1000 slow bodies", Attack::Bodies, 1000),
    ("300 streams that are never read", Attack::Unread, 300),
    ("10000 idle connections", Attack::Idle, 10_000),
];

/// Connects from an address of its own, so many connections of each.
async fn connect(i: usize, to: SocketAddr) -> Result<TcpStream> {
    let from = Ipv4Addr::new(127, 0, 1, (1 + i / OF_ONE) as u8);
    let socket = TcpSocket::new_v4()?;
    // Who does not read should not have a large buffer that does.
    socket.set_recv_buffer_size(4096)?;
    socket.bind(SocketAddr::new(IpAddr::V4(from), 0))?;
    Ok(socket.connect(to).await?)
}

/// Keeps one bad connection until the other side ends it.
async fn harass(attack: Attack, mut stream: TcpStream) -> Result<()> {
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let first = match attack {
        Attack::Heads => head.as_bytes().to_vec(),
        Attack::Bodies => format!("{head}content-length: 1000000\r\n\r\n{{").into_bytes(),
        Attack::Unread => request(true, TOKENS_MAX, Duration::from_millis(10), 20).to_vec(),
        Attack::Nobody | Attack::Idle => Vec::new(),
    };
    stream.write_all(&first).await?;
    let mut answer = [0; 4096];
    loop {
        match attack {
            Attack::Heads | Attack::Bodies => {
                let read = tokio::time::timeout(TRICKLE, stream.read(&mut answer)).await;
                if let Ok(read) = read
                    && read? == 0
                {
                    return Ok(());
                }
                stream.write_all(b"x").await?;
            }
            // Who does not read does not see the end either.
            Attack::Unread => std::future::pending().await,
            Attack::Nobody | Attack::Idle => {
                if stream.read(&mut answer).await? == 0 {
                    return Ok(());
                }
            }
        }
    }
}

/// Reads one metric without labels.
fn metric(admin: SocketAddr, name: &str) -> Result<f64> {
    let mut stream = std::net::TcpStream::connect(admin)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).with_context(|| format!("there is no metric {name}"))
}

/// Asks until the time is over, on one connection or on a new one each time; returns what each answer took, in
/// milliseconds, connection included.
async fn behave(address: SocketAddr, until: Instant, anew: bool) -> Result<Vec<f64>> {
    let (request, seen, mut times) = (request(false, 16, Duration::ZERO, 20), Seen::default(), Vec::new());
    let mut client = None;
    while Instant::now() < until {
        let begun = Instant::now();
        let mut at = match client.take().filter(|_| !anew) {
            Some(client) => client,
            None => Client::connect(address).await?,
        };
        at.ask(&request, &seen).await.context("the good client")?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        client = Some(at);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

#[allow(clippy::print_stdout)]
async fn run(
    args: &HostileArgs,
    (gateway, admin): &mut (Program, SocketAddr),
    (name, attack, count): (&str, Attack, usize),
) -> Result<()> {
    let (address, mut bad) = (gateway.address, JoinSet::new());
    warm(address).await?;
    let (idle, begun) = (gateway.resident()? / 1e6, Instant::now());
    let until = begun + Duration::from_secs_f64(args.seconds.max(1.0));
    let kept = tokio::spawn(behave(address, until, false));
    let anew = tokio::spawn(behave(address, until, true));
    for i in 0..count {
        bad.spawn(async move { harass(attack, connect(i, address).await?).await });
    }
    let (mut most, mut ended, mut last) = (idle, 0usize, 0.0);
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(50)).await;
        most = most.max(gateway.resident()? / 1e6);
        while bad.try_join_next().is_some() {
            (ended, last) = (ended + 1, begun.elapsed().as_secs_f64());
        }
    }
    let (kept, anew) = (kept.await??, anew.await??);
    let (open, stalled) =
        (metric(*admin, "cortex_api_connections")?, metric(*admin, "cortex_api_stalled_clients_total")?);
    bad.shutdown().await;
    ensure!(gateway.alive()?, "the gateway did not survive: {name}");
    let of = |times: &[f64]| [quantile(times, 0.5), quantile(times, 0.99), times.last().copied().unwrap_or(f64::NAN)];
    let (kept, anew) = (of(&kept), of(&anew));
    if args.json {
        let line = json!({"cell": name, "idle_mb": idle, "most_mb": most, "of": count, "ended": ended, "open": open,
            "stalled": stalled,
            "last_ended_s": last, "kept_ms": kept, "anew_ms": anew});
        println!("{line}");
    } else {
        println!(
            "{name:<34} kept connection p50 {:>6.1} p99 {:>7.1} most {:>7.1} ms; a new one each time {:>6.1} {:>7.1} {:>7.1} \
             ms; memory {idle:.0} to {most:.0} MB; of {count}, {ended} saw their end, the last \
             after {last:.1} s; {stalled} cut as stalled, {open} connections left",
            kept[0], kept[1], kept[2], anew[0], anew[1], anew[2]
        );
    }
    Ok(())
}

/// Runs every attack on a gateway of its own.
pub(crate) fn attack(args: &HostileArgs) -> Result<()> {
    raise_open_files()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    for (name, attack, count) in ATTACKS.into_iter().filter(|(name, ..)| name.contains(&args.only)) {
        let folder = tempfile::tempdir()?;
        let (worker, control) = start_worker(folder.path())?;
        let mut gateway = start_cortex(args.cortex.as_deref(), folder.path(), control, SETTINGS)?;
        let result = runtime.block_on(run(args, &mut gateway, (name, attack, count)));
        if result.is_err() {
            let log = std::fs::read_to_string(folder.path().join("cortex.log"))?;
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("{}", lines[lines.len().saturating_sub(20)..].join("\n"));
        }
        result.with_context(|| format!("attack '{name}'"))?;
        drop((gateway, worker));
    }
    Ok(())
}
