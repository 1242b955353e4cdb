#![allow(clippy::unwrap_used)]
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::service::service_fn;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use super::*;

type Chunks = mpsc::Sender<Bytes>;

struct Fixture {
    server: Server,
    /// The senders of the streaming bodies, in order of request.
    streams: mpsc::Receiver<Chunks>,
    body_dropped: Arc<AtomicBool>,
    metrics: ServerMetrics,
}

struct NoteDrop(Arc<AtomicBool>);

impl Drop for NoteDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// `GET /` answers `hello`; `GET /stream` streams what the test sends.
async fn fixture(options: ServerOptions) -> Fixture {
    let (announce, streams) = mpsc::channel(16);
    let body_dropped = Arc::new(AtomicBool::new(false));
    let noted = body_dropped.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let (announce, noted) = (announce.clone(), noted.clone());
        async move {
            let body: UnsyncBoxBody<Bytes, Infallible> = if request.uri().path() == "/stream" {
                let (sender, receiver) = mpsc::channel::<Bytes>(4);
                announce.send(sender).await.unwrap();
                let state = (receiver, NoteDrop(noted));
                let frames = futures_util::stream::unfold(state, |(mut receiver, note)| async move {
                    let bytes = receiver.recv().await?;
                    Some((Ok(http_body::Frame::data(bytes)), (receiver, note)))
                });
                StreamBody::new(frames).boxed_unsync()
            } else {
                http_body_util::Full::new(Bytes::from_static(b"hello")).boxed_unsync()
            };
            Ok::<_, Infallible>(Response::new(body))
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let metrics = ServerMetrics::register(&Registry::new(), "test").unwrap();
    let lanes = Lanes::start("server", 2).unwrap();
    let server = Server::start(&lanes, listener, &options, |_| service.clone(), metrics.clone()).unwrap();
    Fixture { server, streams, body_dropped, metrics }
}

async fn connect(fixture: &Fixture) -> TcpStream {
    TcpStream::connect(fixture.server.local_addr()).await.unwrap()
}

async fn send(stream: &mut TcpStream, path: &str) {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
}

async fn read_until(stream: &mut TcpStream, wanted: &str) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 1024];
    while !String::from_utf8_lossy(&text).contains(wanted) {
        let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut buffer));
        let length = read.await.unwrap().unwrap();
        assert!(length > 0, "closed before {wanted:?}: {:?}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&buffer[..length]);
    }
    String::from_utf8(text).unwrap()
}

async fn closed(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 1024];
    let all = async {
        while let Ok(length) = stream.read(&mut buffer).await {
            if length == 0 {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), all).await.is_ok()
}

fn within(seconds: f64) -> tokio::time::Instant {
    tokio::time::Instant::now() + Duration::from_secs_f64(seconds)
}

#[tokio::test]
async fn idle_silent_and_half_open_connections_never_hold_a_stop() {
    let fixture = fixture(ServerOptions::default()).await;
    let mut idle = connect(&fixture).await;
    send(&mut idle, "/").await;
    read_until(&mut idle, "hello").await;
    let mut silent = connect(&fixture).await;
    let mut half = connect(&fixture).await;
    half.write_all(b"GET / HTT").await.unwrap();
    while fixture.server.connections() < 3 {
        tokio::task::yield_now().await;
    }
    let begun = Instant::now();
    assert_eq!(fixture.server.stop(within(30.0)).await, StopReport { cut: 0 });
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(closed(&mut idle).await && closed(&mut silent).await && closed(&mut half).await);
}

#[tokio::test]
async fn a_body_in_flight_is_waited_for_and_not_cut() {
    let mut fixture = fixture(ServerOptions::default()).await;
    let mut client = connect(&fixture).await;
    send(&mut client, "/stream").await;
    let chunks = fixture.streams.recv().await.unwrap();
    let stop = tokio::spawn(fixture.server.stop(within(30.0)));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!stop.is_finished());
    chunks.send(Bytes::from_static(b"last words")).await.unwrap();
    drop(chunks);
    read_until(&mut client, "last words").await;
    assert_eq!(stop.await.unwrap(), StopReport { cut: 0 });
}

