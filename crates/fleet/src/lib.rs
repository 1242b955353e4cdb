//! Fleet view, routing, admission, attempts and their fences, as pure functions.

mod attempt;
mod budget;
mod catalogue;
mod journey;
mod patience;
mod place;
mod quarantine;
pub mod rollout;
mod route;
mod view;

pub use attempt::{Accepted, Fence, FenceError};
pub use budget::RetryBudget;
pub use catalogue::{coming, on_its_way};
pub use journey::{
    CONTINUATIONS_MAX, Ending, HAND_BACKS_MAX, Journey, JourneyLimits, Origin, POISON_CRASHES, Step, Successor,
    worth_waiting,
};
pub use patience::{ASLEEP_AFTER, Patience, PatienceFacts, PatienceLimits, UNREACHABLE_AFTER, Verdict};
pub use place::{Place, PlaceQuery, Placements, Room, place};
pub use quarantine::{QUARANTINE, Quarantine, SUSPICION};
pub use route::{Route, RouteQuery, Target, route, still_loading};
pub use view::{FAILED_PAUSE, FleetView, NodeView, Observation, SILENT_AFTER, Slot};
