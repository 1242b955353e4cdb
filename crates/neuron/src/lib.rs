//! The worker: runs models in process and serves them.
//!
//! ```text
//! data plane -> gate -> text (template, tokenizer; off the runtime) -> engine thread (scheduler, engine)
//!     ^                                                                    |
//!     +---------------------- events, one bounded queue a request --------+
//! ```
//! [`node`] wires the parts and owns the order of things: control port, activation, data port, drain, exit.

mod activation;
mod cli;
mod control;
mod crumbs;
mod data;
mod engine_thread;
mod exit;
mod harness;
mod metrics;
mod models;
pub mod node;
pub mod options;
mod pace;
mod publisher;
mod sampling;
mod streams;

pub use cli::main;
