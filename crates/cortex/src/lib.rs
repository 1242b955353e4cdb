//! The gateway: one OpenAI-compatible endpoint over a fleet of neurons.
//!
//! ```text
//! client -> front -> (fleet view, route) -> proxy: attempts, polled inside the response body -> neuron
//!                        ^
//!           fleet task <- one attach loop a neuron (control stream, slow poll)
//! ```
//! [`gateway`] wires the parts and owns the order of things: admin port, fleet, API port, drain, exit.

mod admin;
mod attach;
mod cli;
mod command;
mod events;
mod fleet_task;
mod front;
pub mod gateway;
mod lifecycle;
mod logs;
mod metrics;
mod models;
mod operate;
pub mod options;
mod proxy;
mod pull;
mod requests;
mod rollout;
mod targets;

pub use cli::main;
