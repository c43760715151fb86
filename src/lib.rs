//! evalfw runs the same load, train and infer scenarios on each fine-tuning framework, measures them,
//! and writes the decision report. The harness knows no framework: engines are worker processes behind
//! the protocol of [`evalfw_engine`].

pub mod cmd;
pub mod decide;
pub mod measure;
pub mod record;
pub mod render;
pub mod scenario;
pub mod stats;
