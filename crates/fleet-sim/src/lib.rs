//! The deterministic fleet: nodes, gateways, clients and operators on one simulated time line, around the very machines
//! that both programs call. It holds no decision of its own; it breaks things, and checks invariants after each event.
//!
//! ```text
//! seed -> Plan -> World { clients -> gateways -> links -> nodes } -> Report { counters, violation, log }
//! ```
//! Equal seeds give equal runs, byte by byte.

mod client;
mod clock;
mod context;
mod coordinator;
mod counters;
mod demand;
mod faults;
mod forward;
mod gateway;
mod loading;
mod log;
mod model;
mod net;
mod node;
mod operator;
mod plan;
mod planted;
mod relay;
mod rollouts;
mod run;
mod serve;
mod sessions;
mod store;
mod talk;
mod world;

pub use context::Violation;
pub use counters::{Count, Counters};
pub use planted::Planted;
pub use run::{Report, RunOptions, run};
