//! A command of the operator's: argv without a shell, its own process group, killed past its time.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Command;

use crate::notify::VARIABLES;

/// A process group that is killed unless it ended by itself.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // Its leader was not waited for yet, so the number is nobody else's.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// Runs a command to its end; its output goes where this program's own does.
///
/// Past `timeout`, or when the future is dropped, its whole process group is killed.
///
/// # Errors
/// Why it did not succeed, for operators.
pub async fn run(argv: &[String], timeout: Duration) -> Result<(), String> {
    let Some((program, arguments)) = argv.split_first() else { return Err("there is no command".into()) };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).process_group(0);
    // It must not speak for this program to the service manager.
    VARIABLES.iter().for_each(|name| _ = command.env_remove(name));
    let mut child = command.spawn().map_err(|error| format!("{program} could not be started: {error}"))?;
    let mut group = Group(child.id().and_then(|id| Pid::from_raw(id as i32)));
    match tokio::time::timeout(timeout, child.wait()).await {
        Ok(ended) => {
            group.0 = None;
            match ended {
                Ok(status) if status.success() => Ok(()),
                Ok(status) => Err(format!("{program} ended with {status}")),
                Err(error) => Err(format!("{program} could not be waited for: {error}")),
            }
        }
        Err(_) => Err(format!("{program} took longer than {} s and was killed", timeout.as_secs_f64())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn shell(script: &str) -> Vec<String> {
        ["sh", "-c", script].map(String::from).to_vec()
    }

    #[tokio::test]
    async fn a_command_says_how_it_ended() {
        let minute = Duration::from_secs(60);
        assert_eq!(run(&shell("exit 0"), minute).await, Ok(()));
        assert!(run(&shell("exit 3"), minute).await.unwrap_err().contains("exit status: 3"));
        assert!(run(&["/nonexistent/program".into()], minute).await.unwrap_err().contains("could not be started"));
        assert!(run(&[], minute).await.is_err());
    }

    #[tokio::test]
    async fn a_command_past_its_time_is_killed_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let alive = folder.path().join("alive");
        let script = format!("(sleep 1; touch {alive:?}) & wait");
        let error = run(&shell(&script), Duration::from_millis(200)).await.unwrap_err();
        assert!(error.contains("took longer than 0.2 s"), "{error}");
        tokio::time::sleep(Duration::from_millis(1300)).await;
        assert!(!alive.exists(), "a grandchild outlived the kill");
    }
}
