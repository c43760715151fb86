//! From instruction data to the exact token ids of every step.

pub mod adapter;
pub mod batches;
pub mod chat;
pub mod dataset;
