//! The parts of the report that are made of sentences: what speaks for and against each framework, what is won and lost,
//! what to do, what may go wrong. All of it is worked out from the record.

/// Parameters of a model that takes a good part of the memory target; the 7B model has 7.6 × 10^9.
const LARGE: u64 = 7_000_000_000;

pub mod contrast;
pub mod frameworks;
pub mod predictions;
pub mod recommendations;
pub mod risks;
pub mod success;
