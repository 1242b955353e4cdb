//! The one way in for every request that the engine answers: admission, text, submission, and how the answer goes out.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::Response;
use grammar::Source;
use inference::{ChoiceStart, Pooling, Priority, Scoring, StopRules, Submission, Task};
use rand::Rng;
use service::traces::{KeyValue, Span};
use wire::generation::{Generation, Tier};
use wire::output::{Opening, OutputParser, Style};
use wire::private::{self, Line, Meta};
use wire::{Endpoint, HTTP_SSE_CONTENT_TYPE, Identity};
use words::{Code, Error, Fingerprint, GatewayId, ModelId, Moment, RolloutId};

use super::account::Account;
use super::answer::{Answer, Form, Inside, Start};
use super::forward;
use super::outgoing::{Outgoing, response};
use super::output::Output;
use super::parts::Parts;
use super::telling::Telling;
use super::texts::Texts;
use super::{DataPlane, HttpError};
use crate::harness::{ChatText, Prompt};
use crate::models::InUse;
use crate::ready::{Local, ReadyModel};
use crate::sampling;
use crate::stopped::Stopped;
use crate::streams::{self as running, Ticket};
use service::gate::Admission;

/// What a kind of request adds to the way that all take.
pub(super) trait Ask: Sized + Send + 'static {
    /// Where it is asked.
    const ENDPOINT: Endpoint;
    /// The field with the text, for errors.
    const TEXT: &'static str;

    /// Reads a body.
    fn parse(body: &[u8]) -> Result<Self, Error>;

    /// Returns what it says besides its text.
    fn generation(&self) -> &Generation;

    /// Refuses what a model of this style can't do.
    fn check(&self, _style: &Style) -> Result<(), Error> {
        Ok(())
    }

    /// Makes the prompts, at least one and each of a token at least; called off the runtime. `now` is what templates see
    /// as the time, in Unix seconds.
    fn prompts(&self, text: &dyn ChatText, now: u64) -> Result<Vec<Prompt>, Error>;

    /// Says whether answers begin with their prompts.
    fn echoes(&self) -> bool {
        false
    }

    /// Says what is wanted of the engine: tokens, and their scores where those are told. A whole answer is folded anew
    /// at each attempt, and so are its scores.
    fn task(&self, _asked: &Asked) -> Result<Task, Error> {
        let generation = self.generation();
        let (prompt, accepted) = (self.echoes(), !generation.stream);
        let scoring = |top: u32| Task::Score(Scoring { top: top as usize, prompt, accepted });
        Ok(generation.logprobs.map_or(Task::Generate, scoring))
    }

    /// Returns what every answer must be, and the field that says so.
    fn constraint(&self, _style: &Style, _opening: Opening) -> Option<(Source, &'static str)> {
        None
    }

    /// Returns what takes each answer's text apart.
    fn parser(&self, _style: &Style, _opening: Opening) -> OutputParser {
        OutputParser::default()
    }

    /// Says what the events become; `plain` says that all text is content.
    fn form(&self, identity: Identity, asked: &Asked, plain: bool) -> Form;
}

/// What a request became at its model.
pub(super) struct Asked {
    pub(super) prompts: Vec<Vec<u32>>,
    /// How answers to the first one begin.
    pub(super) opening: Opening,
    pub(super) text: Arc<dyn ChatText>,
    pub(super) pooling: Result<Pooling, String>,
    /// Numbers in a hidden state.
    pub(super) width: usize,
}

/// What a gateway fixes, so that a later attempt can't differ.
pub(super) struct Private {
    /// The attempt's number; `None` for clients that talk to the worker directly.
    pub(super) attempt: Option<u32>,
    seed: u64,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) request_id: String,
    /// Which gateway asks.
    pub(super) gateway: Option<GatewayId>,
    /// The rollout whose canary it is.
    canary: Option<RolloutId>,
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().filter(|text| !text.is_empty() && text.len() <= 128)
}

