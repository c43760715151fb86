//! `evalfw verify`: the engines hold, planted errors are caught, an altered reference is refused.

use assert_cmd::Command;
use evalfw::record::Outcome;
use evalfw::verify::reference::Reference;
use evalfw::verify::{Scope, Verdict, verify};
use evalfw::worker::WorkerCommand;
use predicates::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};

fn evalfw(arguments: &[&str]) -> assert_cmd::assert::Assert {
    Command::cargo_bin("evalfw").unwrap().args(arguments).assert()
}

#[test]
fn candle_holds_against_the_whole_reference() {
    evalfw(&["verify", "--engine", "candle-cpu"]).success();
}

#[test]
fn burn_on_flex_holds_against_the_whole_reference() {
    evalfw(&["verify", "--engine", "burn-flex"]).success();
}

#[test]
fn burn_on_wgpu_holds_where_there_is_an_adapter() {
    let output = Command::cargo_bin("evalfw").unwrap().args(["engines", "--json"]).output().unwrap();
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let wgpu = rows.as_array().unwrap().iter().find(|r| r["engine"] == "burn-wgpu").unwrap();
    if wgpu["available"] == false {
        eprintln!("not run: no Vulkan adapter");
        return;
    }
    evalfw(&["verify", "--engine", "burn-wgpu", "--short"]).success();
}

#[test]
fn json_has_every_check_with_its_deviation_and_tolerance() {
    let run = evalfw(&["verify", "--engine", "candle-cpu", "--short", "--json"]).success();
    let verdicts: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    let checks = verdicts[0]["checks"].as_array().unwrap();
    assert!(checks.len() >= 10);
    assert!(checks.iter().all(|c| c["deviation"].is_f64() && c["tolerance"].is_f64() && c["passed"] == true));
}

/// The worker with a planted error: built beside the tests.
fn mutant(mutation: &str) -> Verdict {
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().parent().unwrap().join("examples/mutant_engine");
    assert!(program.exists(), "{} is built with the tests", program.display());
    let command = WorkerCommand { program, arguments: vec![mutation.into()], environment: Vec::new() };
    verify("mutant", &command, &Reference::built_in().unwrap(), Scope::Short)
}

/// Expects a verdict of wrong because of the checks whose names begin so, and of no others.
fn caught(mutation: &str, checks: &[&str]) {
    let verdict = mutant(mutation);
    assert_eq!(verdict.outcome, Outcome::Wrong, "{}", verdict.summary());
    let failed: Vec<_> = verdict.failed_checks().map(|c| c.name.as_str()).collect();
    for check in checks {
        assert!(failed.contains(check), "{check} should have failed, but only {failed:?} did");
    }
}

#[test]
fn the_wrapper_of_the_mutants_is_right_itself() {
    let verdict = mutant("none");
    assert_eq!(verdict.outcome, Outcome::Ok, "{}", verdict.summary());
}

#[test]
fn a_wrong_rope_is_caught() {
    caught("rope", &["logits", "losses without adapter", "adapter gradients"]);
}

#[test]
fn a_dropped_bias_is_caught() {
    // A bias on the keys moves all scores of a query alike, but for its rotation.
    caught("bias", &["logits"]);
}

#[test]
fn an_adapter_without_a_gradient_is_caught() {
    caught("gradient", &["adapter gradients", "NF4: adapter gradients"]);
}

#[test]
fn alpha_instead_of_alpha_over_r_is_caught() {
    caught("scale", &["losses with adapter", "adapter gradients"]);
}

#[test]
fn a_cache_off_by_one_is_caught() {
    caught("cache", &["greedy tokens through the KV cache"]);
}

#[test]
fn dropout_in_evaluation_is_caught() {
    caught("evaluation", &["losses with adapter"]);
}

#[test]
fn a_loss_that_is_not_a_number_is_caught() {
    let verdict = mutant("not-finite");
    assert_eq!(verdict.outcome, Outcome::Wrong);
    assert!(verdict.summary().contains("loss is NaN"), "{}", verdict.summary());
}

/// A copy of the committed reference, to spoil.
fn reference_copy() -> (tempfile::TempDir, PathBuf) {
    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            match entry.file_type().unwrap().is_dir() {
                true => copy(&entry.path(), &target),
                false => drop(fs::copy(entry.path(), target).unwrap()),
            }
        }
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    let folder = tempfile::tempdir().unwrap();
    copy(&source.join("golden"), &folder.path().join("golden"));
    fs::copy(source.join("manifest.json"), folder.path().join("manifest.json")).unwrap();
    let path = folder.path().to_owned();
    (folder, path)
}

#[test]
fn another_reference_is_read_from_its_folder() {
    let (_keep, folder) = reference_copy();
    evalfw(&["verify", "--engine", "candle-cpu", "--short", "--reference", folder.to_str().unwrap()])
        .success();
}

#[test]
fn an_altered_or_missing_golden_file_is_refused_by_name() {
    let (_keep, folder) = reference_copy();
    let file = folder.join("golden/untied-6q3kv/losses.json");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replacen('5', "6", 1)).unwrap();
    let arguments = ["verify", "--engine", "candle-cpu", "--reference", folder.to_str().unwrap()];
    let altered = predicate::str::contains("losses.json").and(predicate::str::contains("altered"));
    evalfw(&arguments).code(2).stderr(altered);
    fs::remove_file(&file).unwrap();
    let missing = predicate::str::contains("losses.json").and(predicate::str::contains("missing"));
    evalfw(&arguments).code(2).stderr(missing);
}
