//! What was asked for, kept beside the record so that a run can be continued.

use crate::scenario::Suite;
use crate::worker::Workers;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const FILE: &str = "run.json";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub suite: Suite,
    pub engines: Vec<String>,
    /// Whether the engines were named: one that cannot run is then an error.
    pub engines_named: bool,
    /// Instead of the suite's model.
    pub model: Option<String>,
    /// Folder with `train.jsonl` and `valid.jsonl` instead of the built-in data.
    pub data: Option<PathBuf>,
    /// How workers are started.
    #[serde(flatten)]
    pub workers: Workers,
    /// Whether the machine's limits are measured.
    #[serde(default)]
    pub no_limits: bool,
    /// How often a cell that was disturbed is repeated.
    #[serde(default)]
    pub repeat_disturbed: u32,
}

impl Settings {
    pub fn write(&self, run: &Path) -> Result<()> {
        let path = run.join(FILE);
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(&path, text).with_context(|| format!("{}: cannot be written", path.display()))
    }

    pub fn read(run: &Path) -> Result<Self> {
        let path = run.join(FILE);
        let place = || format!("{}: not a run that can be resumed", path.display());
        let text = std::fs::read_to_string(&path).with_context(place)?;
        serde_json::from_str(&text).with_context(place)
    }
}
