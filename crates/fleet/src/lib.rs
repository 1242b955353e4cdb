//! Fleet view, routing, admission, attempts and their fences, as pure functions.

mod attempt;
mod budget;
mod journey;
mod patience;
mod quarantine;
pub mod rollout;
mod route;
mod view;

pub use attempt::{Accepted, Fence, FenceError};
pub use budget::RetryBudget;
pub use journey::{
    CONTINUATIONS_MAX, Ending, HAND_BACKS_MAX, Journey, JourneyLimits, Origin, POISON_CRASHES, Step, Successor,
    worth_waiting,
};
pub use patience::{ASLEEP_AFTER, Patience, PatienceFacts, PatienceLimits, UNREACHABLE_AFTER, Verdict};
pub use quarantine::{QUARANTINE, Quarantine, SUSPICION};
pub use route::{Route, RouteQuery, Target, route};
pub use view::{FleetView, NodeView, Observation, SILENT_AFTER, Slot};
