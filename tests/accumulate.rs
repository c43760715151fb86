//! `evalfw merge` and `evalfw history`, through the binary, on records with known figures.

#[path = "report/records.rs"]
#[allow(dead_code, reason = "made for the tests of reports")]
mod records;

use assert_cmd::Command;
use evalfw::record::{CellRecord, Outcome};
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use records::{Engine, ended, train, write};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn evalfw(folder: &Path) -> Command {
    let mut command = Command::cargo_bin("evalfw").unwrap();
    command.current_dir(folder);
    command
}

/// All cells of an engine on a machine, started on a day.
fn cells(cpu: &str, seconds_per_step: f64, day: u32) -> Vec<CellRecord> {
    let mut cells = Engine::new("candle-cpu", 1.2, seconds_per_step).cells();
    for cell in &mut cells {
        cell.environment.cpu = cpu.into();
        cell.device.as_mut().unwrap().name = cpu.into();
        cell.started_at = format!("2026-03-{day:02}T10:0{}:00Z", cell.repetition);
    }
    cells
}

fn record(folder: &TempDir, name: &str, cells: &[CellRecord]) -> PathBuf {
    let path = folder.path().join(name);
    fs::create_dir(&path).unwrap();
    write(&path, cells);
    path
}

#[test]
fn a_merged_record_has_a_column_for_each_host_and_renders_again() {
    let folder = tempfile::tempdir().unwrap();
    record(&folder, "a", &cells("Fast CPU", 2.0, 1));
    record(&folder, "b", &cells("Slow CPU", 4.0, 1));
    let more: Vec<CellRecord> = Engine::new("burn-flex", 1.5, 3.0)
        .cells()
        .into_iter()
        .map(|mut cell| {
            cell.environment.cpu = "Slow CPU".into();
            cell
        })
        .collect();
    record(&folder, "c", &more);
    evalfw(folder.path()).args(["merge", "a", "server=b", "server=c", "--out", "all"]).assert().success();
    let report = fs::read_to_string(folder.path().join("all/report.md")).unwrap();
    assert!(report.contains("| Engine | Job | Fast CPU | server |"), "{report}");
    // 240 real tokens in a step: its median is 2.08 s in the first process and 2.12 s in the second, and twice that.
    let line = report.lines().find(|l| l.contains("| candle-cpu | train-s256-b1 | 1")).unwrap();
    assert!(line.contains("114 (") && line.contains("57.1 ("), "{line}");
    let only_there = report.lines().find(|l| l.starts_with("| burn-flex | train-s256-b1")).unwrap();
    assert!(only_there.contains("| not run | 76"), "{only_there}");
    assert_eq!(evalfw::record::read(&folder.path().join("all")).unwrap().len(), 18);
    // By the record alone, also after another merge.
    let again = evalfw(folder.path()).args(["report", "all", "--output", "-"]).assert().success();
    again.stdout(report.clone());
    record(&folder, "d", &cells("Third CPU", 1.0, 2));
    evalfw(folder.path()).args(["merge", "all", "d", "--out", "more"]).assert().success();
    let more = fs::read_to_string(folder.path().join("more/report.md")).unwrap();
    assert!(more.contains("| Engine | Job | Fast CPU | server | Third CPU |"), "{more}");
    evalfw(folder.path()).args(["report", "all", "--json"]).assert().success().stdout(contains("\"hosts\""));
}

#[test]
fn what_cannot_be_merged_is_refused_and_nothing_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    record(&folder, "a", &cells("Fast CPU", 2.0, 1));
    record(&folder, "b", &cells("Slow CPU", 4.0, 1));
    let merge = |arguments: &[&str]| evalfw(folder.path()).arg("merge").args(arguments).assert();
    merge(&["a", "--out", "all"]).code(2).stderr(contains("two or more"));
    merge(&["a", "a", "--out", "all"]).code(2).stderr(contains("there twice"));
    merge(&["a", "nowhere", "--out", "all"]).code(2).stderr(contains("nowhere"));
    merge(&["x/y=a", "b", "--out", "all"]).code(2).stderr(contains("x/y"));
    merge(&["a", "b", "--out", "a"]).code(2).stderr(contains("is there already"));
    assert!(!folder.path().join("all").exists());
}

#[test]
fn history_shows_each_machine_and_leaves_broken_runs_out_loudly() {
    let folder = tempfile::tempdir().unwrap();
    record(&folder, "20260301-a", &cells("Fast CPU", 2.0, 1));
    record(&folder, "20260302-b", &cells("Fast CPU", 1.0, 2));
    record(&folder, "20260303-c", &cells("Slow CPU", 4.0, 3));
    let crashed: Vec<_> =
        cells("Fast CPU", 1.0, 4).into_iter().map(|cell| ended(cell, Outcome::Crashed, "died")).collect();
    record(&folder, "20260304-d", &crashed);
    fs::create_dir(folder.path().join("20260305-e")).unwrap();
    fs::write(folder.path().join("20260305-e/cells.jsonl"), "garbage\n").unwrap();
    let history = |arguments: &[&str]| evalfw(folder.path()).args(["history", "."]).args(arguments).assert();
    let shown = history(&["--draw", "pictures"]).success();
    shown
        .stdout(
            contains("Fast CPU")
                .and(contains("Slow CPU"))
                .and(contains("+100.0 %"))
                .and(contains("2026-03-02")),
        )
        .stderr(contains("left out").and(contains("20260305-e")).and(contains("drawn")));
    let pictures: Vec<_> = fs::read_dir(folder.path().join("pictures/charts")).unwrap().collect();
    assert_eq!(pictures.len(), 1, "the slow one has one point");
    let json = history(&["--json", "--metric", "peak_memory_bytes", "--scenario", "train"]).success();
    let trends: serde_json::Value = serde_json::from_slice(&json.get_output().stdout).unwrap();
    assert_eq!(trends.as_array().unwrap().len(), 2);
    assert_eq!(trends[0]["points"].as_array().unwrap().len(), 2);
    history(&["--engine", "nobody"]).code(2).stderr(contains("none of 4 runs"));
    evalfw(folder.path()).args(["history", "pictures"]).assert().code(2).stderr(contains("holds no run"));
}

#[test]
fn a_train_cell_alone_is_enough_for_both() {
    let folder = tempfile::tempdir().unwrap();
    let one = |cpu: &str| {
        let mut cell = Engine::new("candle-cpu", 1.0, 2.0).cell(&train(128), 0);
        cell.environment.cpu = cpu.into();
        vec![cell]
    };
    record(&folder, "a", &one("One"));
    record(&folder, "b", &one("Two"));
    evalfw(folder.path()).args(["merge", "a", "b", "--out", "all"]).assert().success();
    evalfw(folder.path()).args(["history", "."]).assert().success();
}
