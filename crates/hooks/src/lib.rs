//! Hooks: what operators run at the turns of a node's and a model's life. Commands, HTTP calls, and functions of a
//! program that embeds a worker; each bounded in time and output, and remembered with how it ended.
//!
//! Which turns there are, in which order hooks run and what a failure means is decided in `lifecycle`.

mod folder;
mod http;
mod options;
mod run;
mod set;

pub use options::{HookConfigError, HookOptions, HooksOptions, HttpHookOptions};
pub use run::{HookFailure, Turn};
pub use set::{Function, FunctionHook, HookMetrics, HookReport, Hooks, LastRun, Source, Stopped};
