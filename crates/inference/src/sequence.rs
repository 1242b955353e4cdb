//! One choice of one request: what it has said, and the blocks it holds while it is in the batch.

use std::ops::Range;
use std::sync::Arc;

use crate::constraint::{Matcher, Violation, next_mask};
use crate::engine::{BlockId, SequenceId, Wanted};
use crate::prefix::{PrefixHash, prefix_hash};
use crate::request::{FinishReason, Pooling, RequestKey, Score, Scoring, Task};
use crate::sampling::{Context, Sampling, sample, score, shape, shapes};
use crate::text::{Assembler, Piece};

/// A choice without blocks: all that a preemption keeps.
pub(crate) struct Choice {
    pub(crate) request: RequestKey,
    pub(crate) index: u32,
    pub(crate) prompt: Arc<[u32]>,
    /// Accepted and generated ids.
    pub(crate) said: Vec<u32>,
    pub(crate) task: Task,
    /// The first position whose output is wanted and still to come; at most its last.
    pub(crate) awaits: usize,
    /// The accepted token that ended it, where it only runs to be scored again; then it ends once more.
    pub(crate) ended_by: Option<u32>,
    /// Sums of the hidden states before it, for a mean.
    pub(crate) pooled: Vec<f64>,
    /// Most positions it can take, prompt included.
    pub(crate) positions: usize,
    pub(crate) assembler: Assembler,
    /// Where it is in its grammar, when it has one.
    pub(crate) matcher: Option<Box<dyn Matcher>>,
    pub(crate) sampling: Sampling,
    pub(crate) bias: Arc<[(u32, f32)]>,
    pub(crate) salt: [u8; 32],
    /// Addresses of its full blocks, as far as anybody asked; each is computed once.
    pub(crate) hashes: Vec<PrefixHash>,
}

impl Choice {
    /// Chooses its next token from what the engine computed.
    ///
    /// # Errors
    /// [`Violation`] when its grammar lets no token come.
    pub(crate) fn choose(&mut self, mut logits: Vec<f32>) -> Result<u32, Violation> {
        let (prompt, said, ends) = (&*self.prompt, self.said.as_slice(), self.assembler.ends());
        let context = Context { prompt, said, bias: &self.bias, ends };
        if shapes(&self.sampling, &context) {
            shape(&mut logits, &self.sampling, &context);
        }
        let index = self.said.len() as u32;
        let Some(matcher) = &mut self.matcher else { return Ok(sample(&logits, &self.sampling, self.index, index)) };
        let mask = next_mask(matcher.as_mut(), ends, logits.len())?;
        mask.apply(&mut logits);
        let id = sample(&logits, &self.sampling, self.index, index);
        // Where bias, a least length or the model itself rule out all that may come, the grammar wins.
        if mask.allows(id) { Ok(id) } else { mask.first().ok_or(Violation::DeadEnd) }
    }

    /// Takes its next token: what it releases, and whether it ends the choice.
    ///
    /// # Errors
    /// [`Violation`] when its grammar lets no such token come.
    pub(crate) fn take(&mut self, id: u32) -> Result<Piece, Violation> {
        let ends = self.assembler.ends().contains(&id);
        let mut piece = self.assembler.push(id);
        self.awaits = self.len();
        self.said.push(id);
        let Some(matcher) = &mut self.matcher else { return Ok(piece) };
        if ends {
            // The grammar may know its text all the same; then it is no violation that the answer ends early.
            let fits = matcher.may_end()? || matcher.mask()?.allows(id);
            return if fits { Ok(piece) } else { Err(Violation::Foreign(id)) };
        }
        matcher.accept(id)?;
        if matcher.is_over() && piece.finish != Some(FinishReason::Stop) {
            // Whole, even if no further token had been left.
            piece.text.push_str(&self.assembler.flush());
            piece.finish = Some(FinishReason::Stop);
        }
        Ok(piece)
    }

    /// Says how likely the token at `position` was; `None` when nobody asked.
    pub(crate) fn score(&self, logits: &[f32], id: u32) -> Option<Score> {
        let Task::Score(Scoring { top, .. }) = self.task else { return None };
        (!self.assembler.ends().contains(&id)).then(|| score(logits, id, top))
    }

    /// Says what a row must give that computes its positions from `start` up to `end`.
    pub(crate) fn wanted(&self, start: usize, end: usize) -> Wanted {
        match (end.saturating_sub(self.awaits.max(start)), self.task) {
            (0, _) => Wanted::Nothing,
            // A device that samples by itself knows no grammar.
            (_, Task::Generate) if self.matcher.is_some() => Wanted::Logits(1),
            (_, Task::Generate) => Wanted::Token,
            (count, Task::Score(_)) => Wanted::Logits(count),
            (count, Task::Embed(_)) => Wanted::Hidden(count),
        }
    }

