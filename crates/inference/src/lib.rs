//! Continuous-batch scheduling, the KV block ledger, sampling and text assembly over an abstract engine.
//!
//! Every request goes submit -> plan -> step -> complete. Nothing here waits, reads a clock or names a tensor:
//! the [`Scheduler`] is a synchronous machine, and the [`engine::Engine`] below it is one synchronous call.

mod admit;
pub mod constraint;
pub mod engine;
mod fake;
mod ledger;
#[cfg(test)]
mod model_tests;
mod prefix;
mod queue;
mod request;
pub mod sampling;
mod scheduler;
mod sequence;
mod step;
mod stop;
#[cfg(test)]
mod test_kit;
mod text;

pub use fake::{FAKE_END_TOKEN, FAKE_VOCABULARY, FAKE_WIDTH, FakeEngine, fake_next_token, fake_token_bytes};
pub use ledger::Ledger;
pub use prefix::{PrefixBlock, PrefixHash, Publication, prefix_hash};
pub use request::{
    ChoiceStart, Event, EventKind, FinishReason, Limits, Load, Pooling, Priority, RequestKey, Score, Scoring,
    Submission, Task, Usage,
};
pub use scheduler::Scheduler;
pub use text::{Assembler, Piece, StopRules, TokenBytes};
