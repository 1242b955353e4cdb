//! The one way in for every request that the engine answers: admission, text, submission, and how the answer goes out.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::Response;
use futures_util::StreamExt;
use inference::{ChoiceStart, Priority, StopRules, Submission};
use rand::Rng;
use wire::generation::{Generation, Tier};
use wire::output::{Opening, OutputParser, Style};
use wire::private::{self, Meta};
use wire::{HTTP_SSE_CONTENT_TYPE, Identity};
use words::{Code, Error, Fingerprint, GatewayId, RolloutId};

use super::answer::{Account, Answer, Form, Inside, Start};
use super::output::Output;
use super::{DataPlane, HttpError};
use crate::harness::{ChatText, Prompt};
use crate::models::ReadyModel;
use crate::sampling;

/// What a kind of request adds to the way that all take.
pub(super) trait Ask: Sized + Send + 'static {
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

    /// Makes the prompt; called off the runtime. `now` is what templates see as the time, in Unix seconds.
    fn prompt(&self, text: &dyn ChatText, now: u64) -> Result<Prompt, Error>;

    /// Returns what takes each answer's text apart.
    fn parser(&self, _style: &Style, _opening: Opening) -> OutputParser {
        OutputParser::default()
    }

    /// Says what the events become; `choices` is how many answers are given, `plain` whether all text is content.
    fn form(&self, identity: Identity, choices: usize, plain: bool) -> Form;
}

/// What a gateway fixes, so that a later attempt can't differ.
struct Private {
    /// The attempt's number; `None` for clients that talk to the worker directly.
    attempt: Option<u32>,
    seed: u64,
    id: String,
    created: u64,
    request_id: String,
    /// Which gateway asks.
    gateway: Option<GatewayId>,
    /// The rollout whose canary it is.
    canary: Option<RolloutId>,
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().filter(|text| !text.is_empty() && text.len() <= 128)
}

