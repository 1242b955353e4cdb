//! A worker that costs next to nothing: its events are made once and sent at the pace that the request asks for, with
//! private lines to a gateway and without to anybody else, as `neuron` does. Its control port says that it is ready.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use clap::Args;
use control::proto::control_server::{Control, ControlServer};
use control::{node_status_to_proto, proto};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, HeaderValue, Response, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::{Request, Status, Streaming};
use wire::private::{ATTEMPT_HEADER, Line, Meta, MetaText, ResolvedSampling};
use wire::{ChatEncoder, DONE_EVENT, Folder, HTTP_SSE_CONTENT_TYPE, Identity, Usage, data_event, with_private};
use words::{
    Capabilities, Fingerprint, Incarnation, ModelId, ModelLoad, ModelState, ModelStatus, NodeId, NodeState, NodeStatus,
};

/// Most tokens of an answer.
pub(super) const TOKENS_MAX: usize = 1 << 14;
/// The model that it has.
pub(super) const MODEL: &str = "bench";
/// What each token says.
const TOKEN: &str = " word";
/// How often the control port says that all is well.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// What the worker is told.
#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// Where its control port listens.
    #[arg(long)]
    control: String,
    /// Where its data plane listens.
    #[arg(long)]
    data: String,
}

/// What of a request it heeds.
#[derive(Debug, Deserialize)]
struct Ask {
    #[serde(default)]
    stream: bool,
    max_tokens: usize,
    /// Between two tokens, in microseconds.
    #[serde(default)]
    pace_us: u64,
}

/// The events of every answer.
struct Events {
    /// To a gateway; the first token's is after the meta event.
    private: Vec<Bytes>,
    /// To anybody else.
    public: Vec<Bytes>,
    meta: Bytes,
}

fn identity() -> Identity {
    Identity { id: "chatcmpl-0123456789abcdef0123456789abcdef".into(), created: 1_700_000_000, model: MODEL.into() }
}

fn token(index: usize, finish: Option<&'static str>) -> Line {
    Line::Tokens { attempt: 1, choice: 0, index: index as u32, ids: vec![1000 + index as u32], finish, reasoning: 0 }
}

impl Events {
    fn make() -> Self {
        let encoder = ChatEncoder::new(identity(), false);
        let public = |index: usize| match index {
            0 => vec![encoder.role(0, true), encoder.content(0, TOKEN, None)],
            _ => vec![encoder.content(0, TOKEN, None)],
        };
        let meta = Meta {
            prompt_hash: Fingerprint([1; 32]),
            prompt_tokens: 12,
            sampling: ResolvedSampling {
                temperature: 1.0,
                top_p: 1.0,
                top_k: 0,
                min_p: 0.0,
                seed: 1,
                max_tokens: TOKENS_MAX as u32,
                presence: 0.0,
                frequency: 0.0,
                repetition: 1.0,
                min_tokens: 0,
            },
            continue_fingerprint: Fingerprint([2; 32]),
            exact_fingerprint: Fingerprint([3; 32]),
            cached: 0,
        };
        Events {
            private: (0..TOKENS_MAX).map(|i| with_private(&[token(i, None)], &public(i))).collect(),
            public: (0..TOKENS_MAX).map(|i| public(i).concat().into()).collect(),
            meta: Line::Meta(MetaText::from(&meta)).event(),
        }
    }

    /// Returns an answer's events but its first ones, which come at once, and its last, which come with the last token.
    fn ends(&self, ask: &Ask, private: bool) -> (Vec<Bytes>, Vec<Bytes>) {
        let (encoder, last) = (ChatEncoder::new(identity(), false), ask.max_tokens - 1);
        let usage = Usage { prompt: 12, completion: ask.max_tokens as u32, cached: 0, reasoning: 0 };
        let (finish, done) = (encoder.finish(0, "length"), Bytes::from_static(DONE_EVENT));
        if !private {
            return (Vec::new(), vec![finish, done]);
        }
        if !ask.stream {
            // The first token's line comes at once, the others' together with the end.
            let head = if last == 0 { Vec::new() } else { vec![token(0, None).event()] };
            let ids = (head.len() as u32..ask.max_tokens as u32).map(|index| 1000 + index).collect();
            let index = head.len() as u32;
            let rest = Line::Tokens { attempt: 1, choice: 0, index, ids, finish: Some("length"), reasoning: 0 };
            let whole = with_private(&[rest, Line::Usage(usage)], &[data_event(&whole(ask, usage))]);
            return ([vec![self.meta.clone()], head].concat(), vec![whole]);
        }
        let finish = with_private(&[token(last, Some("length"))], &[encoder.content(0, TOKEN, None), finish]);
        (vec![self.meta.clone()], vec![finish, with_private(&[Line::Usage(usage)], &[done])])
    }
}

