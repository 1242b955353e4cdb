//! Programs as children: configuration in a temporary folder, logs in memory's reach, an end for each.

use std::hash::{BuildHasher, Hasher};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Longest wait for anything a program should do soon.
const SOON: Duration = Duration::from_secs(20);

/// Where the programs under test are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The gateway.
    pub cortex: PathBuf,
    /// The worker.
    pub neuron: PathBuf,
}

/// Returns the programs that were built with the tests; pass `env!("CARGO_BIN_EXE_test-cortex")` and its twin.
pub fn programs(cortex: &str, neuron: &str) -> Programs {
    Programs { cortex: cortex.into(), neuron: neuron.into() }
}

/// Ports that systems don't give to outgoing connections by default, so that none takes one between finding and binding.
const PORTS: std::ops::Range<u64> = 12_000..32_000;

/// Finds a free port, by chance, so that tests at the same time find others.
pub fn free_port() -> Result<u16> {
    for _ in 0..100 {
        let chance = std::hash::RandomState::new().build_hasher().finish();
        let port = (PORTS.start + chance % (PORTS.end - PORTS.start)) as u16;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port of {PORTS:?} is free")
}

/// A child that is killed when it is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
    log: PathBuf,
    /// Bytes that were in it before.
    log_from: usize,
}

impl Running {
    fn start(
        program: &Path,
        name: &str,
        folder: &Path,
        config: &str,
        group: Option<&AtomicI32>,
        environment: &[(String, String)],
    ) -> Result<Self> {
        let file = folder.join(format!("{name}.toml"));
        std::fs::write(&file, config)?;
        let log = folder.join(format!("{name}.log"));
        let stderr = std::fs::OpenOptions::new().create(true).append(true).open(&log)?;
        let log_from = stderr.metadata()?.len() as usize;
        let mut command = Command::new(program);
        command.args(["serve", "--config"]).arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        if let Some(group) = group {
            command.process_group(group.load(Ordering::Relaxed));
        }
        let child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        if let Some(group) = group {
            // The first one leads the group of all others.
            let _ = group.compare_exchange(0, child.id() as i32, Ordering::Relaxed, Ordering::Relaxed);
        }
        Ok(Running { child, name: name.into(), log, log_from })
    }

    /// Sends a signal to this child.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id() as i32).context("the child has no id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Returns the most memory that the child ever had resident, in bytes.
    pub fn peak_memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no peak is told")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? << 10)
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Kills at once, as kill -9 does.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Returns how the child ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Returns whether the child still runs.
    pub fn alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for the child's own end.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let until = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < until, "{} did not end within {patience:?}\n{}", self.name, self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns `http://host:port` of a worker's data port, as its log tells some milliseconds after it was opened. The
    /// lives before this one have written into the same log.
    ///
    /// # Errors
    /// When it does not say so in time.
    pub async fn data_url(&self) -> Result<String> {
        let until = Instant::now() + SOON;
        loop {
            let log = self.log();
            let own = log.get(self.log_from..).unwrap_or_default();
            let whole = own.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let line = whole.lines().find(|line| line.contains("data port open"));
            let address = line.and_then(|line| line.split("address=").nth(1)?.split_whitespace().next());
            if let Some(address) = address {
                return Ok(format!("http://{address}"));
            }
            ensure!(Instant::now() < until, "{} has no data port\n{log}", self.name);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Returns what the child has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A test that failed leaves no process behind; one that ended is not there any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of {}\n{}", self.name, self.log());
        }
    }
}

/// A worker.
#[derive(Debug)]
pub struct Neuron {
    /// Its process.
    pub process: Running,
    /// Its control address.
    pub control: String,
}

/// A gateway.
#[derive(Debug)]
pub struct Gateway {
    /// Its process.
    pub process: Running,
    /// `http://host:port` of its API.
    pub api: String,
    /// `http://host:port` of its admin port.
    pub admin: String,
}

/// A fleet in one temporary folder.
#[derive(Debug)]
pub struct Fleet {
    programs: Programs,
    folder: tempfile::TempDir,
    http: reqwest::Client,
    /// The process group of all programs, where they have one of their own.
    group: Option<AtomicI32>,
    /// What all programs find in their environment besides ours.
    environment: Vec<(String, String)>,
}

/// Starts workers of a fleet whose configuration has its own node table.
#[derive(Clone, Debug)]
pub struct Starter {
    program: PathBuf,
    folder: PathBuf,
}

