//! Who is being answered: every request of a gateway, so that it can be offered to another worker, or cancelled when
//! its gateway is gone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use words::{GatewayId, ModelId, Moment};

use crate::engine_thread::CancelGuard;

/// An offer that nobody took for this long leaves room for the next.
pub(crate) const OFFER_STALE: Duration = Duration::from_secs(5);

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
    model: ModelId,
    offered_at: Moment,
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
    pub(crate) fn enter(&self, gateway: GatewayId, model: ModelId, cancel: Option<CancelGuard>) -> Ticket {
        let (sender, word) = watch::channel(Word::GoOn);
        let mut table = self.table();
        table.next += 1;
        let number = table.next;
        table.streams.insert(number, Stream { gateway, model, offered_at: Moment::ZERO, word: sender, cancel });
        Ticket { number, streams: self.clone(), word }
    }

    /// Offers further requests to other workers, oldest first, those of one model or of all, until `most` offers are
    /// open or all are offered. An offer that nobody took for [`OFFER_STALE`] does not count as open any more, but it
    /// stays: its request runs on. Returns how many were newly offered.
    pub(crate) fn offer(&self, now: Moment, most: usize, of: Option<&ModelId>) -> usize {
        let mut table = self.table();
        let meant = |stream: &&mut Stream| of.is_none_or(|model| stream.model == *model);
        let fresh = |stream: &Stream| now.since(stream.offered_at) < OFFER_STALE;
        let said = |stream: &Stream| *stream.word.borrow();
        let open = table.streams.values_mut().filter(meant);
        let open = open.filter(|stream| said(stream) == Word::Offered && fresh(stream)).count();
        let others = table.streams.values_mut().filter(meant).filter(|stream| said(stream) == Word::GoOn);
        let mut made = 0;
        for stream in others.take(most.saturating_sub(open)) {
            stream.offered_at = now;
            stream.word.send_replace(Word::Offered);
            made += 1;
        }
        made
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
        let model = |name: &str| ModelId::new(name).unwrap();
        let enter = |i: usize| {
            let (gateway, name) = if i < 3 { (a.clone(), "m") } else { (b.clone(), "other") };
            streams.enter(gateway, model(name), None)
        };
        let at = |seconds| Moment::after_start(Duration::from_secs(seconds));
        let mut tickets: Vec<Ticket> = (0..7).map(enter).collect();
        assert_eq!((streams.offer(at(9), 4, None), streams.offer(at(9), 4, None), streams.offered()), (4, 0, 4));
        assert_eq!(*tickets[0].word.borrow(), Word::Offered);
        tickets.remove(0);
        assert_eq!(streams.offer(at(9), 4, None), 1, "a taken offer makes room");
        assert_eq!(streams.offer(at(14), 1, Some(&model("m"))), 0, "of this model all are offered");
        assert_eq!(streams.offer(at(14), 4, None), 2, "offers that nobody takes make room too");
        streams.withdraw();
        assert_eq!(streams.offered(), 0);
        assert_eq!(streams.offer(at(15), 4, Some(&model("m"))), 2);
        assert_eq!(streams.orphan(&a), 2);
        let orphans = tickets.iter().filter(|ticket| *ticket.word.borrow() == Word::Orphaned).count();
        assert_eq!(orphans, 2);
    }
}