#[tokio::test]
async fn a_reader_that_stopped_reading_is_cut_at_the_deadline() {
    let mut fixture = fixture(ServerOptions::default()).await;
    let mut client = connect(&fixture).await;
    send(&mut client, "/stream").await;
    let chunks = fixture.streams.recv().await.unwrap();
    let pump = tokio::spawn(async move { while chunks.send(Bytes::from(vec![b'x'; 1 << 16])).await.is_ok() {} });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begun = Instant::now();
    let report = fixture.server.stop(within(0.3)).await;
    assert_eq!(report, StopReport { cut: 1 });
    assert!(begun.elapsed() < Duration::from_secs(2));
    tokio::time::timeout(Duration::from_secs(5), pump).await.unwrap().unwrap();
}

#[tokio::test]
async fn closing_answers_once_more_and_then_closes() {
    let fixture = fixture(ServerOptions::default()).await;
    let mut idle = connect(&fixture).await;
    send(&mut idle, "/").await;
    read_until(&mut idle, "hello").await;
    fixture.server.begin_close();
    assert!(closed(&mut idle).await);
    let mut late = connect(&fixture).await;
    send(&mut late, "/").await;
    read_until(&mut late, "hello").await;
    assert!(closed(&mut late).await);
}

#[tokio::test]
async fn a_server_that_was_closing_and_is_open_again_keeps_connections() {
    let fixture = fixture(ServerOptions::default()).await;
    fixture.server.begin_close();
    fixture.server.reopen();
    let mut client = connect(&fixture).await;
    for _ in 0..2 {
        send(&mut client, "/").await;
        read_until(&mut client, "hello").await;
    }
    fixture.server.begin_close();
    assert!(closed(&mut client).await);
}

#[tokio::test]
async fn headers_that_trickle_are_cut_and_idle_connections_have_their_own_time() {
    let options = ServerOptions { header_timeout_ms: 100, idle_timeout_ms: 1_500, ..ServerOptions::default() };
    let fixture = fixture(options).await;
    let mut slow = connect(&fixture).await;
    slow.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let mut idle = connect(&fixture).await;
    send(&mut idle, "/").await;
    read_until(&mut idle, "hello").await;
    assert!(closed(&mut slow).await);
    tokio::time::sleep(Duration::from_millis(300)).await;
    send(&mut idle, "/").await;
    read_until(&mut idle, "hello").await;
    assert!(closed(&mut idle).await, "idle for longer than its own time");
}

/// Reads nothing of a stream that never ends; returns how many bytes its connection took before it was cut.
async fn taken_by_a_client_that_never_reads(fixture: &mut Fixture, client: impl Future<Output = ()>) -> usize {
    let chunks = tokio::join!(client, fixture.streams.recv()).1.unwrap();
    let mut taken = 0;
    let chunk = || tokio::time::timeout(Duration::from_secs(10), chunks.send(Bytes::from(vec![b'x'; 1 << 14])));
    while chunk().await.expect("it is not cut").is_ok() {
        taken += 1 << 14;
    }
    taken
}

#[tokio::test]
async fn a_client_that_never_reads_is_cut_and_holds_little_until_then() {
    let mut fixture = fixture(ServerOptions { write_stall_ms: 300, ..ServerOptions::default() }).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    let mut client = socket.connect(fixture.server.local_addr()).await.unwrap();
    let taken = taken_by_a_client_that_never_reads(&mut fixture, send(&mut client, "/stream")).await;
    // The system's own buffers of both ends, which it counts double, and some of ours.
    assert!(taken < 1 << 20, "{taken} bytes were taken");
    assert_eq!(fixture.metrics.stalled.get(), 1);
    assert!(fixture.body_dropped.load(Ordering::SeqCst), "its place is free");
    let mut other = connect(&fixture).await;
    send(&mut other, "/").await;
    read_until(&mut other, "hello").await;
}

#[tokio::test]
async fn a_stream_of_http2_that_is_never_read_is_cut_too() {
    let mut fixture = fixture(ServerOptions { write_stall_ms: 300, ..ServerOptions::default() }).await;
    let stream = connect(&fixture).await;
    let (mut sender, connection) = hyper::client::conn::http2::handshake::<_, _, http_body_util::Empty<Bytes>>(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    )
    .await
    .unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::get("http://x/stream").body(http_body_util::Empty::new()).unwrap();
    let answer = sender.send_request(request);
    let mut held = None;
    // The connection is read all the time; only this stream's window stays closed.
    let taken = taken_by_a_client_that_never_reads(&mut fixture, async { held = Some(answer.await.unwrap()) }).await;
    assert!(taken < 8 << 20, "{taken} bytes were taken");
    assert_eq!(fixture.metrics.stalled.get(), 1);
    drop((held, driver));
}

