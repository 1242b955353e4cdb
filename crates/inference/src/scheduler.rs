//! The continuous-batch scheduler: which tokens run in the next step, and what the step's outputs mean.
//!
//! ```text
//! submit -> queued -> (blocks reserved) running -> finished | failed | cancelled
//! ```
//! A sequence's blocks are reserved up front for its prompt and all it may generate, so a running sequence
//! never waits for memory. Decodes are planned before prompts, and prompts in chunks under the step's token
//! budget. A resume is a submission whose choices already have ids: they are replayed through text assembly
//! and prefilled like a prompt, and generation goes on at the next index of each choice.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use words::{Code, Moment};

use crate::engine::{Batch, BlockId, Capabilities, Outputs, Row, RowOutput, SequenceId};
use crate::ledger::Ledger;
use crate::request::{Event, EventKind, Limits, Load, RequestKey, Submission, Usage};
use crate::sampling::{Sampling, sample};
use crate::text::{Assembler, Piece, TokenBytes};

struct Sequence {
    id: SequenceId,
    request: RequestKey,
    choice: u32,
    /// Prompt and generated tokens; those below `computed` are in the KV blocks.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    computed: usize,
    blocks: Vec<BlockId>,
    assembler: Assembler,
    sampling: Sampling,
}

impl Sequence {
    fn next_index(&self) -> u32 {
        (self.tokens.len() - self.prompt_tokens) as u32
    }
}

struct Queued {
    submission: Submission,
    since: Moment,
    positions: Vec<usize>,
}

#[derive(Default)]
struct Request {
    usage: Usage,
    open: usize,
    paused: bool,
}

/// The scheduler of one engine. Deterministic: equal calls give equal batches and events.
pub struct Scheduler {
    capabilities: Capabilities,
    limits: Limits,
    table: Arc<TokenBytes>,
    ledger: Ledger,
    queue: VecDeque<Queued>,
    running: Vec<Sequence>,
    requests: BTreeMap<RequestKey, Request>,
    next_sequence: u64,
    turn: usize,
}

impl Scheduler {
    /// Makes a scheduler for an engine with `capabilities`.
    pub fn new(capabilities: Capabilities, limits: Limits, table: Arc<TokenBytes>) -> Self {
        Scheduler {
            capabilities,
            limits,
            table,
            ledger: Ledger::new(capabilities.blocks, capabilities.block_tokens),
            queue: VecDeque::new(),
            running: Vec::new(),
            requests: BTreeMap::new(),
            next_sequence: 0,
            turn: 0,
        }
    }

    /// Takes a request into the queue.
    ///
    /// # Errors
    /// `ContextLengthExceeded` when it can never fit, `Overloaded` when the queue is full, `InvalidRequest` when
    /// it breaks [`Submission`]'s own bounds. A refused request leaves no trace.
    pub fn submit(&mut self, now: Moment, submission: Submission) -> Result<(), words::Error> {
        self.check(&submission)?;
        if self.queue.len() >= self.limits.max_waiting && !self.fits_now(&submission) {
            return Err(words::Error::new(Code::Overloaded, "the model's queue is full; try again shortly"));
        }
        let prompt = submission.prompt.len();
        let limit = submission.max_tokens.min(self.capabilities.context_length - prompt);
        let positions = submission.choices.iter().map(|_| prompt + limit).collect();
        let usage = Usage { prompt_tokens: prompt, completion_tokens: 0 };
        let open = submission.choices.len();
        self.requests.insert(submission.request, Request { usage, open, paused: false });
        self.queue.push_back(Queued { submission, since: now, positions });
        Ok(())
    }

    fn check(&self, submission: &Submission) -> Result<(), words::Error> {
        let invalid = |what: &str| Err(words::Error::new(Code::InvalidRequest, what));
        let context = self.capabilities.context_length;
        if submission.prompt.is_empty() {
            return invalid("the prompt has no tokens");
        }
        if submission.choices.is_empty() || submission.max_tokens == 0 {
            return invalid("a request needs a choice and at least one token to generate");
        }
        if self.requests.contains_key(&submission.request) {
            return invalid("the request's key is in use");
        }
        let vocabulary = self.capabilities.vocab_size as u32;
        let accepted = submission.choices.iter().flat_map(|choice| &choice.accepted);
        if submission.prompt.iter().chain(accepted).any(|id| *id >= vocabulary) {
            return invalid("a token id is outside the vocabulary");
        }
        let longest = submission.choices.iter().map(|choice| choice.accepted.len()).max().unwrap_or(0);
        if longest > submission.max_tokens {
            return invalid("a resume has more accepted ids than max_tokens allows");
        }
        let prompt = submission.prompt.len();
        let tokens = prompt + submission.max_tokens.min(context.saturating_sub(prompt));
        let blocks = self.ledger.blocks_for(tokens) * submission.choices.len();
        let rows = submission.choices.len();
        if prompt >= context || prompt + longest > context {
            return Err(words::Error::new(
                Code::ContextLengthExceeded,
                format!("the prompt has {prompt} tokens; the model's context holds {context}, the answer included"),
            )
            .at("messages"));
        }
        if blocks > self.ledger.total() || rows > self.max_running() {
            return Err(words::Error::new(
                Code::ContextLengthExceeded,
                format!(
                    "the request needs {blocks} KV blocks in {rows} rows, this engine has {} in {}; lower max_tokens",
                    self.ledger.total(),
                    self.max_running()
                ),
            ));
        }
        Ok(())
    }

