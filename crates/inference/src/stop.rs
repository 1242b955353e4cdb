//! The end of a request before its time, on somebody's word: what was generated stays, and nothing is lost of it.

use crate::request::{Event, EventKind, RequestKey};
use crate::scheduler::Scheduler;

impl Scheduler {
    /// Ends a request wherever it is: queued, computing its prompt, generating, paused or preempted. Each choice that
    /// has not ended says [`EventKind::Stopped`] with the text that it held back, then the request is done with what it
    /// took, and all that it held is free. `false` when it is unknown or over.
    ///
    /// A choice of which nothing was generated stops too: whether an answer without a token is one, its owner decides.
    pub fn stop(&mut self, request: RequestKey, events: &mut Vec<Event>) -> bool {
        if !self.requests.contains_key(&request) {
            return false;
        }
        let choices = match self.queue.take(request) {
            Some(waiting) => {
                // Its name may come back for something smaller.
                self.blocked = None;
                if !waiting.replays.is_empty() {
                    // A resume that never ran: whoever folds its answer has heard nothing yet of what came before.
                    self.announce(request, 0, waiting.replays, events);
                }
                waiting.choices
            }
            None => self.leave(request),
        };
        for mut choice in choices {
            let text = choice.assembler.give_up();
            events.push(Event { request, kind: EventKind::Stopped { choice: choice.index, text } });
        }
        if let Some(entry) = self.requests.remove(&request) {
            events.push(Event { request, kind: EventKind::Done(entry.usage) });
        }
        true
    }
}

#[cfg(test)]
#[path = "stop_tests.rs"]
mod tests;
