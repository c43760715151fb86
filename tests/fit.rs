//! `evalfw fit`, through the binary: predictions against the records in this repository, and what fits.

use assert_cmd::Command;
use evalfw::model::Preset;
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

fn evalfw() -> Command {
    let mut command = Command::cargo_bin("evalfw").unwrap();
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

fn fit(arguments: &[&str]) -> assert_cmd::assert::Assert {
    evalfw().arg("fit").args(arguments).assert()
}

fn json_of(arguments: &[&str], code: i32) -> Value {
    let output = evalfw().arg("fit").args(arguments).arg("--json").assert().code(code).get_output().clone();
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The cells of a report that have both figures.
fn compared(report: &Value) -> Vec<&Value> {
    report["cells"].as_array().unwrap().iter().filter(|cell| cell["error"].is_number()).collect()
}

#[test]
fn the_tuned_engines_on_the_cpu_are_within_five_percent_of_their_records() {
    let runs = [
        "results/20261124-162829-large",
        "results/20261124-204355-default",
        "results/20261128-093644-default",
        "results/peers/20261128-005000-0.5b-s512",
        "results/peers/20261128-005953-0.5b-s512",
        "results/peers/20261128-050536-0.5b-s512",
        "results/peers/20261128-051233-0.5b-s512",
    ];
    let arguments = [&["--check"][..], &runs].concat();
    let report = json_of(&arguments, 0);
    let cells = compared(&report);
    // Training and inference of four engines on 0.5b, and of one on 7b at 512 and at 2048.
    for part in
        ["candle-cpu/", "candle-cpu-bf16/", "burn-flex/", "burn-flex-bf16/", "7b/train-s2048", "7b/infer"]
    {
        assert!(cells.iter().any(|cell| cell["cell"].as_str().unwrap().contains(part)), "{part}");
    }
    assert!(cells.len() >= 50, "{}", cells.len());
    for cell in cells {
        assert!(cell["error"].as_f64().unwrap().abs() <= 0.05, "{cell}");
    }
    // A prediction can be off: the same cells, held to less than they keep.
    fit(&[&arguments[..], &["--tolerance", "0.5"]].concat()).code(1).stdout(contains(" off "));
}

#[test]
fn memory_of_a_gpu_is_held_against_what_the_engine_tells() {
    let report = json_of(&["--check", "results/20261128-064931-gpu", "results/20261128-045706-large"], 0);
    let cells = compared(&report);
    assert!(cells.len() >= 8 && cells.iter().all(|cell| cell["is_device"] == json!(true)), "{}", cells.len());
    let unpredicted = report["cells"].as_array().unwrap().iter().filter(|cell| cell["predicted"].is_null());
    let why: Vec<&str> = unpredicted.map(|cell| cell["note"].as_str().unwrap()).collect();
    let told = |note: &&str| note.starts_with("no prediction: ") || note.starts_with("not measured: ");
    assert!(!why.is_empty() && why.iter().all(told), "{why:?}");
}

#[test]
fn cells_without_a_model_or_of_an_older_engine_say_so() {
    let text = fit(&["--check", "results/20261124-132414-default"]).code(1);
    text.stdout(
        contains("older than what the engine does with memory now")
            .and(contains("no prediction: candle-cpu-stock"))
            .and(contains("less than the process around it")),
    );
}

#[test]
fn a_job_is_shown_by_component_with_a_verdict() {
    let job = ["--model", "7b", "--engine", "candle-cpu-bf16", "--sequence", "2048"];
    let shown = contains("4-bit weights").and(contains("their scales")).and(contains("optimizer state"));
    fit(&job).success().stdout(shown.and(contains("GB fits into 16 GB")).and(contains("largest batch")));
    fit(&[&job[..], &["--target-gb", "8"]].concat()).success().stdout(contains("does not fit into 8 GB"));
    let found = json_of(&job, 0);
    let parts = found["prediction"]["components"].as_array().unwrap();
    let sum: u64 = parts.iter().map(|part| part["bytes"].as_u64().unwrap()).sum();
    assert_eq!(found["prediction"]["total_bytes"], sum);
    // r · (in + out) of the seven projections of 28 layers, by hand: 90 112 features a layer.
    let adapter = parts.iter().find(|part| part["name"] == "adapter").unwrap();
    assert_eq!(adapter["bytes"], 4 * 16 * 28 * 90_112);
    let unquantized = json_of(&[&job[..], &["--quantization", "none"]].concat(), 0);
    assert_eq!(unquantized["prediction"]["components"][1]["bytes"], 2 * 28 * 233_046_016u64);
    fit(&[&job[..], &["--infer"]].concat())
        .success()
        .stdout(contains("KV cache").and(contains("head in 6 bits")));
}

#[test]
fn the_longest_sequence_fits_and_one_more_does_not() {
    let common = ["--model", "7b", "--engine", "candle-cpu-bf16"];
    let found = json_of(&common, 0);
    let longest = found["longest_sequence"].as_u64().unwrap();
    let fits = |sequence: u64| {
        json_of(&[&common[..], &["--sequence", &sequence.to_string()]].concat(), 0)["fits"].as_bool().unwrap()
    };
    assert!(fits(longest) && !fits(longest + 1), "{longest}");
    assert_eq!(found["lengths"].as_array().unwrap().len(), 7);
    let text = format!("the longest sequence in 16 GB is {longest}");
    fit(&common).success().stdout(contains(text).and(contains("32768")));
    fit(&[&common[..], &["--target-gb", "2"]].concat()).success().stdout(contains("not even one token fits"));
    let small = ["--model", "0.5b", "--engine", "burn-flex", "--target-gb", "1000"];
    fit(&small).success().stdout(contains("is 32768, the model's longest"));
}

fn model_folder(folder: &Path, most: usize) {
    let config = Preset::parse("0.5b").unwrap().config;
    let text = json!({
        "model_type": "qwen2", "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": most, "rope_theta": 1e6, "tie_word_embeddings": true
    });
    fs::write(folder.join("config.json"), text.to_string()).unwrap();
}

#[test]
fn a_folder_with_a_config_is_a_model() {
    let folder = tempfile::tempdir().unwrap();
    model_folder(folder.path(), 1024);
    let path = folder.path().to_str().unwrap();
    let of = |model: &str| {
        let job = ["--model", model, "--engine", "burn-flex", "--sequence", "1024"];
        json_of(&job, 0)["prediction"]["total_bytes"].clone()
    };
    assert_eq!(of(path), of("0.5b"));
    let too_long = ["--model", path, "--engine", "burn-flex", "--sequence", "1025"];
    fit(&too_long).code(2).stderr(contains("max_position_embeddings").and(contains("1024")));
    let prompt =
        [&["--model", path, "--engine", "burn-flex", "--sequence", "1024"][..], &["--infer"]].concat();
    fit(&prompt).code(2).stderr(contains("above max_position_embeddings 1024"));
    // Only the lengths that the model has.
    let lengths = json_of(&["--model", path, "--engine", "burn-flex"], 0);
    assert_eq!(lengths["lengths"].as_array().unwrap().len(), 2);
}

#[test]
fn bad_input_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().to_str().unwrap();
    let cases: [(&[&str], &str); 13] = [
        (&["--model", "7b", "--engine", "candel", "--sequence", "8"], "--engine candel: unknown"),
        (
            &["--model", "7b", "--engine", "burn-flex-stock", "--sequence", "8"],
            "no prediction: burn-flex-stock",
        ),
        (&["--model", "7b", "--engine", "candle-metal"], "no prediction: candle-metal"),
        (&["--model", "7b", "--engine", "burn-flex", "--sequence", "0"], "--sequence"),
        (&["--model", "7b", "--engine", "burn-flex", "--batch", "0"], "--batch"),
        (&["--model", "7b", "--engine", "burn-flex", "--sequence", "32769"], "max_position_embeddings"),
        (&["--model", "7b", "--engine", "burn-flex", "--target-gb=-1"], "--target-gb"),
        (
            &["--model", "7b", "--engine", "burn-flex", "--kept-activations-gb", "nan"],
            "--kept-activations-gb",
        ),
        (&["--model", "9b", "--engine", "burn-flex"], "9b"),
        (&["--model", "Qwen/Qwen2.5-Coder-7B", "--engine", "burn-flex"], "not on this disk"),
        (&["--model", empty, "--engine", "burn-flex"], "config.json"),
        (&["--check", empty], "cells.jsonl"),
        (&["--engine", "burn-flex"], "--model"),
    ];
    for (arguments, message) in cases {
        fit(arguments).code(2).stderr(contains(message));
    }
    fs::write(folder.path().join("samples.json"), r#"{"measurements": [{"samples": {"detail": {}}}]}"#)
        .unwrap();
    fit(&["--check", empty]).code(2).stderr(contains("none of our engines"));
}

#[test]
fn a_model_of_absurd_size_is_only_too_large() {
    let folder = tempfile::tempdir().unwrap();
    model_folder(folder.path(), usize::MAX);
    let path = folder.path().to_str().unwrap();
    let long = ["--model", path, "--engine", "burn-wgpu", "--sequence", "18000000000000000000"];
    fit(&long).success().stdout(contains("does not fit into 16 GB"));
    fit(&["--model", path, "--engine", "burn-wgpu"]).success().stdout(contains("the longest sequence"));
}
