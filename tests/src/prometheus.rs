//! A real Prometheus over a fleet under test, and its tool; both are Debian's package `prometheus`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::free_port;

/// Longest wait for anything that Prometheus should do soon.
const SOON: Duration = Duration::from_secs(20);

/// Finds a program of others that tests run. `None`, said loudly, where it is not installed.
///
/// # Panics
/// When it is absent and `CORTEX_TEST_TOOLS` is `required`.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        assert!(std::env::var("CORTEX_TEST_TOOLS").as_deref() != Ok("required"), "{name} is not installed");
        eprintln!("SKIPPED: {name} is not installed; .ci/tools installs it");
    }
    found
}

/// Runs promtool in a folder with a text on its input; returns what it said.
///
/// # Errors
/// When it finds fault.
pub fn promtool(promtool: &Path, folder: &Path, arguments: &[&str], input: &str) -> Result<String> {
    let mut command = Command::new(promtool);
    command.args(arguments).current_dir(folder).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().context("it has no input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "promtool {arguments:?}: {}\n{said}", output.status);
    Ok(said)
}

/// One Prometheus, ended when it is dropped.
#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    base: String,
    http: reqwest::Client,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Encodes a query's value for a URL.
fn encode(text: &str) -> String {
    let escape = |byte: u8| match byte.is_ascii_alphanumeric() {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}

impl Prometheus {
    /// Starts it on a configuration file; its data goes beside that. Waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start(program: &Path, config: &Path) -> Result<Self> {
        let folder = config.parent().context("the file is in no folder")?;
        let (address, log) = (format!("127.0.0.1:{}", free_port()?), folder.join("prometheus.log"));
        let mut command = Command::new(program);
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", folder.join("prometheus-data").display()));
        command.arg(format!("--web.listen-address={address}"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&log)?);
        let mut started =
            Prometheus { child: command.spawn()?, base: format!("http://{address}"), http: reqwest::Client::new() };
        let until = Instant::now() + SOON;
        while Instant::now() < until && started.child.try_wait()?.is_none() {
            let ready = started.http.get(format!("{}/-/ready", started.base)).send().await;
            if ready.is_ok_and(|response| response.status().is_success()) {
                return Ok(started);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("prometheus is not ready\n{}", std::fs::read_to_string(&log)?)
    }

    /// Asks its HTTP API; returns the answer's data.
    ///
    /// # Errors
    /// When it refuses.
    pub async fn get(&self, path: &str) -> Result<Value> {
        let mut answer: Value = self.http.get(format!("{}{path}", self.base)).send().await?.json().await?;
        ensure!(answer["status"] == "success", "{path}: {answer}");
        Ok(answer["data"].take())
    }

    /// Evaluates an expression now; returns its samples that are numbers, with their labels.
    ///
    /// # Errors
    /// When it is no expression.
    pub async fn query(&self, expression: &str) -> Result<Vec<(Value, f64)>> {
        let data = self.get(&format!("/api/v1/query?query={}", encode(expression))).await?;
        let samples = data["result"].as_array().context("the answer is no vector")?.iter();
        let number = |sample: &Value| sample["value"][1].as_str().and_then(|text| text.parse::<f64>().ok());
        let samples = samples.filter_map(|sample| Some((sample["metric"].clone(), number(sample)?)));
        Ok(samples.filter(|(_, value)| !value.is_nan()).collect())
    }

    /// Waits until an expression has samples; returns how long that took.
    ///
    /// # Errors
    /// When it has none in time.
    pub async fn until(&self, expression: &str) -> Result<Duration> {
        let begun = Instant::now();
        while begun.elapsed() < SOON {
            if !self.query(expression).await?.is_empty() {
                return Ok(begun.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("{expression} has no samples after {SOON:?}: the targets are {:#}", self.get("/api/v1/targets").await?)
    }
}
