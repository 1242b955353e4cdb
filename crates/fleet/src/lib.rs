//! Fleet view, routing, admission, attempts and their fences, as pure functions.

mod attempt;
mod budget;
pub mod rollout;
mod route;
mod view;

pub use attempt::{Accepted, Fence, FenceError};
pub use budget::RetryBudget;
pub use route::{Route, RouteQuery, Target, route};
pub use view::{FleetView, NodeView, Observation, SILENT_AFTER, Slot};
