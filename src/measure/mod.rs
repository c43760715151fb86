//! What is measured from outside the worker: its memory, and the machine that it runs on.

pub mod host;
pub mod limits;
pub mod memory;
pub mod metrics;
pub mod watch;
