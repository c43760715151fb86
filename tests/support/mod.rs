//! Models small enough to run in a blink, and the built binary.
#![allow(dead_code, reason = "each test file uses a part")]

use assert_cmd::Command;
use evalfw::model::Preset;
use evalfw::model::synth::{self, SynthOptions};
use evalfw::record::CellRecord;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A Hugging Face folder with two layers, and a vocabulary in which an example fits into a short row.
pub fn micro_model(dir: &Path) {
    micro_model_with(dir, SynthOptions::default().max_shard_bytes, true);
}

pub fn micro_model_with(dir: &Path, max_shard_bytes: u64, tied: bool) {
    let mut preset = Preset::parse("tiny").unwrap();
    preset.name = "micro".into();
    preset.config.vocab_size = 4096;
    preset.config.tie_word_embeddings = tied;
    synth::write(&preset, dir, &SynthOptions { seed: 1, max_shard_bytes }, &mut |_, _| ()).unwrap();
}

/// For `evalfw run` among other tests: every cell would be disturbed, and the machine's limits say nothing.
pub const ALONE: [(&str, &str); 2] = [("EVALFW_REPEAT_DISTURBED", "0"), ("EVALFW_NO_LIMITS", "true")];

/// A folder to work in, with a model and a place for results.
pub struct Workspace {
    root: TempDir,
}

impl Workspace {
    pub fn new() -> Self {
        let workspace = Self { root: tempfile::tempdir().unwrap() };
        micro_model(&workspace.model());
        workspace
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn model(&self) -> PathBuf {
        self.path("micro")
    }

    pub fn results(&self) -> PathBuf {
        self.path("results")
    }

    /// The binary, in the workspace, with a cache of its own.
    pub fn evalfw(&self) -> Command {
        let mut command = Command::cargo_bin("evalfw").unwrap();
        command.current_dir(self.root.path()).env("EVALFW_CACHE", self.path("cache"));
        // What is installed on this machine takes no part.
        command.env("EVALFW_DATA", self.path("data"));
        command.envs(ALONE);
        command
    }

    /// `evalfw run --suite quick` on the workspace's model.
    pub fn quick(&self, engines: &str) -> Command {
        let mut command = self.evalfw();
        command.args(["run", "--suite", "quick", "--engine", engines, "--model"]).arg(self.model());
        command
    }

    /// A copy of the scenarios of the suite `quick`, to change.
    pub fn scenarios(&self) -> PathBuf {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let scenarios = self.path("scenarios");
        fs::create_dir_all(scenarios.join("suites")).unwrap();
        for name in ["load.toml", "train.toml", "infer.toml", "suites/quick.toml"] {
            fs::copy(source.join(name), scenarios.join(name)).unwrap();
        }
        scenarios
    }

    /// Scenarios whose suite `quick` trains for so many steps, so that there is time to interfere.
    pub fn scenarios_of_steps(&self, steps: usize) -> PathBuf {
        let scenarios = self.scenarios();
        let quick = scenarios.join("suites/quick.toml");
        let text = fs::read_to_string(&quick).unwrap();
        fs::write(&quick, text.replace("steps = 2", &format!("steps = {steps}"))).unwrap();
        scenarios
    }

    /// Whether the latest run has begun with a cell of this engine and scenario: its log is there.
    pub fn has_begun(&self, engine: &str, scenario: &str) -> bool {
        let Some(run) = self.runs().pop() else { return false };
        let Ok(logs) = fs::read_dir(run.join("logs")) else { return false };
        logs.flatten().any(|log| {
            let name = log.file_name().to_string_lossy().into_owned();
            name.contains(engine) && name.contains(scenario)
        })
    }

    /// The run folders, oldest first.
    pub fn runs(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.results()) else { return Vec::new() };
        let mut runs: Vec<_> = entries.map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
        runs.sort();
        runs
    }

    pub fn records(&self) -> Vec<CellRecord> {
        evalfw::record::read(self.runs().last().expect("no run folder")).unwrap()
    }
}
