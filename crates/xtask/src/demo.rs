//! A whole fleet on a laptop: one gateway, two workers, the embedded model.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::build_programs;

/// The demo model, part of this program.
const MODEL: &[u8] = include_bytes!("../../../examples/demo-model/demo-q8_0.gguf");
/// What it was trained to answer.
const QUESTIONS: &str = include_str!("../../../examples/demo-model/questions.json");
/// What the demo asks.
const QUESTION: &str = "What happens to my stream if a worker dies?";
const TRAINED: &str = "What is continuation?";
/// Longest wait for a program to be ready.
const READY_MAX: Duration = Duration::from_secs(60);
/// Longest wait for a program to leave.
const LEAVE_MAX: Duration = Duration::from_secs(15);

/// A program of the demo, killed if the demo fails before it left by itself.
struct Program {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Program {
    fn start(binary: &Path, name: &str, folder: &Path, config: &str) -> Result<Self> {
        let file = folder.join(format!("{name}.toml"));
        std::fs::write(&file, config)?;
        let log = folder.join(format!("{name}.log"));
        let mut command = Command::new(binary);
        command.args(["serve", "--config"]).arg(&file).stdin(Stdio::null()).stdout(Stdio::null());
        let child =
            command.stderr(File::create(&log)?).spawn().with_context(|| format!("starting {}", binary.display()))?;
        Ok(Program { name: name.into(), child, log })
    }

    /// Waits until a probe says yes.
    fn until_ready(&mut self, probe: SocketAddr) -> Result<()> {
        let until = Instant::now() + READY_MAX;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status}:\n{}", self.name, std::fs::read_to_string(&self.log)?);
            }
            if http(probe, "GET /readyz", "").is_ok_and(|(status, _)| status == 200) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("{} is not ready after {READY_MAX:?}:\n{}", self.name, std::fs::read_to_string(&self.log)?)
    }

    /// Asks it to leave. One that Ctrl-C has reached already is leaving.
    fn terminate(&self) {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    fn until_left(&mut self) -> Result<()> {
        let until = Instant::now() + LEAVE_MAX;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "{} ended with {status}", self.name);
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("{} did not leave within {LEAVE_MAX:?}", self.name)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// One request with a small body and answer.
fn http(address: SocketAddr, line: &str, body: &str) -> Result<(u16, BufReader<TcpStream>)> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(READY_MAX))?;
    stream.set_nodelay(true)?;
    let length = body.len();
    write!(
        stream,
        "{line} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    reader.read_line(&mut head)?;
    let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok()).context("no HTTP answer")?;
    Ok((status, reader))
}

/// Returns the default port where it is free, else a free one.
fn port(preferred: u16) -> Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", preferred)).or_else(|_| TcpListener::bind("127.0.0.1:0"))?;
    Ok(listener.local_addr()?)
}

fn trained_answer() -> Result<String> {
    let list: Vec<serde_json::Value> = serde_json::from_str(QUESTIONS)?;
    let entry =
        list.iter().find(|entry| entry["question"] == TRAINED).context("the demo's question was not trained")?;
    Ok(entry["answer"].as_str().unwrap_or_default().to_string())
}

#[allow(clippy::print_stdout)]
fn ask(api: SocketAddr, question: &str) -> Result<String> {
    let body = serde_json::json!({
        "model": "demo", "stream": true, "temperature": 0,
        "messages": [{ "role": "user", "content": question }],
    });
    println!("> {question}\n");
    let begun = Instant::now();
    let (status, reader) = http(api, "POST /v1/chat/completions", &body.to_string())?;
    let (mut answer, mut pieces, mut done, mut first) = (String::new(), 0u32, false, None);
    for line in reader.lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            done = true;
            break;
        }
        let chunk: serde_json::Value = serde_json::from_str(data)?;
        ensure!(chunk["error"].is_null(), "the stream failed: {}", chunk["error"]["message"]);
        if let Some(text) = chunk["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
            first.get_or_insert_with(Instant::now);
            print!("{text}");
            std::io::stdout().flush()?;
            answer.push_str(text);
            pieces += 1;
        }
    }
    ensure!(status == 200 && done, "the gateway answered with status {status} and no whole stream");
    let seconds = first.map_or(0.0, |first| first.elapsed().as_secs_f64());
    let rate = f64::from(pieces.saturating_sub(1)) / seconds.max(1e-9);
    let wait = first.map_or(0.0, |first| (first - begun).as_secs_f64() * 1000.0);
    println!("\n\n{pieces} pieces, {rate:.0} a second, the first after {wait:.0} ms\n");
    Ok(answer)
}