impl Starter {
    /// Starts a worker without waiting; its log goes on where the life before it ended.
    pub fn neuron(&self, name: &str, port: u16, config: &str) -> Result<Neuron> {
        self.neuron_with_data(name, port, "bind = \"127.0.0.1:0\"", config)
    }

    /// As `neuron`, with its own lines for the data table.
    pub fn neuron_with_data(&self, name: &str, port: u16, data: &str, config: &str) -> Result<Neuron> {
        let control = format!("127.0.0.1:{port}");
        let config = format!("{config}[data]\n{data}\n[control]\nbind = \"{control}\"\n");
        let process = Running::start(&self.program, name, &self.folder, &config, None, &[])?;
        Ok(Neuron { process, control })
    }
}

impl Fleet {
    /// Makes an empty fleet.
    pub fn new(programs: Programs) -> Result<Self> {
        let http = reqwest::Client::builder().connect_timeout(SOON).build()?;
        Ok(Fleet { programs, folder: tempfile::tempdir()?, http, group: None, environment: Vec::new() })
    }

    /// Gives all programs that are started from now on these variables, in place of those before.
    pub fn with_environment(self, variables: &[(&str, &str)]) -> Self {
        let environment = variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Fleet { environment, ..self }
    }

    fn start(&self, program: &Path, name: &str, config: &str) -> Result<Running> {
        Running::start(program, name, self.folder.path(), config, self.group.as_ref(), &self.environment)
    }

    /// Puts all programs that are started from now on into one process group.
    pub fn in_one_group(self) -> Self {
        Fleet { group: Some(AtomicI32::new(0)), ..self }
    }

    /// Sends a signal to the programs' process group.
    pub fn signal_group(&self, signal: Signal) -> Result<()> {
        let leader = self.group.as_ref().and_then(|group| Pid::from_raw(group.load(Ordering::Relaxed)));
        Ok(kill_process_group(leader.context("there is no group")?, signal)?)
    }

    /// Returns the fleet's folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a worker; `config` is added to its ports and name. Waits until it is ready.
    pub async fn neuron(&self, name: &str, config: &str) -> Result<Neuron> {
        let neuron = self.starting_neuron(name, config)?;
        self.until_ok(&format!("http://{}/readyz", neuron.control), &neuron.process).await?;
        Ok(neuron)
    }

    /// Starts a worker without waiting.
    pub fn starting_neuron(&self, name: &str, config: &str) -> Result<Neuron> {
        self.neuron_on(name, free_port()?, config)
    }

    /// Starts a worker whose control port is known.
    pub fn neuron_on(&self, name: &str, port: u16, config: &str) -> Result<Neuron> {
        let control = format!("127.0.0.1:{port}");
        let config = format!(
            "{config}\n[node]\nid = \"{name}\"\n[data]\nbind = \"127.0.0.1:0\"\n[control]\nbind = \"{control}\"\n"
        );
        let process = self.start(&self.programs.neuron, name, &config)?;
        Ok(Neuron { process, control })
    }

    /// Starts a worker whose configuration has its own control table.
    pub fn neuron_with_control(&self, control: &str, config: &str) -> Result<Neuron> {
        let config = format!("{config}[node]\nid = \"a\"\n[data]\nbind = \"127.0.0.1:0\"\n");
        let process = self.start(&self.programs.neuron, "a", &config)?;
        Ok(Neuron { process, control: control.into() })
    }

    /// Starts a worker with a state directory that outlives it, without waiting.
    pub fn durable_neuron(&self, name: &str, port: u16, config: &str) -> Result<Neuron> {
        let control = format!("127.0.0.1:{port}");
        let state = self.state_dir(name);
        let config = format!(
            "{config}\n[node]\nid = \"{name}\"\nstate_dir = {state:?}\n[data]\nbind = \"127.0.0.1:0\"\n\
             [control]\nbind = \"{control}\"\n"
        );
        let process = self.start(&self.programs.neuron, name, &config)?;
        Ok(Neuron { process, control })
    }

