//! How a call to a worker can fail, and what that means for its cell.

use crate::record::{CellError, Outcome};
use evalfw_engine::Error as EngineError;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Engine(EngineError),
    #[error("the worker could not be started: {0}")]
    Start(std::io::Error),
    /// The process ended without a reply.
    #[error("the worker died ({how})")]
    Died { how: String, out_of_memory: bool },
    #[error("no reply within {} s", .0.as_secs())]
    Timeout(Duration),
    /// Something on the pipe that is not the awaited reply.
    #[error("the worker broke the protocol: {0}")]
    Protocol(String),
    /// An answer that cannot be right.
    #[error("{0}")]
    Wrong(String),
    /// The harness's own files.
    #[error("{0}")]
    Harness(String),
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Engine(EngineError::Unavailable { .. }) => Outcome::Unavailable,
            Self::Engine(EngineError::OutOfMemory { .. }) | Self::Died { out_of_memory: true, .. } => {
                Outcome::Oom
            }
            Self::Engine(EngineError::NotFinite { .. } | EngineError::Wrong { .. }) | Self::Wrong(_) => {
                Outcome::Wrong
            }
            Self::Died { .. } => Outcome::Crashed,
            Self::Timeout(_) => Outcome::Timeout,
            Self::Engine(_) | Self::Start(_) | Self::Protocol(_) | Self::Harness(_) | Self::Interrupted => {
                Outcome::Failed
            }
        }
    }

    /// The failure as it stands in the record.
    pub fn record(&self, during: &str, stderr_tail: Vec<String>) -> CellError {
        let (message, advice) = match self {
            Self::Engine(EngineError::Unavailable { reason, advice }) => {
                (reason.clone(), Some(advice.clone()))
            }
            Self::Timeout(_) => (self.to_string(), Some("raise timeout_seconds of the scenario".into())),
            Self::Died { out_of_memory: true, .. } => (
                self.to_string(),
                Some("a shorter sequence_length or a smaller model needs less memory".into()),
            ),
            _ => (self.to_string(), None),
        };
        CellError { during: during.to_owned(), message, advice, stderr_tail }
    }
}
