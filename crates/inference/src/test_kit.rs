//! What the tests of this crate share: small requests, the oracle, and a rig that checks every step it runs.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use words::Moment;

use crate::engine::{Batch, BlockId, Capabilities, Engine, Row, SequenceId};
use crate::fake::{FakeEngine, fake_next_token, fake_token_bytes};
use crate::prefix::PrefixBlock;
use crate::request::{Event, EventKind, Limits, RequestKey, Submission, Usage};
use crate::scheduler::Scheduler;

pub(crate) fn capabilities() -> Capabilities {
    Capabilities {
        max_batch: 4,
        max_step_tokens: 24,
        block_tokens: 4,
        blocks: 64,
        context_length: 96,
        vocab_size: crate::FAKE_VOCABULARY,
        width: crate::FAKE_WIDTH,
    }
}

pub(crate) fn limits() -> Limits {
    Limits {
        max_running: 4,
        max_waiting: 8,
        max_wait: Duration::from_secs(60),
        prefill_tokens: 8,
        max_choices: 4,
        prefix_cache: true,
    }
}

pub(crate) fn scheduler(capabilities: Capabilities, limits: Limits) -> Scheduler {
    Scheduler::new(capabilities, limits, Arc::new(fake_token_bytes()))
}

pub(crate) fn submission(key: u64, prompt: &str, max_tokens: usize) -> Submission {
    Submission::new(RequestKey(key), prompt.bytes().map(u32::from).collect::<Vec<u32>>(), max_tokens)
}

pub(crate) fn oracle(prompt: &str, count: usize) -> Vec<u32> {
    let mut context: Vec<u32> = prompt.bytes().map(u32::from).collect();
    for _ in 0..count {
        context.push(fake_next_token(&context));
    }
    context.split_off(prompt.len())
}

pub(crate) fn step(scheduler: &mut Scheduler, engine: &mut FakeEngine, now: Moment, events: &mut Vec<Event>) -> bool {
    let Some(batch) = scheduler.plan(now, events) else { return false };
    let outputs = engine.step(&batch).unwrap();
    scheduler.complete(&batch, outputs, events);
    true
}

pub(crate) fn run_out(scheduler: &mut Scheduler, engine: &mut FakeEngine) -> Vec<Event> {
    let mut events = Vec::new();
    for _ in 0..10_000 {
        if !step(scheduler, engine, Moment::ZERO, &mut events) {
            return events;
        }
    }
    panic!("the scheduler does not come to rest");
}

pub(crate) fn ids(events: &[Event], key: u64, choice: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for event in events.iter().filter(|event| event.request == RequestKey(key)) {
        if let EventKind::Token { choice: c, index, id, .. } = &event.kind
            && *c == choice
        {
            assert!(found.is_empty() || found.last().is_some_and(|(last, _)| last + 1 == *index), "indices are dense");
            found.push((*index, *id));
        }
    }
    found.into_iter().map(|(_, id)| id).collect()
}

pub(crate) fn text(events: &[Event], key: u64) -> String {
    let mut whole = String::new();
    for event in events.iter().filter(|event| event.request == RequestKey(key)) {
        match &event.kind {
            EventKind::Token { text, .. } | EventKind::Resumed { text, .. } => whole.push_str(text),
            _ => {}
        }
    }
    whole
}

pub(crate) fn done(events: &[Event], key: u64) -> Option<Usage> {
    events.iter().find_map(|event| match event.kind {
        EventKind::Done(usage) if event.request == RequestKey(key) => Some(usage),
        _ => None,
    })
}

/// Counts a request's events of one kind.
pub(crate) fn count(events: &[Event], key: u64, which: impl Fn(&EventKind) -> bool) -> usize {
    events.iter().filter(|event| event.request == RequestKey(key) && which(&event.kind)).count()
}

/// A scheduler over a fake engine; each step is checked against the rules of sharing, each account after it.
pub(crate) struct Rig {
    pub(crate) scheduler: Scheduler,
    pub(crate) engine: FakeEngine,
    pub(crate) events: Vec<Event>,
    pub(crate) now: Moment,
    /// Positions that the engine computed, by request and choice, each time it did.
    pub(crate) computed: BTreeMap<(u64, u32), Vec<usize>>,
    /// Blocks copied so far.
    pub(crate) copies: usize,
    /// Positions in blocks whose content the engine has computed, by block.
    filled: BTreeMap<BlockId, usize>,
}

impl Rig {
    pub(crate) fn new(capabilities: Capabilities, limits: Limits) -> Self {
        Rig {
            scheduler: scheduler(capabilities, limits),
            engine: FakeEngine::new(capabilities),
            events: Vec::new(),
            now: Moment::ZERO,
            computed: BTreeMap::new(),
            copies: 0,
            filled: BTreeMap::new(),
        }
    }

    pub(crate) fn submit(&mut self, submission: Submission) {
        self.scheduler.submit(self.now, submission).unwrap();
    }

    pub(crate) fn after(&mut self, span: Duration) {
        self.now = self.now + span;
    }

    /// Runs one step; `false` when there was nothing to run.
    pub(crate) fn step(&mut self) -> bool {
        let Some(batch) = self.plan() else { return false };
        let outputs = self.engine.step(&batch).unwrap();
        for row in &batch.rows {
            for (i, block) in row.blocks.iter().enumerate() {
                let size = self.scheduler.ledger.block_tokens();
                let end = (row.start + row.tokens.len()).saturating_sub(i * size).min(size);
                if (i + 1) * size > row.start {
                    self.filled.insert(*block, end);
                }
            }
        }
        self.scheduler.complete(&batch, outputs, &mut self.events);
        self.audit();
        true
    }