impl Private {
    fn read(headers: &HeaderMap, plane: &DataPlane, endpoint: Endpoint) -> Self {
        let mut rng = rand::rng();
        let random: u128 = rng.random();
        let named = |name| text(headers, name).map(str::to_string);
        let number = |name| text(headers, name).and_then(|text| text.parse::<u64>().ok());
        Private {
            attempt: number(private::ATTEMPT_HEADER).map(|attempt| attempt.min(u64::from(u32::MAX)) as u32),
            seed: number(private::SEED_HEADER).unwrap_or_else(|| rng.random()),
            id: named(private::COMPLETION_ID_HEADER).unwrap_or_else(|| endpoint.answer_id(random)),
            created: number(private::CREATED_HEADER).unwrap_or_else(|| plane.clock.unix_seconds()),
            request_id: named(private::REQUEST_ID_HEADER).unwrap_or_else(|| format!("req-{random:032x}")),
            gateway: named(private::GATEWAY_HEADER).and_then(|name| GatewayId::new(name).ok()),
            canary: named(private::CANARY_HEADER).and_then(|name| RolloutId::new(name).ok()),
        }
    }
}

/// Reads a body within its bound and deadline.
pub(crate) async fn read_body(plane: &DataPlane, body: Body) -> Result<Bytes, Error> {
    let limit = plane.options.data.max_body_bytes;
    let deadline = Duration::from_millis(plane.options.data.body_timeout_ms);
    service::body::read(body, limit, deadline).await
}

fn check_media_type(headers: &HeaderMap) -> Result<(), Error> {
    // What is no text is no name of a type either.
    let said = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    wire::check_media_type(said(header::CONTENT_TYPE), said(header::CONTENT_ENCODING))
}

pub(super) async fn answer<A: Ask>(State(plane): State<Arc<DataPlane>>, headers: HeaderMap, body: Body) -> Response {
    let mut span = plane.traces.request(&headers, A::ENDPOINT.operation());
    let span = &mut span;
    let admit = async |private: Private| {
        let answer = admit::<A>(&plane, &headers, private, body, span).await;
        answer.inspect_err(|error| span.fail(error.code().row().code))
    };
    answered(A::ENDPOINT, &plane, &headers, admit).await
}

/// Answers under the request's id, whatever comes of it.
pub(super) async fn answered(
    endpoint: Endpoint,
    plane: &DataPlane,
    headers: &HeaderMap,
    make: impl AsyncFnOnce(Private) -> Result<Response, Error>,
) -> Response {
    let private = Private::read(headers, plane, endpoint);
    let request_id = private.request_id.clone();
    let mut response = match make(private).await {
        Ok(response) => response,
        Err(error) => {
            tracing::info!(request_id, code = error.code().row().code, %error, "request refused");
            axum::response::IntoResponse::into_response(HttpError(error))
        }
    };
    if let Ok(request_id) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(private::REQUEST_ID_HEADER, request_id);
    }
    response
}

/// A request past the gate, its body read.
pub(super) struct Entered {
    pub(super) admission: Admission,
    pub(super) arrived: Moment,
    pub(super) bytes: Bytes,
}

/// Takes a request in.
pub(super) async fn enter(
    plane: &DataPlane,
    headers: &HeaderMap,
    private: &Private,
    body: Body,
) -> Result<Entered, Error> {
    let arrived = plane.clock.now();
    let draining = || Error::new(Code::Draining, "this worker is draining and takes no new requests");
    let admission = match &private.canary {
        Some(rollout) => plane.gate.enter_canary(rollout),
        None => plane.gate.enter(),
    };
    let admission = admission.ok_or_else(draining)?;
    check_media_type(headers)?;
    let bytes = read_body(plane, body).await?;
    Ok(Entered { admission, arrived, bytes })
}

/// Gives a request its place in its model, by any of its names. From here on it can be cancelled, also while it waits; who
/// is told of that is told here until it has its place, and by its account from then on.
///
/// # Errors
/// As [`crate::models::Models::attach`]; `Cancelled` when it was cancelled meanwhile.
pub(super) async fn attach(
    plane: &DataPlane,
    private: &Private,
    name: &ModelId,
    arrived: Moment,
) -> Result<(InUse, Ticket), Error> {
    let (model, request_id, completion_id) =
        (plane.models.resolve(name), private.request_id.clone(), private.id.clone());
    let asked = running::Asked {
        gateway: private.gateway.clone().filter(|_| private.attempt.is_some()),
        model: model.clone(),
        request_id: request_id.clone(),
        completion_id: completion_id.clone(),
    };
    let mut ticket = plane.streams.enter(asked);
    let reason = tokio::select! {
        biased;
        reason = ticket.cancelled() => reason,
        model = plane.models.attach(name) => return Ok((model?, ticket)),
    };
    let seconds = plane.clock.now().since(arrived).as_secs_f64();
    plane.stopped.tell(Stopped { model, request_id, completion_id, reason, tokens: 0, seconds });
    Err(running::cancelled())
}

