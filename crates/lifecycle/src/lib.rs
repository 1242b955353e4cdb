//! The model machine, the drain machine and the machine of a node's life, as pure functions.

mod claims;
mod drain;
mod expand;
mod health;
mod hold;
mod hook;
mod model;
mod model_life;
mod node;
mod order;
mod progress;
mod restart;
mod room;
mod turnstile;

pub use claims::{Claim, ClaimAct, Claims, DoorFacts};
pub use drain::{Drain, DrainBudget, DrainFacts, DrainStep};
pub use expand::{ExpandError, expand, is_macro_name};
pub use health::{EngineFacts, HealthFacts, KvFacts, SESSION_SLOW, STEP_SLOW, STEP_STUCK, health};
pub use hook::{HookEvent, HookVerdict, OnFailure, hook_verdict};
pub use model::{ModelInput, RefusedTransition, next_model_state};
pub use model_life::{CALLERS_MAX, Caller, Leaving, ModelAct, ModelAnswer, ModelEvent, ModelLife, ModelWork};
pub use node::{
    Act, CANARY_AGAIN_FIRST, CANARY_AGAIN_MAX, CANARY_MAX, ExitKind, NodeFacts, NodeLife, NodeRules, OFFER_EVERY,
    OFFERS_MAX, ORDER_SPAN_MAX, Record, RestartRecord,
};
pub use restart::{Restart, RestartPolicy, Restarts};
pub use room::{Held, Room, no_room, room};
pub use turnstile::{Turn, Turnstile, TurnstileLimits};
