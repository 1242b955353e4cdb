//! What the service manager is told of a program's life, and when: each thing once, and more time only while there is
//! progress.

use std::time::Duration;

use words::Moment;

use crate::notify::Notifier;

/// The time asked for at each sign of progress; what is silent for longer, and past its unit's own timeout, is stuck.
/// It only counts past that timeout, so it may be generous: a slow disk needs minutes for a thousandth of a large model.
pub const EXTENSION: Duration = Duration::from_secs(300);
/// Progress is told at most this often.
pub const EXTEND_EVERY: Duration = Duration::from_secs(1);

/// The one who speaks to the service manager. `M` is what tells how far a program has come: it moves or it does not.
#[derive(Debug)]
pub struct Supervision<M> {
    notifier: Notifier,
    ready: bool,
    stopping: bool,
    status: String,
    /// How far it was at the last extension, or at the first look.
    mark: Option<M>,
    extended_at: Option<Moment>,
    beaten_at: Option<Moment>,
}

impl<M: PartialEq> Supervision<M> {
    /// Begins with a program that is starting.
    pub fn new(notifier: Notifier) -> Self {
        Supervision {
            notifier,
            ready: false,
            stopping: false,
            status: String::new(),
            mark: None,
            extended_at: None,
            beaten_at: None,
        }
    }

    /// Returns whether it was ready once.
    pub fn was_ready(&self) -> bool {
        self.ready
    }

    /// Returns whether the process is on its way out for good.
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// The program serves, or will be asked to: its start is over.
    pub fn ready(&mut self) {
        if !std::mem::replace(&mut self.ready, true) {
            self.notifier.ready();
        }
    }

    /// The process is on its way out and nothing calls it off.
    pub fn stopping(&mut self) {
        if !std::mem::replace(&mut self.stopping, true) {
            self.notifier.stopping();
        }
    }

    /// Something begins whose progress nobody sees, and which takes this long at most.
    pub fn begins(&self, longest: Duration) {
        if self.in_transit() {
            self.notifier.extend_timeout(longest);
        }
    }

    /// Returns how often [`Supervision::look`] must be called at least.
    pub fn look_every(&self) -> Option<Duration> {
        self.notifier.watchdog_span().map(|span| span / 2)
    }

    /// Takes a look: says that the program is alive where that is wanted, its status when it is another one, and that
    /// it needs more time when it starts or stops and its mark has moved.
    pub fn look(&mut self, now: Moment, mark: M, status: String) {
        if self.status != status {
            self.notifier.status(&status);
            self.status = status;
        }
        if let Some(every) = self.look_every()
            // A look that comes a moment early must not wait for the next one: by then the span may be over.
            && self.beaten_at.is_none_or(|at| now >= at + every / 2)
        {
            self.notifier.watchdog();
            self.beaten_at = Some(now);
        }
        let moved = self.mark.as_ref().is_some_and(|before| *before != mark);
        let due = self.extended_at.is_none_or(|at| now >= at + EXTEND_EVERY);
        if self.mark.is_none() {
            self.mark = Some(mark);
        } else if moved && due && self.in_transit() {
            self.notifier.extend_timeout(EXTENSION);
            (self.mark, self.extended_at) = (Some(mark), Some(now));
        }
    }

    /// Only a start and a stop have a timeout.
    fn in_transit(&self) -> bool {
        !self.ready || self.stopping
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashMap;
    use std::ffi::OsString;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    struct Heard {
        manager: UnixDatagram,
        _folder: tempfile::TempDir,
    }

    impl Heard {
        fn all(&self) -> Vec<String> {
            let mut buffer = [0; 256];
            std::iter::from_fn(|| {
                let length = self.manager.recv(&mut buffer).ok()?;
                Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
            })
            .collect()
        }
    }

    fn supervised(watchdog: Option<&str>) -> (Supervision<u32>, Heard) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        let mut variables = HashMap::from([("NOTIFY_SOCKET", OsString::from(path))]);
        variables.extend(watchdog.map(|span| ("WATCHDOG_USEC", OsString::from(span))));
        let notifier = Notifier::from_variables(|name| variables.get(name).cloned(), 1);
        (Supervision::new(notifier), Heard { manager, _folder: folder })
    }

    fn at(ms: u64) -> Moment {
        Moment::after_start(Duration::from_millis(ms))
    }

    #[test]
    fn more_time_is_asked_for_only_while_something_moves() {
        let (mut life, heard) = supervised(None);
        // Nothing is known of progress before the second look.
        for (ms, mark) in [(0, 0), (500, 0), (900, 1), (1000, 2), (1500, 3), (1899, 3), (1900, 3), (60_000, 3)] {
            life.look(at(ms), mark, "loading".into());
        }
        let extension = format!("EXTEND_TIMEOUT_USEC={}", EXTENSION.as_micros());
        assert_eq!(heard.all(), ["STATUS=loading", &extension, &extension], "at 900 and 1900 ms");
        life.ready();
        life.look(at(70_000), 4, "loading".into());
        assert_eq!(heard.all(), ["READY=1"], "what runs has no timeout");
        life.stopping();
        life.stopping();
        life.look(at(70_500), 4, "draining".into());
        life.look(at(71_000), 4, "draining".into());
        assert_eq!(heard.all(), ["STOPPING=1", "STATUS=draining", &extension], "it moved once since the start");
        life.begins(Duration::from_secs(2));
        assert_eq!(heard.all(), ["EXTEND_TIMEOUT_USEC=2000000"]);
    }

    #[test]
    fn the_watchdog_is_fed_twice_in_its_span_and_only_where_there_is_one() {
        let (mut life, heard) = supervised(Some("4000000"));
        assert_eq!(life.look_every(), Some(Duration::from_secs(2)));
        for ms in [0, 500, 1999, 2000, 2500, 4100] {
            life.look(at(ms), 0, String::new());
        }
        assert_eq!(heard.all(), ["WATCHDOG=1"; 3]);
        let (mut life, heard) = supervised(Some("4000000"));
        [0, 1999, 3998, 5997].into_iter().for_each(|ms| life.look(at(ms), 0, String::new()));
        assert_eq!(heard.all(), ["WATCHDOG=1"; 4], "a look is a moment early, and none is left out for it");
        let (mut life, heard) = supervised(None);
        life.look(at(0), 0, String::new());
        assert!(heard.all().is_empty() && life.look_every().is_none());
    }
}
