//! The environment of a Python engine: a folder of its own, with a note of what is in it.

use crate::folders::data_dir;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Written last: a folder without it is half made.
const NOTE: &str = "installed.json";

/// Where the environment of an engine is, or would be.
#[derive(Debug, Clone)]
pub struct Environment {
    pub folder: PathBuf,
    requirements_sha256: String,
}

/// What an installation left.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Installed {
    pub requirements_sha256: String,
    /// Of the interpreter, e.g. `3.11.7`.
    pub python: String,
    /// What installed the packages, e.g. `uv 0.9.1`.
    pub installer: String,
    /// As the engine tells them.
    pub versions: serde_json::Value,
    pub packages: usize,
    /// On disk.
    pub bytes: u64,
    pub seconds: f64,
    pub installed_at: String,
}

#[derive(Debug, Clone, PartialEq)]
pub enum State {
    Missing,
    /// An installation was cut short.
    HalfMade,
    /// Made from other requirements.
    Outdated,
    /// Whole once, and not any more.
    Broken(String),
    Ready(Box<Installed>),
}

impl Environment {
    pub fn of(engine: &str, requirements: &str) -> Result<Self> {
        let digest = Sha256::digest(requirements.as_bytes());
        Ok(Self {
            folder: data_dir()?.join("engines").join(engine),
            requirements_sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    pub fn requirements_sha256(&self) -> &str {
        &self.requirements_sha256
    }

    pub fn python(&self) -> PathBuf {
        match cfg!(windows) {
            true => self.folder.join("Scripts").join("python.exe"),
            false => self.folder.join("bin").join("python"),
        }
    }

    pub fn state(&self) -> State {
        if !self.folder.exists() {
            return State::Missing;
        }
        let path = self.folder.join(NOTE);
        let Ok(text) = std::fs::read_to_string(&path) else { return State::HalfMade };
        let installed: Installed = match serde_json::from_str(&text) {
            Ok(installed) => installed,
            Err(error) => return State::Broken(format!("{}: {error}", path.display())),
        };
        if installed.requirements_sha256 != self.requirements_sha256 {
            return State::Outdated;
        }
        // A link to a Python that was removed from this machine is there, and leads nowhere.
        let python = self.python();
        match python.exists() {
            true => State::Ready(Box::new(installed)),
            false => State::Broken(format!("{} is not there any more", python.display())),
        }
    }

    pub fn note(&self, installed: &Installed) -> Result<()> {
        let path = self.folder.join(NOTE);
        let text = serde_json::to_string_pretty(installed)?;
        std::fs::write(&path, text).with_context(|| format!("{}: cannot be written", path.display()))
    }

    /// Bytes on disk.
    pub fn size(&self) -> u64 {
        size_of(&self.folder)
    }
}

/// Of all files below; what cannot be read counts nothing.
fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => size_of(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_is_ready_only_when_its_note_and_its_python_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let environment = |digest: &str| Environment {
            folder: folder.path().join("peft"),
            requirements_sha256: digest.to_owned(),
        };
        let here = environment("a");
        assert_eq!(here.state(), State::Missing);
        std::fs::create_dir_all(here.python().parent().unwrap()).unwrap();
        std::fs::write(here.python(), "").unwrap();
        assert_eq!(here.state(), State::HalfMade);
        let installed = Installed {
            requirements_sha256: "a".into(),
            python: "3.11.7".into(),
            installer: "pip 23".into(),
            versions: serde_json::json!({"torch": "2.15.0"}),
            packages: 3,
            bytes: 10,
            seconds: 1.0,
            installed_at: "2026-11-28T00:00:00Z".into(),
        };
        here.note(&installed).unwrap();
        assert_eq!(here.state(), State::Ready(Box::new(installed)));
        assert_eq!(environment("b").state(), State::Outdated);
        std::fs::remove_file(here.python()).unwrap();
        assert!(matches!(here.state(), State::Broken(problem) if problem.contains("python")));
        std::fs::write(here.folder.join(NOTE), "{").unwrap();
        assert!(matches!(here.state(), State::Broken(problem) if problem.contains(NOTE)));
    }
}