    /// Returns the state directory of a durable worker.
    pub fn state_dir(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}-state"))
    }

    /// Runs the gateway's command line to its end; returns its exit code and what it said.
    pub async fn cortex(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let mut command = tokio::process::Command::new(&self.programs.cortex);
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(SOON * 2, command.output()).await??;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
    }

    /// Starts the gateway's command line, with its words in a pipe; it is killed when it is dropped.
    pub fn starting_cortex(&self, arguments: &[&str]) -> Result<tokio::process::Child> {
        let mut command = tokio::process::Command::new(&self.programs.cortex);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        Ok(command.spawn()?)
    }

    /// Runs the worker's command line to its end; returns its exit code and what it said.
    pub async fn neuron_says(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let mut command = tokio::process::Command::new(&self.programs.neuron);
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(SOON * 2, command.output()).await??;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
    }

    /// Returns a worker's status as a gateway sees it.
    pub async fn status(&self, gateway: &Gateway, name: &str) -> Result<serde_json::Value> {
        let url = format!("{}/api/status", gateway.admin);
        let fleet: serde_json::Value = self.http.get(url).send().await?.json().await?;
        let mut nodes = fleet["nodes"].as_array().into_iter().flatten();
        let node = nodes.find(|node| node["status"]["node"] == name || node["control"] == name);
        Ok(node.cloned().unwrap_or_default())
    }

    /// Waits until a worker's status, as a gateway sees it, is as wanted; returns it.
    pub async fn until_status(
        &self,
        gateway: &Gateway,
        name: &str,
        wanted: impl Fn(&serde_json::Value) -> bool,
    ) -> Result<serde_json::Value> {
        let until = Instant::now() + SOON;
        loop {
            let status = self.status(gateway, name).await?;
            if wanted(&status) {
                return Ok(status);
            }
            ensure!(Instant::now() < until, "{name} is not as wanted: {status:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts a worker whose configuration has its own node table.
    pub fn neuron_with_node(&self, port: u16, config: &str) -> Result<Neuron> {
        self.starter().neuron("a", port, config)
    }

    /// Returns what starts workers of this fleet, for a supervisor.
    pub fn starter(&self) -> Starter {
        Starter { program: self.programs.neuron.clone(), folder: self.folder.path().into() }
    }

    /// Starts a gateway over these control addresses; `config` is added. Waits until it is ready.
    pub async fn gateway(&self, controls: &[&str], config: &str) -> Result<Gateway> {
        self.start_gateway(controls, config, "").await
    }

    /// Starts a gateway with more settings in its `[api]` table.
    pub async fn gateway_with_api(&self, controls: &[&str], api: &str) -> Result<Gateway> {
        self.start_gateway(controls, "", api).await
    }

    async fn start_gateway(&self, controls: &[&str], config: &str, more: &str) -> Result<Gateway> {
        let (api, admin) = (free_port()?, free_port()?);
        let mut text =
            format!("{config}\n[api]\nbind = \"127.0.0.1:{api}\"\n{more}[admin]\nbind = \"127.0.0.1:{admin}\"\n");
        for control in controls {
            text.push_str(&format!("[[neurons]]\ncontrol = \"{control}\"\n"));
        }
        let name = format!("cortex-{admin}");
        let process = self.start(&self.programs.cortex, &name, &text)?;
        let (api, admin) = (format!("http://127.0.0.1:{api}"), format!("http://127.0.0.1:{admin}"));
        self.until_ok(&format!("{admin}/readyz"), &process).await?;
        Ok(Gateway { process, api, admin })
    }

    /// Waits until a URL answers 200.
    pub async fn until_ok(&self, url: &str, process: &Running) -> Result<()> {
        let until = Instant::now() + SOON;
        while Instant::now() < until {
            if let Ok(response) = self.http.get(url).send().await
                && response.status().is_success()
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("{url} is not ready\n{}", process.log())
    }

    /// Returns the sum of a metric's samples whose line has all of `labels`.
    pub async fn metric(&self, base: &str, name: &str, labels: &[&str]) -> Result<f64> {
        let text = self.http.get(format!("{base}/metrics")).send().await?.text().await?;
        let matches = |line: &&str| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(['{', ' '])) && labels.iter().all(|label| line.contains(label))
        };
        let samples = text.lines().filter(matches).filter_map(|line| line.rsplit(' ').next());
        Ok(samples.filter_map(|sample| sample.parse::<f64>().ok()).sum())
    }

    /// Waits until a metric is at least `wanted`.
    pub async fn until_metric(&self, base: &str, name: &str, labels: &[&str], wanted: f64) -> Result<Duration> {
        let begun = Instant::now();
        while begun.elapsed() < SOON {
            if self.metric(base, name, labels).await? >= wanted {
                return Ok(begun.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        bail!("{name}{labels:?} did not reach {wanted}: it is {}", self.metric(base, name, labels).await?)
    }
}
