//! Real processes for the fleet tests: started on free ports, watched by their own words, ended by their own ids.

mod client;
mod process;
pub mod prometheus;
mod rig;
pub mod scene;
pub mod soak;
pub mod supervisor;

pub use client::{Answer, Client, chat_body, fake_answer};
pub use process::{Fleet, Gateway, Neuron, Running, Starter, free_port, programs};
pub use rig::{Cut, Knife, Rig, Wire};
