//! The messages about engines that choose kernels by measuring them.

use crate::protocol::BatchRef;
use serde::{Deserialize, Serialize};

/// Runs what will be timed, off every clock, while the engine may measure kernels; nothing is trained. With nothing to
/// run it only asks for the figures. Engines that do not tune run nothing.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Tune {
    /// Micro-batches to train on. An adapter has to be attached.
    pub train: Option<BatchRef>,
    pub evaluate: Option<BatchRef>,
    pub generate: Option<Generate>,
}

/// A prompt, and tokens to decode after it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Generate {
    pub prompt: Vec<u32>,
    pub steps: usize,
}

/// What an engine measured in this process so far. A kind of operation is one that has one choice of its kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Tuning {
    /// Kinds of operations whose kernels were measured.
    pub measured: u64,
    /// Kinds that were used and whose fastest kernel was known from an earlier process.
    pub cached: u64,
    /// Kinds that came first when nothing is measured any more, and run by the framework's default.
    pub late: u64,
    /// Time of the measuring, compiling included.
    pub seconds: f64,
}
