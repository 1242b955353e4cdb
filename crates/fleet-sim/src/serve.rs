//! A node's data plane: requests in, events out, offers to other nodes, and the end of what nobody reads.

use std::collections::BTreeMap;

use fleet::Origin;
use inference::{ChoiceStart, EventKind, FinishReason, RequestKey, Submission};
use rand::Rng;
use words::{Code, GatewayId, ModelState, Moment};

use crate::client::{model_id, read_prompt};
use crate::clock::{At, ms};
use crate::context::Context;
use crate::counters::Count;
use crate::model::{Command, Given};
use crate::net::{ACCEPTOR, ConnId, DIALLER, Loss, Message};
use crate::node::Node;
use crate::planted::Planted;
use crate::talk::{Ask, Said, fingerprint};

/// Events on their way to a reader beyond which its sequence pauses.
const BEHIND: usize = 24;
/// An offer that nobody took in this time makes room for others.
const STALE: std::time::Duration = ms(5_000);

/// A request that runs here.
struct Stream {
    conn: ConnId,
    request: usize,
    /// The place of its model on this node.
    model: usize,
    attempt: u32,
    gateway: GatewayId,
    origin: Origin,
    streamed: bool,
    /// Texts for a client that wants one JSON.
    folded: Vec<(String, Option<FinishReason>)>,
    flows: bool,
    offered: Option<Moment>,
    sign: Moment,
    paused: bool,
    /// Since when it is wanted no more, and how many tokens each choice has said since.
    cancelled: Option<(At, Vec<usize>)>,
    /// What choices that were stopped still held back.
    last: Vec<(u32, String)>,
}

/// A cancelled request is gone after this long, unless the step hangs that ran then.
const CANCEL_MAX: std::time::Duration = ms(2_000);

/// The requests that run on a node.
#[derive(Default)]
pub(crate) struct Streams {
    next: u64,
    streams: BTreeMap<u64, Stream>,
}

impl Streams {
    pub(crate) fn len(&self) -> usize {
        self.streams.len()
    }

    pub(crate) fn offered(&self) -> usize {
        self.streams.values().filter(|stream| stream.offered.is_some()).count()
    }
}

impl Node {
    /// Takes a request of a gateway.
    pub(crate) fn ask(&mut self, context: &mut Context, conn: ConnId, ask: Ask) {
        let numbers = [self.place as u64, ask.request as u64, u64::from(ask.attempt)];
        match self.try_ask(context, conn, ask) {
            Ok(()) => context.note("node #: takes request #, attempt #", &numbers),
            Err(code) => {
                context.note("node #: refuses request #, attempt #", &numbers);
                self.refuse(context, conn, code);
            }
        }
    }

    pub(crate) fn refuse(&mut self, context: &mut Context, conn: ConnId, code: Code) {
        context.count(Count::Refused);
        context.send(conn, ACCEPTOR, Message::Said(Said::Refused(code)));
        context.close(conn, ACCEPTOR, Loss::Clean);
    }

    fn try_ask(&mut self, context: &mut Context, conn: ConnId, ask: Ask) -> Result<(), Code> {
        if !self.admits(context, ask.canary.as_ref()) {
            return Err(Code::Draining);
        }
        let process = self.process.as_mut().ok_or(Code::UpstreamFailed)?;
        let place = process.models.iter().position(|model| model_id(model.number) == ask.order.model);
        let place = place.ok_or(Code::ModelNotHere)?;
        let model = &process.models[place];
        match model.state {
            ModelState::Ready if !model.shut => self.submit(context, conn, place, &ask),
            _ if model.on_demand => self.wait(context, conn, place, ask),
            ModelState::Fetching | ModelState::Loading | ModelState::Warming => Err(Code::ModelLoading),
            _ => Err(Code::ModelNotHere),
        }
    }

