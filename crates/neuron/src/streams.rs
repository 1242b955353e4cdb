//! Who is being answered: every request, so that it can be cancelled by its name, and one of a gateway be offered to
//! another worker, or end when its gateway is gone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use words::{Code, Error, GatewayId, ModelId, Moment};

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
    /// It ends with what it has.
    Cancelled(Reason),
}

/// How a cancelled request was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Alone, by its id.
    Id,
    /// With all of its model.
    Model,
    /// With all of its gateway.
    Gateway,
}

impl Reason {
    /// Returns its name in metrics and for hooks.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Reason::Id => "id",
            Reason::Model => "model",
            Reason::Gateway => "gateway",
        }
    }
}

/// Which requests are meant.
#[derive(Clone, Debug)]
pub(crate) enum Which {
    /// Those of this `x-request-id`, or the one of this completion.
    Id(String),
    /// Those of a model.
    Model(ModelId),
    /// Those that came through a gateway.
    Gateway(GatewayId),
}

impl Which {
    fn reason(&self) -> Reason {
        match self {
            Which::Id(_) => Reason::Id,
            Which::Model(_) => Reason::Model,
            Which::Gateway(_) => Reason::Gateway,
        }
    }

    fn means(&self, asked: &Asked) -> bool {
        match self {
            Which::Id(id) => asked.request_id == *id || asked.completion_id == *id,
            Which::Model(model) => asked.model == *model,
            Which::Gateway(gateway) => asked.gateway.as_ref() == Some(gateway),
        }
    }
}

/// Who asks, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    /// `None` for a client of this worker itself.
    pub(crate) gateway: Option<GatewayId>,
    pub(crate) model: ModelId,
    /// `x-request-id`, which clients may use twice.
    pub(crate) request_id: String,
    /// Of the completion; of all attempts of one request the same.
    pub(crate) completion_id: String,
}

/// Says that a request was cancelled before it had anything to give.
pub(crate) fn cancelled() -> Error {
    Error::new(Code::Cancelled, "the request was cancelled by an operator before it had a token")
}

#[derive(Debug)]
struct Stream {
    asked: Asked,
    offered_at: Moment,
    word: watch::Sender<Word>,
    /// Here and not with the answer: a connection that takes no more bytes never polls its answer again. `None` until it
    /// is with its engine.
    cancel: Option<CancelGuard>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    streams: BTreeMap<u64, Stream>,
}

/// The table of running requests; cheap to clone. Each holds its place at the gate, which bounds it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams {
    table: Arc<Mutex<Table>>,
}