    fn max_running(&self) -> usize {
        self.limits.max_running.min(self.capabilities.max_batch)
    }

    /// Whether the next plan would admit the submission at once, so that it needs no place in the queue.
    fn fits_now(&self, submission: &Submission) -> bool {
        self.queue.is_empty() && self.running.len() + submission.choices.len() <= self.max_running()
    }

    /// Plans the next step, or returns `None` when there is nothing to run.
    pub fn plan(&mut self, now: Moment, events: &mut Vec<Event>) -> Option<Batch> {
        self.expire(now, events);
        self.admit(events);
        let mut rows = Vec::new();
        let mut budget = self.capabilities.max_step_tokens;
        // A rotating start keeps prompts from starving each other when the budget is short.
        self.turn = self.turn.wrapping_add(1);
        let count = self.running.len();
        let order: Vec<usize> = (0..count).map(|i| (i + self.turn) % count).collect();
        let pending = |seq: &Sequence| seq.tokens.len() - seq.computed;
        let paused = |seq: &Sequence| self.requests.get(&seq.request).is_some_and(|r| r.paused);
        for &i in order.iter().filter(|&&i| pending(&self.running[i]) == 1 && !paused(&self.running[i])) {
            if budget == 0 || rows.len() == self.capabilities.max_batch {
                break;
            }
            budget -= 1;
            rows.push(self.row(i, 1));
        }
        let mut budget = budget.min(self.limits.prefill_tokens);
        for &i in order.iter().filter(|&&i| pending(&self.running[i]) > 1 && !paused(&self.running[i])) {
            if budget == 0 || rows.len() == self.capabilities.max_batch {
                break;
            }
            let chunk = pending(&self.running[i]).min(budget);
            budget -= chunk;
            rows.push(self.row(i, chunk));
        }
        (!rows.is_empty()).then_some(Batch { copies: Vec::new(), rows })
    }

    fn row(&self, i: usize, chunk: usize) -> Row {
        let seq = &self.running[i];
        let end = seq.computed + chunk;
        Row {
            sequence: seq.id,
            tokens: seq.tokens[seq.computed..end].to_vec(),
            start: seq.computed,
            blocks: seq.blocks[..self.ledger.blocks_for(end)].to_vec(),
            wants_logits: end == seq.tokens.len(),
            sampling: seq.sampling,
        }
    }

    fn expire(&mut self, now: Moment, events: &mut Vec<Event>) {
        let longest = self.limits.max_wait;
        let requests = &mut self.requests;
        self.queue.retain(|queued| {
            let late = now.since(queued.since) > longest;
            if late {
                let request = queued.submission.request;
                requests.remove(&request);
                let kind = EventKind::Failed(Code::Overloaded, "the request waited too long in the model's queue");
                events.push(Event { request, kind });
            }
            !late
        });
    }

    fn admit(&mut self, events: &mut Vec<Event>) {
        while let Some(queued) = self.queue.front() {
            let rows = queued.positions.len();
            let blocks: usize = queued.positions.iter().map(|tokens| self.ledger.blocks_for(*tokens)).sum();
            let free = self.ledger.total() - self.ledger.used();
            if self.running.len() + rows > self.max_running() || blocks > free {
                return;
            }
            if let Some(queued) = self.queue.pop_front() {
                self.start(queued, events);
            }
        }
    }

    fn start(&mut self, queued: Queued, events: &mut Vec<Event>) {
        let Queued { submission, positions, .. } = queued;
        let request = submission.request;
        events.push(Event { request, kind: EventKind::Started });
        for (choice, (start, positions)) in submission.choices.iter().zip(positions).enumerate() {
            let prompt_tokens = submission.prompt.len();
            let limit = positions - prompt_tokens;
            let mut assembler = Assembler::new(self.table.clone(), submission.stop.clone(), limit);
            let replay = replay(&mut assembler, &start.accepted);
            if let Some(entry) = self.requests.get_mut(&request) {
                entry.usage.completion_tokens += start.accepted.len();
            }
            let finish = replay.finish;
            if !start.accepted.is_empty() {
                let kind = EventKind::Resumed { choice: choice as u32, text: replay.text, finish };
                events.push(Event { request, kind });
            }
            if finish.is_some() {
                self.close_choice(request, events);
                continue;
            }
            let Some(blocks) = self.ledger.reserve(positions) else {
                // `admit` counted the blocks before; without them the request can't go on.
                self.fail(request, Code::Internal, "the KV ledger and its count disagree", events);
                return;
            };
            let tokens = submission.prompt.iter().chain(&start.accepted).copied().collect();
            let id = SequenceId(self.next_sequence);
            self.next_sequence += 1;
            self.running.push(Sequence {
                id,
                request,
                choice: choice as u32,
                tokens,
                prompt_tokens,
                computed: 0,
                blocks,
                assembler,
                sampling: submission.sampling,
            });
        }
    }

