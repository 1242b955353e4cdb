//! `bench gateway`: our gateway beside a bare forwarder of the same libraries, and beside nginx where it is installed,
//! in front of one worker, in one run.
//!
//! Each is a process of its own and is asked in turns; medians over the rounds are compared. Processor time is the
//! process's own, so that the worker, the clients and whoever else is on the machine don't count. Ours gets what a
//! gateway gets, private lines included; the others get what a client gets. A ratio above 1 means that we are better.

mod hostile;
mod load;
mod peer;
mod process;
mod worker;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::report::{Report, median};
pub(crate) use hostile::{HostileArgs, attack};
use load::{Client, Crowd, Sample, Seen, request, warm};
pub(crate) use load::{LoadArgs, load};
use peer::Shape;
pub(crate) use peer::{PeerArgs, forward};
use process::{Program, free_address};
use worker::TOKENS_MAX;
pub(crate) use worker::{WorkerArgs, work};

/// What `bench gateway` is told.
#[derive(Debug, Args)]
pub(crate) struct GatewayArgs {
    /// The gateway; by default the one that was built beside this program.
    #[arg(long)]
    cortex: Option<PathBuf>,
    /// nginx, as a further column; by default the one that is installed, if any.
    #[arg(long, default_value = "nginx")]
    nginx: PathBuf,
    /// Turns a cell.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds a turn.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Only the cells whose name has this in it.
    #[arg(long, default_value = "")]
    only: String,
    /// In our place the bare forwarder in another shape: what that would give, at most.
    #[arg(long)]
    shape: Option<Shape>,
    /// One line of JSON a cell.
    #[arg(long)]
    json: bool,
}

/// What is asked of everybody alike.
enum Ask {
    /// Connections, and bytes of the prompt.
    Json(usize, usize),
    /// Streams and the time between two tokens.
    Paced(usize, Duration),
    /// Streams without a pace.
    Flood(usize),
    /// One short stream after the other on so many connections.
    FirstToken(usize),
    /// Streams, all at once.
    Memory(usize),
}

const CELLS: &[(&str, Ask)] = &[
    ("memory at 1000 streams", Ask::Memory(1000)),
    ("json, 1 connection", Ask::Json(1, 20)),
    ("json, 32 connections", Ask::Json(32, 20)),
    ("json, 256 connections", Ask::Json(256, 20)),
    ("json of 16 KB, 32 connections", Ask::Json(32, 16 << 10)),
    ("400 paced streams", Ask::Paced(400, Duration::from_millis(50))),
    ("saturation, 64 streams", Ask::Flood(64)),
    ("first token, 4 connections", Ask::FirstToken(4)),
];

/// Tokens of an answer that is not streamed, and of a short stream.
const SHORT: usize = 16;

/// Everybody in front of the worker.
struct Field {
    /// Ours, the peer, and nginx where there is one.
    programs: Vec<Program>,
    worker: Program,
    _folder: tempfile::TempDir,
}

