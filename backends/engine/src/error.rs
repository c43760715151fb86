//! What can go wrong in an engine, by the kinds the harness tells apart.

use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::path::Path;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Error {
    /// A file or value the user gave is wrong. The message names the file and the field.
    #[error("{message}")]
    Input { message: String },
    /// The device or driver is not there; `advice` says what to install or to build.
    #[error("{reason}; {advice}")]
    Unavailable { reason: String, advice: String },
    /// The engine does not do this (yet).
    #[error("not supported: {message}")]
    Unsupported { message: String },
    /// The device or the host ran out of memory, and the framework said so.
    #[error("out of memory: {message}")]
    OutOfMemory { message: String },
    /// A loss or gradient is not a finite number.
    #[error("not finite: {message}")]
    NotFinite { message: String },
    /// What the device computes is wrong, by a check of the engine's own.
    #[error("wrong: {message}")]
    Wrong { message: String },
    /// The framework failed.
    #[error("{message}")]
    Framework { message: String },
    /// A call that does not fit the protocol or comes out of order.
    #[error("protocol: {message}")]
    Protocol { message: String },
}

impl Error {
    pub fn input(message: impl Display) -> Self {
        Self::Input { message: message.to_string() }
    }

    /// An input error in the file at `path`.
    pub fn file(path: &Path, problem: impl Display) -> Self {
        Self::input(format_args!("{}: {problem}", path.display()))
    }

    pub fn unsupported(message: impl Display) -> Self {
        Self::Unsupported { message: message.to_string() }
    }

    pub fn protocol(message: impl Display) -> Self {
        Self::Protocol { message: message.to_string() }
    }

    pub fn not_finite(message: impl Display) -> Self {
        Self::NotFinite { message: message.to_string() }
    }

    pub fn wrong(message: impl Display) -> Self {
        Self::Wrong { message: message.to_string() }
    }

    /// A framework's own error. Frameworks report exhausted memory only in words, so the words decide.
    pub fn framework(message: impl Display) -> Self {
        let message = message.to_string();
        let lower = message.to_lowercase();
        let exhausted =
            ["out of memory", "out_of_memory", "can't allocate", "cannot allocate", "failed to allocate"];
        if exhausted.iter().any(|words| lower.contains(words)) {
            Self::OutOfMemory { message }
        } else {
            Self::Framework { message }
        }
    }
}
