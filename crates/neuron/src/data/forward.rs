//! Requests for a model of an external engine: its events are passed on as they come, between the same gate and the same
//! account as everybody's.
//!
//! One task a request asks the engine, so that whoever ends the request ends its connection, also while nobody reads.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::response::Response;
use http_body_util::BodyExt;
use serde_json::Value;
use service::gate::Admission;
use service::traces::Span;
use tokio::sync::{mpsc, watch};
use wire::foreign::{self, Told};
use wire::private::{Line, RESUME_FIELD};
use wire::{
    DONE_EVENT, Encoder, Endpoint, EventSplitter, Identity, KEEP_ALIVE_EVENT, Peek, Usage, data_event, error_event,
    with_private,
};
use words::{Code, Error};

use super::DataPlane;
use super::account::Account;
use super::admission::{self, Entered, Private};
use super::outgoing::{Making, Outgoing};
use crate::models::InUse;
use crate::process::{Incoming, Seat, Upstream, Watched, whole};
use crate::streams::{Reason, Ticket, cancelled};

/// Most bytes of one event.
const EVENT_BYTES_MAX: usize = 8 << 20;

/// What the task of a request says.
enum Said {
    /// It waits behind others.
    Waits,
    /// It has its turn.
    Runs,
    /// A whole event.
    Event(Bytes),
    /// A whole answer.
    Whole(Bytes),
    /// It is over, and not well.
    Failed(Error),
}

/// What is asked of the engine.
struct Question {
    seat: Seat,
    upstream: Arc<Upstream>,
    endpoint: Endpoint,
    body: Bytes,
    headers: HeaderMap,
    stream: bool,
    longest: Duration,
}

impl Question {
    /// Asks to the end, unless the request is over before, nobody listens any more, or its time has passed.
    async fn run(mut self, out: mpsc::Sender<Said>) {
        if self.seat.waits() {
            let _ = out.send(Said::Waits).await;
        }
        let begun = tokio::time::Instant::now();
        let turn = tokio::select! {
            turn = self.seat.turn() => turn,
            () = out.closed() => return,
        };
        if let Err(error) = turn {
            return drop(out.send(Said::Failed(error)).await);
        }
        let _ = out.send(Said::Runs).await;
        let Question { mut seat, upstream, endpoint, body, headers, stream, longest } = self;
        let ended = tokio::select! {
            biased;
            error = seat.over() => Err(error),
            () = out.closed() => return,
            () = tokio::time::sleep_until(begun + longest) => {
                Err(Error::new(Code::DeadlinePassed, "the request took longer than this worker allows"))
            }
            ended = ask(&upstream, endpoint, body, headers, stream, &out) => ended,
        };
        // Its place is free before its end is told.
        drop(seat);
        if let Err(error) = ended {
            let _ = out.send(Said::Failed(error)).await;
        }
    }
}

async fn ask(
    upstream: &Upstream,
    endpoint: Endpoint,
    body: Bytes,
    headers: HeaderMap,
    stream: bool,
    out: &mpsc::Sender<Said>,
) -> Result<(), Error> {
    let answer = upstream.post(endpoint, body, headers).await?;
    if !stream {
        let whole = whole(answer).await?;
        let _ = out.send(Said::Whole(whole)).await;
        return Ok(());
    }
    pass_on(answer, out).await
}

/// Passes whole events on, the end event included.
async fn pass_on(mut answer: Incoming, out: &mpsc::Sender<Said>) -> Result<(), Error> {
    let failed = |message: &'static str| Error::new(Code::UpstreamFailed, message);
    let mut splitter = EventSplitter::new(EVENT_BYTES_MAX);
    loop {
        let nonsense = |error| failed("the model's engine spoke nonsense").because(error);
        while let Some(event) = splitter.next_event().map_err(nonsense)? {
            if out.send(Said::Event(event)).await.is_err() {
                return Ok(());
            }
        }
        match answer.frame().await {
            Some(Ok(frame)) => {
                if let Ok(chunk) = frame.into_data() {
                    splitter.push(chunk);
                }
            }
            Some(Err(error)) => return Err(failed("the model's engine broke off its answer").because(error)),
            None => return Err(failed("the model's engine ended its answer before it was complete")),
        }
    }
}

/// Gives a request its place in the model of an external engine, where it names one.
///
/// # Errors
/// As [`admission::attach`].
pub(super) async fn attach(
    plane: &DataPlane,
    private: &Private,
    entered: &Entered,
) -> Result<Option<(InUse, Ticket)>, Error> {
    let Some(name) = plane.models.external(&entered.bytes)? else { return Ok(None) };
    let (model, ticket) = admission::attach(plane, private, &name, entered.arrived).await?;
    // Somebody may have loaded it with another harness.
    let external = model.upstream().is_some();
    Ok(external.then_some((model, ticket)))
}

