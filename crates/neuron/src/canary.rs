//! The node's own canary: one question to one of its models, whose only right answer is known.

use std::ops::ControlFlow;
use std::time::Duration;

use service::clock::Clock;
use words::Canary;

use crate::models::Models;

/// Longest wait for the answer; less than the machine's own patience, so that the reason is named.
const ANSWER_MAX: Duration = lifecycle::CANARY_MAX.saturating_sub(Duration::from_secs(5));
/// Longest answer, in tokens.
const TOKENS_MAX: usize = 256;
/// Most characters of a wrong answer that are shown.
const SHOWN_MAX: usize = 80;

/// Asks; `Err` says why the answer is not the right one.
pub(crate) async fn ask(models: Models, clock: Clock, canary: Canary) -> Result<(), String> {
    match tokio::time::timeout(ANSWER_MAX, answer(&models, clock, &canary)).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("the model '{}' did not answer within {} s", canary.model, ANSWER_MAX.as_secs())),
    }
}

async fn answer(models: &Models, clock: Clock, canary: &Canary) -> Result<(), String> {
    // One that comes on demand comes for it.
    let ready = models.attach(&canary.model).await.map_err(|error| error.message().to_string())?;
    let mut text = String::new();
    let taken = |piece: &str| {
        text.push_str(piece);
        if text.contains(&canary.answer) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let asked = ready.ask(&canary.prompt, TOKENS_MAX, clock, taken).await;
    if !asked.map_err(|error| error.message().to_string())? {
        return Err(format!("the model '{}' was unloaded before it answered", canary.model));
    }
    if text.contains(&canary.answer) {
        return Ok(());
    }
    let shown: String = text.chars().take(SHOWN_MAX).collect();
    Err(format!("the model '{}' answered {shown:?}", canary.model))
}
