//! The parts of the report that are made of sentences: what speaks for and against each framework, what is won and lost,
//! what to do, what may go wrong. All of it is worked out from the record.

pub mod contrast;
pub mod frameworks;
pub mod predictions;
pub mod recommendations;
pub mod risks;
pub mod success;
