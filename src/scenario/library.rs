//! The files that scenarios and suites are read from: a folder, or the ones that were compiled in.

use super::{CellKernels, Scenario, Suite, SuiteCell, check_distinct};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SuiteFile {
    description: String,
    model: String,
    software_adapter_model: String,
    seed: u64,
    #[serde(default)]
    all_stock_forms: bool,
    cells: Vec<Table>,
}

/// The scenario files: a folder, or the ones that were compiled in.
pub struct Library {
    files: BTreeMap<String, String>,
    folder: Option<PathBuf>,
}

const BUILT_IN: &[(&str, &str)] = &[
    ("load.toml", include_str!("../../scenarios/load.toml")),
    ("train.toml", include_str!("../../scenarios/train.toml")),
    ("infer.toml", include_str!("../../scenarios/infer.toml")),
    ("quality.toml", include_str!("../../scenarios/quality.toml")),
    ("suites/quick.toml", include_str!("../../scenarios/suites/quick.toml")),
    ("suites/ci.toml", include_str!("../../scenarios/suites/ci.toml")),
    ("suites/default.toml", include_str!("../../scenarios/suites/default.toml")),
    ("suites/gpu.toml", include_str!("../../scenarios/suites/gpu.toml")),
    ("suites/long.toml", include_str!("../../scenarios/suites/long.toml")),
    ("suites/full.toml", include_str!("../../scenarios/suites/full.toml")),
    ("suites/large.toml", include_str!("../../scenarios/suites/large.toml")),
    ("suites/stock.toml", include_str!("../../scenarios/suites/stock.toml")),
    ("suites/frameworks.toml", include_str!("../../scenarios/suites/frameworks.toml")),
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
        let mut parameters = table.clone();
        take_kernels(&mut parameters).with_context(place)?;
        parse_scenario(&parameters).with_context(place)?;
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
                let kernels = take_kernels(&mut merged).with_context(place)?;
                let scenario = parse_scenario(&merged).with_context(place)?;
                cells.push(SuiteCell { scenario, repetitions, kernels });
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
            all_stock_forms: raw.all_stock_forms,
            cells,
        })
    }
}

fn parse_scenario(table: &Table) -> Result<Scenario> {
    let scenario: Scenario = Value::Table(table.clone()).try_into()?;
    scenario.check()?;
    Ok(scenario)
}

/// Which engines run a cell is no parameter of what they do.
fn take_kernels(table: &mut Table) -> Result<CellKernels> {
    if table.contains_key("kernels") { take(table, "kernels") } else { Ok(CellKernels::default()) }
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
    fn kernels_stand_in_a_scenario_or_in_a_suite() {
        let both = "scenario = \"load\"\nkernels = [\"custom\", \"stock\"]";
        let in_suite =
            library(&[("suites/quick.toml", "scenario = \"load\"", both)]).suite("quick", None).unwrap();
        let loads: Vec<_> = in_suite.cells.iter().filter(|c| c.scenario.kind() == "load").collect();
        assert_eq!(
            loads.iter().map(|c| c.kernels).collect::<Vec<_>>(),
            [CellKernels::Custom, CellKernels::Stock]
        );
        assert_eq!(loads[0].scenario, loads[1].scenario);
        let in_scenario =
            library(&[("load.toml", "kind = \"load\"", "kind = \"load\"\nkernels = \"stock\"")]);
        assert_eq!(in_scenario.suite("quick", None).unwrap().cells[0].kernels, CellKernels::Stock);
        let unknown = library(&[("load.toml", "kind = \"load\"", "kind = \"load\"\nkernels = \"fast\"")]);
        let message = error(&unknown, "quick");
        assert!(
            message.contains("load.toml") && message.contains("kernels") && message.contains("stock"),
            "{message}"
        );
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
    fn a_way_to_a_target_has_no_steps_that_do_not_count() {
        let base = toml::from_str::<Table>(include_str!("../../scenarios/quality.toml")).unwrap();
        let error = |key: &str, value: Value| {
            let mut table = base.clone();
            table.remove("description");
            match key.split_once('.') {
                Some((outer, inner)) => table[outer].as_table_mut().unwrap().insert(inner.into(), value),
                None => table.insert(key.into(), value),
            };
            format!("{:#}", parse_scenario(&table).unwrap_err())
        };
        for (key, value) in [
            ("target_loss", Value::Float(0.0)),
            ("evaluation_interval", Value::Integer(0)),
            ("train.evaluation_batches", Value::Integer(0)),
            ("train.warmup_steps", Value::Integer(1)),
        ] {
            let message = error(key, value);
            assert!(message.contains(key), "{message}");
        }
        assert!(error("train.target", Value::Integer(1)).contains("target"));
    }

    #[test]
    fn an_unknown_suite_or_scenario_lists_what_there_is() {
        let library = Library::built_in();
        assert!(
            error(&library, "quik").contains("default, frameworks, full, gpu, large, long, quick, stock")
        );
        let message = format!("{:#}", library.suite("quick", Some(&["trian".into()])).unwrap_err());
        assert!(message.contains("trian") && message.contains("infer, load, quality, train"), "{message}");
    }
}
