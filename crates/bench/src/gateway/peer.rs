//! The peer: a hyper server and a hyper-util client with nothing between them but the request's and the answer's bytes.

use anyhow::Result;
use bytes::Bytes;
use clap::Args;
use http::{HeaderName, Request, Response, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpSocket;

/// What the forwarder is told.
#[derive(Debug, Args)]
pub(crate) struct PeerArgs {
    /// Where it listens.
    #[arg(long)]
    listen: String,
    /// Where it sends requests.
    #[arg(long)]
    to: String,
    /// Another shape than the plain one.
    #[arg(long)]
    shape: Option<Shape>,
}

/// What could be done otherwise than the plain forwarder does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Shape {
    /// HTTP/2 without TLS to the worker, many requests on one connection.
    H2c,
    /// A runtime of its own on each core, with listeners that share the port, and nothing shared between them.
    PerCore,
}

/// Headers of one hop.
const HOP: [HeaderName; 4] = [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE, header::TE];

type Upstream = Client<HttpConnector, Full<Bytes>>;

async fn pass(upstream: Upstream, to: String, request: Request<Incoming>) -> Result<Response<Incoming>> {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    parts.uri = format!("http://{to}{path}").parse::<Uri>()?;
    HOP.iter().for_each(|name| drop(parts.headers.remove(name)));
    parts.headers.remove(header::HOST);
    // What the client speaks says nothing of the next hop.
    parts.version = http::Version::default();
    // As a gateway has to that may send it twice.
    let body = body.collect().await?.to_bytes();
    let mut response = upstream.request(Request::from_parts(parts, Full::new(body))).await?;
    HOP.iter().for_each(|name| drop(response.headers_mut().remove(name)));
    Ok(response)
}

/// Forwards until it is killed.
pub(crate) fn forward(args: &PeerArgs) -> Result<()> {
    super::process::die_with_parent()?;
    if args.shape != Some(Shape::PerCore) {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        return runtime.block_on(serve(args, false));
    }
    let cores = std::thread::available_parallelism()?.get();
    let one = || tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(args, true));
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..cores).map(|_| scope.spawn(one)).collect();
        all.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow::anyhow!("a forwarder's thread died"))?)
    })
}

async fn serve(args: &PeerArgs, shared: bool) -> Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(shared)?;
    socket.bind(args.listen.parse()?)?;
    let listener = socket.listen(1024)?;
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let h2c = args.shape == Some(Shape::H2c);
    let upstream: Upstream = Client::builder(TokioExecutor::new()).http2_only(h2c).build(connector);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let (upstream, to) = (upstream.clone(), args.to.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| pass(upstream.clone(), to.clone(), request));
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
