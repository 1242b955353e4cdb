//! The process shell: config, logs, metrics, traces, the server loop with a bounded drain, signals.
//!
//! Of the domain only `words` is known here: points in time, and errors. Environment, clock and signals are read by the programs' `main` and by
//! this crate's shells, and passed down from there.

pub mod addresses;
pub mod body;
pub mod clock;
pub mod command;
pub mod config;
pub mod deadman;
pub mod document;
pub mod exit;
pub mod gate;
pub mod https;
pub mod lanes;
pub mod metrics;
pub mod notify;
pub mod pages;
pub mod program;
pub mod progress;
pub mod ring;
pub mod server;
pub mod signals;
pub mod supervision;
pub mod telemetry;
pub mod terminal;
pub mod token;
pub mod traces;
