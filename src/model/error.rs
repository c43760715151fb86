//! What can go wrong before there is a model to run. Each message names the file or address and the
//! next step.

use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no model is called {name}; the presets are {presets}")]
    UnknownPreset { name: String, presets: String },
    #[error(
        "{spec} is neither a folder nor a preset ({presets}), and a model on the hub is written ORG/NAME"
    )]
    UnknownModel { spec: String, presets: String },
    #[error("{path} is a file; give the folder that holds the model's config.json")]
    NotAFolder { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error("{path} is not empty and does not hold this very checkpoint; remove it or name another folder")]
    Occupied { path: PathBuf },
    #[error(
        "{path}: the checkpoint takes {needed_gb:.1} GB, but only {free_gb:.1} GB are free; make room or name a folder on another disk"
    )]
    DiskFull { path: PathBuf, needed_gb: f64, free_gb: f64 },
    #[error("{name}: {problem}")]
    Preset { name: String, problem: String },
    #[error("training the tokenizer: {0}")]
    Tokenizer(String),
    #[error("no home folder for the hub's cache ({0}); set HF_HOME")]
    NoHubCache(String),
    #[error(transparent)]
    Folder(#[from] crate::folders::Error),
    #[error("{url}: {problem}; {advice}")]
    Hub { url: String, problem: String, advice: String },
}

impl Error {
    /// An I/O error on `path`, for `map_err`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn file(path: &Path, problem: impl std::fmt::Display) -> Self {
        Self::File { path: path.to_owned(), problem: problem.to_string() }
    }
}
