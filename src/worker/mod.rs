//! Worker processes: starting them, talking to them, ending them.

mod client;
mod failure;
mod process;

pub use client::Client;
pub use failure::Failure;
pub use process::{WorkerCommand, kill_all};
