//! A hub of a test's own: real sockets, HTTP by hand, so that it can lie, cut and stall as real ones do.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The commit of everything.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A file of the hub.
#[derive(Clone)]
pub struct HubFile {
    pub bytes: Arc<Vec<u8>>,
    /// What the hub says of it.
    pub etag: String,
    pub size: u64,
    /// Large files lie on another host.
    pub elsewhere: bool,
}

/// What somebody asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Whether it came to the other host.
    pub elsewhere: bool,
    pub method: String,
    pub path: String,
    /// The first byte that was asked for.
    pub from: usize,
    pub token: Option<String>,
}

/// What is done instead of a right answer.
#[derive(Clone, Debug)]
pub enum Trick {
    Status(u16, &'static str),
    /// The connection breaks after so many bytes of the body.
    Cut(usize),
    /// Nothing comes after so many bytes of the body.
    Stall(usize),
    /// The whole file, whatever was asked for.
    NoRanges,
    /// Another part than was asked for.
    OtherPart,
    /// Bytes more than were announced; with their true length in the head, or without a length.
    Grow {
        with_length: bool,
    },
    /// One byte is another.
    Damage,
    /// A body of one's own.
    Body(String),
}

type Plan = Box<dyn FnMut(&Ask) -> Option<Trick> + Send>;

#[derive(Default)]
struct State {
    files: BTreeMap<String, HubFile>,
    names: Vec<String>,
    asks: Vec<Ask>,
    plan: Option<Plan>,
    sent: usize,
}

/// A hub that runs until it is dropped.
pub struct TestHub {
    pub url: String,
    state: Arc<Mutex<State>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for TestHub {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl TestHub {
    pub async fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let (hub, other) =
            (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
        let url = format!("http://{}", hub.local_addr().unwrap());
        let elsewhere = format!("http://{}", other.local_addr().unwrap());
        let mut tasks = Vec::new();
        for (listener, is_other) in [(hub, false), (other, true)] {
            let (state, elsewhere) = (state.clone(), elsewhere.clone());
            tasks.push(tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve(stream, state.clone(), elsewhere.clone(), is_other));
                }
            }));
        }
        TestHub { url, state, tasks }
    }

    /// Adds a file by the name and hash that the hub gives it.
    pub fn add(&self, name: &str, bytes: Vec<u8>, etag: &str, elsewhere: bool) {
        let size = bytes.len() as u64;
        let file = HubFile { bytes: Arc::new(bytes), etag: etag.into(), size, elsewhere };
        let mut state = self.state.lock().unwrap();
        state.names.push(name.into());
        state.files.insert(name.into(), file);
    }

    /// Changes what the hub says of a file.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut HubFile)) {
        change(self.state.lock().unwrap().files.get_mut(name).unwrap());
    }

    /// Lists a name besides.
    pub fn list(&self, name: &str) {
        self.state.lock().unwrap().names.push(name.into());
    }

    /// Decides on every request.
    pub fn plan(&self, plan: impl FnMut(&Ask) -> Option<Trick> + Send + 'static) {
        self.state.lock().unwrap().plan = Some(Box::new(plan));
    }

    /// Plays these, one a download of bytes, then answers rightly.
    pub fn tricks(&self, tricks: impl IntoIterator<Item = Trick>) {
        let mut tricks = tricks.into_iter().collect::<Vec<_>>().into_iter();
        self.plan(move |ask| if ask.is_download() { tricks.next() } else { None });
    }

    pub fn asks(&self) -> Vec<Ask> {
        self.state.lock().unwrap().asks.clone()
    }

    /// Returns how many requests fit.
    pub fn count(&self, which: impl Fn(&Ask) -> bool) -> usize {
        self.state.lock().unwrap().asks.iter().filter(|ask| which(ask)).count()
    }

    /// Returns how many bytes of files were sent.
    pub fn sent(&self) -> usize {
        self.state.lock().unwrap().sent
    }
}

impl Ask {
    /// Returns whether it is for a file's bytes, where they are.
    pub fn is_download(&self) -> bool {
        self.method == "GET" && self.elsewhere
    }
}

async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if head.len() > 16_384 || stream.read(&mut byte).await.ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    String::from_utf8(head).ok()
}