    /// Gives a request to the engine of its model, which serves.
    pub(crate) fn submit(&mut self, context: &mut Context, conn: ConnId, place: usize, ask: &Ask) -> Result<(), Code> {
        let now = self.now(context);
        let old = self.plan.old;
        let process = self.process.as_mut().ok_or(Code::UpstreamFailed)?;
        let model = &mut process.models[place];
        let prompt = read_prompt(&ask.order.prompt, model.build.reads);
        let (continue_fingerprint, exact_fingerprint) = model.prints();
        let origin = Origin { prompt_hash: fingerprint(0, &prompt), continue_fingerprint, exact_fingerprint };
        let mut choices = vec![ChoiceStart::default(); ask.order.choices];
        if let Some((theirs, accepted)) = &ask.resume {
            let same = theirs.prompt_hash == origin.prompt_hash
                && theirs.continue_fingerprint == origin.continue_fingerprint
                && accepted.len() == choices.len();
            if old || !same {
                return Err(Code::ResumeMismatch);
            }
            choices = accepted.iter().map(|ids| ChoiceStart { accepted: ids.clone() }).collect();
        }
        process.streams.next += 1;
        let key = RequestKey(process.streams.next);
        let submission = Submission {
            choices,
            stop: ask.order.stop.clone(),
            priority: ask.order.priority,
            ..Submission::new(key, prompt, ask.order.max_tokens)
        };
        let stream = Stream {
            conn,
            request: ask.request,
            model: place,
            attempt: ask.attempt,
            gateway: ask.gateway.clone(),
            origin,
            streamed: ask.order.streamed,
            folded: vec![Default::default(); ask.order.choices],
            flows: false,
            offered: None,
            sign: now,
            paused: false,
            cancelled: None,
            last: Vec::new(),
        };
        process.streams.streams.insert(key.0, stream);
        context.send(conn, ACCEPTOR, Message::Said(Said::Reached));
        let mut given = Given::default();
        model.command(context, now, Command::Submit(Box::new(submission)), &mut given);
        self.deliver(context, place, given);
        Ok(())
    }

