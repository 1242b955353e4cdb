//! The model machine, the drain machine and the machine of a node's life, as pure functions.

mod drain;
mod expand;
mod health;
mod hold;
mod hook;
mod model;
mod node;
mod order;
mod progress;

pub use drain::{Drain, DrainBudget, DrainFacts, DrainStep};
pub use expand::{ExpandError, expand, is_macro_name};
pub use health::{EngineFacts, HealthFacts, KvFacts, SESSION_SLOW, STEP_SLOW, STEP_STUCK, health};
pub use hook::{HookEvent, HookVerdict, OnFailure, hook_verdict};
pub use model::{ModelInput, RefusedTransition, next_model_state};
pub use node::{
    Act, CANARY_AGAIN_FIRST, CANARY_AGAIN_MAX, CANARY_MAX, ExitKind, NodeFacts, NodeLife, NodeRules, OFFER_EVERY,
    OFFERS_MAX, ORDER_SPAN_MAX, Record, RestartRecord,
};
