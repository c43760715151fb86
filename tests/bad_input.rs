//! Bad input is one clear error that names file and field, with exit code 2, and nothing is started.

mod support;

use predicates::prelude::*;
use std::fs;
use std::path::Path;
use support::{Workspace, micro_model_with};

/// Expects exit code 2, every one of `words` on standard error, and no run folder.
fn refused(workspace: &Workspace, extra: &[&str], words: &[&str]) {
    let mut command = workspace.quick("candle-cpu");
    let output = command.args(extra).assert().code(2).get_output().clone();
    let stderr = String::from_utf8(output.stderr).unwrap();
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in: {stderr}");
    }
    assert!(workspace.runs().is_empty(), "a run folder was made");
}

fn edit_json(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn a_missing_shard() {
    let workspace = Workspace::new();
    fs::remove_dir_all(workspace.model()).unwrap();
    micro_model_with(&workspace.model(), 100_000, true);
    let files =
        fs::read_dir(workspace.model()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let shard = files.into_iter().find(|name| name.starts_with("model-00002-of-")).unwrap();
    fs::remove_file(workspace.model().join(&shard)).unwrap();
    refused(&workspace, &[], &[&shard, "missing"]);
}

#[test]
fn a_truncated_file() {
    let workspace = Workspace::new();
    let path = workspace.model().join("model.safetensors");
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1000).unwrap();
    refused(&workspace, &[], &["model.safetensors", "truncated"]);
}

#[test]
fn a_tensor_of_the_wrong_shape() {
    let workspace = Workspace::new();
    edit_json(&workspace.model().join("config.json"), |c| c["intermediate_size"] = 128.into());
    refused(&workspace, &[], &["model.safetensors", "mlp.gate_proj.weight", "[192, 64]", "[128, 64]"]);
}

#[test]
fn a_model_of_another_architecture() {
    let workspace = Workspace::new();
    edit_json(&workspace.model().join("config.json"), |c| c["model_type"] = "llama".into());
    refused(&workspace, &[], &["config.json", "model_type", "llama"]);
}

#[test]
fn a_config_without_a_field_or_that_is_no_json() {
    let workspace = Workspace::new();
    let config = workspace.model().join("config.json");
    edit_json(&config, |c| drop(c.as_object_mut().unwrap().remove("hidden_size")));
    refused(&workspace, &[], &["config.json", "hidden_size"]);
    fs::write(&config, "{").unwrap();
    refused(&workspace, &[], &["config.json"]);
}

#[test]
fn a_tokenizer_whose_ids_exceed_the_vocabulary() {
    let workspace = Workspace::new();
    // The tokenizer of the full vocabulary beside a model with a small one.
    let tiny = workspace.path("tiny");
    workspace.evalfw().args(["synth", "tiny"]).arg(&tiny).assert().success();
    fs::copy(tiny.join("tokenizer.json"), workspace.model().join("tokenizer.json")).unwrap();
    refused(&workspace, &[], &["tokenizer.json", "151664", "vocab_size is 4096"]);
}

#[test]
fn an_empty_data_set_and_a_line_that_is_not_json() {
    let workspace = Workspace::new();
    let data = workspace.path("data");
    let good = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
    fs::create_dir(&data).unwrap();
    fs::write(data.join("train.jsonl"), "").unwrap();
    fs::write(data.join("valid.jsonl"), good).unwrap();
    refused(&workspace, &["--data", "data"], &["train.jsonl", "empty"]);
    fs::write(data.join("train.jsonl"), format!("{good}\n{{oops\n")).unwrap();
    refused(&workspace, &["--data", "data"], &["train.jsonl: line 2"]);
}

#[test]
fn unknown_names_list_the_known_ones() {
    let workspace = Workspace::new();
    let run = |arguments: &[&str]| workspace.evalfw().arg("run").args(arguments).assert().code(2);
    run(&["--engine", "candle"]).stderr(predicate::str::contains("candle-cpu"));
    run(&["--suite", "quik"])
        .stderr(predicate::str::contains("default, frameworks, full, gpu, large, long, quick"));
    run(&["--scenario", "trian"]).stderr(predicate::str::contains("infer, load, quality, train"));
    run(&["--model", "9b"]).stderr(predicate::str::contains("qwen2.5-coder-7b"));
    workspace.evalfw().args(["synth", "9b", "x"]).assert().code(2).stderr(predicate::str::contains("tiny"));
}

#[test]
fn an_unknown_key_in_a_scenario_of_ones_own() {
    let workspace = Workspace::new();
    let scenarios = workspace.scenarios();
    let train = scenarios.join("train.toml");
    let text = fs::read_to_string(&train).unwrap();
    fs::write(&train, text.replace("packing = true", "packign = true")).unwrap();
    refused(&workspace, &[], &["train.toml", "packign"]);
}

#[test]
fn a_results_folder_that_cannot_be_written() {
    let workspace = Workspace::new();
    fs::write(workspace.path("occupied"), "a file").unwrap();
    refused(&workspace, &["--out", "occupied"], &["occupied", "cannot be written"]);
}

#[test]
fn a_sequence_longer_than_the_model_can_take() {
    let workspace = Workspace::new();
    edit_json(&workspace.model().join("config.json"), |c| c["max_position_embeddings"] = 48.into());
    refused(&workspace, &[], &["sequence_length is 64", "max_position_embeddings", "48"]);
}

#[test]
fn a_folder_that_is_no_run() {
    let workspace = Workspace::new();
    workspace
        .evalfw()
        .args(["report", "micro"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("cells.jsonl"));
    let resume = workspace.evalfw().args(["run", "--resume", "micro"]).assert().code(2);
    resume.stderr(predicate::str::contains("run.json"));
}