const NGINX: &str = "daemon off; master_process off; worker_rlimit_nofile 20000; pid PID; error_log stderr error;
events { worker_connections 16384; }
http { client_body_temp_path TEMP; proxy_temp_path TEMP; fastcgi_temp_path TEMP; uwsgi_temp_path TEMP; scgi_temp_path TEMP;
  access_log off; client_max_body_size 64m; client_body_buffer_size 64k;
  upstream worker { server WORKER; keepalive 1024; }
  server { listen LISTEN; keepalive_requests 100000000;
    location / { proxy_pass http://worker; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_buffering off; } } }";

fn start_nginx(program: &Path, folder: &Path, worker: SocketAddr) -> Result<Program> {
    let address = free_address()?;
    let config = NGINX.replace("LISTEN", &address.to_string()).replace("WORKER", &worker.to_string());
    let config = config.replace("PID", &folder.join("nginx.pid").to_string_lossy());
    let file = folder.join("nginx.conf");
    std::fs::write(&file, config.replace("TEMP", &folder.join("nginx-temp").to_string_lossy()))?;
    let mut command = Command::new(program);
    command.arg("-p").arg(folder).arg("-c").arg(&file);
    Program::start(&mut command, address, &folder.join("nginx.log"))
}

/// Starts the worker.
fn start_worker(folder: &Path) -> Result<(Program, SocketAddr)> {
    let (data, control) = (free_address()?, free_address()?);
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["gateway-worker", "--data", &data.to_string(), "--control", &control.to_string()]);
    Ok((Program::start(&mut command, data, &folder.join("worker.log"))?, control))
}

/// Starts the gateway, and waits until it knows its worker; returns where its admin port is, too.
fn start_cortex(
    program: Option<&Path>,
    folder: &Path,
    control: SocketAddr,
    settings: &str,
) -> Result<(Program, SocketAddr)> {
    let beside = std::env::current_exe()?.with_file_name("cortex");
    let program = program.unwrap_or(&beside);
    ensure!(program.exists(), "{} is not there; build it with: cargo build --release -p cortex", program.display());
    let (api, admin, file) = (free_address()?, free_address()?, folder.join("cortex.toml"));
    let config = format!(
        "admin.bind = \"{admin}\"\n[api]\nbind = \"{api}\"\n{settings}\n[[neurons]]\ncontrol = \"{control}\"\n"
    );
    std::fs::write(&file, config)?;
    let mut command = Command::new(program);
    command.arg("serve").arg("--config").arg(&file);
    Ok((Program::start(&mut command, api, &folder.join("cortex.log"))?, admin))
}

impl Field {
    fn start(args: &GatewayArgs) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (worker, control) = start_worker(folder.path())?;
        let peer = |shape: Option<Shape>| {
            let address = free_address()?;
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["gateway-peer", "--listen", &address.to_string(), "--to", &worker.address.to_string()]);
            let name = shape.and_then(|shape| Some(shape.to_possible_value()?.get_name().to_string()));
            if let Some(name) = name {
                command.args(["--shape", &name]);
            }
            Program::start(&mut command, address, &folder.path().join("peer.log"))
        };
        let ours = match args.shape {
            None => start_cortex(args.cortex.as_deref(), folder.path(), control, "")?.0,
            shape => peer(shape)?,
        };
        let mut programs = vec![ours, peer(None)?];
        if Command::new(&args.nginx).arg("-v").output().is_ok_and(|output| output.status.success()) {
            programs.push(start_nginx(&args.nginx, folder.path(), worker.address)?);
        } else {
            eprintln!("SKIPPED: there is no nginx to compare with");
        }
        Ok(Field { programs, worker, _folder: folder })
    }
}

/// One turn of a cell that costs processor time.
async fn turn(ask: &Ask, program: &Program, time: Duration) -> Result<Sample> {
    let (mut crowd, units): (Crowd, fn(&Seen) -> &_) = match *ask {
        Ask::Json(connections, prompt) => {
            let request = request(false, SHORT, Duration::ZERO, prompt);
            (Crowd::gather(program.address, connections, &request).await?, |seen| &seen.answers)
        }
        Ask::Paced(streams, pace) => {
            let request = request(true, TOKENS_MAX, pace, 20);
            (Crowd::gather(program.address, streams, &request).await?, |seen| &seen.events)
        }
        Ask::Flood(streams) | Ask::FirstToken(streams) | Ask::Memory(streams) => {
            let request = request(true, TOKENS_MAX, Duration::ZERO, 20);
            (Crowd::gather(program.address, streams, &request).await?, |seen| &seen.events)
        }
    };
    if !matches!(ask, Ask::Json(..)) {
        crowd.begun().await?;
    }
    // Connections are made and buffers have grown before it counts.
    tokio::time::sleep(Duration::from_millis(200)).await;
    crowd.watch(program, time, units).await
}

