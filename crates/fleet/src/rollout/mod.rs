//! Rolling restarts under a capacity floor: what may be done next, from what is stored and what is seen.
//!
//! ```text
//! pending -> permitted -> ordered -> back -> answered -> opened -> done
//!    ^          |            |        |         |          |
//!    '-- void --'            '--------'----> failed, and the rollout pauses; resume looks again, abort ends it
//! ```
//! [`plan`] is recomputed every tick. The coordinator stores the rollout that it returns by compare-and-swap, takes
//! the first of its steps, and feeds the outcome to [`Rollout::settle`]. Whoever coordinates next does the same from
//! what is stored: every step may be taken twice. An order is bound to one life and one epoch of its node, so an old
//! coordinator's late order is refused.
//!
//! - RO1: a permit is given and an order sent only while every model of the node keeps `min_available` replicas
//!   elsewhere, for every live gateway. A node that holds a permit counts as away, from the permit on and until it
//!   was healthy for a while. Of a model that comes on demand nodes count that would load it for the first request, and
//!   while it is in use these keep the floor too.
//! - RO2: every wait has a bound, after which the rollout is paused with a reason.

mod capacity;
mod lease;
mod operate;
mod plan;
mod policy;
mod rehearse;
mod timers;

pub use capacity::Blocker;
pub use lease::{Claim, Lease};
pub use operate::Outcome;
pub use plan::{Plan, Step, World, notes, plan};
pub use policy::{
    BACK_WITHIN, BLOCKED_MAX, Before, DEADLINE_OF_NODES, HEALTH_FOR, HOLD_TTL, MaxUnavailable, MinAvailable,
    NodeProgress, Phase, Policy, Progress, Reason, Rollout,
};
pub use rehearse::{Wave, rehearse};
pub use timers::{ASLEEP, Timers};

#[cfg(test)]
mod kit;
#[cfg(test)]
mod plan_tests;
#[cfg(test)]
mod world_tests;