    /// Takes a step's outputs: chooses tokens, releases text, ends choices.
    ///
    /// Outputs of sequences that were cancelled meanwhile are dropped.
    pub fn complete(&mut self, batch: &Batch, outputs: Outputs, events: &mut Vec<Event>) {
        for (row, output) in batch.rows.iter().zip(outputs.rows) {
            let Some(i) = self.running.iter().position(|seq| seq.id == row.sequence) else { continue };
            let seq = &mut self.running[i];
            seq.computed = row.start + row.tokens.len();
            let index = seq.next_index();
            let id = match output {
                RowOutput::Nothing => continue,
                RowOutput::Token(id) => id,
                RowOutput::Logits(logits) => sample(&logits, &seq.sampling, seq.choice, index),
            };
            let Piece { text, finish } = seq.assembler.push(id);
            seq.tokens.push(id);
            let (request, choice) = (seq.request, seq.choice);
            if let Some(entry) = self.requests.get_mut(&request) {
                entry.usage.completion_tokens += 1;
            }
            events.push(Event { request, kind: EventKind::Token { choice, index, id, text, finish } });
            if finish.is_some() {
                let seq = self.running.remove(i);
                self.ledger.release(seq.blocks);
                self.close_choice(request, events);
            }
        }
    }

    fn close_choice(&mut self, request: RequestKey, events: &mut Vec<Event>) {
        let Some(entry) = self.requests.get_mut(&request) else { return };
        entry.open -= 1;
        if entry.open == 0 {
            let usage = entry.usage;
            self.requests.remove(&request);
            events.push(Event { request, kind: EventKind::Done(usage) });
        }
    }

    /// Ends every request of a step that failed.
    pub fn step_failed(&mut self, batch: &Batch, events: &mut Vec<Event>) {
        for row in &batch.rows {
            if let Some(seq) = self.running.iter().find(|seq| seq.id == row.sequence) {
                self.fail(seq.request, Code::EngineFailed, "the engine failed while it ran this request", events);
            }
        }
    }

    fn fail(&mut self, request: RequestKey, code: Code, message: &'static str, events: &mut Vec<Event>) {
        if self.cancel(request) {
            events.push(Event { request, kind: EventKind::Failed(code, message) });
        }
    }

    /// Ends every request with `code`: the end of a drain's budget, or an unload's.
    pub fn fail_all(&mut self, code: Code, message: &'static str, events: &mut Vec<Event>) {
        for request in self.requests.keys().copied().collect::<Vec<_>>() {
            self.fail(request, code, message, events);
        }
    }

    /// Hands the queued requests back: they have used nothing and may run elsewhere.
    pub fn hand_back(&mut self, events: &mut Vec<Event>) {
        for queued in std::mem::take(&mut self.queue) {
            let request = queued.submission.request;
            self.requests.remove(&request);
            let kind = EventKind::Failed(Code::Draining, "the worker is draining; another one takes the request");
            events.push(Event { request, kind });
        }
    }

    /// Forgets a request and frees all it held; `false` when it is unknown or over.
    pub fn cancel(&mut self, request: RequestKey) -> bool {
        self.queue.retain(|queued| queued.submission.request != request);
        for i in (0..self.running.len()).rev() {
            if self.running[i].request == request {
                let seq = self.running.remove(i);
                self.ledger.release(seq.blocks);
            }
        }
        self.requests.remove(&request).is_some()
    }

    /// Keeps a request out of the batch while its reader is behind, or lets it in again.
    pub fn set_paused(&mut self, request: RequestKey, paused: bool) {
        if let Some(entry) = self.requests.get_mut(&request) {
            entry.paused = paused;
        }
    }

    /// Returns how busy the scheduler is.
    pub fn load(&self) -> Load {
        let waiting = self.queue.len();
        Load {
            running: self.requests.len() - waiting,
            waiting,
            blocks_used: self.ledger.used(),
            blocks: self.ledger.total(),
        }
    }

    /// Returns when the oldest queued request will have waited too long.
    pub fn next_deadline(&self) -> Option<Moment> {
        self.queue.front().map(|queued| queued.since + self.limits.max_wait)
    }
}

fn replay(assembler: &mut Assembler, accepted: &[u32]) -> Piece {
    let mut whole = Piece::default();
    for id in accepted {
        let piece = assembler.push(*id);
        whole.text.push_str(&piece.text);
        whole.finish = piece.finish;
        if whole.finish.is_some() {
            break;
        }
    }
    whole
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