/// Answers a request for a model of an external engine.
///
/// # Errors
/// Whatever ends it before its answer begins.
pub(super) async fn answer(
    plane: &Arc<DataPlane>,
    private: Private,
    entered: Entered,
    (model, ticket): (InUse, Ticket),
    endpoint: Endpoint,
    span: &mut Span,
) -> Result<Response, Error> {
    let Entered { admission, arrived, bytes } = entered;
    let elsewhere = || Error::internal("a model of this process was to be asked elsewhere");
    let upstream = model.upstream().cloned().ok_or_else(elsewhere)?;
    upstream.plan.answers(endpoint)?;
    let asked = Peek::parse(&bytes)?;
    if asked.resume.is_some() {
        let message = "nobody can go on with an answer of this model's engine";
        return Err(Error::new(Code::ResumeMismatch, message).at(RESUME_FIELD));
    }
    let stream = endpoint.generates() && asked.stream.unwrap_or(false);
    let (choices, asked_usage) = (asked.choices(endpoint).unwrap_or(1), asked.include_usage());
    let body = upstream.body(bytes)?;
    let key = model.request_key();
    let seat = upstream.queue.enter(key)?;
    let guard = model.engine.guard(vec![key]);
    admission::describe(span, endpoint, &model.id, &private);
    let mut headers = HeaderMap::new();
    span.write(&mut headers);
    let question = Question {
        seat,
        upstream: upstream.clone(),
        endpoint,
        body,
        headers,
        stream,
        longest: Duration::from_secs(plane.options.scheduler.max_request_s),
    };
    let inside = private.attempt.is_some() && private.gateway.is_some();
    let armed = ticket.arm(guard);
    let identity = Identity { id: private.id.clone(), created: private.created, model: model.id.to_string() };
    let ids = (private.request_id, private.id);
    let mut account = Account::new(plane.clone(), model, ids, arrived, stream, std::mem::take(span));
    if let Err(reason) = armed {
        (account.cancelled, account.outcome) = (Some(reason), Some(Code::Cancelled.row().code));
        return Err(cancelled());
    }
    let (out, said) = mpsc::channel(plane.options.data.event_queue);
    tokio::spawn(question.run(out));
    let watched = upstream.watched.clone();
    let forward = Forward {
        said,
        inside,
        ending: stream.then_some(Ending { endpoint, identity, asked_usage, choices }),
        watched,
        spoke: false,
        begun: false,
        over: false,
        usage: Usage::default(),
        account,
        _admission: admission,
    };
    Outgoing::new(ticket, forward).respond(inside, stream, plane.options.data.commit_after()).await
}

/// What is said for an engine whose stream was cancelled.
struct Ending {
    endpoint: Endpoint,
    identity: Identity,
    asked_usage: bool,
    choices: u32,
}

impl Ending {
    /// Takes the names that the engine gives its answer.
    fn named_as(&mut self, event: &[u8]) {
        let data = event.strip_prefix(b"data:").unwrap_or_default();
        let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
        if let (Some(id), Some(created)) = (value["id"].as_str(), value["created"].as_u64()) {
            (self.identity.id, self.identity.created) = (id.to_string(), created);
        }
    }

    /// Makes the last events of the stream.
    fn events(self, usage: Usage) -> Vec<Bytes> {
        let encoder = Encoder::of(self.endpoint, self.identity, self.asked_usage);
        let ends = (0..self.choices).map(|choice| encoder.cancelled(choice));
        ends.chain(encoder.usage(usage)).chain([Bytes::from_static(DONE_EVENT)]).collect()
    }
}

/// The answer. Dropping it ends the request.
struct Forward {
    said: mpsc::Receiver<Said>,
    /// Its client is a gateway.
    inside: bool,
    /// What ends a stream that was cancelled.
    ending: Option<Ending>,
    watched: watch::Receiver<Watched>,
    /// Something was said since the ticker's last turn.
    spoke: bool,
    /// The client has something of the answer.
    begun: bool,
    over: bool,
    usage: Usage,
    account: Account,
    _admission: Admission,
}

