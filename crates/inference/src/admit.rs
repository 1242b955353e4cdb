//! Who runs: from the queue into the batch, and back when somebody more urgent needs the room.
//!
//! All choices of a request start together, or none does. Nothing passes the queue's head; see [`crate::queue`].
//! Ageing moves a request forward in the queue, but who may preempt whom is said by the classes they came with: a
//! request that merely waited long throws nobody's work away.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use words::{Code, Moment};

use crate::engine::{BlockId, SequenceId};
use crate::ledger::Ledger;
use crate::queue::Waiting;
use crate::request::{Event, EventKind, Priority, RequestKey};
use crate::scheduler::Scheduler;
use crate::sequence::{Choice, Follows, Sequence};

/// Times a request may be preempted; then it is immune, so that the work thrown away is bounded.
pub(crate) const MAX_PREEMPTIONS: u32 = 4;

/// How one choice would start now.
struct Entry {
    /// Cached blocks it begins with.
    found: Vec<BlockId>,
    /// Blocks it will share with the first choice once that has computed the prompt.
    follows: Option<usize>,
    /// Blocks of its own.
    fresh: usize,
}

/// Returns the longest chain of known blocks that `choice` can begin with. The positions whose outputs it wants are
/// left to compute: at least the last.
fn find_chain(choice: &mut Choice, ledger: &Ledger) -> Vec<BlockId> {
    let size = ledger.block_tokens();
    let mut found = Vec::new();
    for i in 0..choice.awaits / size {
        choice.hash_blocks(i + 1, size);
        let tokens = choice.span(i * size..(i + 1) * size);
        let Some(block) = ledger.find(&choice.hashes[i], choice.parent(i), &choice.salt, tokens) else { break };
        found.push(block);
    }
    found
}

/// Says how the choices of a request would start. The first one leads: the others share the prompt's blocks with
/// it, but for those that find all of the prompt in the cache by themselves.
fn entries(waiting: &mut Waiting, ledger: &Ledger, prefix_cache: bool) -> Vec<Entry> {
    let size = ledger.block_tokens();
    let mut of_leader = 0;
    let entry = |(i, choice): (usize, &mut Choice)| {
        let (own, all) = (choice.first_own(), ledger.blocks_for(choice.positions));
        // Unless the leader finds the prompt as well, two blocks would hold a part of it, more than was counted.
        let found =
            if prefix_cache && (i == 0 || of_leader >= own / size) { find_chain(choice, ledger) } else { vec![] };
        if i == 0 {
            of_leader = found.len();
        } else if found.len() * size < own {
            return Entry { found: vec![], follows: Some(own / size), fresh: all - own / size };
        }
        Entry { fresh: all - found.len(), found, follows: None }
    };
    waiting.choices.iter_mut().enumerate().map(entry).collect()
}

