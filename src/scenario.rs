//! Scenarios and suites, read from TOML.
//!
//! A scenario file says what is run; a suite combines scenarios with models, repetitions and other
//! values of their parameters. In a suite, an array stands for one cell per value.

use anyhow::{Context, Result, bail};
use evalfw_engine::lora::LoraConfig;
use evalfw_engine::protocol::{Quantization, TrainingConfig};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// What one cell does, with all its parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Scenario {
    Load(LoadScenario),
    Train(TrainScenario),
    Infer(InferScenario),
}

/// From the folder on disk to the first possible forward pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadScenario {
    pub quantization: Quantization,
    /// The longest that one call may take.
    pub timeout_seconds: u64,
}

/// LoRA training on the instruction data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainScenario {
    pub quantization: Quantization,
    pub timeout_seconds: u64,
    /// Slots of a row. Longer examples are cut, shorter ones padded.
    pub sequence_length: usize,
    pub batch_size: usize,
    pub gradient_accumulation_steps: usize,
    /// Fill a row with several whole examples instead of padding.
    pub packing: bool,
    /// Steps that run first and do not count.
    pub warmup_steps: usize,
    /// Steps that count.
    pub steps: usize,
    /// Batches of the validation set, before the first step and after the last. 0: none.
    pub evaluation_batches: usize,
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// 0: no clipping.
    pub max_grad_norm: f64,
    pub gradient_checkpointing: bool,
    pub lora_r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f32,
}

/// Prompt processing and greedy generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InferScenario {
    pub quantization: Quantization,
    pub timeout_seconds: u64,
    pub prompt_tokens: usize,
    pub generate_tokens: usize,
    /// Rounds of prompt and generation that run first and do not count.
    pub warmup: usize,
    /// Rounds that count.
    pub repeats: usize,
}

impl Scenario {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Load(_) => "load",
            Self::Train(_) => "train",
            Self::Infer(_) => "infer",
        }
    }

    pub fn quantization(&self) -> Quantization {
        match self {
            Self::Load(s) => s.quantization,
            Self::Train(s) => s.quantization,
            Self::Infer(s) => s.quantization,
        }
    }

    pub fn timeout_seconds(&self) -> u64 {
        match self {
            Self::Load(s) => s.timeout_seconds,
            Self::Train(s) => s.timeout_seconds,
            Self::Infer(s) => s.timeout_seconds,
        }
    }

    /// A name that tells cells of one run apart, e.g. `train-s512-b1`.
    pub fn label(&self) -> String {
        match self {
            Self::Load(_) => "load".into(),
            Self::Train(s) => {
                let mut label = format!("train-s{}-b{}", s.sequence_length, s.batch_size);
                if s.gradient_accumulation_steps > 1 {
                    label += &format!("-ga{}", s.gradient_accumulation_steps);
                }
                for (unusual, mark) in [(!s.gradient_checkpointing, "-nockpt"), (!s.packing, "-padded")] {
                    label += if unusual { mark } else { "" };
                }
                if s.lora_r != LoraConfig::default().r {
                    label += &format!("-r{}", s.lora_r);
                }
                label
            }
            Self::Infer(s) => format!("infer-pp{}-tg{}", s.prompt_tokens, s.generate_tokens),
        }
    }

    /// Checks what the types cannot say. The message names the key.
    fn check(&self) -> Result<()> {
        let at_least_1: &[(&str, usize)] = match self {
            Self::Load(_) => &[],
            Self::Train(s) => &[
                ("batch_size", s.batch_size),
                ("gradient_accumulation_steps", s.gradient_accumulation_steps),
                ("steps", s.steps),
                ("lora_r", s.lora_r),
            ],
            Self::Infer(s) => &[
                ("prompt_tokens", s.prompt_tokens),
                ("generate_tokens", s.generate_tokens),
                ("repeats", s.repeats),
            ],
        };
        if let Some((key, _)) = at_least_1.iter().find(|(_, value)| *value == 0) {
            bail!("{key} must be at least 1");
        }
        if self.timeout_seconds() == 0 {
            bail!("timeout_seconds must be at least 1");
        }
        if let Self::Train(s) = self {
            if s.sequence_length < 2 {
                bail!("sequence_length must be at least 2: a token and the one to predict");
            }
            if !(0.0..1.0).contains(&s.lora_dropout) {
                bail!("lora_dropout must be in [0, 1)");
            }
            for (key, value) in [
                ("learning_rate", s.learning_rate),
                ("weight_decay", s.weight_decay),
                ("max_grad_norm", s.max_grad_norm),
            ] {
                if !(value.is_finite() && value >= 0.0) {
                    bail!("{key} must be a number of at least 0");
                }
            }
            if !(s.lora_alpha.is_finite() && s.lora_alpha > 0.0) {
                bail!("lora_alpha must be above 0");
            }
        }
        Ok(())
    }
}

