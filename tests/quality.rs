//! Time to quality, end to end: engines learn alike, and the clock stops at the target.

mod support;

use evalfw::measure::metrics::time_to_target;
use evalfw::record::{CellRecord, Outcome};
use predicates::prelude::*;
use std::fs;
use support::Workspace;

/// The built-in scenario, cut to 12 steps, with a target of its own, as a suite `learn` beside loading.
fn write_suite(workspace: &Workspace, target_loss: &str) {
    let scenario = include_str!("../scenarios/quality.toml");
    let mut table: toml::Table = scenario.parse().unwrap();
    table.insert("target_loss".into(), target_loss.parse::<f64>().unwrap().into());
    table.insert("evaluation_interval".into(), 4.into());
    let train = table["train"].as_table_mut().unwrap();
    train.insert("steps".into(), 12.into());
    train.insert("evaluation_batches".into(), 1.into());
    let suites = workspace.path("scenarios/suites");
    fs::create_dir_all(&suites).unwrap();
    fs::write(workspace.path("scenarios/quality.toml"), table.to_string()).unwrap();
    fs::write(workspace.path("scenarios/load.toml"), include_str!("../scenarios/load.toml")).unwrap();
    let suite = "description = \"x\"\nmodel = \"tiny\"\nsoftware_adapter_model = \"tiny\"\nseed = 1\n\
                 [[cells]]\nscenario = \"quality\"\nrepetitions = 1\n\
                 [[cells]]\nscenario = \"load\"\nrepetitions = 1\n";
    fs::write(suites.join("learn.toml"), suite).unwrap();
}

fn run(workspace: &Workspace, target_loss: &str) -> Vec<CellRecord> {
    write_suite(workspace, target_loss);
    let mut command = workspace.evalfw();
    let engines = "candle-cpu,burn-flex";
    command.args(["run", "--suite", "learn", "--scenario", "quality", "--engine", engines]);
    command.assert().success();
    workspace.records()
}

#[test]
fn engines_need_the_same_steps_to_the_target_and_stop_there() {
    let workspace = Workspace::new();
    let records = run(&workspace, "5");
    assert_eq!(records.len(), 2);
    for record in &records {
        assert_eq!(record.outcome, Outcome::Ok, "{:?}", record.error);
        assert_eq!(record.model.name, "learner");
        let evaluations = &record.samples.evaluations;
        assert!(evaluations.first().unwrap().loss > 5.0, "{evaluations:?}");
        let met = time_to_target(&record.samples, 5.0).expect("the target is within reach");
        assert_eq!(met.steps as usize, record.samples.train.len(), "training went on after the target");
        assert_eq!(evaluations.iter().filter(|e| e.loss <= 5.0).count(), 1);
    }
    let losses = |r: &CellRecord| -> Vec<f64> { r.samples.evaluations.iter().map(|e| e.loss).collect() };
    for (a, b) in losses(&records[0]).iter().zip(losses(&records[1])) {
        assert!((a - b).abs() < 1e-3, "the engines learn differently: {a} {b}");
    }
    let report = fs::read_to_string(workspace.results().join("REPORT.md")).unwrap();
    assert!(report.contains("## Time to quality") && report.contains("on learner | 5 |"), "{report}");
}

#[test]
fn a_target_out_of_reach_is_told_and_is_no_failure() {
    let workspace = Workspace::new();
    let records = run(&workspace, "0.1");
    assert!(records.iter().all(|r| r.outcome == Outcome::Ok && r.samples.train.len() == 12));
    let report = fs::read_to_string(workspace.results().join("REPORT.md")).unwrap();
    assert!(report.contains("not reached in 12"), "{report}");
}

#[test]
fn a_target_that_is_met_before_the_first_step_takes_no_steps_and_no_time() {
    let workspace = Workspace::new();
    for record in run(&workspace, "20") {
        assert_eq!(record.outcome, Outcome::Ok, "{:?}", record.error);
        assert!(record.samples.train.is_empty());
        let met = time_to_target(&record.samples, 20.0).expect("an untrained loss is below 20");
        assert_eq!((met.steps, met.seconds), (0, 0.0));
    }
}

#[test]
fn a_model_that_quality_does_not_take_is_told_or_refused() {
    let workspace = Workspace::new();
    write_suite(&workspace, "20");
    let with_model = |scenarios: &str| {
        let mut command = workspace.evalfw();
        command.args(["run", "--suite", "learn", "--engine", "candle-cpu", "--scenario", scenarios]);
        command.arg("--model").arg(workspace.model()).assert()
    };
    let reason = || predicate::str::contains("the scenario quality brings its own model, learner");
    with_model("quality").code(2).stderr(reason().and(predicate::str::contains("would not be used")));
    assert!(workspace.runs().is_empty());
    with_model("quality,load").success().stderr(reason());
    let records = workspace.records();
    let models: Vec<_> = records.iter().map(|r| (r.parameters.kind(), r.model.name.as_str())).collect();
    assert_eq!(models.len(), 2);
    let ran = |kind, model| models.contains(&(kind, model));
    assert!(ran("quality", "learner") && ran("load", "micro"), "{models:?}");
    with_model("load").success().stderr(predicate::str::contains("brings its own").not());
}
