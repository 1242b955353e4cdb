//! What both programs tell a service manager, over a real socket: the right words in the right order, more time only
//! while something gets on, and an end for an exit that is stuck.
#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::io::{PipeReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use fleet_tests::scene::stream;
use fleet_tests::{Client, free_port};
use rustix::process::{Pid, Signal, kill_process};

/// Longest wait for anything that should happen soon.
const SOON: Duration = Duration::from_secs(20);

/// A program under a service manager of the test's own.
struct Watched {
    child: Child,
    manager: UnixDatagram,
    heard: Vec<(Duration, String)>,
    begun: Instant,
}

impl Watched {
    fn start(program: &str, folder: &Path, config: &str, watchdog_ms: u64) -> Watched {
        let log = File::create(folder.join(format!("{}.log", config.len()))).unwrap();
        Watched::start_logging(program, folder, config, watchdog_ms, Stdio::from(log))
    }

    fn start_logging(program: &str, folder: &Path, config: &str, watchdog_ms: u64, log: Stdio) -> Watched {
        let socket = folder.join("notify");
        let manager = UnixDatagram::bind(&socket).unwrap();
        manager.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let file = folder.join("config.toml");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new(program);
        command.args(["serve", "--config"]).arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", (watchdog_ms * 1000).to_string());
        Watched { child: command.spawn().unwrap(), manager, heard: Vec::new(), begun: Instant::now() }
    }