/// Runs the demo.
#[allow(clippy::print_stdout)]
pub(crate) fn run_fleet(once: bool, folder: &Path, binaries: &Path) -> Result<()> {
    let model = folder.join("demo-q8_0.gguf");
    std::fs::write(&model, MODEL)?;
    let (api, admin) = (port(31313)?, port(31314)?);
    let mut programs = Vec::new();
    let mut entries = String::new();
    for (name, preferred) in [("neuron-1", 13231), ("neuron-2", 13232)] {
        let control = port(preferred)?;
        let config = format!(
            "[node]\nid = \"{name}\"\n[data]\nbind = \"127.0.0.1:0\"\n[control]\nbind = \"{control}\"\n\
             [drain]\ndeadline_s = 5.0\n[harness.candle]\nkv_cache_mib = 64\n\
             [[default_models]]\nid = \"demo\"\npath = {model:?}\nrequired = true\n"
        );
        let mut program = Program::start(&binaries.join("neuron"), name, folder, &config)?;
        program.until_ready(control)?;
        entries.push_str(&format!("[[neurons]]\ncontrol = \"{control}\"\n"));
        programs.push(program);
    }
    let config = format!(
        "[api]\nbind = \"{api}\"\n[admin]\nbind = \"{admin}\"\n[drain]\nsettle_ms = 0\ndeadline_s = 5.0\n{entries}"
    );
    let mut gateway = Program::start(&binaries.join("cortex"), "cortex", folder, &config)?;
    gateway.until_ready(admin)?;
    println!("one gateway and two workers are up; the model is a demo of 1.5 million parameters\n");
    let answer = ask(api, TRAINED)?;
    let right = answer == trained_answer()?;
    if once {
        println!("{}", if right { "the answer is the trained one" } else { "the answer is NOT the trained one" });
    } else {
        hints(api, admin);
        wait_for_interrupt()?;
        println!("draining all three");
    }
    gateway.terminate();
    gateway.until_left()?;
    programs.iter().for_each(Program::terminate);
    for program in &mut programs {
        program.until_left()?;
    }
    ensure!(right, "the answer differs from the trained one");
    Ok(())
}

#[allow(clippy::print_stdout)]
fn hints(api: SocketAddr, admin: SocketAddr) {
    println!("ask it yourself:\n");
    println!("  curl -N http://{api}/v1/chat/completions -H 'content-type: application/json' \\");
    println!(
        "    -d '{{\"model\":\"demo\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"{QUESTION}\"}}]}}'\n"
    );
    println!("or with the OpenAI SDK:\n");
    println!("  from openai import OpenAI");
    println!("  client = OpenAI(base_url=\"http://{api}/v1\", api_key=\"any\")");
    println!("  for chunk in client.chat.completions.create(model=\"demo\", stream=True,");
    println!("          messages=[{{\"role\": \"user\", \"content\": \"What is a drain?\"}}]):");
    println!("      print(chunk.choices[0].delta.content or \"\", end=\"\")\n");
    println!("metrics: http://{admin}/metrics    fleet: http://{admin}/api/status\n");
    println!("Ctrl-C drains all three.");
}

/// Waits for Ctrl-C, which reaches the children too: each drains by itself, and this program sees them out.
fn wait_for_interrupt() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            result = tokio::signal::ctrl_c() => result,
            _ = terminate.recv() => Ok(()),
        }
    })?;
    Ok(())
}

/// Builds the programs and runs the demo in a temporary folder.
pub(crate) fn run(once: bool) -> Result<()> {
    let programs = build_programs()?;
    let folder = tempfile::tempdir()?;
    run_fleet(once, folder.path(), &programs)
}
