//! `cortex chat`: one question, its answer as it comes.

use bytes::Bytes;
use clap::Args;
use service::exit;
use service::program::first_cause;

use super::client;
use crate::events::Events;

#[derive(Debug, Args)]
pub(super) struct ChatArgs {
    /// The model.
    model: String,
    /// What to say; standard input when absent.
    message: Vec<String>,
    /// The gateway's API URL.
    #[arg(long, env = "CORTEX_API_URL", default_value = "http://127.0.0.1:31313")]
    api: String,
    /// 0 always takes the likeliest token.
    #[arg(long)]
    temperature: Option<f32>,
}

/// Most bytes of one event that the command line reads.
const EVENT_BYTES_MAX: usize = 1 << 20;

pub(super) async fn chat(args: ChatArgs) -> anyhow::Result<u8> {
    let message = match args.message.join(" ") {
        text if text.is_empty() => std::io::read_to_string(std::io::stdin())?,
        text => text,
    };
    let mut body = serde_json::json!({
        "model": args.model,
        "stream": true,
        "messages": [{ "role": "user", "content": message.trim() }],
    });
    if let Some(temperature) = args.temperature {
        body["temperature"] = temperature.into();
    }
    let url = format!("{}/v1/chat/completions", args.api.trim_end_matches('/'));
    let unreachable = |error: reqwest::Error| {
        let why = first_cause(&error);
        anyhow::anyhow!(
            "no answer of the gateway's API at {}: {why}; --api or CORTEX_API_URL says where it is",
            args.api
        )
    };
    let response = client()?.post(&url).json(&body).send().await.map_err(unreachable)?;
    if !response.status().is_success() {
        let status = response.status();
        let text = response.text().await.unwrap_or_default();
        let error: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        anyhow::bail!("{status}: {}", error["error"]["message"].as_str().unwrap_or(&text));
    }
    let mut events = Events::new(response, EVENT_BYTES_MAX);
    let mut done = false;
    while let Some(event) = events.next().await? {
        done |= show(&event)?;
    }
    service::say!();
    anyhow::ensure!(done, "the stream ended before the answer was complete");
    Ok(exit::CLEAN)
}

/// Prints an event's text, reasoning to standard error; true for the last event.
fn show(event: &Bytes) -> anyhow::Result<bool> {
    let Some(data) = event.strip_prefix(b"data: ") else { return Ok(false) };
    if data.starts_with(b"[DONE]") {
        return Ok(true);
    }
    let chunk: serde_json::Value = serde_json::from_slice(data)?;
    if let Some(message) = chunk["error"]["message"].as_str() {
        anyhow::bail!("{message}");
    }
    let delta = &chunk["choices"][0]["delta"];
    if let Some(text) = delta["reasoning_content"].as_str() {
        // Shown, but no part of the answer.
        eprint!("{text}");
    }
    if let Some(text) = delta["content"].as_str() {
        service::terminal::write(format_args!("{text}"));
    }
    Ok(false)
}
