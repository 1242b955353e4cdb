//! systemd's notification protocol (sd_notify): datagrams to `$NOTIFY_SOCKET`.

use std::ffi::{OsStr, OsString};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The variables of the protocol; no child of a program may speak for it.
pub const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// Longest wait for a service manager that does not read.
const SEND_MAX: Duration = Duration::from_secs(1);

/// The way to the service manager; says nothing where there is none.
#[derive(Debug, Default)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Takes the values of [`VARIABLES`]; `process` is this process's id.
    ///
    /// The socket is a path, or `@` and an abstract name.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>, process: u32) -> Self {
        let [socket, span, of] = VARIABLES.map(variable);
        let socket = socket.as_deref().and_then(|address: &OsStr| {
            let address = match address.as_bytes().strip_prefix(b"@") {
                Some(name) => SocketAddr::from_abstract_name(name),
                None => SocketAddr::from_pathname(address),
            };
            let socket = UnixDatagram::unbound().ok()?;
            socket.set_write_timeout(Some(SEND_MAX)).ok()?;
            Some((socket, address.ok()?))
        });
        let number = |text: &OsString| text.to_str()?.parse::<u64>().ok();
        let ours = of.is_none_or(|of| number(&of) == Some(u64::from(process)));
        let span = span.as_ref().and_then(number).filter(|span| ours && *span > 0);
        Notifier { socket, watchdog: span.map(Duration::from_micros) }
    }

    /// Returns the silence after which the service manager takes this process for dead, where it watches.
    pub fn watchdog_span(&self) -> Option<Duration> {
        self.watchdog
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(message.as_bytes(), address)
        {
            tracing::warn!(%error, "the service manager could not be notified");
        }
    }

    /// The program serves.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// One line for `systemctl status`.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={}", text.replace('\n', " ")));
    }

    /// The program is on its way out.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// The current phase needs this much more; say it only while progress is real.
    pub fn extend_timeout(&self, span: Duration) {
        self.send(&format!("EXTEND_TIMEOUT_USEC={}", span.as_micros()));
    }

    /// The program is alive.
    pub fn watchdog(&self) {
        self.send("WATCHDOG=1");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn notifier(pairs: &[(&str, &OsStr)]) -> Notifier {
        let find = |name: &str| Some(pairs.iter().find(|(key, _)| *key == name)?.1.to_os_string());
        Notifier::from_variables(find, 7)
    }

    #[test]
    fn messages_reach_the_manager_and_nobody_is_fine_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let notifier = notifier(&[("NOTIFY_SOCKET", path.as_os_str())]);
        notifier.ready();
        notifier.extend_timeout(Duration::from_secs(2));
        let mut buffer = [0; 64];
        let length = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");
        let length = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"EXTEND_TIMEOUT_USEC=2000000");
        Notifier::default().ready();
    }

    #[test]
    fn a_watchdog_counts_only_for_the_process_that_it_names() {
        let span = |pairs: &[(&str, &str)]| {
            let pairs: Vec<_> = pairs.iter().map(|(key, value)| (*key, OsStr::new(*value))).collect();
            notifier(&pairs).watchdog_span()
        };
        assert_eq!(span(&[("WATCHDOG_USEC", "30000000")]), Some(Duration::from_secs(30)));
        assert_eq!(span(&[("WATCHDOG_USEC", "30000000"), ("WATCHDOG_PID", "7")]), Some(Duration::from_secs(30)));
        assert_eq!(span(&[("WATCHDOG_USEC", "30000000"), ("WATCHDOG_PID", "8")]), None);
        assert_eq!(span(&[("WATCHDOG_USEC", "0")]), None);
        assert_eq!(span(&[("WATCHDOG_USEC", "soon")]), None);
    }
}
