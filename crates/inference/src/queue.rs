//! The queue: requests without blocks, fresh ones and preempted ones.
//!
//! Order: class, then those whose client holds tokens already (preempted ones, resumes) before fresh ones, then arrival. Nothing passes the head, whatever its size,
//! so a big request can't be starved by small ones. Waiting raises a class step by step, so no class is starved
//! by the ones above it either.

use std::time::Duration;

use words::Moment;

use crate::request::{Priority, RequestKey};
use crate::sequence::Choice;
use crate::text::Piece;

/// A request in the queue.
pub(crate) struct Waiting {
    pub(crate) request: RequestKey,
    /// The class it was submitted with.
    pub(crate) class: Priority,
    /// Its place among all requests ever submitted; a preemption does not change it.
    pub(crate) arrival: u64,
    /// When it was submitted; a preemption does not change it, so ageing goes on.
    pub(crate) since: Moment,
    /// Whether it has been in the batch: it was preempted.
    pub(crate) ran: bool,
    /// Whether it goes on from ids of an earlier attempt.
    pub(crate) resumed: bool,
    /// Choices that have not ended.
    pub(crate) choices: Vec<Choice>,
    /// What accepted ids released, by choice, and whether that runs; to be told when it first leaves the queue.
    pub(crate) replays: Vec<(u32, Piece, bool)>,
}

/// Returns the class that a request counts as: one higher after half of `max_wait`, two after three quarters, so
/// that even the lowest one comes to the front before its wait is over.
pub(crate) fn aged(class: Priority, waited: Duration, max_wait: Duration) -> Priority {
    let steps = usize::from(waited > max_wait / 2) + usize::from(waited > max_wait / 4 * 3);
    class.raised(steps)
}

/// Requests in no order; the head is looked for, as ageing changes the order with time.
#[derive(Default)]
pub(crate) struct Queue {
    items: Vec<Waiting>,
}

impl Queue {
    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// Returns how many have not run yet and have no tokens either: those that the queue's bound counts.
    pub(crate) fn fresh(&self) -> usize {
        self.items.iter().filter(|item| !item.ran && !item.resumed).count()
    }

    /// Returns how many resumes have not run yet.
    pub(crate) fn resumes(&self) -> usize {
        self.items.iter().filter(|item| !item.ran && item.resumed).count()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Waiting> {
        self.items.iter()
    }

    pub(crate) fn push(&mut self, item: Waiting) {
        self.items.push(item);
    }

    /// Returns whose turn it is.
    pub(crate) fn head(&self, now: Moment, max_wait: Duration) -> Option<RequestKey> {
        let order = |item: &&Waiting| {
            let fresh = !item.ran && !item.resumed;
            (aged(item.class, now.since(item.since), max_wait), fresh, item.arrival)
        };
        self.items.iter().min_by_key(order).map(|item| item.request)
    }

    /// Returns a request that is queued.
    pub(crate) fn get_mut(&mut self, request: RequestKey) -> Option<&mut Waiting> {
        self.items.iter_mut().find(|item| item.request == request)
    }

    /// Takes a request out.
    pub(crate) fn take(&mut self, request: RequestKey) -> Option<Waiting> {
        let i = self.items.iter().position(|item| item.request == request)?;
        Some(self.items.swap_remove(i))
    }

    /// Names the requests for which `which` holds, in order of arrival.
    pub(crate) fn names(&self, which: impl Fn(&Waiting) -> bool) -> Vec<RequestKey> {
        let mut found: Vec<&Waiting> = self.items.iter().filter(|item| which(item)).collect();
        found.sort_unstable_by_key(|item| item.arrival);
        found.into_iter().map(|item| item.request).collect()
    }
}
