//! The submissions of one answer: one a prompt, a few of them at a time.

use std::collections::VecDeque;
use std::task::{Context, Poll};

use inference::{EventKind, RequestKey, Submission, Usage};
use tokio::sync::mpsc;
use words::Fingerprint;

use crate::engine_thread::{CancelGuard, EngineHandle, Message};

/// Most prompts of one answer that are with the engine at once: enough to fill a batch, and no more of the queue than
/// other clients can spare.
const AT_ONCE: usize = 8;

/// The parts; their events come as of one request.
pub(super) struct Parts {
    engine: EngineHandle,
    name: Fingerprint,
    queue: usize,
    open: Vec<mpsc::Receiver<Message>>,
    waiting: VecDeque<Submission>,
    requests: Vec<RequestKey>,
    /// Whose turn it is, so that no part starves the others.
    turn: usize,
    usage: Usage,
}

impl Parts {
    /// Submits the first of them. Whoever drops the guard cancels all.
    pub(super) fn submit(
        engine: &EngineHandle,
        name: Fingerprint,
        queue: usize,
        submissions: Vec<Submission>,
    ) -> (Self, CancelGuard) {
        let requests: Vec<RequestKey> = submissions.iter().map(|submission| submission.request).collect();
        let mut parts = Parts {
            engine: engine.clone(),
            name,
            queue,
            open: Vec::new(),
            waiting: submissions.into(),
            requests: requests.clone(),
            turn: 0,
            usage: Usage::default(),
        };
        parts.feed();
        (parts, engine.guard(requests))
    }

    fn feed(&mut self) {
        while self.open.len() < AT_ONCE
            && let Some(submission) = self.waiting.pop_front()
        {
            self.open.push(self.engine.submit(submission, self.name, self.queue));
        }
    }

    /// Ends all of them properly: what is not with the engine yet never comes there.
    pub(super) fn stop(&mut self) {
        self.waiting.clear();
        self.requests.iter().for_each(|request| self.engine.end(*request));
    }

    /// Returns the next message of any part; `Done` comes once, with the usage of all. `None` when the engine is gone.
    /// Safe to cancel.
    pub(super) async fn recv(&mut self) -> Option<Message> {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Message>> {
        let mut silent = 0;
        while silent < self.open.len() {
            self.turn = (self.turn + 1) % self.open.len();
            match self.open[self.turn].poll_recv(context) {
                Poll::Pending => silent += 1,
                Poll::Ready(Some(Message::Event(EventKind::Done(usage)))) => {
                    self.usage.prompt_tokens += usage.prompt_tokens;
                    self.usage.completion_tokens += usage.completion_tokens;
                    self.usage.cached_tokens += usage.cached_tokens;
                    self.open.swap_remove(self.turn);
                    self.feed();
                    if self.open.is_empty() {
                        return Poll::Ready(Some(Message::Event(EventKind::Done(self.usage))));
                    }
                    silent = 0;
                }
                Poll::Ready(message) => return Poll::Ready(message),
            }
        }
        // Without an open part nothing wakes anybody: the answer is over.
        if self.open.is_empty() { Poll::Ready(None) } else { Poll::Pending }
    }
}
