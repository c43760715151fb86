//! The file that tells a checkpoint with random weights from a real one.

use super::{CONFIG_FILE, CORPUS, SynthOptions, configs, fnv1a, pretty};
use crate::model::presets::Preset;
use crate::model::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// To be raised whenever the same name and seed would give other bytes.
const GENERATOR_VERSION: u32 = 1;
const MARKER_FILE: &str = "evalfw_synthetic.json";

/// `evalfw_synthetic.json`: says that the weights of a checkpoint are random, and which they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// For people who find the file.
    note: String,
    generator_version: u32,
    pub name: String,
    pub seed: u64,
    max_shard_bytes: u64,
    /// FNV-1a of the text that the tokenizer was trained on.
    corpus: String,
    /// The size of every other file.
    files: BTreeMap<String, u64>,
}

impl Marker {
    /// Of the checkpoint to be written.
    pub(super) fn new(preset: &Preset, options: &SynthOptions) -> Self {
        Self {
            note: "Random weights, written by evalfw. Good for measuring speed and memory, not for text."
                .to_owned(),
            generator_version: GENERATOR_VERSION,
            name: preset.name.clone(),
            seed: options.seed,
            max_shard_bytes: options.max_shard_bytes,
            corpus: format!("{:016x}", fnv1a(CORPUS.as_bytes())),
            files: BTreeMap::new(),
        }
    }

    /// Reads the marker of `dir`; `None` where the weights are not evalfw's.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(MARKER_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(Error::io(&path)(error)),
        };
        serde_json::from_str(&text).map(Some).map_err(|e| Error::file(&path, e))
    }

    /// Writes the marker beside `files`, given with their sizes.
    pub(super) fn write(self, dir: &Path, files: BTreeMap<String, u64>) -> Result<()> {
        let path = dir.join(MARKER_FILE);
        let complete = Self { files, ..self };
        let text = serde_json::to_string_pretty(&complete).map_err(|e| Error::file(&path, e))?;
        fs::write(&path, text + "\n").map_err(Error::io(&path))
    }

    /// Whether `dir` holds the checkpoint that this marker (its list of files aside) stands for, whole.
    pub(super) fn describes(&self, dir: &Path, preset: &Preset) -> Result<bool> {
        let Some(mut found) = Self::read(dir)? else { return Ok(false) };
        let files = std::mem::take(&mut found.files);
        let whole =
            || files.iter().all(|(name, size)| fs::metadata(dir.join(name)).is_ok_and(|m| m.len() == *size));
        let config = || fs::read_to_string(dir.join(CONFIG_FILE)).unwrap_or_default();
        Ok(found == *self && config() == pretty(&configs::model_config(&preset.config)) && whole())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_from_elsewhere_has_no_marker() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(Marker::read(root.path()).unwrap(), None);
        fs::write(root.path().join(MARKER_FILE), "{").unwrap();
        assert!(Marker::read(root.path()).unwrap_err().to_string().contains(MARKER_FILE));
    }
}
