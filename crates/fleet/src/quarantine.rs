//! Requests that crash workers: a request that two workers in a row died of is refused for long if the dead left a
//! breadcrumb that names it, and until they could have said so.

use std::collections::VecDeque;
use std::time::Duration;

use words::{Fingerprint, Moment};

/// How long a request is refused.
pub const QUARANTINE: Duration = Duration::from_secs(600);
/// How long a suspect is refused, while the dead come back and say what they died of.
pub const SUSPICION: Duration = Duration::from_secs(10);
/// Most requests that are suspected or refused at once; the oldest are forgotten first.
const ENTRIES_MAX: usize = 1024;

#[derive(Clone, Copy, Debug)]
struct Entry {
    body: Fingerprint,
    name: Fingerprint,
    since: Moment,
    proven: bool,
}

/// The table of suspects and proven ones.
#[derive(Clone, Debug, Default)]
pub struct Quarantine {
    entries: VecDeque<Entry>,
}

impl Quarantine {
    /// Takes a request that ended as poison: the hash of its body, and the name by which workers knew it.
    pub fn suspect(&mut self, now: Moment, body: Fingerprint, name: Fingerprint) {
        self.expire(now);
        self.entries.retain(|entry| entry.body != body);
        if self.entries.len() == ENTRIES_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back(Entry { body, name, since: now, proven: false });
    }

    /// Takes the breadcrumbs of a crash; returns how many requests they prove guilty.
    pub fn crumbs(&mut self, now: Moment, crumbs: &[Fingerprint]) -> usize {
        self.expire(now);
        let mut proven = 0;
        for entry in self.entries.iter_mut().filter(|entry| !entry.proven && crumbs.contains(&entry.name)) {
            (entry.proven, entry.since) = (true, now);
            proven += 1;
        }
        proven
    }

    /// Returns whether nothing is suspected or refused, so that nobody needs to hash bodies.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns how much longer a request is refused, if it is.
    pub fn refuses(&self, now: Moment, body: &Fingerprint) -> Option<Duration> {
        let entry = self.entries.iter().find(|entry| entry.body == *body)?;
        let span = if entry.proven { QUARANTINE } else { SUSPICION };
        span.checked_sub(now.since(entry.since)).filter(|left| !left.is_zero())
    }

    fn expire(&mut self, now: Moment) {
        self.entries.retain(|entry| now.since(entry.since) < QUARANTINE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(byte: u8) -> Fingerprint {
        Fingerprint([byte; 32])
    }

    #[test]
    fn only_a_crumb_that_names_a_request_refuses_it_for_long_and_only_for_ten_minutes() {
        let at = |seconds| Moment::after_start(Duration::from_secs(seconds));
        let mut table = Quarantine::default();
        table.suspect(at(0), print(1), print(11));
        table.suspect(at(0), print(2), print(12));
        assert_eq!(table.refuses(at(4), &print(1)), Some(Duration::from_secs(6)), "the dead have not spoken");
        assert_eq!(table.crumbs(at(5), &[print(12), print(13)]), 1);
        assert_eq!(table.crumbs(at(6), &[print(12)]), 0, "known already");
        assert_eq!(table.refuses(at(10), &print(1)), None);
        assert_eq!(table.refuses(at(65), &print(2)), Some(Duration::from_secs(540)));
        assert_eq!(table.refuses(at(605), &print(2)), None);
        table.crumbs(at(700), &[]);
        assert!(table.is_empty());
    }

    #[test]
    fn the_table_is_bounded() {
        let mut table = Quarantine::default();
        for i in 0..2 * ENTRIES_MAX as u64 {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&i.to_le_bytes());
            table.suspect(Moment::ZERO, Fingerprint(bytes), print(1));
        }
        assert_eq!(table.entries.len(), ENTRIES_MAX);
    }
}