async fn serve(mut stream: TcpStream, state: Arc<Mutex<State>>, elsewhere: String, is_other: bool) {
    let Some(head) = read_head(&mut stream).await else { return };
    let mut lines = head.lines();
    let mut first = lines.next().unwrap_or_default().split(' ');
    let header = |name: &str| {
        head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_string())
        })
    };
    let from = header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let ask = Ask {
        elsewhere: is_other,
        method: first.next().unwrap_or_default().into(),
        path: first.next().unwrap_or_default().into(),
        from: from.unwrap_or(0),
        token: header("authorization"),
    };
    let (trick, file, names) = {
        let mut state = state.lock().unwrap();
        state.asks.push(ask.clone());
        let mut plan = state.plan.take();
        let trick = plan.as_mut().and_then(|plan| plan(&ask));
        state.plan = plan;
        let name = ask.path.split_once(&format!("/{COMMIT}/")).map(|(_, name)| name.replace("%20", " "));
        (trick, name.and_then(|name| state.files.get(&name).cloned()), state.names.clone())
    };
    let answer = answer(&ask, trick, file, &names, &elsewhere);
    let _ = stream.write_all(answer.head.as_bytes()).await;
    if ask.method == "HEAD" {
        return;
    }
    state.lock().unwrap().sent += if answer.counts { answer.body.len() } else { 0 };
    let _ = stream.write_all(&answer.body).await;
    let _ = stream.flush().await;
    if answer.stalls {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
}

struct Answer {
    head: String,
    body: Vec<u8>,
    counts: bool,
    stalls: bool,
}

fn text(status: u16, headers: &str, body: &str) -> Answer {
    let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n", body.len());
    Answer { head, body: body.into(), counts: false, stalls: false }
}

fn answer(ask: &Ask, trick: Option<Trick>, file: Option<HubFile>, names: &[String], elsewhere: &str) -> Answer {
    match &trick {
        Some(Trick::Status(status, headers)) => return text(*status, headers, "told to"),
        Some(Trick::Body(body)) => return text(200, "", body),
        _ => {}
    }
    if ask.path.starts_with("/api/models/org/repo/revision/") {
        let list: Vec<String> = names.iter().map(|name| format!("{{\"rfilename\":{name:?}}}")).collect();
        return text(200, "", &format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[{}]}}", list.join(",")));
    }
    let Some(file) = file else { return text(404, "x-error-code: EntryNotFound\r\n", "no such file") };
    if !ask.elsewhere {
        let facts =
            format!("x-repo-commit: {COMMIT}\r\nx-linked-size: {}\r\nx-linked-etag: \"{}\"\r\n", file.size, file.etag);
        if file.elsewhere {
            return text(302, &format!("{facts}location: {elsewhere}{}\r\n", ask.path), "it is elsewhere");
        }
        // Small files lie on the hub itself, one redirect away.
        if let Some(path) = ask.path.strip_prefix("/org/repo/resolve/") {
            return text(307, &format!("{facts}location: /cache/{path}\r\n"), "it is over there");
        }
    }
    bytes(ask, trick.as_ref(), &file)
}

fn bytes(ask: &Ask, trick: Option<&Trick>, file: &HubFile) -> Answer {
    let whole = file.bytes.len();
    let from = match trick {
        Some(Trick::NoRanges) => 0,
        Some(Trick::OtherPart) => ask.from + 1,
        _ => ask.from.min(whole),
    };
    let mut body = file.bytes[from..].to_vec();
    let mut length = Some(body.len());
    let mut total = whole;
    match trick {
        Some(Trick::Cut(at) | Trick::Stall(at)) => body.truncate(*at),
        Some(Trick::Damage) => body[0] ^= 1,
        Some(Trick::Grow { with_length }) => {
            body.extend_from_slice(b"more");
            total += 4;
            length = with_length.then_some(body.len());
        }
        _ => {}
    }
    let length = length.map(|length| format!("content-length: {length}\r\n")).unwrap_or_default();
    let status =
        if from > 0 { format!("206 X\r\ncontent-range: bytes {from}-{}/{total}", whole - 1) } else { "200 X".into() };
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\netag: \"{}\"\r\n{length}\r\n", file.etag);
    Answer { head, body, counts: true, stalls: matches!(trick, Some(Trick::Stall(_))) }
}
