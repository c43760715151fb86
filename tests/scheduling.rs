//! The order and the bookkeeping of a run, with an executor that only pretends.

use evalfw::measure::host::Environment;
use evalfw::plan::{Cell, interleaved};
use evalfw::record::{self, CellError, ModelRecord, Outcome, RunLog, Samples, TrainSample};
use evalfw::run::cell::{Execution, Executor};
use evalfw::run::progress::Progress;
use evalfw::run::{RunContext, execute};
use evalfw::scenario::{Library, Suite};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Runs nothing; engines called `broken` fail, those called `disturbed` are, and those called `once` are the first time. Checks that every earlier row is on disk already.
struct Pretender<'a> {
    folder: &'a Path,
    executed: Vec<String>,
}

impl Executor for Pretender<'_> {
    fn execute(&mut self, cell: &Cell, _: &Progress) -> Execution {
        let on_disk = std::fs::read_to_string(self.folder.join("cells.jsonl")).unwrap().lines().count();
        assert_eq!(on_disk, self.executed.len(), "a row was not written before the next cell began");
        let is_first = !self.executed.contains(&cell.id("m"));
        self.executed.push(cell.id("m"));
        let is_disturbed = cell.engine == "disturbed" || cell.engine == "once" && is_first;
        let disturbances = if is_disturbed { vec!["a noise".to_owned()] } else { vec![] };
        let sample = |warmup, seconds| TrainSample {
            step: 0,
            warmup,
            seconds,
            loss: 1.0,
            grad_norm: 1.0,
            examples: 2,
            trained_tokens: 30,
            real_tokens: 40,
            slot_tokens: 50,
        };
        let failure = (cell.engine == "broken").then(|| {
            let error =
                CellError { during: "load".into(), message: "no".into(), advice: None, stderr_tail: vec![] };
            (Outcome::Failed, error)
        });
        Execution {
            info: None,
            started_at: "2026-01-01T00:00:00Z".into(),
            wall_seconds: 1.0,
            samples: Samples {
                train: vec![sample(true, 100.0), sample(false, 4.0)],
                disturbances,
                ..Samples::default()
            },
            failure,
        }
    }
}

fn suite(repetitions: u32) -> Suite {
    let mut suite = Library::built_in().suite("quick", Some(&["load".into(), "train".into()])).unwrap();
    suite.cells.iter_mut().for_each(|c| c.repetitions = repetitions);
    suite
}

fn context() -> RunContext {
    let model = ModelRecord {
        name: "m".into(),
        parameters: 1,
        checkpoint_bytes: 2,
        synthetic: true,
        origin: "test".into(),
        config: None,
    };
    RunContext {
        models: vec![model],
        environment: Environment::detect(),
        verdicts: Default::default(),
        host_limits: None,
        adoption: BTreeMap::new(),
        caveats: BTreeMap::new(),
        device_limits: Default::default(),
        launcher: None,
        repeat_disturbed: 2,
    }
}

fn run(folder: &Path, cells: &[Cell], done: &BTreeSet<String>) -> Vec<String> {
    let mut log = RunLog::open(folder).unwrap();
    let mut executor = Pretender { folder, executed: Vec::new() };
    execute(&context(), cells, done, &mut executor, &mut log, &Progress::hidden()).unwrap();
    executor.executed
}

fn cells(repetitions: u32, engines: &[&str]) -> Vec<Cell> {
    let selected: Vec<String> = engines.iter().map(|e| (*e).to_owned()).collect();
    let engines: Vec<_> = selected.iter().map(|e| (e.clone(), 0)).collect();
    interleaved(&suite(repetitions), &selected, &engines, &BTreeMap::new())
}

#[test]
fn cells_run_interleaved_and_a_failure_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let cells = cells(2, &["good", "broken"]);
    let executed = run(folder.path(), &cells, &BTreeSet::new());
    assert_eq!(
        executed,
        [
            "good/m/load/nf4/0",
            "broken/m/load/nf4/0",
            "good/m/train-s64-b1/nf4/0",
            "broken/m/train-s64-b1/nf4/0",
            "broken/m/load/nf4/1",
            "good/m/load/nf4/1",
            "broken/m/train-s64-b1/nf4/1",
            "good/m/train-s64-b1/nf4/1",
        ]
    );
    let records = record::read(folder.path()).unwrap();
    assert_eq!(records.len(), 8);
    for record in records {
        match record.engine.as_str() {
            // 40 real tokens and 2 examples in the 4 s of the step that counts.
            "good" => {
                assert_eq!((record.tokens_per_second, record.examples_per_second), (Some(10.0), Some(0.5)))
            }
            _ => assert_eq!((record.outcome, record.tokens_per_second), (Outcome::Failed, None)),
        }
    }
}

#[test]
fn cells_that_are_done_are_not_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let cells = cells(1, &["good"]);
    let done = ["good/m/load/nf4/0".to_owned()].into();
    assert_eq!(run(folder.path(), &cells, &done), ["good/m/train-s64-b1/nf4/0"]);
}

#[test]
fn a_record_of_another_schema_or_with_a_broken_row_is_refused_by_line() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), &cells(1, &["good"]), &BTreeSet::new());
    let path = folder.path().join("cells.jsonl");
    let good = std::fs::read_to_string(&path).unwrap();
    let message = |text: String| {
        std::fs::write(&path, text).unwrap();
        format!("{:#}", record::read(folder.path()).unwrap_err())
    };
    let newer = message(good.replacen("\"schema\":2", "\"schema\":9", 1));
    assert!(newer.contains("line 1") && newer.contains("schema 9"), "{newer}");
    let broken = message(format!("{good}{{\"schema\":1}}\n"));
    assert!(broken.contains("line 3") && broken.contains("cell"), "{broken}");
    let empty = message(String::new());
    assert!(empty.contains("no finished cell"), "{empty}");
}

#[test]
fn a_disturbed_cell_is_repeated_up_to_the_limit_and_its_last_row_counts() {
    let folder = tempfile::tempdir().unwrap();
    let executed = run(folder.path(), &cells(1, &["once"]), &BTreeSet::new());
    assert_eq!(executed.len(), 4, "each of two cells was disturbed once: {executed:?}");
    let rows = std::fs::read_to_string(folder.path().join("cells.jsonl")).unwrap();
    assert_eq!(rows.lines().count(), 4, "what was disturbed is kept");
    let records = record::read(folder.path()).unwrap();
    assert_eq!(records.len(), 2);
    assert!(records.iter().all(|r| r.attempt == 1 && r.samples.disturbances.is_empty()));
}

#[test]
fn on_a_machine_that_is_never_quiet_repeating_ends() {
    let folder = tempfile::tempdir().unwrap();
    let executed = run(folder.path(), &cells(3, &["disturbed"]), &BTreeSet::new());
    // Three cells of six are tried three times, the others once.
    assert_eq!(executed.len(), 3 * 3 + 3, "{executed:?}");
    let records = record::read(folder.path()).unwrap();
    assert_eq!(records.len(), 6);
    assert!(records.iter().all(|r| r.samples.disturbances == ["a noise"]));
}