    fn listen(&mut self) {
        let mut buffer = [0; 512];
        while let Ok(length) = self.manager.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            self.heard.push((self.begun.elapsed(), text));
        }
    }

    /// Listens until a message begins so; returns when it came.
    fn until(&mut self, start: &str) -> Duration {
        let patience = Instant::now() + SOON;
        loop {
            if let Some((at, _)) = self.heard.iter().find(|(_, text)| text.starts_with(start)) {
                return *at;
            }
            assert!(Instant::now() < patience, "no {start}: {:?}", self.heard);
            self.listen();
        }
    }

    fn listen_for(&mut self, span: Duration) {
        let until = Instant::now() + span;
        while Instant::now() < until {
            self.listen();
        }
    }

    fn terminate(&self) {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), Signal::TERM).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        let patience = Instant::now() + SOON;
        loop {
            self.listen();
            if let Some(status) = self.child.try_wait().unwrap() {
                self.listen();
                return status;
            }
            assert!(Instant::now() < patience, "it does not end: {:?}", self.heard);
        }
    }

    /// Returns how many messages that begin so came in a time.
    fn count(&self, start: &str, times: std::ops::Range<Duration>) -> usize {
        self.heard.iter().filter(|(at, text)| times.contains(at) && text.starts_with(start)).count()
    }

    fn place(&self, start: &str) -> usize {
        self.heard.iter().position(|(_, text)| text.starts_with(start)).unwrap()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn neuron(data: u16, control: u16, more: &str) -> String {
    format!(
        "[[default_models]]\nid = \"m\"\nharness = \"fake\"\n[data]\nbind = \"127.0.0.1:{data}\"\n\
         [control]\nbind = \"127.0.0.1:{control}\"\n{more}"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_tells_how_it_starts_lives_and_leaves() {
    let (folder, data) = (tempfile::tempdir().unwrap(), free_port().unwrap());
    let more = "[harness.fake]\nload_ms = 1500\nstep_ms = 10\n[drain]\nsettle_max_ms = 200\n";
    let config = neuron(data, free_port().unwrap(), more);
    let mut worker = Watched::start(env!("CARGO_BIN_EXE_test-neuron"), folder.path(), &config, 600);
    let ready = worker.until("READY=1");
    let extensions = worker.count("EXTEND_TIMEOUT_USEC=", Duration::ZERO..ready);
    assert!((1..=4).contains(&extensions), "one a second at most while it loads: {:?}", worker.heard);
    assert!(worker.place("STATUS=loading m (1 of 1), ") < worker.place("READY=1"), "{:?}", worker.heard);
    worker.listen_for(Duration::from_millis(1200));
    let alive = worker.count("WATCHDOG=1", ready..SOON);
    assert!(alive >= 3, "at least every half of its span: {alive} in 1.2 s");
    assert_eq!(worker.count("EXTEND_TIMEOUT_USEC=", ready..SOON), 0, "what runs has no timeout");
    worker.until("STATUS=serving; models: 1");

    // Some two seconds of tokens, and its end is what lets the worker go.
    let client = Client::new(&format!("http://127.0.0.1:{data}")).unwrap();
    let running = stream(&client, "leave with me", 200);
    tokio::time::sleep(Duration::from_millis(300)).await;
    worker.terminate();
    assert_eq!(worker.wait().code(), Some(0));
    assert!(running.await.unwrap().unwrap().whole());
    let stopping = worker.until("STOPPING=1");
    assert!(worker.count("EXTEND_TIMEOUT_USEC=", stopping..SOON) >= 2, "tokens are progress: {:?}", worker.heard);
    let order = ["READY=1", "STATUS=serving", "STOPPING=1", "STATUS=draining: 1 requests left"];
    let places: Vec<usize> = order.iter().map(|start| worker.place(start)).collect();
    assert!(places.is_sorted(), "{places:?} {:?}", worker.heard);
    assert_eq!(worker.count("READY=1", Duration::ZERO..SOON * 2), 1);
    assert_eq!(worker.count("STOPPING=1", Duration::ZERO..SOON * 2), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_makes_no_progress_asks_for_no_more_time() {
    let (folder, data) = (tempfile::tempdir().unwrap(), free_port().unwrap());
    // Its step takes longer than the test.
    let more = "[harness.fake]\nprefill_ms = 60000\n[drain]\nsettle_max_ms = 0\nhandoff_s = 100.0\ndeadline_s = 4.0\n\
                cut_max_ms = 100\nunload_max_s = 0.5\n";
    // The warm-up is a step too: the model comes later, by an order.
    let config = neuron(data, free_port().unwrap(), more).replace("[[default_models]]\nid = \"m\"\n", "");
    let config = config.replacen("harness = \"fake\"\n", "", 1);
    let mut worker = Watched::start(env!("CARGO_BIN_EXE_test-neuron"), folder.path(), &config, 0);
    worker.until("READY=1");
    let load = format!("http://127.0.0.1:{data}/models/load");
    let body = serde_json::json!({ "model_id": "m", "harness": "fake" });
    let loading = tokio::spawn(reqwest::Client::new().post(load).json(&body).send());
    worker.listen_for(Duration::from_millis(500));
    let leaving = worker.begun.elapsed();
    worker.terminate();
    worker.listen_for(Duration::from_millis(3000));
    // The drain's own steps are progress; after them nothing is.
    let quiet = leaving + Duration::from_millis(1500)..SOON;
    assert_eq!(worker.count("EXTEND_TIMEOUT_USEC=", quiet), 0, "{:?}", worker.heard);
    worker.wait();
    assert_eq!(worker.count("WATCHDOG=1", Duration::ZERO..SOON * 2), 0, "nobody watches");
    loading.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_tells_how_it_starts_lives_and_leaves() {
    let (folders, data) = ([tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()], free_port().unwrap());
    let (control, api) = (free_port().unwrap(), free_port().unwrap());
    let config = neuron(data, control, "[harness.fake]\nstep_ms = 10\n");
    let mut worker = Watched::start(env!("CARGO_BIN_EXE_test-neuron"), folders[0].path(), &config, 0);
    worker.until("READY=1");
    let config = format!(
        "[api]\nbind = \"127.0.0.1:{api}\"\n[admin]\nbind = \"127.0.0.1:{}\"\n[drain]\nsettle_ms = 100\n\
         [[neurons]]\ncontrol = \"127.0.0.1:{control}\"\n",
        free_port().unwrap()
    );
    let mut gateway = Watched::start(env!("CARGO_BIN_EXE_test-cortex"), folders[1].path(), &config, 600);
    let ready = gateway.until("READY=1");
    gateway.until("STATUS=serving; 1 of 1 workers are routable");
    gateway.listen_for(Duration::from_millis(1200));
    let alive = gateway.count("WATCHDOG=1", ready..SOON);
    assert!(alive >= 3, "at least every half of its span: {alive} in 1.2 s");

    let client = Client::new(&format!("http://127.0.0.1:{api}")).unwrap();
    let running = stream(&client, "leave with me", 200);
    tokio::time::sleep(Duration::from_millis(400)).await;
    gateway.terminate();
    assert_eq!(gateway.wait().code(), Some(0));
    assert!(running.await.unwrap().unwrap().whole());
    let stopping = gateway.until("STOPPING=1");
    assert!(gateway.count("EXTEND_TIMEOUT_USEC=", stopping..SOON) >= 1, "tokens are progress: {:?}", gateway.heard);
    let order = ["STATUS=waiting", "READY=1", "STATUS=serving", "STOPPING=1", "STATUS=draining: 1 requests left"];
    let places: Vec<usize> = order.iter().map(|start| gateway.place(start)).collect();
    assert!(places.is_sorted(), "{places:?} {:?}", gateway.heard);
    worker.terminate();
    assert_eq!(worker.wait().code(), Some(0));
}

/// A log that nobody reads any more, and that is full.
fn stuff(reader: &PipeReader) {
    let way_in = format!("/proc/self/fd/{}", reader.as_raw_fd());
    // Its own description, so that only this side does not block.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let mut pipe = OpenOptions::new().write(true).custom_flags(nonblocking).open(way_in).unwrap();
    for size in [4096, 1] {
        while pipe.write(&vec![b'x'; size]).is_ok() {}
    }
}

fn wedged(program: &str, config: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut program = Watched::start_logging(program, folder.path(), config, 0, Stdio::from(writer));
    program.until("READY=1");
    program.listen_for(Duration::from_millis(300));
    stuff(&reader);
    program.terminate();
    let begun = Instant::now();
    assert_eq!(program.wait().code(), Some(70), "the deadman ends it");
    assert!(begun.elapsed() > Duration::from_secs(1), "within the budget it may still leave by itself");
    let mut log = [0; 16];
    reader.read_exact(&mut log).unwrap();
}

#[test]
fn the_deadman_ends_a_worker_whose_log_is_stuck() {
    let more = "[drain]\nsettle_max_ms = 0\nhandoff_s = 0.0\ndeadline_s = 0.0\ncut_max_ms = 0\nunload_max_s = 0.0\n";
    let config = neuron(free_port().unwrap(), free_port().unwrap(), more);
    wedged(env!("CARGO_BIN_EXE_test-neuron"), &config);
}

#[test]
fn the_deadman_ends_a_gateway_whose_log_is_stuck() {
    let (api, admin) = (free_port().unwrap(), free_port().unwrap());
    let config = format!(
        "[api]\nbind = \"127.0.0.1:{api}\"\n[admin]\nbind = \"127.0.0.1:{admin}\"\n\
         [drain]\nsettle_ms = 0\ndeadline_s = 0.0\ncut_max_ms = 0\n"
    );
    wedged(env!("CARGO_BIN_EXE_test-cortex"), &config);
}
