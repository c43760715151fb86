//! What is measured from outside the worker: its memory, and the machine it runs on.

pub mod host;
pub mod memory;
pub mod metrics;