fn whole(ask: &Ask, usage: Usage) -> String {
    let mut folder = Folder::new(identity(), 1, true, false);
    folder.part(0, &wire::output::Delta::Content(TOKEN.repeat(ask.max_tokens)));
    folder.finish(0, "length");
    folder.done(usage)
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// One answer on its way out.
struct Flow {
    events: Arc<Events>,
    private: bool,
    head: std::vec::IntoIter<Bytes>,
    tail: std::vec::IntoIter<Bytes>,
    /// The token that comes next, and the first that does not.
    at: usize,
    end: usize,
    due: Instant,
    pace: Duration,
}

impl Flow {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(event) = self.head.next() {
            return Some(event);
        }
        if self.at >= self.end {
            return self.tail.next();
        }
        if !self.pace.is_zero() && self.at > 0 {
            self.due += self.pace;
            tokio::time::sleep_until(self.due).await;
        }
        self.at += 1;
        let events = if self.private { &self.events.private } else { &self.events.public };
        events.get(self.at - 1).cloned()
    }
}

async fn answer(events: Arc<Events>, request: http::Request<Incoming>) -> Result<Response<Body>> {
    let private = request.headers().contains_key(ATTEMPT_HEADER);
    let body = request.into_body().collect().await?.to_bytes();
    let mut ask: Ask = serde_json::from_slice(&body)?;
    ask.max_tokens = ask.max_tokens.clamp(1, TOKENS_MAX);
    let mut headers = HeaderMap::new();
    headers.insert("x-request-id", HeaderValue::from_static("req-0123456789abcdef"));
    let usage = Usage { prompt: 12, completion: ask.max_tokens as u32, cached: 0, reasoning: 0 };
    let body = if ask.stream || private {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(HTTP_SSE_CONTENT_TYPE));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        let (head, tail) = events.ends(&ask, private);
        let flow = Flow {
            head: head.into_iter(),
            tail: tail.into_iter(),
            at: 0,
            // A gateway's last token comes with its finish.
            end: match (private, ask.stream) {
                (true, true) => ask.max_tokens - 1,
                (true, false) => 0,
                (false, _) => ask.max_tokens,
            },
            due: Instant::now(),
            pace: Duration::from_micros(ask.pace_us),
            private,
            events,
        };
        let frames = futures_util::stream::unfold(flow, |mut flow| async move {
            let event = flow.next().await?;
            Some((Ok::<_, Infallible>(Frame::data(event)), flow))
        });
        StreamBody::new(frames).boxed_unsync()
    } else {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Full::new(Bytes::from(whole(&ask, usage))).boxed_unsync()
    };
    let mut response = Response::new(body);
    *response.headers_mut() = headers;
    Ok(response)
}

/// Serves answers until the process ends.
async fn serve(listener: TcpListener) -> Result<()> {
    let events = Arc::new(Events::make());
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let events = events.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(events.clone(), request));
            let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// The control port of a worker that is always ready.
struct Ready(NodeStatus);

type NodeStream = Pin<Box<dyn Stream<Item = Result<proto::NodeMessage, Status>> + Send>>;
type LogStream = Pin<Box<dyn Stream<Item = Result<proto::LogLines, Status>> + Send>>;
type PullStream = Pin<Box<dyn Stream<Item = Result<proto::PullProgress, Status>> + Send>>;

fn status_message(status: &NodeStatus) -> proto::NodeMessage {
    proto::NodeMessage { message: Some(proto::node_message::Message::Status(node_status_to_proto(status))) }
}

