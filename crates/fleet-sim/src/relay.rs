//! One client request in a gateway: the shell around `fleet::Journey`, as the proxy is.

use std::collections::VecDeque;
use std::sync::Arc;

use fleet::{Journey, JourneyLimits, Origin, Patience, Slot};
use inference::FinishReason;
use words::{Code, Error, Moment};

use crate::clock::ms;
use crate::net::ConnId;
use crate::talk::{Order, Said};

/// The open attempt of a request.
pub(crate) struct Attempt {
    pub(crate) slot: Slot,
    pub(crate) conn: ConnId,
    pub(crate) patience: Patience,
    /// Its node is leaving and would have it go elsewhere.
    pub(crate) offered: bool,
    /// The node may have to load the model for it, and has not answered yet.
    pub(crate) placed: bool,
    /// The node has answered.
    pub(crate) reached: bool,
    /// How long the model is waited for.
    pub(crate) load_until: Moment,
}

/// A request.
pub(crate) struct Relay {
    pub(crate) client: usize,
    pub(crate) order: Arc<Order>,
    pub(crate) journey: Journey,
    pub(crate) attempt: Option<Attempt>,
    /// The last word of the attempt before, should nobody else be found.
    pub(crate) last: Option<Error>,
    pub(crate) origin: Option<Origin>,
    /// Texts and finishes for a request that its gateway has to complete.
    pub(crate) finishes: Vec<Option<FinishReason>>,
    /// Events that came while the client did not read; nothing for the connection's end.
    pub(crate) unread: VecDeque<Option<Said>>,
    pub(crate) waits: bool,
    /// Nobody wants it any more.
    pub(crate) cancelled: bool,
    /// Until then its node may end it.
    pub(crate) end_by: Option<Moment>,
}

/// Bounds of a request's way, as the proxy's defaults are but for shorter waits.
pub(crate) fn limits() -> JourneyLimits {
    JourneyLimits { retries_max: 3, route_wait: ms(10_000), continue_wait: ms(20_000) }
}

impl Relay {
    pub(crate) fn new(client: usize, order: Arc<Order>, now: Moment) -> Self {
        Relay {
            client,
            journey: Journey::new(order.choices, order.streamed, limits(), now),
            attempt: None,
            last: None,
            origin: None,
            finishes: vec![None; order.choices],
            unread: VecDeque::new(),
            waits: false,
            cancelled: false,
            end_by: None,
            order,
        }
    }
}

/// Says that an operator did not want it any more.
pub(crate) fn cancelled() -> Error {
    Error::new(Code::Cancelled, "the request was cancelled")
}

/// Says that a node's stream broke off.
pub(crate) fn broken() -> Error {
    Error::new(Code::UpstreamFailed, "the worker ended the answer before it was complete")
}
