//! Ends a wedged exit: its own OS thread, so that a stuck runtime can't stop it.

use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

/// Disarms when dropped.
#[derive(Debug)]
pub struct Deadman {
    _disarm: Sender<()>,
}

/// Ends the process with `exit_code` unless the returned guard is dropped within `budget`.
///
/// # Errors
/// When the system gives no thread.
pub fn arm(budget: Duration, exit_code: u8) -> std::io::Result<Deadman> {
    let (disarm, armed) = channel::<()>();
    std::thread::Builder::new().name("deadman".into()).spawn(move || {
        if armed.recv_timeout(budget) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            // The logger may be what is stuck, so this goes to stderr by the shortest way.
            eprintln!("the exit is past its budget of {} s; ending the process", budget.as_secs_f64());
            std::process::exit(i32::from(exit_code));
        }
    })?;
    Ok(Deadman { _disarm: disarm })
}
