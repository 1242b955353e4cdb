//! One step: the batch to run, and what its outputs mean.

use words::{Code, Moment};

use crate::engine::{Batch, BlockCopy, Capabilities, Outputs, Row, RowOutput, SequenceId, Wanted};
use crate::ledger::Ledger;
use crate::prefix::{PrefixBlock, Publication};
use crate::request::{Event, EventKind, RequestKey};
use crate::scheduler::Scheduler;
use crate::sequence::{Choice, Sequence};
use crate::text::Piece;

/// Most positions of prompts and accepted ids in one step after which logits are wanted: each is a row of the
/// vocabulary's length, so 64 of them are some 40 MB for the largest vocabularies.
const SCORED_PER_STEP: usize = 64;

impl Scheduler {
    /// Plans the next step, or returns `None` when there is nothing to run.
    ///
    /// Decodes come first, so that no prompt keeps them waiting; then prompts, in chunks under
    /// [`crate::Limits::prefill_tokens`] and the engine's own budget.
    pub fn plan(&mut self, now: Moment, events: &mut Vec<Event>) -> Option<Batch> {
        self.expire(now, events);
        self.admit(now, events);
        // A rotating start keeps prompts from starving each other when the budget is short.
        self.turn = self.turn.wrapping_add(1);
        let mut ready: Vec<SequenceId> = Vec::with_capacity(self.running.len());
        let paused = |seq: &Sequence| self.requests.get(&seq.choice.request).is_some_and(|entry| entry.paused);
        ready.extend(self.running.values().filter(|seq| seq.follows.is_none() && !paused(seq)).map(|seq| seq.id));
        let start = self.turn.checked_rem(ready.len()).unwrap_or(0);
        ready.rotate_left(start);
        let ready: Vec<&Sequence> = ready.iter().filter_map(|id| self.running.get(id)).collect();
        let mut batch = Batch::default();
        let mut budget = self.capabilities.max_step_tokens;
        for seq in ready.iter().filter(|seq| seq.pending() == 1) {
            if budget == 0 || batch.rows.len() == self.capabilities.max_batch {
                break;
            }
            budget -= 1;
            add_row(&mut batch, seq, 1, &self.ledger);
        }
        let mut budget = budget.min(self.limits.prefill_tokens.max(1));
        let mut scored = SCORED_PER_STEP;
        for seq in ready.iter().filter(|seq| seq.pending() > 1) {
            if budget == 0 || batch.rows.len() == self.capabilities.max_batch {
                break;
            }
            let mut chunk = seq.pending().min(budget);
            if let Wanted::Logits(count) = seq.choice.wanted(seq.computed, seq.computed + chunk) {
                chunk -= count.saturating_sub(scored);
                scored -= count.min(scored);
            }
            if chunk == 0 {
                continue;
            }
            budget -= chunk;
            add_row(&mut batch, seq, chunk, &self.ledger);
        }
        (!batch.rows.is_empty()).then_some(batch)
    }

    /// Takes a step's outputs: chooses tokens, releases text, ends choices, and makes blocks that are now whole
    /// findable.
    ///
    /// Outputs of sequences that were cancelled meanwhile are dropped.
    pub fn complete(&mut self, batch: &Batch, outputs: Outputs, events: &mut Vec<Event>) {
        for (row, output) in batch.rows.iter().zip(outputs.rows) {
            let Some(seq) = self.running.get_mut(&row.sequence) else { continue };
            let request = seq.choice.request;
            if let Some(copied) = seq.copy_from.take() {
                self.ledger.release(copied);
            }
            seq.computed = row.start + row.tokens.len();
            publish(seq, &mut self.ledger);
            self.note_computed(row);
            self.hand_over(row.sequence);
            let Some(seq) = self.running.get_mut(&row.sequence) else { continue };
            let Capabilities { vocab_size: vocabulary, width, .. } = self.capabilities;
            let chosen = match (row.wanted, output) {
                (Wanted::Logits(count), RowOutput::Logits(logits))
                    if seq.choice.ended_by.is_some() && logits.len() == count * vocabulary =>
                {
                    score_known(&mut seq.choice, count, &logits, vocabulary, events);
                    if seq.computed == seq.choice.len() {
                        self.end_choice(row.sequence, request, events);
                    }
                    continue;
                }
                (Wanted::Nothing, _) => continue,
                (Wanted::Token, RowOutput::Token(id)) => Ok((id, None)),
                (Wanted::Token, RowOutput::Logits(logits)) if logits.len() == vocabulary => {
                    seq.choice.choose(logits).map(|id| (id, None))
                }
                (Wanted::Logits(count), RowOutput::Logits(logits)) if logits.len() == count * vocabulary => {
                    score_known(&mut seq.choice, count, &logits, vocabulary, events);
                    if seq.computed < seq.choice.len() {
                        continue;
                    }
                    let last = &logits[(count - 1) * vocabulary..];
                    let chosen = seq.choice.choose(last.to_vec());
                    chosen.map(|id| (id, seq.choice.score(last, id).map(Box::new)))
                }
                (Wanted::Hidden(count), RowOutput::Hidden(hidden)) if hidden.len() == count * width => {
                    if let Some(vector) = seq.choice.pool(&hidden, width) {
                        let choice = seq.choice.index;
                        events.push(Event { request, kind: EventKind::Embedded { choice, vector } });
                        self.end_choice(row.sequence, request, events);
                    }
                    continue;
                }
                _ => {
                    // Without its output it would never be planned again.
                    self.fail(request, Code::EngineFailed, "the engine gave another output than was wanted", events);
                    continue;
                }
            };
            let (choice, index) = (seq.choice.index, seq.choice.said.len() as u32);
            let taken = chosen.and_then(|(id, score)| Ok((id, score, seq.choice.take(id)?)));
            let (id, score, Piece { text, finish }) = match taken {
                Ok(taken) => taken,
                Err(violation) => {
                    let (code, message) = violation.told();
                    self.fail(request, code, message, events);
                    continue;
                }
            };
            if let Some(entry) = self.requests.get_mut(&request) {
                entry.usage.completion_tokens += 1;
            }
            events.push(Event { request, kind: EventKind::Token { choice, index, id, text, finish, score } });
            if finish.is_some() {
                self.end_choice(row.sequence, request, events);
            }
        }
    }

