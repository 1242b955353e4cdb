//! A client that reads streams as apps do, and says exactly what it got.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures_util::StreamExt;
use serde_json::{Value, json};

/// What a streamed answer was.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// All text.
    pub text: String,
    /// Content events.
    pub pieces: usize,
    /// How it ended.
    pub finish: Option<String>,
    /// Whether `[DONE]` came.
    pub done: bool,
    /// The error of the body, or of an event.
    pub error: Option<Value>,
    /// The usage, when one came.
    pub usage: Option<Value>,
    /// From the request to the first content.
    pub first: Option<Duration>,
    /// Everything, byte for byte.
    pub raw: String,
}

impl Answer {
    /// What came, without what differs between any two requests: ids, times, keep-alives.
    pub fn bytes(&self) -> String {
        let mut text = self.raw.replace(": keep-alive\n\n", "");
        for (key, end) in [("\"id\":\"", '"'), ("\"created\":", ',')] {
            let mut parts = text.split(key);
            let first = parts.next().unwrap_or_default().to_string();
            text = parts.fold(first, |fresh, part| fresh + key + part.find(end).map_or(part, |at| &part[at..]));
        }
        text
    }

    /// Whether it is a whole answer: finished, `[DONE]`, no error.
    pub fn whole(&self) -> bool {
        self.status == 200 && self.done && self.finish.is_some() && self.error.is_none()
    }
}

/// Returns a streaming request of one user message.
pub fn chat_body(model: &str, message: &str, max_tokens: u32) -> Value {
    json!({
        "model": model, "stream": true, "max_tokens": max_tokens, "temperature": 0,
        "messages": [{"role": "user", "content": message}],
    })
}

/// Returns what the fake engine answers to one user message: the oracle, which knows nothing of attempts.
pub fn fake_answer(message: &str, tokens: u32) -> String {
    let mut context: Vec<u32> = format!("user:{message}\n").bytes().map(u32::from).collect();
    let prompt = context.len();
    for _ in 0..tokens {
        context.push(inference::fake_next_token(&context));
    }
    let bytes: Vec<u8> = context[prompt..].iter().map(|id| *id as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A client of one API.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    api: String,
    path: &'static str,
    request_id: Option<String>,
}

impl Client {
    /// Makes a client; connections are reused.
    pub fn new(api: &str) -> Result<Self> {
        let (http, path) = (reqwest::Client::builder().tcp_nodelay(true).build()?, "/v1/chat/completions");
        Ok(Client { http, api: api.into(), path, request_id: None })
    }

    /// Returns a client that gives its requests this id.
    #[must_use]
    pub fn named(&self, id: &str) -> Client {
        Client { request_id: Some(id.into()), ..self.clone() }
    }

    fn post(&self, body: &Value) -> reqwest::RequestBuilder {
        let request = self.http.post(self.url()).json(body);
        match &self.request_id {
            Some(id) => request.header("x-request-id", id),
            None => request,
        }
    }

    /// Returns a client that posts to another path.
    #[must_use]
    pub fn at(&self, path: &'static str) -> Client {
        Client { path, ..self.clone() }
    }

    fn url(&self) -> String {
        format!("{}{}", self.api, self.path)
    }

    /// Posts a body and reads the whole answer; `on_text` is told all content so far at each piece.
    pub async fn stream(&self, body: &Value, mut on_text: impl FnMut(&Answer)) -> Result<Answer> {
        let begun = Instant::now();
        let response = self.post(body).send().await?;
        let mut answer = Answer { status: response.status().as_u16(), ..Answer::default() };
        if !response.status().is_success() {
            let text = response.text().await?;
            let body: Value = serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
            answer.error = Some(body["error"].clone());
            return Ok(answer);
        }
        let mut chunks = response.bytes_stream();
        let mut rest = String::new();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk?;
            let text = std::str::from_utf8(&chunk).context("an event splits a character")?;
            answer.raw.push_str(text);
            rest.push_str(text);
            while let Some(end) = rest.find("\n\n") {
                let event: String = rest.drain(..end + 2).collect();
                take(&mut answer, event.trim_end(), begun)?;
                on_text(&answer);
            }
        }
        Ok(answer)
    }

    /// Posts a body and reads the whole answer; the future borrows nothing.
    pub fn stream_owned(&self, body: Value) -> impl Future<Output = Result<Answer>> + Send + 'static {
        let client = self.clone();
        async move { client.stream(&body, |_| {}).await }
    }

    /// As [`Client::json`]; the future borrows nothing.
    pub fn json_owned(&self, body: Value) -> impl Future<Output = Result<(u16, Value)>> + Send + 'static {
        let client = self.clone();
        async move { client.json(&body).await }
    }

    /// Posts a body and returns status and JSON.
    pub async fn json(&self, body: &Value) -> Result<(u16, Value)> {
        let response = self.post(body).send().await?;
        let status = response.status().as_u16();
        Ok((status, serde_json::from_str(&response.text().await?)?))
    }

    /// Posts raw bytes and returns status and JSON.
    pub async fn raw(&self, body: impl Into<reqwest::Body>, content_type: &str) -> Result<(u16, Value)> {
        let request = self.http.post(self.url()).header("content-type", content_type);
        let response = request.body(body).send().await?;
        let status = response.status().as_u16();
        Ok((status, serde_json::from_str(&response.text().await?)?))
    }

    /// Gets a path and returns status and JSON.
    pub async fn get(&self, path: &str) -> Result<(u16, Value)> {
        let response = self.http.get(format!("{}{path}", self.api)).send().await?;
        let status = response.status().as_u16();
        Ok((status, serde_json::from_str(&response.text().await?)?))
    }
}

fn take(answer: &mut Answer, event: &str, begun: Instant) -> Result<()> {
    let Some(data) = event.strip_prefix("data: ") else { return Ok(()) };
    if data == "[DONE]" {
        answer.done = true;
        return Ok(());
    }
    let chunk: Value = serde_json::from_str(data).with_context(|| format!("not JSON: {data}"))?;
    if !chunk["error"].is_null() {
        answer.error = Some(chunk["error"].clone());
    }
    if !chunk["usage"].is_null() {
        answer.usage = Some(chunk["usage"].clone());
    }
    let choice = &chunk["choices"][0];
    let text = choice["delta"]["content"].as_str().or(choice["text"].as_str());
    if let Some(text) = text.filter(|text| !text.is_empty()) {
        answer.first.get_or_insert_with(|| begun.elapsed());
        answer.text.push_str(text);
        answer.pieces += 1;
    }
    if let Some(finish) = choice["finish_reason"].as_str() {
        answer.finish = Some(finish.into());
    }
    Ok(())
}
