//! The continuous-batch scheduler: which tokens run in the next step, and what the step's outputs mean.
//!
//! ```text
//! submit -> queued -> (blocks reserved) running -> finished | failed | cancelled
//!             ^-- preempted --'
//! ```
//! A sequence's blocks are reserved up front for its prompt and all it may generate, so a running sequence never
//! waits for memory; only a request of a higher class takes its blocks away, whole, and what it has said is then
//! recomputed. A resume is a submission whose choices already have ids: they are replayed through text assembly
//! and prefilled like a prompt, and generation goes on at the next index of each choice.
//!
//! This file takes requests in and ends them; `admit` chooses who runs, `step` plans batches and reads outputs.

use std::collections::BTreeMap;
use std::sync::Arc;

use words::{Code, Moment};

use crate::constraint::Violation;
use crate::engine::{BlockId, Capabilities, SequenceId};
use crate::ledger::Ledger;
use crate::prefix::{PrefixBlock, PrefixHash};
use crate::queue::{Queue, Waiting};
use crate::request::{Event, EventKind, Limits, Load, Priority, RequestKey, Scoring, Submission, Task, Usage};
use crate::sequence::{Choice, Sequence, first_awaited};
use crate::text::{Assembler, Piece, TokenBytes};

/// What a request keeps from its submission to its end, queued or running.
pub(crate) struct Request {
    pub(crate) usage: Usage,
    /// Choices that have not ended.
    pub(crate) open: usize,
    pub(crate) paused: bool,
    pub(crate) class: Priority,
    pub(crate) arrival: u64,
    pub(crate) since: Moment,
    pub(crate) deadline: Option<Moment>,
    pub(crate) preemptions: u32,
    /// The sequence that computes the prompt for all choices, since the request last started.
    pub(crate) leader: Option<SequenceId>,
    /// The first position that a leader computed.
    pub(crate) computed_from: Option<usize>,
}

/// The choices of a request that have not ended, and what their accepted ids released.
type Begun = (Vec<Choice>, Vec<(u32, Piece, bool)>);

/// The scheduler of one engine. Deterministic: equal calls give equal batches and events.
pub struct Scheduler {
    pub(crate) capabilities: Capabilities,
    pub(crate) limits: Limits,
    table: Arc<TokenBytes>,
    pub(crate) ledger: Ledger,
    pub(crate) queue: Queue,
    /// Sequences in the batch; their ids ascend in order of start.
    pub(crate) running: BTreeMap<SequenceId, Sequence>,
    pub(crate) requests: BTreeMap<RequestKey, Request>,
    pub(crate) next_sequence: u64,
    next_arrival: u64,
    pub(crate) turn: usize,
    /// The head that found no room, and [`Ledger::changes`] then: it need not look again before they change,
    /// since whoever else starts meanwhile only makes less room.
    pub(crate) blocked: Option<(RequestKey, u64)>,
    /// The counters of [`Load`]; its other fields are filled in when somebody asks.
    pub(crate) counters: Load,
}

impl Scheduler {
    /// Makes a scheduler for an engine with `capabilities`.
    pub fn new(capabilities: Capabilities, limits: Limits, table: Arc<TokenBytes>) -> Self {
        Scheduler {
            capabilities,
            limits,
            table,
            ledger: Ledger::new(capabilities.blocks, capabilities.block_tokens),
            queue: Queue::default(),
            running: BTreeMap::new(),
            requests: BTreeMap::new(),
            next_sequence: 0,
            next_arrival: 0,
            turn: 0,
            blocked: None,
            counters: Load::default(),
        }
    }

    /// Returns whose a running sequence is.
    pub fn owner(&self, sequence: SequenceId) -> Option<RequestKey> {
        self.running.get(&sequence).map(|seq| seq.choice.request)
    }

