//! Continuous-batch scheduling, the KV block ledger, sampling and text assembly over an abstract engine.
//!
//! Every request goes submit -> plan -> step -> complete. Nothing here waits, reads a clock or names a tensor:
//! the [`Scheduler`] is a synchronous machine, and the [`engine::Engine`] below it is one synchronous call.

pub mod engine;
mod fake;
mod ledger;
mod request;
pub mod sampling;
mod scheduler;
mod text;

pub use fake::{FAKE_END_TOKEN, FAKE_VOCABULARY, FakeEngine, fake_next_token, fake_token_bytes};
pub use ledger::Ledger;
pub use request::{ChoiceStart, Event, EventKind, FinishReason, Limits, Load, RequestKey, Submission, Usage};
pub use scheduler::Scheduler;
pub use text::{Assembler, Piece, StopRules, TokenBytes};
