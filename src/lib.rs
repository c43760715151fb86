//! evalfw runs the same load, train and infer scenarios on each fine-tuning framework, measures them,
//! and writes the decision report. The harness knows no framework: engines are worker processes behind
//! the protocol of [`evalfw_engine`].

pub mod accumulate;
pub mod adoption;
pub mod cli;
pub mod cmd;
pub mod compare;
pub mod conformance;
pub mod data;
pub mod decide;
pub mod engines;
pub mod fit;
mod folders;
pub mod interrupt;
pub mod measure;
pub mod model;
pub mod output;
pub mod plan;
pub mod probe;
pub mod record;
pub mod render;
pub mod run;
pub mod scenario;
pub mod scorecard;
pub mod stats;
pub mod verify;
pub mod worker;