    /// Takes a request into the queue.
    ///
    /// # Errors
    /// `ContextLengthExceeded` when it can never fit, `Overloaded` when the queue is full, `InvalidRequest` when
    /// it breaks [`Submission`]'s own bounds, `ResumeMismatch` when accepted ids break its constraint. A refused
    /// request leaves no trace.
    pub fn submit(&mut self, now: Moment, submission: Submission) -> Result<(), words::Error> {
        self.check(&submission)?;
        let accepted: usize = submission.choices.iter().map(|choice| choice.accepted.len()).sum();
        let resumed = accepted > 0;
        // Resumes have as much room again: refused, their clients would lose what they have.
        let before = if resumed { self.queue.resumes() } else { self.queue.fresh() };
        if before >= self.limits.max_waiting && !self.fits_now(&submission) {
            return Err(words::Error::new(Code::Overloaded, "the model's queue is full; try again shortly"));
        }
        let usage = Usage { prompt_tokens: submission.prompt.len(), completion_tokens: accepted, ..Usage::default() };
        let (request, class, deadline) = (submission.request, submission.priority, submission.deadline);
        let open = submission.choices.len();
        let (choices, replays) = self.begin(submission)?;
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        let entry = Request {
            usage,
            open,
            paused: false,
            class,
            arrival,
            since: now,
            deadline,
            preemptions: 0,
            leader: None,
            computed_from: None,
        };
        self.requests.insert(request, entry);
        self.queue.push(Waiting { request, class, arrival, since: now, ran: false, resumed, choices, replays });
        Ok(())
    }

    /// Replays the accepted ids.
    fn begin(&self, submission: Submission) -> Result<Begun, Violation> {
        let limit = self.most_said(&submission);
        let (mut choices, mut replays) = (Vec::new(), Vec::new());
        for (index, start) in (submission.first_choice..).zip(submission.choices) {
            let mut choice = Choice {
                request: submission.request,
                index,
                prompt: submission.prompt.clone(),
                task: submission.task,
                awaits: 0,
                ended_by: None,
                pooled: Vec::new(),
                said: Vec::with_capacity(start.accepted.len()),
                positions: submission.prompt.len() + limit,
                assembler: Assembler::new(self.table.clone(), submission.stop.clone(), limit),
                matcher: submission.constraint.as_ref().map(|grammar| grammar.open()).transpose()?,
                sampling: submission.sampling,
                bias: submission.bias.clone(),
                salt: submission.salt,
                hashes: Vec::new(),
            };
            let piece = replay(&mut choice, &start.accepted)?;
            let ended = piece.finish.is_some();
            // A choice that is over runs again where its tokens are to be scored.
            let runs = !ended || matches!(submission.task, Task::Score(Scoring { accepted: true, .. }));
            if !start.accepted.is_empty() {
                replays.push((index, piece, runs));
            }
            choice.ended_by = if ended { choice.said.pop() } else { None };
            let (prompt, said) = (submission.prompt.len(), choice.said.len());
            choice.awaits = first_awaited(submission.task, prompt, said, choices.is_empty());
            if runs {
                choices.push(choice);
            }
        }
        Ok((choices, replays))
    }

    /// Returns the most tokens that a choice can say.
    fn most_said(&self, submission: &Submission) -> usize {
        submission.max_tokens.min(self.capabilities.context_length.saturating_sub(submission.prompt.len()))
    }