impl Scheduler {
    /// Fails what waited too long before it ran, and whatever is past its deadline.
    pub(crate) fn expire(&mut self, now: Moment, events: &mut Vec<Event>) {
        let longest = self.limits.max_wait;
        for request in self.queue.names(|waiting| !waiting.ran && now.since(waiting.since) > longest) {
            self.fail(request, Code::Overloaded, "the request waited too long in the model's queue", events);
        }
        let late = self.requests.iter().filter(|(_, request)| request.deadline.is_some_and(|end| now > end));
        for request in late.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.fail(request, Code::DeadlinePassed, "the request's deadline has passed", events);
        }
    }

    /// Starts queued requests, the head first, as long as there is room or a preemption makes some.
    pub(crate) fn admit(&mut self, now: Moment, events: &mut Vec<Event>) {
        while let Some(head) = self.queue.head(now, self.limits.max_wait) {
            if self.blocked == Some((head, self.ledger.changes())) {
                return;
            }
            let Some(waiting) = self.queue.get_mut(head) else { return };
            let class = waiting.class;
            let entries = entries(waiting, &self.ledger, self.limits.prefix_cache);
            if !self.room(&entries, &[]) {
                let Some(victims) = self.victims(class, &entries) else {
                    self.blocked = Some((head, self.ledger.changes()));
                    return;
                };
                for victim in victims {
                    self.preempt(victim);
                }
            }
            self.start(head, entries, events);
        }
    }

    /// Whether there are slots and blocks for `entries` once the `victims` are gone.
    fn room(&self, entries: &[Entry], victims: &[RequestKey]) -> bool {
        let gone = || self.running.values().filter(|seq| victims.contains(&seq.choice.request));
        if self.running.len() - gone().count() + entries.len() > self.max_running() {
            return false;
        }
        let mut given: BTreeMap<BlockId, usize> = BTreeMap::new();
        for block in gone().flat_map(Sequence::holds) {
            *given.entry(block).or_default() += 1;
        }
        let left = |block: &BlockId| self.ledger.holders(*block) - given.get(block).copied().unwrap_or(0);
        let freed = given.keys().filter(|block| left(block) == 0).count();
        // A cached block that is shared is not there for others any more.
        let found = entries.iter().flat_map(|entry| &entry.found);
        let woken = found.filter(|block| left(block) == 0).collect::<BTreeSet<_>>().len();
        let fresh: usize = entries.iter().map(|entry| entry.fresh).sum();
        fresh + woken <= self.ledger.available() + freed
    }

    /// Chooses the running requests of a lower class than `class` that make room for `entries`: the lowest class
    /// first, of one class the latest arrival first, and none without which there is room. `None` when even all
    /// of them make too little.
    fn victims(&self, class: Priority, entries: &[Entry]) -> Option<Vec<RequestKey>> {
        let running: BTreeSet<RequestKey> = self.running.values().map(|seq| seq.choice.request).collect();
        let of = |key: RequestKey| self.requests.get(&key).map(|request| (key, request));
        let lower = |(_, request): &(_, &crate::scheduler::Request)| {
            request.class > class && request.preemptions < MAX_PREEMPTIONS
        };
        let mut order: Vec<_> = running.into_iter().filter_map(of).filter(lower).collect();
        order.sort_unstable_by_key(|(_, request)| Reverse((request.class, request.arrival)));
        let mut chosen = Vec::new();
        for (key, _) in order {
            chosen.push(key);
            if self.room(entries, &chosen) {
                // The last one was needed; of the others, spare those that would have come last.
                for i in (0..chosen.len() - 1).rev() {
                    let spared = chosen.remove(i);
                    if !self.room(entries, &chosen) {
                        chosen.insert(i, spared);
                    }
                }
                return Some(chosen);
            }
        }
        None
    }

    /// Sends a running request back to the queue. Its computed blocks stay in the cache as long as nobody needs
    /// the room; what it has said is kept, so that it later goes on as if nothing had happened.
    fn preempt(&mut self, request: RequestKey) {
        let choices = self.leave(request);
        let Some(entry) = self.requests.get_mut(&request) else { return };
        entry.preemptions += 1;
        self.counters.preemptions += 1;
        let (class, arrival, since) = (entry.class, entry.arrival, entry.since);
        self.queue.push(Waiting {
            request,
            class,
            arrival,
            since,
            ran: true,
            resumed: false,
            choices,
            replays: Vec::new(),
        });
    }

    fn start(&mut self, request: RequestKey, entries: Vec<Entry>, events: &mut Vec<Event>) {
        let Some(waiting) = self.queue.take(request) else { return };
        // Before anything is taken, which could evict them.
        for block in entries.iter().flat_map(|entry| &entry.found) {
            self.ledger.share(*block);
        }
        let Some(mut fresh) = self.ledger.take(entries.iter().map(|entry| entry.fresh).sum()) else {
            // `room` counted the blocks before; without them the request can't go on.
            for block in entries.iter().flat_map(|entry| entry.found.iter().rev()) {
                self.ledger.release(*block);
            }
            self.fail(request, Code::Internal, "the KV ledger and its count disagree", events);
            return;
        };
        if !waiting.ran {
            if let (Some(entry), Some(choice)) = (entries.first(), waiting.choices.first())
                && self.limits.prefix_cache
            {
                self.counters.prefix_query_tokens += choice.len() as u64;
                self.counters.prefix_hit_tokens += (entry.found.len() * self.ledger.block_tokens()) as u64;
            }
            let found = entries.first().map_or(0, |entry| entry.found.len() * self.ledger.block_tokens());
            self.announce(request, found, waiting.replays, events);
        }
        let leader = SequenceId(self.next_sequence);
        if let Some(entry) = self.requests.get_mut(&request) {
            entry.leader = Some(leader);
        }
        let leads = entries.iter().any(|entry| entry.follows.is_some());
        for (choice, entry) in waiting.choices.into_iter().zip(entries) {
            let id = SequenceId(self.next_sequence);
            self.next_sequence += 1;
            let mut blocks = entry.found.clone();
            blocks.extend(fresh.drain(..entry.fresh));
            let seq = Sequence {
                id,
                choice,
                computed: entry.found.len() * self.ledger.block_tokens(),
                blocks,
                chain: entry.found,
                publishes: self.limits.prefix_cache,
                follows: entry.follows.map(|shared| Follows { leader, shared }),
                leads: leads && id == leader,
                copy_from: None,
            };
            self.running.insert(id, seq);
        }
        // The cache may have had the whole prompt.
        self.hand_over(leader);
    }

    /// Tells the owner that its request left the queue, and what accepted ids had released.
    pub(crate) fn announce(
        &mut self,
        request: RequestKey,
        found: usize,
        replays: Vec<(u32, crate::text::Piece, bool)>,
        events: &mut Vec<Event>,
    ) {
        let prompt = self.requests.get(&request).map_or(0, |entry| entry.usage.prompt_tokens);
        events.push(Event { request, kind: EventKind::Started { cached: found.min(prompt) } });
        for (choice, piece, runs) in replays {
            let finish = piece.finish;
            events.push(Event { request, kind: EventKind::Resumed { choice, text: piece.text, finish } });
            if finish.is_some() && !runs {
                self.close_choice(request, events);
            }
        }
    }
}

#[cfg(test)]
#[path = "admit_tests.rs"]
mod tests;