    fn end_choice(&mut self, sequence: SequenceId, request: RequestKey, events: &mut Vec<Event>) {
        if let Some(seq) = self.running.remove(&sequence) {
            self.release(seq);
            self.close_choice(request, events);
        }
    }

    /// Ends every request of a step that failed. None of the step's blocks becomes findable.
    pub fn step_failed(&mut self, batch: &Batch, events: &mut Vec<Event>) {
        for row in &batch.rows {
            if let Some(seq) = self.running.get(&row.sequence) {
                let request = seq.choice.request;
                self.fail(request, Code::EngineFailed, "the engine failed while it ran this request", events);
            }
        }
    }

    /// Keeps `cached_tokens` true: what the leader computes of the prompt did not come from the cache.
    fn note_computed(&mut self, row: &Row) {
        let Some(seq) = self.running.get(&row.sequence) else { return };
        let Some(entry) = self.requests.get_mut(&seq.choice.request) else { return };
        if entry.leader == Some(seq.id) {
            let from = row.start.min(entry.computed_from.unwrap_or(entry.usage.prompt_tokens));
            entry.computed_from = Some(from);
            entry.usage.cached_tokens = from;
        }
    }

    /// Gives the prompt's blocks to the choices that wait for them, once `leader` has computed the prompt.
    ///
    /// Full blocks are shared. The block in which a choice computes its first position is its own; what that block
    /// must hold before is copied when the choice first runs, and until then the source is held.
    pub(crate) fn hand_over(&mut self, leader: SequenceId) {
        let Some(seq) = self.running.get_mut(&leader) else { return };
        if !seq.leads || seq.computed < seq.choice.prompt.len() {
            return;
        }
        seq.leads = false;
        let prompt = self.ledger.blocks_for(seq.choice.prompt.len());
        let blocks = seq.blocks[..prompt].to_vec();
        let known = seq.chain.len().min(prompt);
        let (chain, hashes, publishes) =
            (seq.chain[..known].to_vec(), seq.choice.hashes[..known].to_vec(), seq.publishes);
        let size = self.ledger.block_tokens();
        for follower in self.running.range_mut(leader..).map(|(_, seq)| seq) {
            let Some(follows) = follower.follows.take_if(|follows| follows.leader == leader) else { continue };
            let shared = follows.shared;
            let own = std::mem::replace(&mut follower.blocks, blocks[..shared].to_vec());
            follower.chain = chain[..shared.min(known)].to_vec();
            follower.choice.hashes = hashes[..shared.min(known)].to_vec();
            follower.publishes = publishes;
            follower.computed = follower.choice.first_own();
            follower.copy_from = (shared * size < follower.computed).then(|| blocks[shared]);
            for block in follower.holds() {
                self.ledger.share(block);
            }
            follower.blocks.extend(own);
        }
    }
}

/// Tells how likely the tokens were that a choice has already, of which `logits` are the last `count` positions computed.
fn score_known(choice: &mut Choice, count: usize, logits: &[f32], vocabulary: usize, events: &mut Vec<Event>) {
    for (position, logits) in (choice.awaits + 1..).zip(logits.chunks_exact(vocabulary)).take(count) {
        let id = if position < choice.len() { choice.span(position..position + 1).next() } else { choice.ended_by };
        let Some(id) = id else { return };
        choice.awaits = position.min(choice.len() - 1);
        if let Some(score) = choice.score(logits, id) {
            let kind = EventKind::Scored { choice: choice.index, position, id, score };
            events.push(Event { request: choice.request, kind });
        }
    }
}

/// Adds a row that runs the next `chunk` tokens of `seq`.
fn add_row(batch: &mut Batch, seq: &Sequence, chunk: usize, ledger: &Ledger) {
    let end = seq.computed + chunk;
    if let Some(from) = seq.copy_from {
        batch.copies.push(BlockCopy { from, to: seq.blocks[seq.computed / ledger.block_tokens()] });
    }
    batch.rows.push(Row {
        sequence: seq.id,
        tokens: seq.choice.span(seq.computed..end).collect(),
        start: seq.computed,
        blocks: seq.blocks[..ledger.blocks_for(end)].to_vec(),
        wanted: seq.choice.wanted(seq.computed, end),
        sampling: seq.choice.sampling,
    });
}

/// Makes the blocks of `seq` that are now whole findable.
fn publish(seq: &mut Sequence, ledger: &mut Ledger) {
    let size = ledger.block_tokens();
    while seq.publishes && (seq.chain.len() + 1) * size <= seq.computed {
        let i = seq.chain.len();
        seq.choice.hash_blocks(i + 1, size);
        let content = PrefixBlock {
            hash: seq.choice.hashes[i],
            parent: seq.choice.parent(i).copied(),
            salt: seq.choice.salt,
            tokens: seq.choice.span(i * size..(i + 1) * size).collect(),
            block: seq.blocks[i],
        };
        match ledger.publish(content) {
            Publication::Published => seq.chain.push(seq.blocks[i]),
            Publication::Known(block) => {
                ledger.share(block);
                seq.chain.push(block);
            }
            Publication::Refused => seq.publishes = false,
        }
    }
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod task_tests;
#[cfg(test)]
#[path = "step_tests.rs"]
mod tests;
