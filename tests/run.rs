//! The main job, end to end through the real binary, on a model of a blink.

mod support;

use evalfw::record::{CellRecord, Outcome};
use evalfw::scenario::Scenario;
use predicates::prelude::*;
use std::fs;
use std::process::{Command, Stdio};
use support::{ALONE, Workspace, micro_model_with};

#[test]
fn a_run_measures_every_cell_and_writes_record_and_report() {
    let workspace = Workspace::new();
    let run = workspace.quick("candle-cpu,burn-flex").assert().success();
    run.stdout(predicate::str::contains("candle-cpu").and(predicate::str::contains("REPORT.md")));

    let records = workspace.records();
    let of = |engine: &str, kind: &str| -> CellRecord {
        let mut found = records.iter().filter(|r| r.engine == engine && r.parameters.kind() == kind);
        found.next().unwrap_or_else(|| panic!("no {kind} cell of {engine}")).clone()
    };
    for engine in ["candle-cpu", "burn-flex"] {
        for kind in ["load", "train", "infer"] {
            let record = of(engine, kind);
            assert_eq!(record.outcome, Outcome::Ok, "{:?}", record.error);
            assert!(record.peak_memory_bytes.unwrap() > 1_000_000, "{kind}");
            assert!(record.framework_version.is_some() && record.device.is_some());
            assert!(!record.environment.cpu.is_empty());
        }
        let load = of(engine, "load");
        assert_eq!((load.tokens_per_second, load.examples_per_second), (None, None));
        assert!(load.samples.load.unwrap().times.total_seconds > 0.0);

        let train = of(engine, "train");
        let Scenario::Train(parameters) = &train.parameters else { panic!("{:?}", train.parameters) };
        assert_eq!(train.samples.train.len(), parameters.total_steps());
        assert!(train.tokens_per_second.unwrap() > 0.0 && train.examples_per_second.unwrap() > 0.0);
        assert!(train.samples.probes.iter().any(|p| p.name == "lora_all_projections" && p.passed));

        let infer = of(engine, "infer");
        assert!(infer.samples.decode.iter().all(|d| d.seconds.len() == 8));
    }
    // Same batches, same initial adapter, same dropout masks: the first losses agree.
    let first_loss = |engine| of(engine, "train").samples.train[0].loss;
    let (a, b) = (first_loss("candle-cpu"), first_loss("burn-flex"));
    assert!((a - b).abs() / a < 1e-4, "{a} {b}");

    let run = workspace.runs().pop().unwrap();
    let report = fs::read_to_string(run.join("report.md")).unwrap();
    assert!(report.contains("candle-cpu") && report.contains("16 GB"));
    assert!(workspace.results().join("REPORT.md").exists());
}

#[test]
fn sharded_and_untied_checkpoints_run_too() {
    let workspace = Workspace::new();
    fs::remove_dir_all(workspace.model()).unwrap();
    micro_model_with(&workspace.model(), 100_000, false);
    workspace.quick("candle-cpu,burn-flex").assert().success();
    assert!(workspace.records().iter().all(|r| r.outcome == Outcome::Ok));
}

#[test]
fn a_folder_without_a_tokenizer_is_measured_with_random_tokens() {
    let workspace = Workspace::new();
    fs::remove_file(workspace.model().join("tokenizer.json")).unwrap();
    workspace.quick("candle-cpu").assert().success();
    assert!(workspace.records().iter().any(|r| r.examples_per_second.is_some()));
}

#[test]
fn json_is_the_record_on_standard_output() {
    let workspace = Workspace::new();
    let output = workspace.quick("candle-cpu").args(["--scenario", "load", "--json"]).output().unwrap();
    assert!(output.status.success());
    let records: Vec<CellRecord> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].scenario, "load");
}

#[test]
fn a_named_engine_that_cannot_run_fails_the_run_and_the_others_go_on() {
    let workspace = Workspace::new();
    let run = workspace.quick("candle-metal,candle-cpu").args(["--scenario", "load"]).assert().code(1);
    run.stderr(predicate::str::contains("candle-metal"));
    let outcomes: Vec<_> = workspace.records().into_iter().map(|r| (r.engine, r.outcome)).collect();
    assert!(outcomes.contains(&("candle-metal".into(), Outcome::Unavailable)), "{outcomes:?}");
    assert!(outcomes.contains(&("candle-cpu".into(), Outcome::Ok)), "{outcomes:?}");
}