/// Times to the first token, in milliseconds, of streams that follow one another on their connections.
async fn first_tokens(address: SocketAddr, connections: usize, time: Duration) -> Result<Vec<f64>> {
    let request = request(true, SHORT, Duration::from_millis(1), 20);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..connections {
        let (mut client, request) = (Client::connect(address).await?, request.clone());
        tasks.spawn(async move {
            let (seen, until, mut times) = (Seen::default(), tokio::time::Instant::now() + time, Vec::new());
            while tokio::time::Instant::now() < until {
                times.push(client.ask(&request, &seen).await?.as_secs_f64() * 1e3);
            }
            Ok::<_, anyhow::Error>(times)
        });
    }
    let mut all = Vec::new();
    while let Some(times) = tasks.join_next().await {
        all.extend(times??);
    }
    all.sort_by(f64::total_cmp);
    Ok(all)
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted.get((sorted.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN)
}

/// Prints a cell, nginx's value below it.
fn say(report: &Report, cell: &str, values: Vec<f64>, unit: &str) {
    report.less(cell, values[0], values[1], unit);
    if let Some(nginx) = values.get(2) {
        report.less(&format!("{cell}, beside nginx"), values[0], *nginx, unit);
    }
}

async fn measure(args: &GatewayArgs, report: &Report, field: &Field, cell: &str, ask: &Ask) -> Result<()> {
    let time = Duration::from_secs_f64(args.seconds.max(0.05));
    let (rounds, count) = (args.rounds.max(1), field.programs.len());
    match *ask {
        Ask::Memory(streams) => {
            let request = request(true, TOKENS_MAX, Duration::from_millis(100), 20);
            let (mut idle, mut full) = (Vec::new(), Vec::new());
            for program in &field.programs {
                idle.push(program.resident()? / 1e6);
                let mut crowd = Crowd::gather(program.address, streams, &request).await?;
                crowd.begun().await?;
                tokio::time::sleep(time).await;
                full.push(program.resident()? / 1e6);
            }
            report.text(&format!("  idle: {idle:.1?} MB"));
            say(report, cell, full, "MB");
        }
        Ask::FirstToken(connections) => {
            // The worker itself is asked too: what it takes is not added by anybody.
            let (mut p50, mut p99) = (vec![Vec::new(); count + 1], vec![Vec::new(); count + 1]);
            for round in 0..rounds {
                for i in 0..=count {
                    let i = (i + round) % (count + 1);
                    let address = field.programs.get(i).map_or(field.worker.address, |program| program.address);
                    let times = first_tokens(address, connections, time).await?;
                    p50[i].push(quantile(&times, 0.5));
                    p99[i].push(quantile(&times, 0.99));
                }
            }
            for (name, times) in [("p50", p50), ("p99", p99)] {
                let mut medians: Vec<f64> = times.into_iter().map(median).collect();
                let direct = medians.pop().unwrap_or(f64::NAN);
                report.text(&format!("  the worker itself, {name}: {direct:.3} ms"));
                let added = medians.into_iter().map(|time| time - direct).collect();
                say(report, &format!("added to the {cell}, {name}"), added, "ms");
            }
        }
        _ => {
            let (mut cpu, mut rate) = (vec![Vec::new(); count], vec![Vec::new(); count]);
            for round in 0..rounds {
                for i in 0..count {
                    let i = (i + round) % count;
                    let sample = turn(ask, &field.programs[i], time).await?;
                    cpu[i].push(sample.cpu_us);
                    rate[i].push(sample.a_second);
                }
            }
            let unit = if matches!(ask, Ask::Json(..)) { "request" } else { "chunk" };
            say(report, &format!("{cell}, cpu"), cpu.into_iter().map(median).collect(), &format!("us/{unit}"));
            if !matches!(ask, Ask::Paced(..)) {
                let rate: Vec<f64> = rate.into_iter().map(median).collect();
                report.more(&format!("{cell}, rate"), rate[0], rate[1], &format!("{unit}s/s"));
            }
        }
    }
    Ok(())
}

/// Lets this process, and those that it starts, have as many open files as the system allows.
fn raise_open_files() -> Result<()> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).context("raising the limit of open files")
}

/// Runs it all.
pub(crate) fn bench(args: &GatewayArgs) -> Result<()> {
    raise_open_files()?;
    let mut field = Field::start(args)?;
    let report = Report { json: args.json };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        for program in &field.programs {
            warm(program.address).await?;
        }
        for (cell, ask) in CELLS.iter().filter(|(cell, _)| cell.contains(&args.only)) {
            measure(args, &report, &field, cell, ask).await.with_context(|| format!("cell '{cell}'"))?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    for program in field.programs.iter_mut().chain([&mut field.worker]) {
        ensure!(program.alive()?, "a program did not survive");
    }
    Ok(())
}