/// A request's place in the table; dropping it takes the request out, and cancels what it has with its engine.
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

    /// Waits until somebody cancels the request. Safe to cancel.
    pub(crate) async fn cancelled(&mut self) -> Reason {
        loop {
            if let Word::Cancelled(reason) = self.told().await {
                return reason;
            }
        }
    }

    /// Takes what cancels the request, now that it is with its engine.
    ///
    /// # Errors
    /// Why it is not wanted any more; its engine then forgets it.
    pub(crate) fn arm(&self, cancel: CancelGuard) -> Result<(), Reason> {
        let mut table = self.streams.table();
        let said = *self.word.borrow();
        match (said, table.streams.get_mut(&self.number)) {
            (Word::Cancelled(reason), _) => Err(reason),
            (_, Some(stream)) => {
                stream.cancel = Some(cancel);
                Ok(())
            }
            (_, None) => Ok(()),
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

    /// Enters a request, before anything is made of it.
    pub(crate) fn enter(&self, asked: Asked) -> Ticket {
        let (sender, word) = watch::channel(Word::GoOn);
        let mut table = self.table();
        table.next += 1;
        let number = table.next;
        let stream = Stream { asked, offered_at: Moment::ZERO, word: sender, cancel: None };
        table.streams.insert(number, stream);
        Ticket { number, streams: self.clone(), word }
    }

    /// Has requests end with what they have; returns those that did not know yet. Their engines know it with this call,
    /// whether anybody reads their answers or not.
    pub(crate) fn cancel(&self, which: &Which) -> Vec<Asked> {
        let table = self.table();
        let running = |word: &Word| matches!(word, Word::GoOn | Word::Offered);
        let meant =
            table.streams.values().filter(|stream| which.means(&stream.asked) && running(&stream.word.borrow()));
        let ended = meant.map(|stream| {
            if let Some(guard) = &stream.cancel {
                guard.end();
            }
            stream.word.send_replace(Word::Cancelled(which.reason()));
            stream.asked.clone()
        });
        ended.collect()
    }

    /// Offers further requests to other workers, oldest first, those of one model or of all, until `most` offers are
    /// open or all are offered. An offer that nobody took for [`OFFER_STALE`] does not count as open any more, but it
    /// stays: its request runs on. Returns how many were newly offered.
    pub(crate) fn offer(&self, now: Moment, most: usize, of: Option<&ModelId>) -> usize {
        let mut table = self.table();
        // Only a gateway can take an offer.
        let meant = |stream: &&mut Stream| {
            stream.asked.gateway.is_some() && of.is_none_or(|model| stream.asked.model == *model)
        };
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
            stream.word.send_if_modified(|word| {
                let offered = *word == Word::Offered;
                if offered {
                    *word = Word::GoOn;
                }
                offered
            });
        }
    }

    /// Ends every request of a gateway whose session is lost; returns how many.
    pub(crate) fn orphan(&self, gateway: &GatewayId) -> usize {
        let mut table = self.table();
        let theirs = table.streams.values_mut().filter(|stream| stream.asked.gateway.as_ref() == Some(gateway));
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

    fn gateway(name: &str) -> GatewayId {
        GatewayId::new(name).unwrap()
    }

    fn model(name: &str) -> ModelId {
        ModelId::new(name).unwrap()
    }

    fn enter(streams: &Streams, from: Option<&str>, of: &str, id: &str) -> Ticket {
        let (gateway, model) = (from.map(gateway), model(of));
        streams.enter(Asked { gateway, model, request_id: id.into(), completion_id: format!("chatcmpl-{id}") })
    }

    fn said(ticket: &Ticket) -> Word {
        *ticket.word.borrow()
    }

    #[test]
    fn offers_are_made_oldest_first_within_their_number_and_orphans_are_their_gateways_alone() {
        let streams = Streams::default();
        let _direct = enter(&streams, None, "m", "direct");
        let of = |i: usize| if i < 3 { ("a", "m") } else { ("b", "other") };
        let at = |seconds| Moment::after_start(Duration::from_secs(seconds));
        let mut tickets: Vec<Ticket> = (0..7).map(|i| enter(&streams, Some(of(i).0), of(i).1, "x")).collect();
        assert_eq!((streams.offer(at(9), 4, None), streams.offer(at(9), 4, None), streams.offered()), (4, 0, 4));
        assert_eq!(said(&tickets[0]), Word::Offered);
        tickets.remove(0);
        assert_eq!(streams.offer(at(9), 4, None), 1, "a taken offer makes room");
        assert_eq!(streams.offer(at(14), 1, Some(&model("m"))), 0, "of this model all are offered");
        assert_eq!(streams.offer(at(14), 4, None), 2, "offers that nobody takes make room too");
        streams.withdraw();
        assert_eq!(streams.offered(), 0);
        assert_eq!(streams.offer(at(15), 4, Some(&model("m"))), 2);
        assert_eq!(streams.orphan(&gateway("a")), 2);
        assert_eq!(tickets.iter().filter(|ticket| said(ticket) == Word::Orphaned).count(), 2);
    }

    #[test]
    fn a_request_is_cancelled_once_by_either_of_its_ids_its_model_or_its_gateway() {
        let streams = Streams::default();
        let [a, b, c, d] = ["a", "b", "c", "d"].map(|id| {
            let from = if id == "d" { Some("g") } else { None };
            enter(&streams, from, if id == "c" { "other" } else { "m" }, id)
        });
        let cancel = |which| streams.cancel(&which).into_iter().map(|asked| asked.request_id).collect::<Vec<_>>();
        assert_eq!(cancel(Which::Id("nobody".into())), [""; 0]);
        assert_eq!(cancel(Which::Id("a".into())), ["a"]);
        assert_eq!(cancel(Which::Id("chatcmpl-b".into())), ["b"]);
        assert_eq!(cancel(Which::Gateway(gateway("g"))), ["d"]);
        assert_eq!(cancel(Which::Model(model("m"))), [""; 0], "they know already");
        assert_eq!(
            (said(&b), said(&c), said(&d)),
            (Word::Cancelled(Reason::Id), Word::GoOn, { Word::Cancelled(Reason::Gateway) })
        );
        assert_eq!(streams.offer(Moment::ZERO, 9, None), 0, "what ends is not offered");
        streams.withdraw();
        assert_eq!(said(&a), Word::Cancelled(Reason::Id), "what was withdrawn were offers");
    }
}