#[test]
fn engines_lists_all_and_says_what_is_missing() {
    let workspace = Workspace::new();
    let output = workspace.evalfw().args(["engines", "--json"]).output().unwrap();
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let row = |name: &str| rows.as_array().unwrap().iter().find(|r| r["engine"] == name).unwrap().clone();
    assert_eq!(row("candle-cpu")["available"], true);
    assert_eq!(row("burn-flex")["available"], true);
    let metal = row("candle-metal");
    if metal["available"] == false {
        assert!(!metal["problem"]["advice"].as_str().unwrap().is_empty());
    }
}

#[test]
fn without_a_vulkan_driver_burn_wgpu_is_unavailable_with_advice() {
    let workspace = Workspace::new();
    let mut run = workspace.quick("candle-cpu,burn-wgpu");
    run.args(["--scenario", "load"]).env("VK_DRIVER_FILES", "/nowhere").env("VK_ICD_FILENAMES", "/nowhere");
    run.assert().code(1).stderr(predicate::str::contains("burn-wgpu"));
    let records = workspace.records();
    let wgpu = records.iter().find(|r| r.engine == "burn-wgpu").unwrap();
    assert_eq!(wgpu.outcome, Outcome::Unavailable, "{:?}", wgpu.error);
    assert!(wgpu.error.as_ref().unwrap().advice.is_some());
}

#[test]
fn nan_in_a_checkpoint_is_a_failure_that_names_the_tensor() {
    let workspace = Workspace::new();
    let path = workspace.model().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor("model.layers.1.mlp.up_proj.weight").unwrap();
    let start = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[start..start + 2].copy_from_slice(&[0xc0, 0x7f]);
    fs::write(&path, bytes).unwrap();
    let run = workspace.quick("candle-cpu").args(["--scenario", "load"]).assert().code(1);
    run.stderr(predicate::str::contains("model.layers.1.mlp.up_proj.weight"));
    assert_eq!(workspace.records()[0].outcome, Outcome::Failed);
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let workspace = Workspace::new();
    workspace.quick("candle-cpu,candle-metal").args(["--scenario", "load"]).assert().code(1);
    let run = workspace.runs().pop().unwrap();
    let before = fs::read_to_string(run.join("cells.jsonl")).unwrap();
    // From another folder: the model was given by its path.
    workspace.evalfw().current_dir("/").args(["run", "--resume"]).arg(&run).assert().code(1);
    assert_eq!(fs::read_to_string(run.join("cells.jsonl")).unwrap(), before);
}

#[test]
fn a_row_whose_line_has_no_end_is_kept_when_the_run_goes_on() {
    let workspace = Workspace::new();
    workspace.quick("candle-cpu").args(["--scenario", "load,infer"]).assert().success();
    let run = workspace.runs().pop().unwrap();
    let cells = run.join("cells.jsonl");
    let before = fs::read_to_string(&cells).unwrap();
    fs::write(&cells, before.trim_end()).unwrap();
    workspace.evalfw().args(["run", "--resume"]).arg(&run).assert().success();
    assert_eq!(fs::read_to_string(&cells).unwrap(), before);
}

#[test]
fn a_run_is_not_resumed_with_other_weights() {
    let workspace = Workspace::new();
    workspace.quick("candle-cpu").args(["--scenario", "load"]).assert().success();
    let run = workspace.runs().pop().unwrap();
    fs::remove_dir_all(workspace.model()).unwrap();
    micro_model_with(&workspace.model(), u64::MAX, false);
    let resumed = workspace.evalfw().args(["run", "--resume"]).arg(&run).assert().code(2);
    resumed.stderr(predicate::str::contains("micro is not the one that this run began with"));
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_an_error_and_no_panic() {
    let workspace = Workspace::new();
    let full = || Stdio::from(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("evalfw"));
    command.current_dir(workspace.path(".")).envs(ALONE);
    command.args(["run", "--suite", "quick", "--engine", "candle-cpu"]);
    command.args(["--scenario", "load", "--model"]).arg(workspace.model());
    let output = command.stdout(full()).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("standard output") && !stderr.contains("panicked"), "{stderr}");
    // Nobody reads the progress: the run goes on.
    assert_eq!(command.stdout(Stdio::null()).stderr(full()).status().unwrap().code(), Some(0));
}
