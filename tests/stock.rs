//! Stock kernels beside ours, and a framework's own quantized format, end to end.

mod support;

use evalfw::record::Outcome;
use predicates::prelude::*;
use std::fs;
use support::Workspace;

/// Both kinds of kernels and both forms of the base, on the smallest jobs there are.
const SUITE: &str = "\
description = \"x\"
model = \"tiny\"
software_adapter_model = \"tiny\"
seed = 1
[[cells]]
scenario = \"infer\"
repetitions = 1
kernels = [\"custom\", \"stock\"]
quantization = [\"nf4\", \"native\"]
prompt_tokens = 8
generate_tokens = 3
warmup = 0
repeats = 1
[[cells]]
scenario = \"train\"
repetitions = 1
kernels = [\"custom\", \"stock\"]
quantization = [\"nf4\", \"native\"]
sequence_length = 32
warmup_steps = 0
steps = 2
";

fn write_suite(workspace: &Workspace) {
    let suites = workspace.path("scenarios/suites");
    fs::create_dir_all(&suites).unwrap();
    for (name, text) in [
        ("infer", include_str!("../scenarios/infer.toml")),
        ("train", include_str!("../scenarios/train.toml")),
    ] {
        fs::write(workspace.path(&format!("scenarios/{name}.toml")), text).unwrap();
    }
    fs::write(suites.join("kernels.toml"), SUITE).unwrap();
}

#[test]
fn a_stock_form_runs_where_a_suite_asks_for_it_and_stands_beside_the_tuned_one() {
    let workspace = Workspace::new();
    write_suite(&workspace);
    let mut run = workspace.evalfw();
    run.args(["run", "--suite", "kernels", "--engine", "candle-cpu", "--model"]).arg(workspace.model());
    run.assert().success();
    let records = workspace.records();
    let mut cells: Vec<String> = records.iter().map(|r| r.cell.replace(&r.model.name, "m")).collect();
    cells.sort();
    let expected = ["infer-pp8-tg3", "train-s32-b1"].iter().flat_map(|scenario| {
        ["candle-cpu", "candle-cpu-stock"].into_iter().flat_map(move |engine| {
            ["native", "nf4"].into_iter().map(move |form| format!("{engine}/m/{scenario}/{form}/0"))
        })
    });
    let mut expected: Vec<String> = expected.collect();
    expected.sort();
    assert_eq!(cells, expected);
    for record in &records {
        assert_eq!(record.outcome, Outcome::Ok, "{}: {:?}", record.cell, record.error);
    }
    // Both forms of the kernels compute the same: the first loss and the gradient behind it.
    let first_step = |engine: &str, form: &str| {
        let cell = format!("{engine}/{}/train-s32-b1/{form}/0", records[0].model.name);
        let record = records.iter().find(|r| r.cell == cell).unwrap();
        (record.samples.train[0].loss, record.samples.train[0].grad_norm)
    };
    let (tuned, stock) = (first_step("candle-cpu", "nf4"), first_step("candle-cpu-stock", "nf4"));
    assert!((tuned.0 / stock.0 - 1.0).abs() < 1e-4, "{tuned:?} {stock:?}");
    assert!((tuned.1 / stock.1 - 1.0).abs() < 1e-3, "{tuned:?} {stock:?}");

    let report = fs::read_to_string(workspace.results().join("REPORT.md")).unwrap();
    let (_, table) = report.split_once("Stock beside tuned").expect("no table of stock kernels");
    for row in ["| candle-cpu | train-s32-b1 | slot tokens/s |", "(native) | generated tokens/s |"] {
        assert!(table.contains(row), "{row} is not in: {table}");
    }
}

#[test]
fn a_form_that_an_engine_lacks_is_unavailable_there_and_the_rest_is_measured() {
    let workspace = Workspace::new();
    write_suite(&workspace);
    let mut run = workspace.evalfw();
    run.args(["run", "--suite", "kernels", "--scenario", "infer", "--engine", "burn-flex", "--model"]);
    run.arg(workspace.model()).assert().code(1);
    let records = workspace.records();
    let outcome = |form: &str| {
        let record = records.iter().find(|r| r.cell.contains(&format!("/{form}/"))).unwrap();
        (record.outcome, record.error.as_ref().map(|e| e.message.clone()).unwrap_or_default())
    };
    assert_eq!(outcome("nf4").0, Outcome::Ok);
    let (unavailable, message) = outcome("native");
    assert_eq!(unavailable, Outcome::Unavailable);
    assert!(message.contains("native"), "{message}");
    let advice = records.iter().find_map(|r| r.error.as_ref()?.advice.clone()).unwrap();
    assert!(advice.contains("`none` and `nf4`"), "{advice}");
    assert!(records.iter().all(|r| r.engine == "burn-flex"), "Burn has no stock form yet");
}

#[test]
fn a_suite_of_stock_kernels_alone_names_the_engines_that_have_them() {
    let workspace = Workspace::new();
    write_suite(&workspace);
    let suite = workspace.path("scenarios/suites/kernels.toml");
    fs::write(suite, SUITE.replace("[\"custom\", \"stock\"]", "\"stock\"")).unwrap();
    let mut run = workspace.evalfw();
    run.args(["run", "--suite", "kernels", "--engine", "burn-flex", "--model"]).arg(workspace.model());
    let refused = run.assert().code(2);
    refused.stderr(predicate::str::contains("has a stock form").and(predicate::str::contains("candle-cpu,")));
}
