//! A command of the operator's: argv without a shell, its own process group, killed past its time, and nothing of it
//! left when it is over.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::fs::{Access, access};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::notify::VARIABLES;
use crate::ring::LINE_BYTES_MAX;

/// How long the last words of a command that has ended are waited for.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// The program and its arguments; no shell reads them.
    pub argv: Vec<String>,
    /// Variables besides this process's own.
    pub environment: Vec<(String, String)>,
    /// Its working directory; this process's own when absent.
    pub directory: Option<PathBuf>,
    /// What it reads on its standard input.
    pub input: Vec<u8>,
    /// Its process group is killed also when this process dies without a word. That takes a small process of its own, a
    /// shell that waits for this one's end.
    pub guarded: bool,
}

/// Finds a signal that may ask a process to stop, by its name, with or without 'SIG'.
pub fn stop_signal(name: &str) -> Option<Signal> {
    Some(match name.strip_prefix("SIG").unwrap_or(name) {
        "TERM" => Signal::TERM,
        "INT" => Signal::INT,
        "QUIT" => Signal::QUIT,
        "HUP" => Signal::HUP,
        "USR1" => Signal::USR1,
        "USR2" => Signal::USR2,
        "KILL" => Signal::KILL,
        _ => return None,
    })
}

/// Finds a program as a command does: where it says, or in the folders of PATH. `None` when nothing there can be run.
pub fn find_program(program: &str) -> Option<PathBuf> {
    let runs = |path: &PathBuf| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(runs);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).map(|folder| folder.join(program)).find(runs)
}

/// Why a command did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandFailure {
    /// There is no such program.
    Missing(String),
    /// The program is there and may not be run.
    NotExecutable(String),
    /// The system could not start it.
    NotStarted(String, String),
    /// It ended with this status.
    Exited(String, i32),
    /// A signal ended it.
    Signalled(String, i32),
    /// It took longer than this and was killed, with everything that it had started.
    TimedOut(String, Duration),
    /// How it ended could not be learned.
    Lost(String, String),
}

impl std::fmt::Display for CommandFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CommandFailure::Missing(program) => {
                write!(f, "{program} could not be started: there is no such program")
            }
            CommandFailure::NotExecutable(program) => {
                write!(f, "{program} could not be started: it may not be run; is it executable?")
            }
            CommandFailure::NotStarted(program, why) => write!(f, "{program} could not be started: {why}"),
            CommandFailure::Exited(program, status) => write!(f, "{program} ended with exit status: {status}"),
            CommandFailure::Signalled(program, signal) => write!(f, "{program} was ended by signal {signal}"),
            CommandFailure::TimedOut(program, after) => {
                write!(f, "{program} took longer than {} s and was killed", after.as_secs_f64())
            }
            CommandFailure::Lost(program, why) => write!(f, "{program} could not be waited for: {why}"),
        }
    }
}

impl std::error::Error for CommandFailure {}

/// A running command and its process group. Dropping it kills them all.
#[derive(Debug)]
pub struct Running {
    program: String,
    child: Child,
    leader: Option<Pid>,
    /// Ends with this process, and kills the group then. Dropped before the group's number may be anybody else's.
    guard: Option<Child>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Waits for the end of its standard input, which only the death of this process brings, and kills the group then.
const GUARD: &str = "cat >/dev/null; kill -s KILL -- \"-$1\"";

/// Starts the guard of a process group.
fn guard(leader: Pid) -> Option<Child> {
    let mut command = Command::new("sh");
    command.args(["-c", GUARD, "guard"]).arg(leader.as_raw_nonzero().to_string());
    // Not in this process's group: what a terminal sends there must not end the guard first.
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).kill_on_drop(true);
    let started = command.spawn();
    started.inspect_err(|error| tracing::warn!(%error, "no guard: what is started may outlive a kill -9")).ok()
}

impl Running {
    /// Starts a command; its outputs are pipes, to be taken with [`Running::outputs`].
    ///
    /// # Errors
    /// [`CommandFailure`] when it can't be started.
    pub fn start(order: &Order) -> Result<Running, CommandFailure> {
        let Some((program, arguments)) = order.argv.split_first() else {
            return Err(CommandFailure::Missing("an empty command".into()));
        };
        let mut command = Command::new(program);
        command.args(arguments).envs(order.environment.iter().cloned()).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // It is not this process, and must not speak to the service manager for it.
        VARIABLES.iter().for_each(|name| _ = command.env_remove(name));
        if let Some(directory) = &order.directory {
            command.current_dir(directory);
        }
        let child = command.spawn().map_err(|error| match error.kind() {
            ErrorKind::NotFound => CommandFailure::Missing(program.clone()),
            ErrorKind::PermissionDenied => CommandFailure::NotExecutable(program.clone()),
            _ => CommandFailure::NotStarted(program.clone(), error.to_string()),
        })?;
        let leader = child.id().and_then(|id| Pid::from_raw(id as i32));
        let guard = leader.filter(|_| order.guarded).and_then(guard);
        Ok(Running { program: program.clone(), child, leader, guard })
    }

    /// Lets its standard input end.
    pub fn close_input(&mut self) {
        self.child.stdin = None;
    }

    /// Returns its process id, until it was waited for.
    pub fn id(&self) -> Option<u32> {
        self.leader.map(|pid| pid.as_raw_nonzero().get() as u32)
    }

    /// Signals its whole process group; nothing happens once it was waited for.
    pub fn signal(&self, signal: Signal) {
        if let Some(leader) = self.leader {
            // The leader was not reaped yet, so the number is nobody else's.
            let _ = kill_process_group(leader, signal);
        }
    }