    /// Takes the end of a model's step.
    pub(crate) fn step_over(&mut self, context: &mut Context, number: usize) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let Some(place) = process.models.iter().position(|model| model.number == number) else { return };
        let mut given = Given::default();
        process.models[place].step_over(context, now, &mut given);
        self.deliver(context, place, given);
        self.look_at_readers(context);
    }

    /// Lets a model go on, if its thread waits.
    pub(crate) fn run_model(&mut self, context: &mut Context, place: usize) {
        let now = self.now(context);
        let mut given = Given::default();
        if let Some(model) = self.process.as_mut().and_then(|process| process.models.get_mut(place)) {
            model.run(context, now, &mut given);
        }
        self.deliver(context, place, given);
    }

    /// Passes on what a model gave.
    pub(crate) fn deliver(&mut self, context: &mut Context, place: usize, given: Given) {
        let mut ended = false;
        for (key, code) in given.refused {
            ended |= self.end_stream(context, key, Said::Refused(code));
        }
        for event in given.events {
            let Some(process) = &mut self.process else { return };
            let key = event.request;
            let Some(stream) = process.streams.streams.get_mut(&key.0) else { continue };
            debug_assert_eq!(stream.model, place);
            match event.kind {
                EventKind::Started { .. } => {
                    context.send(stream.conn, ACCEPTOR, Message::Said(Said::Origin(stream.origin)));
                }
                EventKind::Resumed { choice, text, finish } => {
                    stream.folded[choice as usize] = (text, finish);
                }
                EventKind::Token { choice, index, id, text, finish, .. } => {
                    stream.flows = true;
                    if let Some((_, said)) = &mut stream.cancelled {
                        // The step that ran as it was cancelled.
                        said[choice as usize] += 1;
                        let (request, more) = (stream.request, said[choice as usize]);
                        context.check(more <= 1, "CN1", || format!("request {request} goes on after it was cancelled"));
                    }
                    if !stream.streamed {
                        let (whole, ended) = &mut stream.folded[choice as usize];
                        whole.push_str(&text);
                        *ended = finish;
                    }
                    let token = Said::Token { attempt: stream.attempt, choice, index, id, text, finish };
                    if context.stormy() && context.rng.random_bool(0.000_2) {
                        context.count(Count::Echo);
                        context.send(stream.conn, ACCEPTOR, Message::Said(token.clone()));
                    }
                    context.send(stream.conn, ACCEPTOR, Message::Said(token));
                }
                // Nobody here asks for these.
                EventKind::Scored { .. } | EventKind::Embedded { .. } => {}
                EventKind::Stopped { choice, text } => stream.last.push((choice, text)),
                EventKind::Done(_) if context.stormy() && context.rng.random_bool(0.005) => {
                    context.count(Count::LostEnd);
                    let conn = stream.conn;
                    process.streams.streams.remove(&key.0);
                    context.close(conn, ACCEPTOR, Loss::Clean);
                    ended = true;
                }
                EventKind::Done(usage) if stream.cancelled.is_some() => {
                    let (last, whole) = (std::mem::take(&mut stream.last), !stream.streamed);
                    // What has no token is no answer; one JSON is made of what there is, here as in a stream.
                    let said = match usage.completion_tokens {
                        0 => Said::Refused(Code::Cancelled),
                        _ if whole => Said::Cut(usage, Vec::new()),
                        _ => Said::Cut(usage, last),
                    };
                    ended |= self.end_stream(context, key, said);
                }
                EventKind::Done(usage) => {
                    let folded = std::mem::take(&mut stream.folded);
                    ended |= self.end_stream(context, key, Said::Done(usage, folded));
                }
                EventKind::Failed(code, _) => ended |= self.end_stream(context, key, Said::Refused(code)),
            }
        }
        if ended {
            self.drive(context);
        }
    }

    fn end_stream(&mut self, context: &mut Context, key: RequestKey, last: Said) -> bool {
        let Some(process) = &mut self.process else { return false };
        let Some(stream) = process.streams.streams.remove(&key.0) else { return false };
        context.send(stream.conn, ACCEPTOR, Message::Said(last));
        context.close(stream.conn, ACCEPTOR, Loss::Clean);
        true
    }

    /// Takes the end of a request's connection: nobody reads it any more.
    pub(crate) fn unread(&mut self, context: &mut Context, conn: ConnId) {
        let Some(process) = &mut self.process else { return };
        let of = process.streams.streams.iter().find(|(_, stream)| stream.conn == conn);
        if let Some(key) = of.map(|(key, _)| *key) {
            self.cancel(context, key);
            self.drive(context);
        } else if self.leave_waiting(|waiting| waiting.conn == conn).is_some() {
            self.drive(context);
        }
    }

    /// Ends a request with what it has, wherever it is.
    pub(crate) fn cancel_request(&mut self, context: &mut Context, request: usize, gateway: &GatewayId) {
        let of = |ask: &Ask| ask.request == request && ask.gateway == *gateway;
        if let Some(waiting) = self.leave_waiting(|waiting| of(&waiting.ask)) {
            context.count(Count::CancelledWaiting);
            self.refuse(context, waiting.conn, Code::Cancelled);
            return self.drive(context);
        }
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let mut streams = process.streams.streams.iter_mut();
        let found = streams.find(|(_, stream)| stream.request == request && stream.gateway == *gateway);
        let Some((key, stream)) = found.filter(|(_, stream)| stream.cancelled.is_none()) else { return };
        stream.cancelled = Some((context.now, vec![0; stream.folded.len()]));
        let (key, place, mut given) = (RequestKey(*key), stream.model, Given::default());
        if !context.planted(Planted::DeafToCancel) {
            process.models[place].command(context, now, Command::End(key), &mut given);
        }
        self.deliver(context, place, given);
    }

    fn cancel(&mut self, context: &mut Context, key: u64) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let Some(stream) = process.streams.streams.remove(&key) else { return };
        let mut given = Given::default();
        process.models[stream.model].command(context, now, Command::Cancel(RequestKey(key)), &mut given);
        self.deliver(context, stream.model, given);
    }

    /// Ends every request of a gateway whose session is lost.
    pub(crate) fn orphan(&mut self, context: &mut Context, gateway: &GatewayId) {
        let Some(process) = &self.process else { return };
        let attached = process.attached.values().any(|known| known == gateway);
        context.check(!attached, "LS1", || format!("{gateway} is attached, and its requests are ended"));
        let theirs = process.streams.streams.iter().filter(|(_, stream)| stream.gateway == *gateway);
        let theirs: Vec<_> = theirs.map(|(key, stream)| (*key, stream.conn)).collect();
        while let Some(waiting) = self.leave_waiting(|waiting| waiting.ask.gateway == *gateway) {
            context.count(Count::Orphaned);
            context.close(waiting.conn, ACCEPTOR, Loss::Reset);
        }
        for (key, conn) in theirs {
            context.count(Count::Orphaned);
            self.cancel(context, key);
            context.close(conn, ACCEPTOR, Loss::Reset);
        }
        self.drive(context);
    }

    /// Offers running streams to other nodes, oldest first.
    pub(crate) fn offer(&mut self, context: &mut Context, open_at_most: usize) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let rollout = process.status.rollout.clone();
        let open = |stream: &&Stream| stream.offered.is_some_and(|at| now.since(at) < STALE);
        let room = open_at_most.saturating_sub(process.streams.streams.values().filter(open).count());
        for stream in process.streams.streams.values_mut().filter(|stream| stream.offered.is_none()).take(room) {
            stream.offered = Some(now);
            context.count(Count::Offered);
            context.send(stream.conn, ACCEPTOR, Message::Said(Said::Offer(rollout.clone())));
        }
    }

    /// Takes all offers back.
    pub(crate) fn withdraw(&mut self, context: &mut Context) {
        let Some(process) = &mut self.process else { return };
        for stream in process.streams.streams.values_mut().filter(|stream| stream.offered.is_some()) {
            stream.offered = None;
            context.send(stream.conn, ACCEPTOR, Message::Said(Said::Withdrawn));
        }
    }

    /// Shows signs of life on streams that have said nothing yet.
    pub(crate) fn signs_of_life(&mut self, context: &mut Context, now: Moment) {
        self.look_at_readers(context);
        let Some(process) = &mut self.process else { return };
        let (streams, models) = (&mut process.streams.streams, &process.models);
        for stream in streams.values() {
            let Some((since, _)) = &stream.cancelled else { continue };
            let late = context.now.since(*since) > CANCEL_MAX && !models[stream.model].steps_since(*since);
            let request = stream.request;
            context.check(!late, "CN1", || format!("request {request} was cancelled, and keeps its place"));
        }
        for stream in process.streams.streams.values_mut().filter(|stream| !stream.flows) {
            if now.since(stream.sign) >= ms(1_000) {
                stream.sign = now;
                context.send(stream.conn, ACCEPTOR, Message::Said(Said::Progress));
            }
        }
        // The thread looks at its queue's deadlines by itself.
        for place in 0..process.models.len() {
            let resting = self.process.as_ref().is_some_and(|p| p.models[place].rests() && !p.models[place].is_idle());
            if resting {
                self.run_model(context, place);
            }
        }
    }

    /// Pauses sequences whose readers are behind.
    fn look_at_readers(&mut self, context: &mut Context) {
        let Some(process) = &mut self.process else { return };
        let (counted, live) = (process.streams.len(), process.models.iter().map(|model| model.live()).sum::<usize>());
        context
            .check(counted == live, "AD1", || format!("{counted} requests are counted as in flight, {live} are there"));
        for (key, stream) in &mut process.streams.streams {
            let behind = context.net.waiting(stream.conn, DIALLER) > BEHIND;
            if behind != stream.paused {
                stream.paused = behind;
                if behind {
                    context.count(Count::Paused);
                }
                process.models[stream.model].pause(RequestKey(*key), behind);
            }
        }
    }

    /// KV2, once everything has come to rest.
    pub(crate) fn check_rest(&self, context: &mut Context) {
        let place = self.place;
        match &self.process {
            Some(process) => {
                let (left, idle) = (process.streams.len(), process.models.iter().all(|model| model.is_idle()));
                let rests = left == 0 && idle;
                context.check(rests, "KV2", || format!("node {place} still runs {left} requests that nobody reads"));
            }
            None => context.breach("LV1", || format!("node {place} did not come back")),
        }
    }
}
