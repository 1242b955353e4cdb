//! One choice of one request: what it has said, and the blocks it holds while it is in the batch.

use std::ops::Range;
use std::sync::Arc;

use crate::engine::{BlockId, SequenceId};
use crate::prefix::{PrefixHash, prefix_hash};
use crate::request::RequestKey;
use crate::sampling::{Context, Sampling, sample, shape, shapes};
use crate::text::Assembler;

/// A choice without blocks: all that a preemption keeps.
pub(crate) struct Choice {
    pub(crate) request: RequestKey,
    pub(crate) index: u32,
    pub(crate) prompt: Arc<[u32]>,
    /// Accepted and generated ids.
    pub(crate) said: Vec<u32>,
    /// Most positions it can take, prompt included.
    pub(crate) positions: usize,
    pub(crate) assembler: Assembler,
    pub(crate) sampling: Sampling,
    pub(crate) bias: Arc<[(u32, f32)]>,
    pub(crate) salt: [u8; 32],
    /// Addresses of its full blocks, as far as anybody asked; each is computed once.
    pub(crate) hashes: Vec<PrefixHash>,
}

impl Choice {
    /// Chooses its next token from what the engine computed.
    pub(crate) fn choose(&self, mut logits: Vec<f32>) -> u32 {
        let (prompt, said, ends) = (&*self.prompt, self.said.as_slice(), self.assembler.ends());
        let context = Context { prompt, said, bias: &self.bias, ends };
        if shapes(&self.sampling, &context) {
            shape(&mut logits, &self.sampling, &context);
        }
        sample(&logits, &self.sampling, self.index, self.said.len() as u32)
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
        first_own(self.prompt.len(), self.said.len())
    }
}

/// Returns the first position that a choice computes for itself when a sibling has computed the prompt: what it
/// said, or else the prompt's last token, whose logits it needs.
pub(crate) fn first_own(prompt: usize, said: usize) -> usize {
    prompt - usize::from(said == 0)
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