    /// Takes what it writes.
    pub fn outputs(&mut self) -> (Option<impl AsyncRead + Unpin + use<>>, Option<impl AsyncRead + Unpin + use<>>) {
        (self.child.stdout.take(), self.child.stderr.take())
    }

    /// Waits for its end, then kills whatever it has left behind in its group. Safe to cancel and to call again.
    ///
    /// # Errors
    /// Of the system.
    pub async fn ended(&mut self) -> std::io::Result<ExitStatus> {
        if let Some(leader) = self.leader {
            // Seen, but not reaped: until then its number names its group and nobody else's.
            let seen = move || waitid(WaitId::Pid(leader), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            tokio::task::spawn_blocking(seen).await.map_err(std::io::Error::other)??;
            self.signal(Signal::KILL);
            if let Some(mut guard) = self.guard.take() {
                let _ = guard.kill().await;
            }
            self.leader = None;
        }
        self.child.wait().await
    }

    /// Says what a status means.
    ///
    /// # Errors
    /// Every status but success.
    pub fn judge(&self, ended: std::io::Result<ExitStatus>) -> Result<(), CommandFailure> {
        use std::os::unix::process::ExitStatusExt;
        let program = self.program.clone();
        match ended {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(match (status.code(), status.signal()) {
                (Some(code), _) => CommandFailure::Exited(program, code),
                (None, signal) => CommandFailure::Signalled(program, signal.unwrap_or_default()),
            }),
            Err(error) => Err(CommandFailure::Lost(program, error.to_string())),
        }
    }
}

/// Runs a command to its end; `line` is told each line that it writes to either output, cut to
/// [`LINE_BYTES_MAX`].
///
/// Past `timeout`, or when the future is dropped, its whole process group is killed; when it ends by itself, so is what
/// it has left running.
///
/// # Errors
/// [`CommandFailure`].
pub async fn run(order: &Order, timeout: Duration, mut line: impl FnMut(&str)) -> Result<(), CommandFailure> {
    let mut running = Running::start(order)?;
    let stdin = running.child.stdin.take();
    let (out, err) = running.outputs();
    let (mut out, mut err) = (Lines::new(out), Lines::new(err));
    let feed = async {
        if let Some(mut stdin) = stdin {
            // It need not read what it is told.
            let _ = stdin.write_all(&order.input).await;
        }
        std::future::pending::<()>().await;
    };
    let mut feed = std::pin::pin!(feed);
    let mut deadline = std::pin::pin!(tokio::time::sleep(timeout));
    let ended = {
        let mut end = std::pin::pin!(running.ended());
        loop {
            tokio::select! {
                biased;
                ended = &mut end => break Some(ended),
                () = &mut deadline => break None,
                () = &mut feed => {}
                read = out.fill() => out.tell(read, &mut line),
                read = err.fill() => err.tell(read, &mut line),
            }
        }
    };
    let Some(ended) = ended else {
        running.signal(Signal::KILL);
        let _ = tokio::time::timeout(LAST_WORDS, running.ended()).await;
        return Err(CommandFailure::TimedOut(running.program.clone(), timeout));
    };
    let last_words = async {
        while !(out.over && err.over) {
            tokio::select! {
                read = out.fill() => out.tell(read, &mut line),
                read = err.fill() => err.tell(read, &mut line),
            }
        }
    };
    // A grandchild that has left the group may hold the pipes for ever.
    let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
    out.flush(&mut line);
    err.flush(&mut line);
    running.judge(ended)
}

/// Lines out of a pipe.
pub struct Lines<R> {
    pipe: Option<R>,
    buffer: Vec<u8>,
    /// What has come of a line that has no end yet.
    partial: Vec<u8>,
    /// The pipe has ended.
    pub over: bool,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Reads lines of `pipe`; `None` has ended already.
    pub fn new(pipe: Option<R>) -> Self {
        let over = pipe.is_none();
        Lines { pipe, buffer: vec![0; 16 << 10], partial: Vec::new(), over }
    }

    /// Waits for further output, and returns how many bytes came; for ever once the pipe has ended. Safe to cancel.
    pub async fn fill(&mut self) -> usize {
        let Some(pipe) = self.pipe.as_mut().filter(|_| !self.over) else { return std::future::pending().await };
        let read = pipe.read(&mut self.buffer).await.unwrap_or(0);
        self.over = read == 0;
        read
    }

    /// Tells the lines that end in the `read` bytes that [`Lines::fill`] has brought.
    pub fn tell(&mut self, read: usize, line: &mut impl FnMut(&str)) {
        let mut rest = &self.buffer[..read];
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            keep(&mut self.partial, &rest[..end]);
            tell(&mut self.partial, line);
            rest = &rest[end + 1..];
        }
        keep(&mut self.partial, rest);
    }

    /// Tells what came last, without the end of its line.
    pub fn flush(&mut self, line: &mut impl FnMut(&str)) {
        if !self.partial.is_empty() {
            tell(&mut self.partial, line);
        }
    }
}

/// Adds to a line what still fits in it.
fn keep(partial: &mut Vec<u8>, more: &[u8]) {
    let room = LINE_BYTES_MAX.saturating_sub(partial.len()).min(more.len());
    partial.extend_from_slice(&more[..room]);
}

fn tell(partial: &mut Vec<u8>, line: &mut impl FnMut(&str)) {
    line(String::from_utf8_lossy(partial).trim_end_matches('\r'));
    partial.clear();
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
