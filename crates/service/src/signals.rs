//! SIGTERM and SIGINT, one by one: the first asks to leave, the second to leave now.

use tokio::signal::unix::{Signal as UnixSignal, SignalKind, signal};
use tokio::sync::mpsc;

/// The two signals that ask a program to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// From systemd and operators.
    Terminate,
    /// From a terminal.
    Interrupt,
}

/// The signals' receiver; from its creation on they no longer end the process by themselves.
#[derive(Debug)]
pub struct Signals {
    terminate: UnixSignal,
    interrupt: UnixSignal,
}

impl Signals {
    /// Takes the signals over.
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Moves the signals to a channel, for programs that take them from there.
    pub fn forward(mut self) -> mpsc::Receiver<Signal> {
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(async move { while sender.send(self.next().await).await.is_ok() {} });
        receiver
    }

    /// Waits for the next signal. Safe to cancel.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            Some(()) = self.terminate.recv() => Signal::Terminate,
            Some(()) = self.interrupt.recv() => Signal::Interrupt,
            else => std::future::pending().await,
        }
    }
}
