//! Who coordinates: one gateway's claim to the lease, as a pure machine.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use words::{GatewayId, Moment};

/// The holder shows a sign of life this often.
const RENEW_EVERY: Duration = Duration::from_secs(1);
/// A holder that could not renew for this long acts no more.
const ACT_MAX: Duration = Duration::from_secs(3);
/// A beat that stands still for this long, by the watcher's own clock, is a holder's last one.
const SILENT_MAX: Duration = Duration::from_secs(5);

/// Who coordinates, as it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The gateway; none when it was given back.
    pub holder: Option<GatewayId>,
    /// Rises with each sign of life.
    pub beat: u64,
    /// Rises with each change of holder: the fencing token of every order.
    pub revision: u64,
}

/// One gateway's claim. Its own name in the store proves nothing: a life before it may have had the same one.
#[derive(Debug)]
pub struct Claim {
    me: GatewayId,
    /// The lease as it was last written by this life, and when that was begun.
    mine: Option<(Lease, Moment)>,
    /// What was seen last, and since when.
    seen: Option<(Lease, Moment)>,
}

impl Claim {
    /// Claims nothing yet.
    pub fn new(me: GatewayId) -> Self {
        Claim { me, mine: None, seen: None }
    }

    /// Returns what is to be written in place of `stored`, if anything. `wanted` is false when there is nothing to
    /// coordinate: then a lease is given back.
    pub fn next(&mut self, now: Moment, stored: &Lease, wanted: bool) -> Option<Lease> {
        if self.mine.as_ref().is_some_and(|(mine, _)| mine != stored) {
            self.mine = None;
        }
        if self.seen.as_ref().is_none_or(|(seen, _)| seen != stored) {
            self.seen = Some((stored.clone(), now));
        }
        let beat = stored.beat + 1;
        if let Some((mine, renewed_at)) = &self.mine {
            if !wanted {
                return Some(Lease { holder: None, beat, revision: mine.revision });
            }
            return (now.since(*renewed_at) >= RENEW_EVERY).then(|| Lease { beat, ..mine.clone() });
        }
        let still_since = self.seen.as_ref().map_or(now, |(_, since)| *since);
        let free = stored.holder.is_none() || now.since(still_since) >= SILENT_MAX;
        (wanted && free).then(|| Lease { holder: Some(self.me.clone()), beat, revision: stored.revision + 1 })
    }

    /// Takes note that `lease` was written; `begun` is the moment before that.
    pub fn wrote(&mut self, begun: Moment, lease: Lease) {
        self.mine = lease.holder.is_some().then_some((lease, begun));
    }

    /// Returns what to write to give the lease back.
    pub fn give_back(&mut self) -> Option<(Lease, Lease)> {
        let (mine, _) = self.mine.take()?;
        let next = Lease { holder: None, beat: mine.beat + 1, revision: mine.revision };
        Some((mine, next))
    }

    /// Returns the lease's revision while this gateway may act.
    pub fn holds(&self, now: Moment) -> Option<u64> {
        self.mine.as_ref().filter(|(_, renewed_at)| now.since(*renewed_at) <= ACT_MAX).map(|(mine, _)| mine.revision)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment::after_start(Duration::from_secs(seconds))
    }

    fn claim(name: &str) -> Claim {
        Claim::new(GatewayId::new(name).unwrap())
    }

    #[test]
    fn the_lease_is_taken_when_free_renewed_while_wanted_and_given_back() {
        let mut one = claim("g1");
        assert_eq!(one.next(at(0), &Lease::default(), false), None, "there is nothing to coordinate");
        let taken = one.next(at(0), &Lease::default(), true).unwrap();
        assert_eq!((taken.beat, taken.revision), (1, 1));
        one.wrote(at(0), taken.clone());
        assert_eq!(one.holds(at(0)), Some(1));
        assert_eq!(one.next(at(0), &taken, true), None);
        let renewed = one.next(at(1), &taken, true).unwrap();
        assert_eq!((renewed.beat, renewed.revision), (2, 1));
        one.wrote(at(1), renewed.clone());
        let back = one.next(at(2), &renewed, false).unwrap();
        assert_eq!((back.holder.clone(), back.revision), (None, 1));
        one.wrote(at(2), back.clone());
        assert_eq!(one.holds(at(2)), None);
        assert_eq!(one.next(at(2), &back, true).unwrap().revision, 2, "each taking is another revision");
    }

    #[test]
    fn a_silent_holder_is_followed_after_it_has_stopped_acting() {
        let (mut one, mut two) = (claim("g1"), claim("g2"));
        let held = one.next(at(0), &Lease::default(), true).unwrap();
        one.wrote(at(0), held.clone());
        assert_eq!(two.next(at(1), &held, true), None);
        assert_eq!(two.next(at(5), &held, true), None);
        assert_eq!(one.holds(at(4)), None, "it acts no more");
        let taken = two.next(at(6), &held, true).unwrap();
        assert_eq!(taken.revision, 2);
        two.wrote(at(6), taken.clone());
        // The first one wakes up.
        assert_eq!(one.next(at(7), &taken, true), None);
        assert_eq!(one.holds(at(7)), None);
    }

    #[test]
    fn a_holder_that_beats_is_never_followed_and_its_old_name_proves_nothing() {
        let mut two = claim("g1");
        for second in 0..60 {
            let held = Lease { holder: Some(GatewayId::new("g1").unwrap()), beat: second + 1, revision: 1 };
            assert_eq!(two.next(at(second), &held, true), None);
            assert_eq!(two.holds(at(second)), None);
        }
    }
}
