//! One module for each verb.

pub mod compare;
pub mod engines;
pub mod fit;
pub mod history;
pub mod limits;
pub mod merge;
pub mod report;
pub mod run;
pub mod score;
pub mod synth;
pub mod verify;
pub mod worker;
