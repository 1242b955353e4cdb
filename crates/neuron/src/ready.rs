//! A model that serves: its engine, the text around it, and the node's own questions to it.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use inference::{EventKind, Pooling, Priority, RequestKey, StopRules, Submission, TokenBytes};
use service::clock::Clock;
use words::{Error, Fingerprint, ModelId};

use crate::constraint::Constraints;
use crate::engine_thread::{EngineHandle, Message};
use crate::harness::{ChatInput, ChatText};
use crate::keeper::Keeper;
use crate::metrics::ModelMetrics;
use crate::pace::Pace;
use crate::process::Upstream;
use crate::sampling::Defaults;

/// Events that wait for the node's own questions.
const ASK_QUEUE: usize = 16;

/// A model that serves.
pub(crate) struct ReadyModel {
    pub(crate) id: ModelId,
    pub(crate) engine: EngineHandle,
    pub(crate) kind: Kind,
    pub(crate) context_length: usize,
    pub(crate) continue_fingerprint: Fingerprint,
    pub(crate) exact_fingerprint: Fingerprint,
    pub(crate) metrics: ModelMetrics,
    /// Held for one sample.
    pub(crate) pace: Mutex<Pace>,
    pub(crate) next_request: AtomicU64,
}

/// Where its answers come from.
pub(crate) enum Kind {
    /// An engine of this process, and the text around it.
    Local(Box<Local>),
    /// An external engine.
    Process(Arc<Upstream>),
}

/// What is around an engine of this process.
pub(crate) struct Local {
    pub(crate) text: Arc<dyn ChatText>,
    pub(crate) token_bytes: Arc<TokenBytes>,
    pub(crate) constraints: Constraints,
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) defaults: Defaults,
    /// Tokens there are.
    pub(crate) vocabulary: usize,
    /// Numbers in a hidden state.
    pub(crate) width: usize,
    /// How its embeddings are pooled; in words what can't be done.
    pub(crate) pooling: Result<Pooling, String>,
    /// What is taken from the KV store, where there is a prefix cache to take it to.
    pub(crate) keeper: Option<Keeper>,
}

impl ReadyModel {
    /// Makes a model of an external engine.
    pub(crate) fn of_process(id: ModelId, upstream: Upstream, context_length: usize, metrics: ModelMetrics) -> Self {
        ReadyModel {
            id,
            engine: EngineHandle::of_queue(upstream.queue.clone()),
            context_length,
            kind: Kind::Process(Arc::new(upstream)),
            continue_fingerprint: Fingerprint::default(),
            exact_fingerprint: Fingerprint::default(),
            metrics,
            pace: Mutex::default(),
            next_request: AtomicU64::new(0),
        }
    }

    /// Returns what is around its engine, where that is of this process.
    ///
    /// # Errors
    /// `Internal` for an external engine, whose requests go another way.
    pub(crate) fn local(&self) -> Result<&Local, Error> {
        match &self.kind {
            Kind::Local(local) => Ok(local),
            Kind::Process(_) => Err(Error::internal("an external engine was asked for its tokens")),
        }
    }

    /// Returns the way to its external engine, where it has one.
    pub(crate) fn upstream(&self) -> Option<&Arc<Upstream>> {
        match &self.kind {
            Kind::Local(_) => None,
            Kind::Process(upstream) => Some(upstream),
        }
    }

    /// Returns how many requests it runs at once, and how many may wait, where that is not as the scheduler's options say.
    pub(crate) fn places(&self) -> Option<(usize, usize)> {
        self.upstream().map(|upstream| (upstream.plan.options.max_running, upstream.plan.options.max_waiting))
    }

    /// Takes the time between two tokens of one stream.
    pub(crate) fn inter_token(&self, span: Duration) {
        self.metrics.inter_token.observe(span.as_secs_f64());
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).observe(span);
    }

    /// Returns the 99th percentile of the time between two tokens, in milliseconds.
    pub(crate) fn inter_token_p99_ms(&self) -> u32 {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).p99_ms()
    }

    /// Asks a question of the node's own, at temperature 0 and before others; `taken` sees each piece of the answer and
    /// may break it off. `false` when the engine ended before the answer did.
    ///
    /// # Errors
    /// The text's, the scheduler's or the engine's.
    pub(crate) async fn ask(
        &self,
        question: &str,
        max_tokens: usize,
        clock: Clock,
        mut taken: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<bool, Error> {
        if let Some(upstream) = self.upstream() {
            return upstream.ask(question, max_tokens, taken).await.map(|()| true);
        }
        let local = self.local()?;
        let messages = [serde_json::json!({ "role": "user", "content": question })];
        let input = ChatInput { messages: &messages, tools: &[], variables: &serde_json::Map::new() };
        let prompt = local.text.prompt(&input, clock.unix_seconds())?.ids;
        let stop = Arc::new(StopRules { strings: Vec::new(), tokens: local.end_tokens.clone() });
        let plain = Submission::new(self.request_key(), prompt, max_tokens);
        let submission = Submission { stop, priority: Priority::High, ..plain };
        let _guard = self.engine.guard(vec![submission.request]);
        let mut events = self.engine.submit(submission, Fingerprint::default(), ASK_QUEUE);
        while let Some(message) = events.recv().await {
            match message {
                Message::Event(EventKind::Token { text, .. }) if taken(&text).is_break() => return Ok(true),
                Message::Event(EventKind::Done(_)) => return Ok(true),
                Message::Event(EventKind::Failed(code, message)) => return Err(Error::new(code, message)),
                Message::Refused(error) => return Err(error),
                Message::Event(_) => {}
            }
        }
        Ok(false)
    }

    /// Names a new request.
    pub(crate) fn request_key(&self) -> RequestKey {
        RequestKey(self.next_request.fetch_add(1, Ordering::Relaxed))
    }
}
