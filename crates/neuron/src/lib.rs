//! The worker: runs models in process and serves them.
//!
//! ```text
//! data plane -> gate -> text (template, tokenizer; off the runtime) -> engine thread (scheduler, engine)
//!     ^                                                                    |
//!     +---------------------- events, one bounded queue a request --------+
//! ```
//! [`node`] wires the parts and owns the order of things: control port, activation, data port, drain, exit.

mod activation;
mod asking;
mod canary;
mod check;
mod cli;
mod compat;
mod constraint;
mod control;
mod crumbs;
mod data;
mod emptying;
mod engine_thread;
mod fetch;
mod harness;
mod history;
mod inspect;
mod keeper;
mod kv;
mod life;
mod logs;
mod manager;
mod metrics;
mod models;
pub mod node;
pub mod options;
mod pace;
mod process;
mod publisher;
mod pull;
mod ready;
mod rehearse;
mod sampling;
mod sessions;
mod state_dir;
mod stopped;
mod streams;
mod turns;

pub use cli::main;
