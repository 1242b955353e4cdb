//! Ends a wedged exit: its own OS thread, so that a stuck runtime can't stop it.

use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

/// Disarms when dropped.
#[derive(Debug)]
pub struct Deadman {
    _disarm: Sender<()>,
}

/// Longest wait for the words to be out: stderr may be what is stuck, and its lock with it.
const LAST_WORDS_MAX: Duration = Duration::from_millis(200);

fn last_words(budget: Duration) {
    let (said, heard) = channel::<()>();
    let say = move || {
        eprintln!("the exit is past its budget of {} s; ending the process", budget.as_secs_f64());
        drop(said);
    };
    if std::thread::Builder::new().name("last-words".into()).spawn(say).is_ok() {
        let _ = heard.recv_timeout(LAST_WORDS_MAX);
    }
}

/// Ends the process with `exit_code` unless the returned guard is dropped within `budget`.
///
/// # Errors
/// When the system gives no thread.
pub fn arm(budget: Duration, exit_code: u8) -> std::io::Result<Deadman> {
    let (disarm, armed) = channel::<()>();
    std::thread::Builder::new().name("deadman".into()).spawn(move || {
        if armed.recv_timeout(budget) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            last_words(budget);
            std::process::exit(i32::from(exit_code));
        }
    })?;
    Ok(Deadman { _disarm: disarm })
}