    /// Takes hidden states of its next positions, in order; returns the pooled one once it has had its last.
    ///
    /// Sums are taken one position after another, so that chunks change nothing.
    pub(crate) fn pool(&mut self, hidden: &[f32], width: usize) -> Option<Vec<f32>> {
        let states = hidden.chunks_exact(width.max(1));
        self.awaits += states.len();
        if self.task == Task::Embed(Pooling::Mean) {
            self.pooled.resize(width, 0.0);
            for state in states.clone() {
                self.pooled.iter_mut().zip(state).for_each(|(sum, number)| *sum += f64::from(*number));
            }
        }
        if self.awaits < self.len() {
            return None;
        }
        let mean = |sum: &f64| (sum / self.len() as f64) as f32;
        match self.task {
            Task::Embed(Pooling::Mean) => Some(self.pooled.iter().map(mean).collect()),
            _ => states.last().map(<[f32]>::to_vec),
        }
    }

    /// Returns its tokens so far, prompt included.
    pub(crate) fn len(&self) -> usize {
        self.prompt.len() + self.said.len()
    }

    /// Returns the tokens at `range`, which lies within [`Choice::len`].
    pub(crate) fn span(&self, range: Range<usize>) -> impl Iterator<Item = u32> + '_ {
        let prompt = self.prompt.len();
        let of_prompt = &self.prompt[range.start.min(prompt)..range.end.min(prompt)];
        let of_said = &self.said[range.start.saturating_sub(prompt)..range.end.saturating_sub(prompt)];
        of_prompt.iter().chain(of_said).copied()
    }

    /// Computes the addresses of its first `count` blocks of `size` tokens, as far as they are missing.
    pub(crate) fn hash_blocks(&mut self, count: usize, size: usize) {
        for i in self.hashes.len()..count {
            let hash = prefix_hash(self.hashes.last(), &self.salt, self.span(i * size..(i + 1) * size));
            self.hashes.push(hash);
        }
    }

    /// Returns the address before block `i`.
    pub(crate) fn parent(&self, i: usize) -> Option<&PrefixHash> {
        self.hashes.get(i.checked_sub(1)?)
    }

    /// Returns the first position that it computes for itself when a sibling has computed the prompt.
    pub(crate) fn first_own(&self) -> usize {
        self.prompt.len().min(self.awaits)
    }
}

/// Returns the first position whose output a choice wants. `leads` says that it is its request's first to run.
pub(crate) fn first_awaited(task: Task, prompt: usize, said: usize, leads: bool) -> usize {
    match task {
        Task::Embed(Pooling::Mean) => 0,
        Task::Score(scoring) if scoring.prompt && leads => 0,
        Task::Score(scoring) if scoring.accepted => prompt - 1,
        _ => prompt + said - 1,
    }
}

/// A choice in the batch, with its blocks.
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) choice: Choice,
    /// Positions below it are in its blocks.
    pub(crate) computed: usize,
    /// Its blocks by position; without the shared ones as long as it follows.
    pub(crate) blocks: Vec<BlockId>,
    /// The findable block of each published or found address. Usually its own; where another sequence published
    /// the same content first, that one's, held so that what follows it stays reachable.
    pub(crate) chain: Vec<BlockId>,
    /// Whether its next full block may be published: not after a collision.
    pub(crate) publishes: bool,
    /// Set while it waits for a sibling to compute the prompt.
    pub(crate) follows: Option<Follows>,
    /// Whether siblings wait for it.
    pub(crate) leads: bool,
    /// Held until its first row, which copies it into its own first block.
    pub(crate) copy_from: Option<BlockId>,
}

/// What a sequence takes over once its leader has computed the prompt.
pub(crate) struct Follows {
    pub(crate) leader: SequenceId,
    /// Full blocks to share with the leader.
    pub(crate) shared: usize,
}

impl Sequence {
    /// Returns the tokens that are not computed yet.
    pub(crate) fn pending(&self) -> usize {
        self.choice.len() - self.computed
    }

    /// Lists every block it is counted as a holder of, once a count, the end of its chain first.
    pub(crate) fn holds(&self) -> impl Iterator<Item = BlockId> + '_ {
        let by_position = (0..self.blocks.len()).rev().flat_map(|i| {
            let own = self.blocks[i];
            let first_published = self.chain.get(i).copied().filter(|block| *block != own);
            [Some(own), first_published].into_iter().flatten()
        });
        self.copy_from.into_iter().chain(by_position)
    }
}
