//! The vocabulary of the fleet: ids, time, the error table and status snapshots.
//!
//! Nothing here waits, reads a clock or opens a socket; every other crate may import it.

mod error;
mod ids;
mod moment;
mod status;

pub use error::{Code, Error, GrpcCode, Retry, Row};
pub use ids::{Epoch, Fingerprint, GatewayId, Generation, IdError, Incarnation, ModelId, NodeId, RequestId};
pub use moment::Moment;
pub use status::{
    ActivationProgress, Capabilities, DrainPhase, Intent, ModelLoad, ModelState, ModelStatus, NodeState, NodeStatus,
};