async fn admit<A: Ask>(
    plane: &Arc<DataPlane>,
    headers: &HeaderMap,
    private: Private,
    body: Body,
    span: &mut Span,
) -> Result<Response, Error> {
    let entered = enter(plane, headers, &private, body).await?;
    if let Some(place) = forward::attach(plane, &private, &entered).await? {
        return forward::answer(plane, private, entered, place, A::ENDPOINT, span).await;
    }
    let Entered { admission, arrived, bytes } = entered;
    let (ask, length) = (A::parse(&bytes)?, bytes.len());
    drop(bytes);
    let (model, ticket) = attach(plane, &private, &ask.generation().model, arrived).await?;
    let local = model.local()?;
    plane.metrics.unknown_fields(model.id.as_str(), ask.generation().unknown_fields);
    let style = local.text.style();
    ask.check(&style)?;
    let (asked, ask) = tokenize(&plane.texts, local, ask, length, private.created).await?;
    let (request, task) = (ask.generation(), ask.task(&asked)?);
    let room = room::<A>(&model, local, &asked.prompts, task)?;
    let fallback = plane.options.scheduler.default_max_tokens;
    let resolved = sampling::resolve(request, &local.defaults, private.seed, fallback, room as u32);
    let meta = Meta {
        prompt_hash: hash_of(&asked.prompts),
        prompt_tokens: asked.prompts.iter().map(Vec::len).sum::<usize>() as u32,
        sampling: resolved,
        continue_fingerprint: model.continue_fingerprint,
        exact_fingerprint: model.exact_fingerprint,
        cached: 0,
    };
    let each = request.choices as usize;
    let starts = starts(request, &meta, each, asked.prompts.len(), plane.options.scheduler.max_choices)?;
    let constraint = match ask.constraint(&style, asked.opening) {
        Some((source, param)) => Some(local.constraints.compile(source, param).await?),
        None => None,
    };
    let output = Output::new(ask.parser(&style, asked.opening), local.token_bytes.clone(), &starts);
    let plain = output.plain();
    let telling = matches!(task, Task::Score(_)).then(|| {
        let from_start = vec![ChoiceStart::default(); starts.len()];
        let told = if request.stream { &starts } else { &from_start };
        Telling::new(local.text.clone(), &asked.prompts, ask.echoes(), told)
    });
    let start = Start {
        output,
        prompt_tokens: meta.prompt_tokens,
        begun: starts.iter().map(|start| request.stream && !start.accepted.is_empty()).collect(),
        telling,
        // Of several prompts the cache is not told: no single moment knows what all of them found.
        cached: request.resume.as_ref().map(|resume| resume.meta.cached).or((asked.prompts.len() > 1).then_some(0)),
    };
    let class = match request.tier {
        Tier::Priority => Priority::High,
        Tier::Default => Priority::Normal,
        Tier::Flex => Priority::Low,
    };
    let stop = Arc::new(StopRules { strings: request.stop.clone(), tokens: ends(request, local) });
    let bias: Arc<[(u32, f32)]> = request.shaping.bias.as_slice().into();
    let submission = |(i, prompt): (usize, &Vec<u32>)| Submission {
        request: model.request_key(),
        prompt: prompt.as_slice().into(),
        choices: starts[i * each..(i + 1) * each].to_vec(),
        first_choice: (i * each) as u32,
        task,
        sampling: sampling::scheduled(&resolved),
        bias: bias.clone(),
        constraint: constraint.clone(),
        max_tokens: if matches!(task, Task::Embed(_)) { 0 } else { resolved.max_tokens as usize },
        stop: stop.clone(),
        // A client in the middle of its answer comes before one that has none.
        priority: class.raised(usize::from(request.resume.is_some())),
        deadline: Some(arrived + Duration::from_secs(plane.options.scheduler.max_request_s)),
        salt: salt_of(request),
    };
    let submissions = asked.prompts.iter().enumerate().map(submission).collect();
    model.metrics.prompt_tokens.inc_by(u64::from(meta.prompt_tokens));
    let name = Fingerprint(*blake3::hash(private.id.as_bytes()).as_bytes());
    let (parts, guard) = Parts::submit(&model.engine, name, plane.options.data.event_queue, submissions);
    describe(span, A::ENDPOINT, &request.model, &private);
    describe_generation(span, request, &meta, &private);
    let ids = (private.request_id, private.id.clone());
    let identity = Identity { id: private.id, created: private.created, model: request.model.to_string() };
    let form = ask.form(identity, &asked, plain);
    let inside = private.attempt.zip(private.gateway).map(|(number, _)| Inside { number, meta: Some(meta) });
    let (armed, stream) = (ticket.arm(guard), request.stream);
    let mut account = Account::new(plane.clone(), model, ids, arrived, stream, std::mem::take(span));
    if let Err(reason) = armed {
        (account.cancelled, account.outcome) = (Some(reason), Some(Code::Cancelled.row().code));
        return Err(running::cancelled());
    }
    let private = inside.is_some();
    let answer = Answer::new(parts, admission, account, form, inside, start);
    Outgoing::new(ticket, answer).respond(private, stream, plane.options.data.commit_after()).await
}

