//! The vocabulary of the fleet: ids, time, the error table and status snapshots.
//!
//! Nothing here waits, reads a clock or opens a socket; every other crate may import it.

mod error;
mod ids;
mod inspection;
mod intent;
mod moment;
mod status;

pub use error::{Code, Error, GrpcCode, Loading, Retry, Row};
pub use ids::{
    Epoch, Fingerprint, GatewayId, Generation, IdError, Incarnation, ModelId, NodeId, RequestId, RolloutId, random_name,
};
pub use inspection::{ComponentHealth, Health, Inspection, ItemRun, LaneItem, ModelHistory, StateChange};
pub use intent::{Canary, Door, HandoffPolicy, Intent, IntentOrder, RolloutClaim};
pub use moment::Moment;
pub use status::{
    ActivationProgress, CRUMBS_MAX, Capabilities, DrainPhase, DrainProgress, Hold, ModelCard, ModelLoad, ModelState,
    ModelStatus, NodeMemory, NodeState, NodeStatus, UpgradeOutcome,
};
