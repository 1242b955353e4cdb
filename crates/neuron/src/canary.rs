//! The node's own canary: one question to one of its models, whose only right answer is known.

use std::sync::Arc;
use std::time::Duration;

use inference::sampling::Sampling;
use inference::{ChoiceStart, EventKind, Priority, StopRules, Submission};
use service::clock::Clock;
use words::Canary;

use crate::engine_thread::Message;
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
    let ready = models.ready(&canary.model).map_err(|error| error.message().to_string())?;
    let messages = [serde_json::json!({ "role": "user", "content": canary.prompt })];
    let prompt = ready.text.prompt(&messages, clock.unix_seconds()).map_err(|error| error.message().to_string())?;
    let submission = Submission {
        request: ready.request_key(),
        prompt: prompt.into(),
        choices: vec![ChoiceStart::default()],
        sampling: Sampling::GREEDY,
        bias: Arc::new([]),
        max_tokens: TOKENS_MAX,
        stop: Arc::new(StopRules { strings: Vec::new(), tokens: ready.end_tokens.clone() }),
        priority: Priority::High,
        deadline: None,
        salt: [0; 32],
    };
    let (mut events, _guard) = ready.engine.submit(submission, words::Fingerprint::default(), 16);
    let mut text = String::new();
    while let Some(message) = events.recv().await {
        match message {
            Message::Event(EventKind::Token { text: piece, .. }) => {
                text.push_str(&piece);
                if text.contains(&canary.answer) {
                    return Ok(());
                }
            }
            Message::Event(EventKind::Done(_)) => {
                let shown: String = text.chars().take(SHOWN_MAX).collect();
                return Err(format!("the model '{}' answered {shown:?}", canary.model));
            }
            Message::Event(EventKind::Failed(_, message)) => return Err(message.to_string()),
            Message::Refused(error) => return Err(error.message().to_string()),
            Message::Event(_) => {}
        }
    }
    Err(format!("the model '{}' was unloaded before it answered", canary.model))
}