fn not_here<T>() -> Result<tonic::Response<T>, Status> {
    Err(Status::unimplemented("a worker of a benchmark takes no orders"))
}

#[tonic::async_trait]
impl Control for Ready {
    type AttachStream = NodeStream;
    type PullModelStream = PullStream;
    type ModelLogsStream = LogStream;

    async fn attach(
        &self,
        request: Request<Streaming<proto::GatewayMessage>>,
    ) -> Result<tonic::Response<NodeStream>, Status> {
        let (status, mut inbound) = (self.0.clone(), request.into_inner());
        let (out, receiver) = mpsc::channel(8);
        tokio::spawn(async move {
            let mut heartbeat = tokio::time::interval(HEARTBEAT);
            loop {
                tokio::select! {
                    message = inbound.message() => if !matches!(message, Ok(Some(_))) { return },
                    _ = heartbeat.tick() => if out.send(Ok(status_message(&status))).await.is_err() { return },
                }
            }
        });
        Ok(tonic::Response::new(tokio_stream::wrappers::ReceiverStream::new(receiver).boxed()))
    }

    async fn list_models(
        &self,
        _: Request<proto::ListModelsRequest>,
    ) -> Result<tonic::Response<proto::ListModelsResponse>, Status> {
        Ok(tonic::Response::new(proto::ListModelsResponse { status: Some(node_status_to_proto(&self.0)) }))
    }

    async fn load_model(
        &self,
        _: Request<proto::LoadModelRequest>,
    ) -> Result<tonic::Response<proto::LoadModelResponse>, Status> {
        not_here()
    }

    async fn pull_model(&self, _: Request<proto::PullModelRequest>) -> Result<tonic::Response<PullStream>, Status> {
        not_here()
    }

    async fn unload_model(
        &self,
        _: Request<proto::UnloadModelRequest>,
    ) -> Result<tonic::Response<proto::UnloadModelResponse>, Status> {
        not_here()
    }

    async fn set_intent(
        &self,
        _: Request<proto::SetIntentRequest>,
    ) -> Result<tonic::Response<proto::SetIntentResponse>, Status> {
        not_here()
    }

    async fn release_hold(
        &self,
        _: Request<proto::ReleaseHoldRequest>,
    ) -> Result<tonic::Response<proto::ReleaseHoldResponse>, Status> {
        not_here()
    }

    async fn cancel_requests(
        &self,
        _: Request<proto::CancelRequestsRequest>,
    ) -> Result<tonic::Response<proto::CancelRequestsResponse>, Status> {
        not_here()
    }

    async fn get_lifecycle(
        &self,
        _: Request<proto::GetLifecycleRequest>,
    ) -> Result<tonic::Response<proto::GetLifecycleResponse>, Status> {
        not_here()
    }

    async fn model_logs(&self, _: Request<proto::ModelLogsRequest>) -> Result<tonic::Response<LogStream>, Status> {
        not_here()
    }
}

fn status(data: &str) -> Result<NodeStatus> {
    let mut status = NodeStatus::new(NodeId::new("bench")?, Incarnation { counter: 1, random: 1 });
    status.state = NodeState::Ready;
    status.data_address = data.into();
    status.models.push(ModelStatus {
        state: ModelState::Ready,
        harness: "bench".into(),
        context_length: 1 << 20,
        continue_fingerprint: Fingerprint([2; 32]),
        exact_fingerprint: Fingerprint([3; 32]),
        capabilities: Capabilities { chat: true, continuation: true },
        load: ModelLoad { max_running: 1 << 16, max_waiting: 1 << 16, kv_blocks: 1 << 20, ..ModelLoad::default() },
        ..ModelStatus::absent(ModelId::new(MODEL)?)
    });
    Ok(status)
}

/// Runs the worker until it is killed.
pub(crate) fn work(args: &WorkerArgs) -> Result<()> {
    super::process::die_with_parent()?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let data = TcpListener::bind(&args.data).await?;
        let control = tonic::transport::Server::builder().add_service(ControlServer::new(Ready(status(&args.data)?)));
        tokio::try_join!(serve(data), async { Ok(control.serve(args.control.parse()?).await?) })?;
        Ok(())
    })
}
