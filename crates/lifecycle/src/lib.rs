//! The model machine and the drain machine, as pure functions.

mod drain;
mod model;

pub use drain::{Drain, DrainBudget, DrainFacts, DrainStep};
pub use model::{ModelInput, RefusedTransition, next_model_state};