/// Says what is asked, in the words of OpenTelemetry's conventions for generative models; never what is in it.
pub(super) fn describe(span: &mut Span, endpoint: Endpoint, model: &ModelId, private: &Private) {
    let operation = endpoint.operation();
    span.rename(|| format!("{operation} {model}").into());
    span.note(|| {
        [
            KeyValue::new("gen_ai.operation.name", operation),
            KeyValue::new("gen_ai.provider.name", "cortex"),
            KeyValue::new("gen_ai.request.model", model.to_string()),
            KeyValue::new("cortex.request_id", private.request_id.clone()),
            KeyValue::new("cortex.attempt", private.attempt.map_or(0, i64::from)),
        ]
    });
}

/// Says the rest of it that only an engine of this process makes of a request.
fn describe_generation(span: &mut Span, request: &Generation, meta: &Meta, private: &Private) {
    let sampling = &meta.sampling;
    span.note(|| {
        [
            KeyValue::new("gen_ai.request.choice.count", i64::from(request.choices)),
            KeyValue::new("gen_ai.request.max_tokens", i64::from(sampling.max_tokens)),
            KeyValue::new("gen_ai.request.temperature", f64::from(sampling.temperature)),
            KeyValue::new("gen_ai.request.top_p", f64::from(sampling.top_p)),
            KeyValue::new("gen_ai.request.seed", sampling.seed as i64),
            KeyValue::new("gen_ai.response.model", request.model.to_string()),
            KeyValue::new("gen_ai.response.id", private.id.clone()),
            KeyValue::new("gen_ai.usage.input_tokens", i64::from(meta.prompt_tokens)),
        ]
    });
}

/// Keeps what tenants have computed apart.
fn salt_of(request: &Generation) -> [u8; 32] {
    request.cache_salt.as_ref().map_or([0; 32], |salt| *blake3::hash(salt.as_bytes()).as_bytes())
}

/// Renders and tokenises what came in a body of so many bytes. What the disk has of the prompts' KV is brought into memory on
/// the way.
async fn tokenize<A: Ask>(texts: &Texts, model: &Local, ask: A, length: usize, now: u64) -> Result<(Asked, A), Error> {
    let (text, pooling, width) = (model.text.clone(), model.pooling.clone(), model.width);
    let keeper = model.keeper.clone();
    let work = move || {
        let prompts = ask.prompts(&*text, now)?;
        if let Some(keeper) = keeper {
            let salt = salt_of(ask.generation());
            prompts.iter().for_each(|prompt| keeper.prefetch(&prompt.ids, &salt));
        }
        let opening = prompts.first().map_or(Opening::default(), |prompt| prompt.opening);
        let prompts = prompts.into_iter().map(|prompt| prompt.ids).collect();
        Ok((Asked { prompts, opening, text, pooling, width }, ask))
    };
    texts.work(length, work).await
}