    /// Imports what another rig exported, as far as there is room.
    pub(crate) fn import(&mut self, kept: &[(PrefixBlock, Vec<u8>)]) {
        for (known, bytes) in kept {
            let tokens = known.tokens.clone();
            if let Some((block, hash)) = self.scheduler.import_prefix(known.parent, known.salt, tokens) {
                assert_eq!(hash, known.hash);
                self.engine.import_block(block, bytes).unwrap();
                self.filled.insert(block, known.tokens.len());
            }
            self.audit();
        }
    }

    /// Exports all that is known, with its bytes.
    pub(crate) fn export(&mut self) -> Vec<(PrefixBlock, Vec<u8>)> {
        let known = self.scheduler.export_prefixes().into_iter();
        known.map(|known| (known.clone(), self.engine.export_block(known.block).unwrap())).collect()
    }

    /// Runs at most `count` steps.
    pub(crate) fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.step();
        }
    }

    /// Runs one step that fails; `false` when there was nothing to run.
    pub(crate) fn failing_step(&mut self) -> bool {
        let Some(batch) = self.plan() else { return false };
        self.scheduler.step_failed(&batch, &mut self.events);
        self.audit();
        true
    }

    pub(crate) fn run_out_until(&mut self, reached: impl Fn(&Rig) -> bool) {
        while !reached(self) {
            assert!(self.step(), "it is never reached");
        }
    }

    pub(crate) fn run_out(&mut self) {
        for _ in 0..20_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the scheduler does not come to rest");
    }

    fn plan(&mut self) -> Option<Batch> {
        let batch = self.scheduler.plan(self.now, &mut self.events);
        self.audit();
        self.check(batch.as_ref()?);
        batch
    }

    fn sequence(&self, id: SequenceId) -> &crate::sequence::Sequence {
        self.scheduler.running.get(&id).unwrap()
    }

    /// What is written is no one else's, what is copied was computed before.
    fn check(&mut self, batch: &Batch) {
        let size = self.scheduler.ledger.block_tokens();
        for copy in &batch.copies {
            self.copies += 1;
            let row = batch.rows.iter().find(|row| row.blocks.get(row.start / size) == Some(&copy.to)).unwrap();
            let needed = row.start % size;
            assert!(self.filled[&copy.from] >= needed, "a copy of what is not computed yet");
            assert_eq!(self.scheduler.ledger.holders(copy.to), 1, "the target of a copy is held alone");
        }
        for row in &batch.rows {
            for block in &row.blocks[row.start / size..] {
                let of = |seq: &crate::sequence::Sequence| seq.blocks.contains(block);
                assert_eq!(self.scheduler.running.values().filter(|seq| of(seq)).count(), 1, "written by one");
                assert!(!self.scheduler.ledger.knows(*block), "a block that can be found is written");
                let sources = self.scheduler.running.values().filter(|seq| seq.copy_from == Some(*block)).count();
                assert_eq!(self.scheduler.ledger.holders(*block), 1 + sources, "a shared block is written");
            }
            let choice = &self.sequence(row.sequence).choice;
            assert!(!self.scheduler.requests[&choice.request].paused, "a paused request runs");
            let key = (choice.request.0, choice.index);
            self.computed.entry(key).or_default().extend(row.start..row.start + row.tokens.len());
        }
        let ends = |row: &Row| row.start + row.tokens.len() == self.sequence(row.sequence).choice.len();
        let order: Vec<bool> = batch.rows.iter().map(|row| row.tokens.len() > 1 || !ends(row)).collect();
        assert!(order.is_sorted(), "decodes come first");
    }

    /// KV1, KV2 and AD1: each hold is counted, and nothing is out of bounds.
    pub(crate) fn audit(&self) {
        let scheduler = &self.scheduler;
        scheduler.ledger.audit();
        let mut holds: BTreeMap<BlockId, usize> = BTreeMap::new();
        for block in scheduler.running.values().flat_map(crate::sequence::Sequence::holds) {
            *holds.entry(block).or_default() += 1;
        }
        for block in (0..scheduler.ledger.total() as u32).map(BlockId) {
            let counted = holds.get(&block).copied().unwrap_or(0);
            assert_eq!(scheduler.ledger.holders(block), counted, "KV2: block {}", block.0);
        }
        let load = scheduler.load();
        assert!(scheduler.running.len() <= scheduler.max_running(), "AD1: rows");
        assert!(scheduler.queue.fresh() <= scheduler.limits.max_waiting.max(1), "AD1: the queue");
        assert!(load.blocks_used + load.blocks_cached <= load.blocks, "KV1");
        let running: BTreeSet<RequestKey> = scheduler.running.values().map(|seq| seq.choice.request).collect();
        let queued: BTreeSet<RequestKey> = scheduler.queue.names(|_| true).into_iter().collect();
        assert!(running.is_disjoint(&queued), "a request is in one place");
        assert_eq!(load.running, running.len(), "requests in the batch");
        assert_eq!(running.len() + queued.len(), scheduler.requests.len(), "no request is lost");
    }
}