impl TrainScenario {
    pub fn lora(&self) -> LoraConfig {
        LoraConfig { r: self.lora_r, lora_alpha: self.lora_alpha, lora_dropout: self.lora_dropout }
    }

    pub fn training(&self) -> TrainingConfig {
        TrainingConfig {
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            max_grad_norm: (self.max_grad_norm > 0.0).then_some(self.max_grad_norm),
            gradient_checkpointing: self.gradient_checkpointing,
            ..TrainingConfig::default()
        }
    }

    pub fn total_steps(&self) -> usize {
        self.warmup_steps + self.steps
    }

    pub fn rows_per_step(&self) -> usize {
        self.batch_size * self.gradient_accumulation_steps
    }
}

/// What `evalfw run` runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Suite {
    pub name: String,
    pub description: String,
    /// A preset, a hub id or a folder.
    pub model: String,
    /// For adapters that render on the CPU: their speed says nothing, so that a small model shows
    /// that the engine works without taking an hour.
    pub software_adapter_model: String,
    pub seed: u64,
    pub cells: Vec<SuiteCell>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SuiteCell {
    pub scenario: Scenario,
    pub repetitions: u32,
}

impl Suite {
    /// Checks what the types cannot say.
    pub fn check(&self) -> Result<()> {
        for cell in &self.cells {
            if cell.repetitions == 0 {
                bail!("repetitions must be at least 1");
            }
            cell.scenario.check()?;
        }
        check_distinct(&self.cells)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SuiteFile {
    description: String,
    model: String,
    software_adapter_model: String,
    seed: u64,
    cells: Vec<Table>,
}

/// The scenario files: a folder, or the ones that were compiled in.
pub struct Library {
    files: BTreeMap<String, String>,
    folder: Option<PathBuf>,
}

const BUILT_IN: &[(&str, &str)] = &[
    ("load.toml", include_str!("../scenarios/load.toml")),
    ("train.toml", include_str!("../scenarios/train.toml")),
    ("infer.toml", include_str!("../scenarios/infer.toml")),
    ("suites/quick.toml", include_str!("../scenarios/suites/quick.toml")),
    ("suites/default.toml", include_str!("../scenarios/suites/default.toml")),
    ("suites/full.toml", include_str!("../scenarios/suites/full.toml")),
];

impl Library {
    pub fn built_in() -> Self {
        let files = BUILT_IN.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect();
        Self { files, folder: None }
    }

    /// Reads every `*.toml` of `folder` and of its `suites` folder.
    pub fn folder(folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for (dir, prefix) in [(folder.to_owned(), ""), (folder.join("suites"), "suites/")] {
            let entries = std::fs::read_dir(&dir).with_context(|| dir.display().to_string())?;
            for entry in entries {
                let path = entry.with_context(|| dir.display().to_string())?.path();
                let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
                if path.extension().is_some_and(|e| e == "toml") {
                    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                    files.insert(format!("{prefix}{name}"), text);
                }
            }
        }
        Ok(Self { files, folder: Some(folder.to_owned()) })
    }

    pub fn suites(&self) -> Vec<&str> {
        self.files.keys().filter_map(|n| n.strip_prefix("suites/")?.strip_suffix(".toml")).collect()
    }

    pub fn scenarios(&self) -> Vec<&str> {
        self.files.keys().filter(|n| !n.contains('/')).filter_map(|n| n.strip_suffix(".toml")).collect()
    }

    /// How a file is called in messages.
    fn place(&self, file: &str) -> String {
        match &self.folder {
            Some(folder) => folder.join(file).display().to_string(),
            None => format!("scenarios/{file} (built in)"),
        }
    }

    fn text(&self, file: &str, what: &str, known: Vec<&str>) -> Result<&str> {
        let text = self.files.get(file).map(String::as_str);
        text.with_context(|| format!("no {what}; there are {}", known.join(", ")))
    }

    /// A scenario file, checked on its own, as a table for a suite to change.
    fn scenario(&self, name: &str) -> Result<Table> {
        let file = format!("{name}.toml");
        let text = self.text(&file, &format!("scenario {name}"), self.scenarios())?;
        let place = || self.place(&file);
        let mut table: Table = text.parse().with_context(place)?;
        // The description is for people who read the file.
        table.remove("description");
        parse_scenario(&table).with_context(place)?;
        Ok(table)
    }

    /// Reads a suite; `only` keeps the cells of these scenarios, by file name.
    pub fn suite(&self, name: &str, only: Option<&[String]>) -> Result<Suite> {
        for scenario in only.unwrap_or_default() {
            self.scenario(scenario)?;
        }
        let file = format!("suites/{name}.toml");
        let place = || self.place(&file);
        let text = self.text(&file, &format!("suite {name}"), self.suites())?;
        let raw: SuiteFile = toml::from_str(text).with_context(place)?;
        let mut cells = Vec::new();
        for (index, table) in raw.cells.into_iter().enumerate() {
            let place = || format!("{}: cells[{index}]", self.place(&file));
            let mut overrides = table;
            let scenario: String = take(&mut overrides, "scenario").with_context(place)?;
            let repetitions: u32 = take(&mut overrides, "repetitions").with_context(place)?;
            if repetitions == 0 {
                bail!("{}: repetitions must be at least 1", place());
            }
            if only.is_some_and(|only| !only.contains(&scenario)) {
                continue;
            }
            let base = self.scenario(&scenario)?;
            for values in sweep(&overrides) {
                let mut merged = base.clone();
                merged.extend(values);
                let scenario = parse_scenario(&merged).with_context(place)?;
                cells.push(SuiteCell { scenario, repetitions });
            }
        }
        check_distinct(&cells).with_context(place)?;
        if cells.is_empty() {
            bail!("{}: no cells{}", place(), if only.is_some() { " of the scenarios asked for" } else { "" });
        }
        Ok(Suite {
            name: name.to_owned(),
            description: raw.description,
            model: raw.model,
            software_adapter_model: raw.software_adapter_model,
            seed: raw.seed,
            cells,
        })
    }
}

/// Cells are told apart by their label, which names the parameters that people vary.
fn check_distinct(cells: &[SuiteCell]) -> Result<()> {
    let mut labels = std::collections::BTreeSet::new();
    match cells.iter().map(|c| c.scenario.label()).find(|label| !labels.insert(label.clone())) {
        Some(label) => {
            bail!("two cells are called {label}: they must differ in a parameter that is in the name")
        }
        None => Ok(()),
    }
}

fn parse_scenario(table: &Table) -> Result<Scenario> {
    let scenario: Scenario = Value::Table(table.clone()).try_into()?;
    scenario.check()?;
    Ok(scenario)
}

fn take<T: DeserializeOwned>(table: &mut Table, key: &str) -> Result<T> {
    let value = table.remove(key).with_context(|| format!("{key} is missing"))?;
    value.try_into().with_context(|| key.to_owned())
}

/// Every combination of the values of keys that hold arrays.
fn sweep(overrides: &Table) -> Vec<Table> {
    let mut combinations = vec![Table::new()];
    for (key, value) in overrides {
        let values = match value {
            Value::Array(values) => values.as_slice(),
            single => std::slice::from_ref(single),
        };
        let with = |table: &Table, value: &Value| {
            let mut table = table.clone();
            table.insert(key.clone(), value.clone());
            table
        };
        combinations = combinations.iter().flat_map(|t| values.iter().map(|v| with(t, v))).collect();
    }
    combinations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn library(changes: &[(&str, &str, &str)]) -> Library {
        let mut library = Library::built_in();
        for (file, from, to) in changes {
            let text = library.files.get_mut(*file).unwrap();
            assert!(text.contains(from), "{file} no longer holds {from:?}");
            *text = text.replacen(from, to, 1);
        }
        library
    }

    fn error(library: &Library, suite: &str) -> String {
        format!("{:#}", library.suite(suite, None).unwrap_err())
    }

    #[test]
    fn every_built_in_suite_is_valid_and_runs_all_three_kinds() {
        let library = Library::built_in();
        for name in library.suites() {
            let suite = library.suite(name, None).unwrap();
            for kind in ["load", "train", "infer"] {
                assert!(suite.cells.iter().any(|c| c.scenario.kind() == kind), "{name} has no {kind}");
            }
        }
    }

    #[test]
    fn unknown_keys_name_the_file_and_the_key() {
        let in_scenario = library(&[("train.toml", "batch_size", "batchsize")]);
        let message = error(&in_scenario, "quick");
        assert!(message.contains("train.toml") && message.contains("batchsize"), "{message}");

        let in_cell = library(&[("suites/quick.toml", "repetitions", "epochs = 3\nrepetitions")]);
        let message = error(&in_cell, "quick");
        assert!(
            message.contains("quick.toml") && message.contains("cells[0]") && message.contains("epochs"),
            "{message}"
        );

        let in_suite = library(&[("suites/quick.toml", "seed", "sead")]);
        let message = error(&in_suite, "quick");
        assert!(message.contains("quick.toml") && message.contains("sead"), "{message}");
    }

    #[test]
    fn an_array_makes_a_cell_for_each_value() {
        let mut table = Table::new();
        table.insert("a".into(), Value::Array(vec![1.into(), 2.into()]));
        table.insert("b".into(), Value::Array(vec![3.into(), 4.into()]));
        table.insert("c".into(), 5.into());
        let all = sweep(&table);
        assert_eq!(all.len(), 4);
        assert!(all.iter().all(|t| t["c"] == 5.into() && !t["a"].is_array()));
    }

    #[test]
    fn two_cells_of_one_name_are_refused() {
        let twice = library(&[(
            "suites/quick.toml",
            "[[cells]]",
            "[[cells]]\nscenario = \"load\"\nrepetitions = 1\n\n[[cells]]",
        )]);
        assert!(error(&twice, "quick").contains("two cells are called load"));
    }

    #[test]
    fn values_out_of_range_name_the_key() {
        let broken = library(&[("train.toml", "lora_dropout = 0.1", "lora_dropout = 1.5")]);
        assert!(error(&broken, "quick").contains("lora_dropout"));
    }

    #[test]
    fn an_unknown_suite_or_scenario_lists_what_there_is() {
        let library = Library::built_in();
        assert!(error(&library, "quik").contains("default, full, quick"));
        let message = format!("{:#}", library.suite("quick", Some(&["trian".into()])).unwrap_err());
        assert!(message.contains("trian") && message.contains("infer, load, train"), "{message}");
    }
}
