//! One engine's side of the KV store: what it leaves there when it goes, and what it takes back when somebody asks.

use std::collections::HashMap;
use std::time::Duration;

use inference::engine::Engine;
use inference::{PrefixHash, Scheduler, Submission, prefix_hash};
use kv_store::{KvBlock, KvStore};
use service::clock::Clock;
use words::Fingerprint;

use crate::metrics::ModelMetrics;

/// The store as one engine sees it.
#[derive(Clone, Debug)]
pub(crate) struct Keeper {
    pub(crate) store: KvStore,
    /// The exact fingerprint: only equal engines read each other's blocks.
    pub(crate) of: Fingerprint,
    pub(crate) block_tokens: usize,
    /// Longest time that leaving takes.
    pub(crate) leave_max: Duration,
    pub(crate) clock: Clock,
    pub(crate) metrics: ModelMetrics,
}

impl Keeper {
    /// Keeps what `scheduler` has computed, hottest first, within the store's memory and this keeper's time.
    pub(crate) fn leave(&self, scheduler: &Scheduler, engine: &mut dyn Engine) {
        let until = self.clock.now() + self.leave_max;
        let mut depths: HashMap<PrefixHash, u32> = HashMap::new();
        let mut blocks = scheduler.export_prefixes().into_iter();
        let kept = self.store.keep(self.of, || {
            let known = blocks.next().filter(|_| self.clock.now() < until)?;
            let depth = known.parent.and_then(|parent| depths.get(&parent)).map_or(0, |depth| depth + 1);
            depths.insert(known.hash, depth);
            let bytes = engine.export_block(known.block);
            let bytes = bytes.inspect_err(|error| tracing::warn!(%error, "a KV block could not be kept")).ok()?;
            Some(KvBlock { parent: known.parent, salt: known.salt, tokens: known.tokens, depth, bytes })
        });
        if kept > 0 {
            tracing::info!(blocks = kept, "KV kept for the model's next load");
        }
    }

    /// Takes back the longest prefix of a request that the store has in memory and the engine has not.
    pub(crate) fn restore(&self, submission: &Submission, scheduler: &mut Scheduler, engine: &mut dyn Engine) {
        if !self.store.in_memory() {
            return;
        }
        let accepted = submission.choices.first().filter(|_| submission.choices.len() == 1);
        let accepted = accepted.map_or(&[][..], |choice| choice.accepted.as_slice());
        let tokens: Vec<u32> = submission.prompt.iter().chain(accepted).copied().collect();
        let mut parent: Option<PrefixHash> = None;
        let mut restored = 0;
        for chunk in tokens.chunks_exact(self.block_tokens.max(1)) {
            let hash = prefix_hash(parent.as_ref(), &submission.salt, chunk.iter().copied());
            if !scheduler.knows_prefix(&hash) {
                let Some(stored) = self.store.get(&self.of, &hash) else { break };
                // A hash alone is never believed.
                if stored.tokens != chunk || stored.salt != submission.salt || stored.parent != parent {
                    break;
                }
                let Some((block, address)) = scheduler.import_prefix(parent, submission.salt, chunk.to_vec()) else {
                    break;
                };
                if let Err(error) = engine.import_block(block, &stored.bytes) {
                    tracing::warn!(%error, "a stored KV block does not fit this engine");
                    scheduler.forget_prefix(&address);
                    break;
                }
                self.store.forget(&self.of, &hash);
                restored += 1;
            }
            parent = Some(hash);
        }
        self.metrics.restored_blocks.inc_by(restored);
    }

    /// Brings what the disk has of a prompt into memory. Blocks on the disk.
    pub(crate) fn prefetch(&self, prompt: &[u32], salt: &[u8; 32]) {
        if self.store.on_disk() {
            self.store.prefetch(self.of, salt, prompt, self.block_tokens, self.clock.unix_seconds());
        }
    }
}

#[cfg(all(test, feature = "candle"))]
#[path = "keeper_tests.rs"]
mod tests;
