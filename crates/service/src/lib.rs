//! The process shell: config, tracing, metrics, the server loop with a bounded drain, signals.
//!
//! No word of the domain is known here. Environment, clock and signals are read by the programs' `main` and by
//! this crate's shells, and passed down from there.

pub mod config;
pub mod deadman;
pub mod document;
pub mod exit;
pub mod metrics;
pub mod notify;
pub mod server;
pub mod signals;
pub mod telemetry;
pub mod token;