impl Private {
    fn read(headers: &HeaderMap, plane: &DataPlane) -> Self {
        let mut rng = rand::rng();
        let random: u128 = rng.random();
        let named = |name| text(headers, name).map(str::to_string);
        let number = |name| text(headers, name).and_then(|text| text.parse::<u64>().ok());
        Private {
            attempt: number(private::ATTEMPT_HEADER).map(|attempt| attempt.min(u64::from(u32::MAX)) as u32),
            seed: number(private::SEED_HEADER).unwrap_or_else(|| rng.random()),
            id: named(private::COMPLETION_ID_HEADER).unwrap_or_else(|| format!("chatcmpl-{random:032x}")),
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
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    wire::check_media_type(value.to_str().unwrap_or_default())
}

pub(super) async fn answer<A: Ask>(
    State(plane): State<Arc<DataPlane>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, HttpError> {
    let private = Private::read(&headers, &plane);
    let request_id = HeaderValue::from_str(&private.request_id);
    let result = admit::<A>(&plane, &headers, private, body).await;
    let mut response = match result {
        Ok(response) => response,
        Err(error) => {
            tracing::info!(request_id = ?request_id, code = error.code().row().code, %error, "request refused");
            axum::response::IntoResponse::into_response(HttpError(error))
        }
    };
    if let Ok(request_id) = request_id {
        response.headers_mut().insert(private::REQUEST_ID_HEADER, request_id);
    }
    Ok(response)
}

async fn admit<A: Ask>(
    plane: &Arc<DataPlane>,
    headers: &HeaderMap,
    private: Private,
    body: Body,
) -> Result<Response, Error> {
    let arrived = plane.clock.now();
    let draining = || Error::new(Code::Draining, "this worker is draining and takes no new requests");
    let admission = match &private.canary {
        Some(rollout) => plane.gate.enter_canary(rollout),
        None => plane.gate.enter(),
    };
    let admission = admission.ok_or_else(draining)?;
    check_media_type(headers)?;
    let bytes = read_body(plane, body).await?;
    let asked = A::parse(&bytes)?;
    drop(bytes);
    let model = plane.models.ready(&asked.generation().model)?;
    plane.metrics.unknown_fields(model.id.as_str(), asked.generation().unknown_fields);
    let style = model.text.style();
    asked.check(&style)?;
    let (Prompt { ids: prompt, opening }, asked) = tokenize(&model, asked, private.created).await?;
    let request = asked.generation();
    let room = model.context_length.saturating_sub(prompt.len());
    if room == 0 {
        let message = format!(
            "the prompt has {} tokens; the model's context holds {}, the answer included",
            prompt.len(),
            model.context_length
        );
        return Err(Error::new(Code::ContextLengthExceeded, message).at(A::TEXT));
    }
    let fallback = plane.options.scheduler.default_max_tokens;
    let resolved = sampling::resolve(request, &model.defaults, private.seed, fallback, room as u32);
    let meta = Meta {
        prompt_hash: hash_of(&prompt),
        prompt_tokens: prompt.len() as u32,
        sampling: resolved,
        continue_fingerprint: model.continue_fingerprint,
        exact_fingerprint: model.exact_fingerprint,
        cached: 0,
    };
    let choices = starts(request, &meta, plane.options.scheduler.max_choices)?;
    let output = Output::new(asked.parser(&style, opening), model.token_bytes.clone(), &choices);
    let plain = output.plain();
    let start = Start {
        output,
        prompt_tokens: meta.prompt_tokens,
        begun: choices.iter().map(|choice| !choice.accepted.is_empty()).collect(),
        cached: request.resume.as_ref().map(|resume| resume.meta.cached),
    };
    let class = match request.tier {
        Tier::Priority => Priority::High,
        Tier::Default => Priority::Normal,
        Tier::Flex => Priority::Low,
    };
    let submission = Submission {
        request: model.request_key(),
        prompt: prompt.into(),
        choices,
        sampling: sampling::scheduled(&resolved),
        bias: request.shaping.bias.as_slice().into(),
        max_tokens: resolved.max_tokens as usize,
        stop: Arc::new(StopRules { strings: request.stop.clone(), tokens: ends(request, &model) }),
        // A client in the middle of its answer comes before one that has none.
        priority: class.raised(usize::from(request.resume.is_some())),
        deadline: Some(arrived + Duration::from_secs(plane.options.scheduler.max_request_s)),
        salt: request.cache_salt.as_ref().map_or([0; 32], |salt| *blake3::hash(salt.as_bytes()).as_bytes()),
    };
    model.metrics.prompt_tokens.inc_by(u64::from(meta.prompt_tokens));
    let wanted = submission.choices.len();
    let name = Fingerprint(*blake3::hash(private.id.as_bytes()).as_bytes());
    let (events, guard) = model.engine.submit(submission, name, plane.options.data.event_queue);
    let identity = Identity { id: private.id, created: private.created, model: request.model.to_string() };
    let form = asked.form(identity, wanted, plain);
    let account = Account::new(plane.clone(), model, private.request_id, arrived, request.stream);
    let (guard, inside) = match (private.attempt, private.gateway) {
        (Some(number), Some(gateway)) => {
            let ticket = plane.streams.enter(gateway, request.model.clone(), Some(guard));
            (None, Some(Inside { number, meta: Some(meta), ticket }))
        }
        _ => (Some(guard), None),
    };
    let private = inside.is_some();
    let answer = Answer::new(events, guard, admission, account, form, inside, start);
    respond(plane, answer, asked.generation().stream, private).await
}

/// Renders and tokenises off the runtime: a long prompt takes milliseconds of pure computing.
async fn tokenize<A: Ask>(model: &Arc<ReadyModel>, asked: A, now: u64) -> Result<(Prompt, A), Error> {
    let text = model.text.clone();
    let work = tokio::task::spawn_blocking(move || asked.prompt(&*text, now).map(|prompt| (prompt, asked)));
    work.await.map_err(Error::internal)?
}

/// Returns the tokens that end an answer.
fn ends(request: &Generation, model: &ReadyModel) -> Vec<u32> {
    let own = model.end_tokens.iter().filter(|_| !request.shaping.ignore_eos);
    own.chain(&request.shaping.stop_tokens).copied().collect()
}

fn hash_of(prompt: &[u32]) -> Fingerprint {
    let mut hasher = blake3::Hasher::new();
    prompt.iter().for_each(|id| _ = hasher.update(&id.to_le_bytes()));
    Fingerprint(*hasher.finalize().as_bytes())
}

/// Returns where each choice begins; a resume must agree with what this worker makes of the request.
fn starts(request: &Generation, meta: &Meta, most: usize) -> Result<Vec<ChoiceStart>, Error> {
    let wanted = request.choices as usize;
    if wanted > most {
        return Err(Error::invalid("n", format!("'n' may be {most} at most on this worker, it is {wanted}")));
    }
    let Some(resume) = &request.resume else { return Ok(vec![ChoiceStart::default(); wanted]) };
    let theirs = &resume.meta;
    let same = theirs.prompt_hash == meta.prompt_hash
        && theirs.prompt_tokens == meta.prompt_tokens
        && theirs.sampling == meta.sampling
        && theirs.continue_fingerprint == meta.continue_fingerprint;
    if !same || resume.choices.len() != wanted {
        let message = "this worker would not generate what the earlier attempt did";
        return Err(Error::new(Code::ResumeMismatch, message));
    }
    Ok(resume.choices.iter().map(|choice| ChoiceStart { accepted: choice.ids.clone() }).collect())
}

/// Sends the answer out: to a gateway always as a stream with private lines, committed at once; to a client as
/// OpenAI does, where a stream commits at its first token or after a while.
async fn respond(plane: &DataPlane, mut answer: Answer, stream: bool, private: bool) -> Result<Response, Error> {
    if private {
        return Ok(event_stream(answer, Vec::new()));
    }
    if !stream {
        let json = answer.whole().await?;
        let mut response = Response::new(Body::from(json));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        return Ok(response);
    }
    let patience = Duration::from_millis(plane.options.data.commit_after_ms);
    match tokio::time::timeout(patience, answer.first()).await {
        Ok(Ok(first)) => Ok(event_stream(answer, first.into_iter().collect())),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            answer.commit();
            Ok(event_stream(answer, vec![Bytes::from_static(wire::KEEP_ALIVE_EVENT)]))
        }
    }
}

fn event_stream(answer: Answer, first: Vec<Bytes>) -> Response {
    let rest = futures_util::stream::unfold(answer, |mut answer| async move {
        let bytes = answer.next().await?;
        Some((bytes, answer))
    });
    let whole = futures_util::stream::iter(first).chain(rest).map(Ok::<_, std::convert::Infallible>);
    let mut response = Response::new(Body::from_stream(whole));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(HTTP_SSE_CONTENT_TYPE));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
