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
use tokio::net::TcpListener;

/// What the forwarder is told.
#[derive(Debug, Args)]
pub(crate) struct PeerArgs {
    /// Where it listens.
    #[arg(long)]
    listen: String,
    /// Where it sends requests.
    #[arg(long)]
    to: String,
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
    // As a gateway has to that may send it twice.
    let body = body.collect().await?.to_bytes();
    let mut response = upstream.request(Request::from_parts(parts, Full::new(body))).await?;
    HOP.iter().for_each(|name| drop(response.headers_mut().remove(name)));
    Ok(response)
}

/// Forwards until it is killed.
pub(crate) fn forward(args: &PeerArgs) -> Result<()> {
    super::process::die_with_parent()?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let listener = TcpListener::bind(&args.listen).await?;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let upstream: Upstream = Client::builder(TokioExecutor::new()).build(connector);
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let (upstream, to) = (upstream.clone(), args.to.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request| pass(upstream.clone(), to.clone(), request));
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    })
}
