//! Stock kernels beside ours, and a framework's own quantized format, end to end.

mod support;

use evalfw::record::{CellRecord, Outcome};
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
    for row in [
        "| candle-cpu | train-s32-b1 | NF4 | slot tokens/s |",
        "| candle-cpu | infer-pp8-tg3 | native | generated tokens/s |",
    ] {
        assert!(table.contains(row), "{row} is not in: {table}");
    }
}

#[test]
fn a_form_that_an_engine_lacks_is_unavailable_there_and_the_rest_is_measured() {
    let workspace = Workspace::new();
    write_suite(&workspace);
    let mut run = workspace.evalfw();
    run.args([
        "run",
        "--suite",
        "kernels",
        "--scenario",
        "infer",
        "--engine",
        "burn-flex,burn-flex-stock",
        "--model",
    ]);
    run.arg(workspace.model()).assert().code(1);
    let records = workspace.records();
    let outcome = |engine: &str, form: &str| {
        let of = |r: &&CellRecord| r.engine == engine && r.cell.contains(&format!("/{form}/"));
        let record = records.iter().find(of).unwrap();
        (record.outcome, record.error.clone())
    };
    assert_eq!(outcome("burn-flex", "nf4").0, Outcome::Ok);
    assert_eq!(outcome("burn-flex-stock", "native").0, Outcome::Ok);
    for (engine, form, forms) in
        [("burn-flex", "native", "`none` and `nf4`"), ("burn-flex-stock", "nf4", "`none` and `native`")]
    {
        let (unavailable, error) = outcome(engine, form);
        assert_eq!(unavailable, Outcome::Unavailable);
        let error = error.unwrap();
        assert!(error.message.contains(form), "{}", error.message);
        assert!(error.advice.unwrap().contains(forms));
    }
    // Each has one format of 4 bits.
    let report = fs::read_to_string(workspace.results().join("REPORT.md")).unwrap();
    let row = "| burn-flex | infer-pp8-tg3 | native, tuned NF4 | generated tokens/s |";
    assert!(report.contains(row), "{row} is not in: {report}");
}

/// Trains two steps on the framework's own format.
const NATIVE_TRAINING: &str = "\
description = \"x\"
model = \"tiny\"
software_adapter_model = \"tiny\"
seed = 1
[[cells]]
scenario = \"train\"
repetitions = 1
quantization = \"native\"
sequence_length = 32
warmup_steps = 0
steps = 2
";

#[test]
fn stock_burn_trains_on_its_own_format_without_dropout_and_refuses_it() {
    let workspace = Workspace::new();
    write_suite(&workspace);
    let train = |dropout: &str| {
        let suite = format!("{NATIVE_TRAINING}lora_dropout = {dropout}\n");
        fs::write(workspace.path("scenarios/suites/kernels.toml"), suite).unwrap();
        let mut run = workspace.evalfw();
        run.args(["run", "--suite", "kernels", "--engine", "burn-flex-stock", "--model"]);
        run.arg(workspace.model()).assert()
    };
    train("0.1").code(1);
    let refused = workspace.records().pop().unwrap();
    assert_eq!(refused.outcome, Outcome::Failed);
    let message = refused.error.unwrap().message;
    assert!(
        message.contains("lora_dropout 0.1") && message.contains("train with lora_dropout 0"),
        "{message}"
    );

    train("0.0").success();
    let trained = workspace.records().pop().unwrap();
    assert_eq!(trained.outcome, Outcome::Ok, "{:?}", trained.error);
    assert!(trained.samples.train.iter().all(|step| step.loss.is_finite() && step.grad_norm > 0.0));
}