impl Forward {
    fn event(&mut self, event: Bytes) -> Result<Bytes, Error> {
        let told = foreign::event(&event);
        if let Some(failure) = told.failure {
            let message = format!("the model's engine failed in the middle of its answer: {failure}");
            return Err(self.ended(Error::new(Code::UpstreamFailed, message)));
        }
        if let (false, Some(ending)) = (self.begun, &mut self.ending) {
            ending.named_as(&event);
        }
        (self.spoke, self.begun) = (true, true);
        self.account.outcome = told.finish.or(self.account.outcome);
        if told.text {
            self.account.token();
            self.account.model.metrics.generation_tokens.inc();
        }
        self.usage = told.usage.unwrap_or(self.usage);
        if told.done {
            return Ok(self.done(&[Bytes::from_static(DONE_EVENT)]));
        }
        let line = self.inside.then(|| Line::Words(u32::from(told.text)));
        Ok(with_private(line.as_slice(), &[event]))
    }

    fn whole(&mut self, json: &Bytes) -> Bytes {
        let Told { usage, finish, .. } = foreign::answer(json);
        self.usage = usage.unwrap_or_default();
        self.account.outcome = finish;
        let public = match self.inside {
            false => json.clone(),
            // One line of data: JSON has no line feeds but between its tokens.
            true => data_event(&String::from_utf8_lossy(json).replace(['\r', '\n'], " ")),
        };
        self.done(&[public])
    }

    /// Ends an answer that was cancelled: with what there is, where that is something.
    fn cut(&mut self) -> Result<Bytes, Error> {
        self.account.cancelled.get_or_insert(Reason::Id);
        let Some(ending) = self.ending.take().filter(|_| self.begun) else {
            return Err(self.ended(cancelled()));
        };
        self.account.outcome = Some(Code::Cancelled.row().code);
        self.usage.completion = self.account.tokens;
        let last = ending.events(self.usage);
        Ok(self.done(&last))
    }

    /// Ends the answer; what its engine counted of tokens goes before what was counted by events.
    fn done(&mut self, last: &[Bytes]) -> Bytes {
        self.over = true;
        self.account.outcome.get_or_insert("stop");
        let (metrics, counted) = (&self.account.model.metrics, self.account.tokens);
        metrics.prompt_tokens.inc_by(u64::from(self.usage.prompt));
        metrics.generation_tokens.inc_by(u64::from(self.usage.completion.saturating_sub(counted)));
        if self.usage.completion > 0 {
            self.account.tokens = self.usage.completion;
        } else {
            self.usage.completion = counted;
        }
        let line = self.inside.then_some(Line::Usage(self.usage));
        with_private(line.as_slice(), last)
    }
}

impl Making for Forward {
    type News = Said;

    async fn news(&mut self) -> Option<Said> {
        self.said.recv().await
    }

    /// Turns what the task says into bytes, if it makes any.
    fn take(&mut self, said: Option<Said>) -> Result<Option<Bytes>, Error> {
        match said {
            // So that its gateway knows at once: should the engine die, it was not this request's doing.
            Some(Said::Waits) => Ok(self.inside.then(|| self.account.progress())),
            Some(Said::Runs) => {
                self.account.begun.get_or_insert(self.account.plane.clock.now());
                Ok(None)
            }
            Some(Said::Event(event)) => self.event(event).map(Some),
            Some(Said::Whole(json)) => Ok(Some(self.whole(&json))),
            Some(Said::Failed(error)) if error.code() == Code::Cancelled => self.cut().map(Some),
            Some(Said::Failed(error)) => Err(self.ended(error)),
            None => Err(self.ended(Error::new(Code::UpstreamFailed, "the request to the model's engine was lost"))),
        }
    }

    fn over(&self) -> bool {
        self.over
    }

    fn cancelled(&mut self, reason: Reason) {
        // Its task ends, and says so after what it has.
        self.account.cancelled = Some(reason);
    }

    fn offered(&mut self) -> Option<Bytes> {
        // What its client has nothing of yet may go elsewhere; the rest ends here or not at all.
        (!self.begun).then(|| Line::Offer.event())
    }

    /// Shows life while nothing else does; to a gateway only as long as the engine is healthy.
    fn sign_of_life(&mut self) -> Option<Bytes> {
        if std::mem::take(&mut self.spoke) {
            return None;
        }
        match self.inside {
            true => self.watched.borrow().healthy.then(|| self.account.progress()),
            false => (!self.begun).then_some(Bytes::from_static(KEEP_ALIVE_EVENT)),
        }
    }

    fn ended(&mut self, error: Error) -> Error {
        self.over = true;
        self.account.outcome = Some(error.code().row().code);
        error
    }

    /// Turns a failure into the last bytes: a private refusal for a gateway, an error event for a client.
    fn fail(&mut self, error: &Error) -> Bytes {
        super::errors::log(error);
        match self.inside {
            true => Line::Refusal(error.into()).event(),
            false => error_event(error),
        }
    }
}
