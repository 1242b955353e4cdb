//! The store of rollouts: compare-and-swap and a lease, as the gateways share it; at times it can't be used.

use fleet::rollout::{Lease, Rollout};

use crate::clock::At;

/// What every gateway sees of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stored {
    pub(crate) rollout: Option<Rollout>,
    /// Rises with each swap.
    pub(crate) revision: u64,
    pub(crate) lease: Lease,
}

/// The store.
#[derive(Debug, Default)]
pub(crate) struct Store {
    stored: Stored,
    pub(crate) down_until: At,
}

/// It can't be used, or somebody else was faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotStored;

impl Store {
    /// Looks at the rollout, as no gateway can.
    pub(crate) fn peek(&self) -> Option<&Rollout> {
        self.stored.rollout.as_ref()
    }

    /// Reads everything.
    pub(crate) fn load(&self, now: At) -> Result<Stored, NotStored> {
        if now < self.down_until { Err(NotStored) } else { Ok(self.stored.clone()) }
    }

    /// Puts a rollout in place of the revision `expected`; with `fence` the lease must still have that revision.
    pub(crate) fn swap(
        &mut self,
        now: At,
        expected: u64,
        fence: Option<u64>,
        rollout: Rollout,
    ) -> Result<(), NotStored> {
        let fenced = fence.is_some_and(|revision| revision != self.stored.lease.revision);
        if now < self.down_until || expected != self.stored.revision || fenced {
            return Err(NotStored);
        }
        self.stored.rollout = Some(rollout);
        self.stored.revision += 1;
        Ok(())
    }

    pub(crate) fn swap_lease(&mut self, now: At, expected: &Lease, next: Lease) -> Result<(), NotStored> {
        if now < self.down_until || *expected != self.stored.lease {
            return Err(NotStored);
        }
        self.stored.lease = next;
        Ok(())
    }
}