    fn check(&self, submission: &Submission) -> Result<(), words::Error> {
        let invalid = |what: &str| Err(words::Error::new(Code::InvalidRequest, what));
        let context = self.capabilities.context_length;
        if submission.prompt.is_empty() {
            return invalid("the prompt has no tokens");
        }
        let embeds = matches!(submission.task, Task::Embed(_));
        if submission.choices.is_empty() || embeds != (submission.max_tokens == 0) {
            return invalid("a request needs a choice and, but for an embedding, at least one token to generate");
        }
        let rows = submission.choices.len();
        if rows > self.limits.max_choices {
            return invalid("the request has more choices than this model allows");
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
        if prompt + usize::from(!embeds) > context || prompt + longest > context {
            return Err(words::Error::new(
                Code::ContextLengthExceeded,
                format!("the prompt has {prompt} tokens; the model's context holds {context}, the answer included"),
            )
            .at("messages"));
        }
        let blocks = self.blocks_needed(submission);
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

    /// Returns the blocks that a request takes when it finds nothing in the cache; the prompt's full blocks, which
    /// its choices share, count once. It never takes more later: what its choices say only lets them share more.
    fn blocks_needed(&self, submission: &Submission) -> usize {
        let prompt = submission.prompt.len();
        let each = self.ledger.blocks_for(prompt + self.most_said(submission));
        let own = |accepted: &[u32]| prompt.min(first_awaited(submission.task, prompt, accepted.len(), false));
        let shared = |accepted: &[u32]| own(accepted) / self.ledger.block_tokens();
        let others = submission.choices.iter().skip(1).map(|choice| each - shared(&choice.accepted));
        each + others.sum::<usize>()
    }

    pub(crate) fn max_running(&self) -> usize {
        self.limits.max_running.min(self.capabilities.max_batch)
    }

    /// Whether the next plan would admit the submission at once, so that it needs no place in the queue.
    fn fits_now(&self, submission: &Submission) -> bool {
        self.queue.len() == 0
            && self.running.len() + submission.choices.len() <= self.max_running()
            && self.blocks_needed(submission) <= self.ledger.available()
    }

    pub(crate) fn close_choice(&mut self, request: RequestKey, events: &mut Vec<Event>) {
        let Some(entry) = self.requests.get_mut(&request) else { return };
        entry.open -= 1;
        if entry.open == 0 {
            let usage = entry.usage;
            self.requests.remove(&request);
            events.push(Event { request, kind: EventKind::Done(usage) });
        }
    }

    pub(crate) fn fail(&mut self, request: RequestKey, code: Code, message: &'static str, events: &mut Vec<Event>) {
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

    /// Hands the queued requests back: they have used nothing and may run elsewhere. Preempted ones have been told
    /// of already; they stay, and finish here.
    pub fn hand_back(&mut self, events: &mut Vec<Event>) {
        for request in self.queue.names(|waiting| !waiting.ran) {
            self.fail(request, Code::Draining, "the worker is draining; another one takes the request", events);
        }
    }

    /// Forgets a request and frees all it held; `false` when it is unknown or over.
    pub fn cancel(&mut self, request: RequestKey) -> bool {
        if self.requests.remove(&request).is_none() {
            return false;
        }
        if self.queue.take(request).is_some() {
            // Its name may come back for something smaller.
            self.blocked = None;
        } else {
            drop(self.leave(request));
        }
        true
    }

    /// Takes a request's sequences out of the batch and gives their blocks back; the choices come in order.
    pub(crate) fn leave(&mut self, request: RequestKey) -> Vec<Choice> {
        let of_request = self.running.values().filter(|seq| seq.choice.request == request);
        let gone: Vec<SequenceId> = of_request.map(|seq| seq.id).collect();
        let gone: Vec<Sequence> = gone.iter().filter_map(|id| self.running.remove(id)).collect();
        gone.into_iter().map(|seq| self.release(seq)).collect()
    }

    /// Gives a sequence's blocks back.
    pub(crate) fn release(&mut self, seq: Sequence) -> Choice {
        for block in seq.holds() {
            self.ledger.release(block);
        }
        seq.choice
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
            blocks_cached: self.ledger.cached(),
            blocks: self.ledger.total(),
            ..self.counters
        }
    }

    /// Returns when the next request will have waited too long or be past its deadline.
    pub fn next_deadline(&self) -> Option<Moment> {
        let fresh = self.queue.iter().filter(|waiting| !waiting.ran);
        let waits = fresh.map(|waiting| waiting.since + self.limits.max_wait);
        waits.chain(self.requests.values().filter_map(|request| request.deadline)).min()
    }

    /// Lists the computed blocks that may be found again, for a store that outlives the process: a parent before
    /// its children, blocks in use first, then those used last.
    pub fn export_prefixes(&self) -> Vec<PrefixBlock> {
        self.ledger.export()
    }

    /// Takes a free block for content that a store has kept, and makes it findable; returns the block and its
    /// address, the parent of what follows. The caller fills the block with [`crate::engine::Engine::import_block`]
    /// before it plans the next step, or takes it back with [`Scheduler::forget_prefix`].
    ///
    /// `None` when no block is free (nothing is evicted for it), the parent is unknown, the tokens don't fill a
    /// block, the content is known already, or there is no prefix cache.
    pub fn import_prefix(
        &mut self,
        parent: Option<PrefixHash>,
        salt: [u8; 32],
        tokens: Vec<u32>,
    ) -> Option<(BlockId, PrefixHash)> {
        if !self.limits.prefix_cache {
            return None;
        }
        self.ledger.import(parent, salt, tokens)
    }

    /// Whether a block with this address can be found.
    pub fn knows_prefix(&self, hash: &PrefixHash) -> bool {
        self.ledger.has_prefix(hash)
    }

    /// Forgets a cached block that could not be filled; `false` when it is unknown, in use, or has children.
    pub fn forget_prefix(&mut self, hash: &PrefixHash) -> bool {
        self.ledger.forget(hash)
    }
}

fn replay(choice: &mut Choice, accepted: &[u32]) -> Result<Piece, Violation> {
    let mut whole = Piece::default();
    for id in accepted {
        let piece = choice.take(*id)?;
        whole.text.push_str(&piece.text);
        whole.finish = piece.finish;
        if whole.finish.is_some() {
            break;
        }
    }
    Ok(whole)
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
