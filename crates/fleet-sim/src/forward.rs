//! A gateway's data plane: clients' requests to attempts, attempts' events to clients.

use fleet::{
    Ending, Patience, PatienceFacts, PatienceLimits, Placements, Route, RouteQuery, Slot, Step, Target, Verdict,
    coming, route, worth_waiting,
};
use words::{Code, Error, Moment};

use crate::client::{Client, Ended, model_id};
use crate::clock::ms;
use crate::context::{Context, Party};
use crate::counters::Count;
use crate::gateway::{Gateway, Process};
use crate::net::{ConnId, DIALLER, Loss, Message};
use crate::node::{Node, Told};
use crate::planted::Planted;
use crate::relay::{Attempt, Relay, broken, cancelled};
use crate::talk::{Ask, Order, Said};

/// How long a node has to end a request that was cancelled.
const CANCEL_MAX: std::time::Duration = ms(5_000);
/// How late its gateway may be to end it, unless that slept.
const CANCEL_LATE: std::time::Duration = ms(1_000);
/// How much longer than a node a gateway waits for a load.
const LOAD_WAIT_MORE: std::time::Duration = ms(10_000);

/// Most events of one request that one input may cause, so that no loop is endless.
const STEPS_MAX: usize = 200;

impl Gateway {
    /// Takes a client's request.
    pub(crate) fn take(&mut self, context: &mut Context, clients: &mut [Client], nodes: &[Node], client: usize) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return clients[client].end(context, Ended::Broken) };
        process.budget.deposit();
        if self.old {
            context.count(Count::OldGateway);
        }
        let relay = Relay::new(client, clients[client].order.clone(), now);
        process.relays.insert(client, relay);
        self.find(context, clients, nodes, client);
    }

    /// Takes the client's leaving.
    pub(crate) fn left(&mut self, context: &mut Context, client: usize) {
        let Some(process) = &mut self.process else { return };
        if let Some(relay) = process.relays.remove(&client)
            && let Some(attempt) = relay.attempt
        {
            process.answered(&relay.order, &attempt);
            process.attempts.remove(&attempt.conn);
            context.close(attempt.conn, DIALLER, Loss::Clean);
        }
    }

    /// Takes an operator's word that nobody wants a request any more. Its node may end it, and has its time for that.
    pub(crate) fn cancel(&mut self, context: &mut Context, clients: &mut [Client], nodes: &[Node], client: usize) {
        let (now, me) = (self.now(context), self.party());
        let Some(process) = &mut self.process else { return };
        let Some(relay) = process.relays.get_mut(&client) else { return };
        if std::mem::replace(&mut relay.cancelled, true) {
            return;
        }
        context.count(Count::Cancelled);
        context.note("gateway #: request # is cancelled", &[self.place as u64, client as u64]);
        (clients[client].cancelled, relay.end_by) = (true, Some(now + CANCEL_MAX));
        match relay.attempt.as_ref().map(|attempt| attempt.slot) {
            Some(slot) => {
                let conn = context.dial(me, Party::Node(slot.0));
                context.send(conn, DIALLER, Message::Cancel(client, process.id.clone()));
            }
            None => self.ended(context, clients, nodes, client, Ending::Failed(cancelled())),
        }
    }

    /// Lets the requests that wait for a better view look again.
    pub(crate) fn view_changed(&mut self, context: &mut Context, clients: &mut [Client], nodes: &[Node]) {
        let Some(process) = &mut self.process else { return };
        let waiting = |relay: &Relay| relay.waits || relay.attempt.as_ref().is_some_and(|attempt| attempt.offered);
        let of = process.relays.values().filter(|relay| waiting(relay));
        for client in of.map(|relay| relay.client).collect::<Vec<_>>() {
            let Some(relay) = self.process.as_mut().and_then(|p| p.relays.get_mut(&client)) else { continue };
            if relay.waits {
                // The view is newer than the refusals, so they no longer bind.
                relay.journey.forget_tried();
                self.find(context, clients, nodes, client);
            } else {
                self.hand_over(context, clients, nodes, client);
            }
        }
    }

    /// Looks at the timers of all requests.
    pub(crate) fn look(&mut self, context: &mut Context, clients: &mut [Client], nodes: &[Node]) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let slept = now.since(std::mem::replace(&mut process.looked, now)) > CANCEL_LATE / 2;
        for client in process.relays.keys().copied().collect::<Vec<_>>() {
            let Some(process) = &mut self.process else { return };
            let Some(relay) = process.relays.get_mut(&client) else { continue };
            if let Some(end) = relay.end_by {
                let late = !slept && now >= end + CANCEL_LATE;
                context.check(!late, "CN1", || format!("request {client} was cancelled, and its client waits on"));
            }
            let keeps = context.planted(Planted::KeepCancelled);
            if relay.end_by.is_some_and(|end| now >= end) && relay.attempt.is_some() && !keeps {
                self.ended(context, clients, nodes, client, Ending::Failed(cancelled()));
                continue;
            }
            if relay.waits && now >= relay.journey.wait_until() {
                self.find(context, clients, nodes, client);
                continue;
            }
            // Nobody looks while nobody reads.
            let Some(attempt) = relay.attempt.as_mut().filter(|_| clients[client].reading) else { continue };
            let node = process.view.node(attempt.slot);
            let status = node.and_then(|node| node.status.as_ref());
            let p99 = status.and_then(|status| status.model(&relay.order.model));
            let facts = PatienceFacts {
                control_heard: node.map_or(Moment::ZERO, |node| node.heard_at),
                inter_token_p99: p99.map_or(ms(0), |model| ms(u64::from(model.inter_token_p99_ms))),
                begun: relay.journey.accepted() > 0,
                coming: !attempt.reached && status.is_some_and(|status| coming(status, &relay.order.model)),
            };
            let limits = PatienceLimits { first_event: ms(25_000), stall: ms(5_000), load_until: attempt.load_until };
            let (count, text) = match attempt.patience.look(now, &limits, &facts) {
                Verdict::WaitUntil(_) => continue,
                Verdict::Stalled => (Count::Stalled, "the worker stood still"),
                Verdict::StillLoading => (Count::Stalled, "the model is still on its way"),
                Verdict::Unreachable => (Count::Unreachable, "the worker is out of reach"),
            };
            context.count(count);
            let numbers = [self.place as u64, client as u64, attempt.slot.0 as u64];
            context.note("gateway #: gives request # on node # up", &numbers);
            let error = Error::new(Code::UpstreamTimeout, text);
            self.ended(context, clients, nodes, client, Ending::Failed(error));
        }
    }

    /// Takes a message on an attempt's connection; nothing for its end.
    pub(crate) fn answer(
        &mut self,
        context: &mut Context,
        clients: &mut [Client],
        nodes: &[Node],
        conn: ConnId,
        said: Option<Said>,
    ) {
        let Some(process) = &mut self.process else { return };
        let Some(&client) = process.attempts.get(&conn) else { return };
        let Some(relay) = process.relays.get_mut(&client) else { return };
        if clients[client].reading && relay.unread.is_empty() {
            return self.read(context, clients, nodes, client, said);
        }
        relay.unread.push_back(said);
        context.net.set_untaken(conn, DIALLER, relay.unread.len());
    }

    /// Goes on with what came while the client did not read.
    pub(crate) fn read_on(&mut self, context: &mut Context, clients: &mut [Client], nodes: &[Node], client: usize) {
        for _ in 0..STEPS_MAX {
            let Some(process) = &mut self.process else { return };
            let Some(relay) = process.relays.get_mut(&client) else { return };
            let Some(said) = relay.unread.pop_front() else { return };
            if let Some(attempt) = &relay.attempt {
                context.net.set_untaken(attempt.conn, DIALLER, relay.unread.len());
            }
            self.read(context, clients, nodes, client, said);
        }
        context.breach("ST1", || "a client's backlog has no end".into());
    }

    fn read(
        &mut self,
        context: &mut Context,
        clients: &mut [Client],
        nodes: &[Node],
        client: usize,
        said: Option<Said>,
    ) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let Some(relay) = process.relays.get_mut(&client) else { return };
        let Some(attempt) = &mut relay.attempt else { return };
        let fail = |error: Error| Ending::Failed(error);
        let Some(said) = said else {
            return self.ended(context, clients, nodes, client, fail(broken()));
        };
        attempt.patience.heard(now);
        match said {
            Said::Reached => {
                relay.journey.reached();
                attempt.reached = true;
                if std::mem::take(&mut attempt.placed) {
                    process.placements.leave(&relay.order.model, attempt.slot);
                }
            }
            Said::Progress => relay.journey.queued(),
            Said::Origin(origin) => match relay.journey.began(origin) {
                Ok(()) => _ = relay.origin.get_or_insert(origin),
                Err(error) => self.ended(context, clients, nodes, client, fail(error)),
            },
            Said::Token { attempt: number, choice, index, id, text, finish } => {
                let accepted = relay.journey.accept(number, choice, index, &[id], finish.is_some());
                match accepted {
                    accepted if accepted.is_ok() || context.planted(Planted::DropFence) => {
                        relay.finishes[choice as usize] = finish;
                        if relay.order.streamed {
                            clients[client].event(context, choice, &text, finish);
                        }
                    }
                    _ => {
                        context.count(Count::FenceRefused);
                        let error = Error::new(Code::UpstreamFailed, "tokens out of turn");
                        self.ended(context, clients, nodes, client, fail(error));
                    }
                }
            }
            Said::Done(usage, answers) => {
                clients[client].done(context, usage.completion_tokens, &answers);
                self.left(context, client);
            }
            Said::Cut(usage, last) => {
                clients[client].cut(context, usage.completion_tokens, &last);
                self.left(context, client);
            }
            Said::Refused(code) => {
                let error = Error::new(code, "the worker will not go on");
                self.ended(context, clients, nodes, client, fail(error));
            }
            Said::Offer(rollout) => {
                if !self.old && !relay.cancelled {
                    attempt.offered = true;
                    relay.journey.driven_by(rollout);
                    self.hand_over(context, clients, nodes, client);
                }
            }
            Said::Withdrawn => attempt.offered = false,
        }
    }

    /// Takes a leaving node's offer, if somebody else can go on.
    fn hand_over(&mut self, context: &mut Context, clients: &mut [Client], nodes: &[Node], client: usize) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let Process { relays, view, sent, rng, .. } = process;
        let Some(relay) = relays.get_mut(&client) else { return };
        let Some(attempt) = &relay.attempt else { return };
        let (successor, here) = (relay.journey.successor(), [attempt.slot]);
        let query = RouteQuery {
            model: &relay.order.model,
            tried: &here,
            wait_until: now,
            successor: successor.as_ref(),
            placements: &Placements::default(),
        };
        // A stream that runs is not moved to where it would have to wait for a load.
        let found = route(view, &query, |slot| sent[slot.0], now, rng);
        if matches!(found, Route::Forward(target) if target.room.is_none()) {
            context.count(Count::HandedOver);
            self.ended(context, clients, nodes, client, Ending::HandedOver);
        }
    }

    /// Lets the journey decide what follows an attempt.
    fn ended(&mut self, context: &mut Context, clients: &mut [Client], nodes: &[Node], client: usize, ending: Ending) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let Some(relay) = process.relays.get_mut(&client) else { return };
        let taken = relay.attempt.take();
        // Whatever ended the attempt: nobody wants another one.
        let ending = if relay.cancelled { Ending::Failed(cancelled()) } else { ending };
        if let Some(attempt) = taken {
            if attempt.placed {
                process.placements.leave(&relay.order.model, attempt.slot);
            }
            process.attempts.remove(&attempt.conn);
            context.close(attempt.conn, DIALLER, Loss::Clean);
            // What it still says goes nowhere.
            relay.unread.clear();
        }
        let last = match &ending {
            Ending::Failed(error) | Ending::NobodyFound(error) => Error::new(error.code(), error.message()),
            Ending::HandedOver => Error::new(Code::Draining, "the worker is leaving"),
        };
        let number = last.code().row().http;
        let begun = relay.journey.begun();
        let mut step = relay.journey.ended(now, ending, &mut process.budget);
        if self.old && begun && matches!(step, Step::Again) {
            // The version before continues nothing.
            step = Step::Fail(Error::new(last.code(), last.message()));
        }
        context.note(
            "gateway #: an attempt at request # ends with status #",
            &[self.place as u64, client as u64, u64::from(number)],
        );
        match step {
            Step::Again => {
                context.count(if begun { Count::Continuation } else { Count::Retry });
                relay.last = Some(last);
                self.find(context, clients, nodes, client);
            }
            Step::Complete => {
                context.count(Count::CompletedLocally);
                let tokens = relay.journey.accepted();
                let finished = relay.journey.choices().iter().all(|choice| choice.finished);
                if finished || !relay.cancelled {
                    clients[client].done(context, tokens, &[]);
                } else {
                    clients[client].cut(context, tokens, &[]);
                }
                self.left(context, client);
            }
            Step::Fail(error) => self.fail(context, clients, client, &error),
        }
    }

    fn fail(&mut self, context: &mut Context, clients: &mut [Client], client: usize, error: &Error) {
        let known = error.code() != Code::ModelNotFound;
        context.check(known, "ER1", || format!("request {client} was told that its model does not exist"));
        clients[client].end(context, Ended::Failed(error.code()));
        self.left(context, client);
    }

    /// Looks for a node for a request that has none.
    fn find(&mut self, context: &mut Context, clients: &mut [Client], nodes: &[Node], client: usize) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let Process { relays, view, sent, rng, placements, .. } = process;
        let Some(relay) = relays.get_mut(&client) else { return };
        let successor = relay.journey.successor();
        let query = RouteQuery {
            model: &relay.order.model,
            tried: relay.journey.tried(),
            wait_until: relay.journey.wait_until(),
            successor: successor.as_ref(),
            placements,
        };
        match route(view, &query, |slot| sent[slot.0], now, rng) {
            Route::Forward(target) => {
                relay.waits = false;
                self.open(context, clients, nodes, client, &target);
            }
            Route::Reject(error) => {
                relay.waits = false;
                let error = relay.last.take().unwrap_or(error);
                self.ended(context, clients, nodes, client, Ending::NobodyFound(error));
            }
            Route::Wait(_) => {
                let hopeless = |error: &mut Error| successor.is_none() && !worth_waiting(error.code());
                match relay.last.take_if(hopeless) {
                    Some(error) => self.ended(context, clients, nodes, client, Ending::NobodyFound(error)),
                    None => {
                        if !std::mem::replace(&mut relay.waits, true) {
                            context.count(Count::RouteWait);
                        }
                    }
                }
            }
        }
    }

    fn open(&mut self, context: &mut Context, clients: &[Client], nodes: &[Node], client: usize, target: &Target) {
        self.check_route(context, clients, nodes, client, target.slot);
        let now = self.now(context);
        let me = self.party();
        let Some(process) = &mut self.process else { return };
        let Some(relay) = process.relays.get_mut(&client) else { return };
        process.sent[target.slot.0] += 1;
        let number = relay.journey.open(target.slot);
        context.count(Count::Attempt);
        if nodes[target.slot.0].plan.old {
            context.count(Count::OldNode);
        }
        let numbers = [self.place as u64, client as u64, u64::from(number), target.slot.0 as u64];
        context.note("gateway #: request #, attempt # goes to node #", &numbers);
        let resume = relay.origin.filter(|_| relay.journey.begun()).map(|origin| {
            let left_out = usize::from(context.planted(Planted::WrongIndex));
            let ids =
                relay.journey.choices().iter().map(|choice| &choice.ids[..choice.ids.len().saturating_sub(left_out)]);
            (origin, ids.map(<[u32]>::to_vec).collect())
        });
        let conn = context.dial(me, Party::Node(target.slot.0));
        let ask = Ask {
            request: client,
            attempt: number,
            gateway: process.id.clone(),
            order: relay.order.clone(),
            resume,
            canary: None,
        };
        let patience = Patience::new(now);
        let placed = target.on_demand;
        if placed {
            process.placements.enter(&relay.order.model, target.slot);
        }
        if target.room.is_some() {
            context.count(Count::Placed);
        }
        let load_until = now + context.plan.load_wait + LOAD_WAIT_MORE;
        let (slot, offered, reached) = (target.slot, false, false);
        relay.attempt = Some(Attempt { slot, conn, patience, offered, placed, reached, load_until });
        process.attempts.insert(conn, client);
        context.send(conn, DIALLER, Message::Ask(Box::new(ask)));
    }

    /// RT1, judged by what the node itself said last to this gateway.
    fn check_route(&self, context: &mut Context, clients: &[Client], nodes: &[Node], client: usize, slot: Slot) {
        let Some(process) = &self.process else { return };
        let (incarnation, generation) = process.newest[slot.0];
        let told = nodes[slot.0].told.get(&(incarnation.counter, generation));
        let wanted = &clients[client].order.model;
        let ready = |told: &Told| told.ready.iter().chain(&told.listed).any(|number| model_id(*number) == *wanted);
        let open = told.is_some_and(|told| told.open && ready(told));
        let name = self.place;
        context.check(open, "RT1", || {
            format!("gateway {name} sends request {client} to node {}, which said that it does not take it", slot.0)
        });
    }
}

impl Process {
    /// Counts a request out of those that may wait for a load.
    fn answered(&mut self, order: &Order, attempt: &Attempt) {
        if attempt.placed {
            self.placements.leave(&order.model, attempt.slot);
        }
    }
}