#[tokio::test]
async fn one_address_has_its_connections_and_no_more() {
    let fixture = fixture(ServerOptions { max_connections_per_address: 2, ..ServerOptions::default() }).await;
    let mut first = connect(&fixture).await;
    let second = connect(&fixture).await;
    send(&mut first, "/").await;
    read_until(&mut first, "hello").await;
    assert!(closed(&mut connect(&fixture).await).await);
    assert_eq!(fixture.metrics.limited.get(), 1);
    drop(second);
    while fixture.server.connections() > 1 {
        tokio::task::yield_now().await;
    }
    let mut third = connect(&fixture).await;
    send(&mut third, "/").await;
    read_until(&mut third, "hello").await;
}

#[tokio::test]
async fn connections_without_a_request_make_room_for_those_that_wait() {
    let options = ServerOptions { max_connections: 2, header_timeout_ms: 400, ..ServerOptions::default() };
    let fixture = fixture(options).await;
    let mut silent = connect(&fixture).await;
    let mut idle = connect(&fixture).await;
    send(&mut idle, "/").await;
    read_until(&mut idle, "hello").await;
    let begun = Instant::now();
    let mut good = connect(&fixture).await;
    send(&mut good, "/").await;
    read_until(&mut good, "hello").await;
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert!(closed(&mut silent).await && closed(&mut idle).await);
}

#[tokio::test]
async fn a_connection_that_never_speaks_is_closed() {
    let fixture = fixture(ServerOptions { sniff_timeout_ms: 50, ..ServerOptions::default() }).await;
    assert!(closed(&mut connect(&fixture).await).await);
}

#[tokio::test]
async fn headers_over_the_limit_get_431() {
    let fixture = fixture(ServerOptions { max_header_bytes: 8192, ..ServerOptions::default() }).await;
    let mut client = connect(&fixture).await;
    let head = format!("GET / HTTP/1.1\r\nhost: x\r\nbig: {}\r\n\r\n", "y".repeat(20_000));
    client.write_all(head.as_bytes()).await.unwrap();
    assert!(read_until(&mut client, "\r\n").await.contains("431"));
}

#[tokio::test]
async fn a_client_that_leaves_a_silent_stream_is_known_at_once() {
    let mut fixture = fixture(ServerOptions::default()).await;
    let mut client = connect(&fixture).await;
    send(&mut client, "/stream").await;
    let chunks = fixture.streams.recv().await.unwrap();
    chunks.send(Bytes::from_static(b"first")).await.unwrap();
    read_until(&mut client, "first").await;
    drop(client);
    let begun = Instant::now();
    chunks.closed().await;
    // The rest of the body goes a moment later, on its own thread.
    while !fixture.body_dropped.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn http2_peers_are_told_to_go_and_finish_first() {
    let mut fixture = fixture(ServerOptions::default()).await;
    let stream = connect(&fixture).await;
    let (mut sender, connection) = hyper::client::conn::http2::handshake::<_, _, http_body_util::Empty<Bytes>>(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    )
    .await
    .unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::get("http://x/stream").body(http_body_util::Empty::new()).unwrap();
    let answer = tokio::spawn(sender.send_request(request));
    let chunks = fixture.streams.recv().await.unwrap();
    fixture.server.begin_close();
    chunks.send(Bytes::from_static(b"whole")).await.unwrap();
    drop(chunks);
    let body = answer.await.unwrap().unwrap().collect().await.unwrap().to_bytes();
    assert_eq!(body, "whole");
    tokio::time::timeout(Duration::from_secs(5), driver).await.unwrap().unwrap().unwrap();
    assert_eq!(fixture.server.stop(within(1.0)).await, StopReport { cut: 0 });
}

#[test]
fn a_limit_that_would_shut_everybody_out_is_refused_by_its_name() {
    assert!(ServerOptions::default().check("api.server").is_ok());
    for (options, key) in [
        (ServerOptions { write_stall_ms: 0, ..ServerOptions::default() }, "api.server.write_stall_ms"),
        (ServerOptions { max_connections: 0, ..ServerOptions::default() }, "api.server.max_connections"),
        (ServerOptions { max_header_bytes: 100, ..ServerOptions::default() }, "api.server.max_header_bytes"),
    ] {
        assert_eq!(options.check("api.server").unwrap_err().key, key);
    }
}