/// Names the `i`th of several texts.
pub(super) fn place(field: &str, i: usize, count: usize) -> String {
    if count == 1 { field.to_string() } else { format!("{field}[{i}]") }
}

/// Returns how many tokens the context leaves for answers to the shortest prompt; the engine bounds each by its own.
///
/// # Errors
/// `ContextLengthExceeded` when a prompt leaves no room; an embedding needs none. `InvalidRequest` for ids that are no
/// tokens.
fn room<A: Ask>(model: &ReadyModel, local: &Local, prompts: &[Vec<u32>], task: Task) -> Result<usize, Error> {
    let at = |i: usize| place(A::TEXT, i, prompts.len());
    let (context, embeds) = (model.context_length, matches!(task, Task::Embed(_)));
    for (i, prompt) in prompts.iter().enumerate() {
        if prompt.len() + usize::from(!embeds) > context {
            let rest = if embeds { "" } else { ", the answer included" };
            let message = format!("the prompt has {} tokens; the model's context holds {context}{rest}", prompt.len());
            return Err(Error::new(Code::ContextLengthExceeded, message).at(at(i)));
        }
        if let Some(id) = prompt.iter().find(|id| **id as usize >= local.vocabulary) {
            let message = format!("{id} is no token; the model's vocabulary has {}", local.vocabulary);
            return Err(Error::invalid(at(i), message));
        }
    }
    Ok(context - prompts.iter().map(Vec::len).min().unwrap_or(0))
}

/// Returns the tokens that end an answer.
fn ends(request: &Generation, model: &Local) -> Vec<u32> {
    let own = model.end_tokens.iter().filter(|_| !request.shaping.ignore_eos);
    own.chain(&request.shaping.stop_tokens).copied().collect()
}

fn hash_of(prompts: &[Vec<u32>]) -> Fingerprint {
    let mut hasher = blake3::Hasher::new();
    for (i, prompt) in prompts.iter().enumerate() {
        if i > 0 {
            // No token has this id.
            hasher.update(&u32::MAX.to_le_bytes());
        }
        prompt.iter().for_each(|id| _ = hasher.update(&id.to_le_bytes()));
    }
    Fingerprint(*hasher.finalize().as_bytes())
}

/// Returns what each choice of each prompt has; a resume must agree with what this worker makes of the request.
fn starts(
    request: &Generation,
    meta: &Meta,
    each: usize,
    prompts: usize,
    most: usize,
) -> Result<Vec<ChoiceStart>, Error> {
    if each > most {
        return Err(Error::invalid("n", format!("'n' may be {most} at most on this worker, it is {each}")));
    }
    let Some(resume) = &request.resume else { return Ok(vec![ChoiceStart::default(); each * prompts]) };
    let theirs = &resume.meta;
    let same = theirs.prompt_hash == meta.prompt_hash
        && theirs.prompt_tokens == meta.prompt_tokens
        && theirs.sampling == meta.sampling
        && theirs.continue_fingerprint == meta.continue_fingerprint;
    if !same || resume.choices.len() != each * prompts {
        let message = "this worker would not generate what the earlier attempt did";
        return Err(Error::new(Code::ResumeMismatch, message));
    }
    Ok(resume.choices.iter().map(|choice| ChoiceStart { accepted: choice.ids.clone() }).collect())
}

/// Sends out an answer that took no engine: to a gateway as the one event of a stream.
pub(super) fn one_json(json: String, tokens: u32, private: &Private) -> Response {
    let inside = private.attempt.is_some() && private.gateway.is_some();
    let usage = Line::Usage(wire::Usage { prompt: tokens, ..wire::Usage::default() });
    let (body, kind) = match inside {
        true => (wire::with_private(&[usage], &[wire::data_event(&json)]), HTTP_SSE_CONTENT_TYPE),
        false => (json.into(), "application/json"),
    };
    response(kind, Body::from(body))
}
