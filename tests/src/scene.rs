//! What many tests of fleets say in one word.

use anyhow::Result;
use tokio::task::JoinHandle;

use crate::{Answer, Client, Fleet, Gateway, Neuron, chat_body};

/// A worker with the fake model `m`.
pub fn fake(extra: &str) -> String {
    format!("[[default_models]]\nid = \"m\"\nharness = \"fake\"\n{extra}")
}

/// Starts a worker that remembers, and waits until it lives.
pub async fn durable(fleet: &Fleet, name: &str, port: u16, config: &str) -> Result<Neuron> {
    let neuron = fleet.durable_neuron(name, port, config)?;
    fleet.until_ok(&format!("http://{}/livez", neuron.control), &neuron.process).await?;
    Ok(neuron)
}

/// Starts a worker that remembers, and waits until it serves.
pub async fn ready(fleet: &Fleet, name: &str, port: u16, config: &str) -> Result<Neuron> {
    let neuron = durable(fleet, name, port, config).await?;
    fleet.until_ok(&format!("http://{}/readyz", neuron.control), &neuron.process).await?;
    Ok(neuron)
}

/// Returns a metric of a worker.
pub async fn metric(fleet: &Fleet, neuron: &Neuron, name: &str) -> Result<f64> {
    fleet.metric(&format!("http://{}", neuron.control), name, &[]).await
}

/// Waits until a worker runs so many requests.
pub async fn until_running(fleet: &Fleet, neuron: &Neuron, count: f64) -> Result<()> {
    let base = format!("http://{}", neuron.control);
    fleet.until_metric(&base, "neuron_num_requests_running", &[], count).await?;
    Ok(())
}

/// Begins a stream.
pub fn stream(client: &Client, prompt: &str, tokens: u32) -> JoinHandle<Result<Answer>> {
    tokio::spawn(client.stream_owned(chat_body("m", prompt, tokens)))
}

/// Returns the answer to a short question.
pub async fn asked(gateway: &Gateway, prompt: &str) -> Result<Answer> {
    Client::new(&gateway.api)?.stream(&chat_body("m", prompt, 4), |_| {}).await
}
