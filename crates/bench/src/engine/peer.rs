//! llama.cpp in a process of its own, told by lines of JSON.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

const SCRIPT: &str = include_str!("../../peers/llama_peer.py");

/// The process; it ends when its input does.
pub(crate) struct Peer {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts it with this Python.
    pub(crate) fn start(python: &Path) -> Result<Self> {
        let mut child = Command::new(python)
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} does not start", python.display()))?;
        let output = BufReader::new(child.stdout.take().context("the peer has no output")?);
        let input = child.stdin.take();
        Ok(Peer { child, input, output })
    }

    fn ask(&mut self, command: &Value) -> Result<Value> {
        let input = self.input.as_mut().context("the peer has no input")?;
        writeln!(input, "{command}")?;
        input.flush()?;
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the peer ended at {command}");
        }
        let answer: Value = serde_json::from_str(&line)?;
        match answer.get("error") {
            Some(error) => bail!("the peer says {error} to {command}"),
            None => Ok(answer),
        }
    }

    fn seconds(&mut self, command: &Value) -> Result<f64> {
        self.ask(command)?["seconds"].as_f64().context("the peer gave no seconds")
    }

    pub(crate) fn quantize(&mut self, from: &Path, to: &Path, kind: u32) -> Result<()> {
        self.ask(&json!({"op": "quantize", "source": from, "target": to, "kind": kind})).map(drop)
    }

    pub(crate) fn open(&mut self, model: &Path, threads: usize, context: usize, flash: bool) -> Result<()> {
        let command = json!({"op": "open", "model": model, "threads": threads, "context": context, "sequences": 16, "flash": flash});
        self.ask(&command).map(drop)
    }

    /// Opens a model for exactness: one sequence, KV in f32.
    pub(crate) fn open_exact(&mut self, model: &Path, threads: usize, context: usize) -> Result<()> {
        self.ask(&json!({"op": "open", "model": model, "threads": threads, "context": context, "f32_kv": true}))
            .map(drop)
    }

    /// Logprobs of `ids` after a prompt, or of the hundred likeliest when there are none.
    pub(crate) fn logprobs(&mut self, tokens: &[u32], ids: &[u32]) -> Result<Vec<(u32, f64)>> {
        let answer = self.ask(&json!({"op": "logprobs", "tokens": tokens, "ids": ids}))?;
        Ok(serde_json::from_value(answer["logprobs"].clone())?)
    }

    pub(crate) fn prefill(&mut self, tokens: usize) -> Result<f64> {
        self.seconds(&json!({"op": "prefill", "tokens": tokens}))
    }

    pub(crate) fn fill(&mut self, depth: usize) -> Result<f64> {
        self.seconds(&json!({"op": "fill", "depth": depth}))
    }

    pub(crate) fn decode(&mut self, tokens: usize) -> Result<f64> {
        self.seconds(&json!({"op": "decode", "tokens": tokens}))
    }

    pub(crate) fn batch(&mut self, rows: usize, tokens: usize) -> Result<f64> {
        self.seconds(&json!({"op": "batch", "rows": rows, "tokens": tokens}))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.wait();
    }
}
