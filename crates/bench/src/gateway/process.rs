//! The processes that are measured: started on free ports, read from /proc, killed in the end.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Longest wait until a program listens.
const START_MAX: Duration = Duration::from_secs(20);

/// Asks the system to end this process with the one that started it.
pub(super) fn die_with_parent() -> Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
}

/// Finds a free port of this machine.
pub(super) fn free_address() -> Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// A program under measurement; killed when dropped.
#[derive(Debug)]
pub(super) struct Program {
    child: Child,
    pub(super) address: SocketAddr,
}

impl Program {
    /// Starts a program that will listen at `address`, and waits until it does.
    pub(super) fn start(command: &mut Command, address: SocketAddr, log: &Path) -> Result<Self> {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let mut program = Program { child, address };
        let until = Instant::now() + START_MAX;
        while std::net::TcpStream::connect(address).is_err() {
            if program.child.try_wait()?.is_some() || Instant::now() > until {
                bail!("{command:?} does not listen at {address}: {}", std::fs::read_to_string(log)?);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(program)
    }

    fn proc(&self) -> std::path::PathBuf {
        format!("/proc/{}", self.child.id()).into()
    }

    /// Seconds of processor time that all threads have used so far. The scheduler's own account of each thread is used:
    /// the process's one counts in hundredths of a second.
    pub(super) fn cpu(&self) -> Result<f64> {
        let mut nanoseconds = 0.0;
        for task in std::fs::read_dir(self.proc().join("task"))? {
            let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
            nanoseconds += text.split(' ').next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0);
        }
        Ok(nanoseconds / 1e9)
    }

    /// Bytes in memory.
    pub(super) fn resident(&self) -> Result<f64> {
        let text = std::fs::read_to_string(self.proc().join("statm"))?;
        let pages: f64 = text.split_whitespace().nth(1).context("statm has no second field")?.parse()?;
        Ok(pages * rustix::param::page_size() as f64)
    }

    /// Returns whether it still runs.
    pub(super) fn alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
