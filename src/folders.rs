//! The folders that are evalfw's own: what it can make again, and what the user asked it to install.

use etcetera::BaseStrategy;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}")]
    Path { path: String, source: std::io::Error },
    #[error("there is no home folder ({problem}); set {variable} to a folder to write to")]
    NoHome { variable: &'static str, problem: String },
}

/// What evalfw can make again: `$EVALFW_CACHE`, or `evalfw` in the user's cache folder.
pub fn cache_dir() -> Result<PathBuf, Error> {
    folder("EVALFW_CACHE", |strategy| strategy.cache_dir())
}

/// What is no cache: `$EVALFW_DATA`, or `evalfw` in the user's data folder.
pub fn data_dir() -> Result<PathBuf, Error> {
    folder("EVALFW_DATA", |strategy| strategy.data_dir())
}

/// Absolute, so that a worker finds it from wherever it runs.
fn folder(variable: &'static str, of_user: fn(&dyn BaseStrategy) -> PathBuf) -> Result<PathBuf, Error> {
    if let Some(dir) = std::env::var_os(variable).filter(|dir| !dir.is_empty()) {
        let path = PathBuf::from(dir);
        return std::path::absolute(&path)
            .map_err(|source| Error::Path { path: path.display().to_string(), source });
    }
    let strategy = etcetera::choose_base_strategy()
        .map_err(|error| Error::NoHome { variable, problem: error.to_string() })?;
    Ok(of_user(&strategy).join("evalfw"))
}
