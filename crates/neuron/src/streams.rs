//! Who is being answered: every request of a gateway, so that it can be offered to another worker, or cancelled when
//! its gateway is gone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use words::GatewayId;

use crate::engine_thread::CancelGuard;

/// What a running request is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Word {
    /// Nothing: go on.
    #[default]
    GoOn,
    /// Another worker may continue it; its gateway decides.
    Offered,
    /// Its gateway's session is lost; nobody reads it any more.
    Orphaned,
}

#[derive(Debug)]
struct Stream {
    gateway: GatewayId,
    word: watch::Sender<Word>,
    /// Here and not with the answer: a connection that takes no more bytes never polls its answer again.
    cancel: Option<CancelGuard>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    streams: BTreeMap<u64, Stream>,
}

/// The table of running requests of gateways; cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams {
    table: Arc<Mutex<Table>>,
}

/// A request's place in the table; dropping it takes the request out.
#[derive(Debug)]
pub(crate) struct Ticket {
    number: u64,
    streams: Streams,
    /// What the request is told.
    word: watch::Receiver<Word>,
}

impl Ticket {
    /// Waits for the next word to this request. Safe to cancel.
    pub(crate) async fn told(&mut self) -> Word {
        match self.word.changed().await {
            Ok(()) => *self.word.borrow_and_update(),
            // The table outlives its tickets, which keep their senders in it.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // What is taken out cancels its request, and must not do so under the lock.
        let _ended = self.streams.table().streams.remove(&self.number);
    }
}

impl Streams {
    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a request of a gateway, with what cancels it.
    pub(crate) fn enter(&self, gateway: GatewayId, cancel: Option<CancelGuard>) -> Ticket {
        let (sender, word) = watch::channel(Word::GoOn);
        let mut table = self.table();
        table.next += 1;
        let number = table.next;
        table.streams.insert(number, Stream { gateway, word: sender, cancel });
        Ticket { number, streams: self.clone(), word }
    }

    /// Offers further requests to other workers, oldest first, until `most` offers are open or all are offered. An
    /// offer that nobody takes stays open: its request runs on.
    ///
    /// `stale` offers, which nobody took in time, don't count as open. Returns how many were newly offered.
    pub(crate) fn offer(&self, most: usize, stale: usize) -> usize {
        let table = self.table();
        let open = table.streams.values().filter(|stream| *stream.word.borrow() == Word::Offered).count();
        let room = most.saturating_sub(open.saturating_sub(stale));
        let fresh = table.streams.values().filter(|stream| *stream.word.borrow() == Word::GoOn).take(room);
        fresh.map(|stream| stream.word.send_replace(Word::Offered)).count()
    }

    /// Returns how many offers are open: made, and their requests still here.
    pub(crate) fn offered(&self) -> usize {
        self.table().streams.values().filter(|stream| *stream.word.borrow() == Word::Offered).count()
    }

    /// Takes all offers back, for a drain that was undone.
    pub(crate) fn withdraw(&self) {
        for stream in self.table().streams.values() {
            stream.word.send_if_modified(|word| std::mem::take(word) == Word::Offered);
        }
    }

    /// Ends every request of a gateway whose session is lost; returns how many.
    pub(crate) fn orphan(&self, gateway: &GatewayId) -> usize {
        let mut table = self.table();
        let theirs = table.streams.values_mut().filter(|stream| stream.gateway == *gateway);
        let ended = theirs.map(|stream| {
            stream.cancel = None;
            stream.word.send_replace(Word::Orphaned)
        });
        ended.count()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn offers_are_made_oldest_first_within_their_number_and_orphans_are_their_gateways_alone() {
        let (streams, [a, b]) = (Streams::default(), ["a", "b"].map(|name| GatewayId::new(name).unwrap()));
        let mut tickets: Vec<Ticket> =
            (0..6).map(|i| streams.enter(if i < 3 { a.clone() } else { b.clone() }, None)).collect();
        assert_eq!((streams.offer(4, 0), streams.offer(4, 0), streams.offered()), (4, 0, 4));
        assert_eq!(*tickets[0].word.borrow(), Word::Offered);
        tickets.remove(0);
        assert_eq!(streams.offer(4, 0), 1, "a taken offer makes room");
        assert_eq!(streams.offer(4, 4), 1, "so do offers that nobody takes");
        streams.withdraw();
        assert_eq!(streams.offered(), 0);
        assert_eq!(streams.orphan(&a), 2);
        let orphans = tickets.iter().filter(|ticket| *ticket.word.borrow() == Word::Orphaned).count();
        assert_eq!(orphans, 2);
    }
}
