//! `evalfw verify`: the engines hold, planted errors are caught, an altered reference is refused.

mod support;

use assert_cmd::Command;
use assert_cmd::cargo::cargo_bin;
use evalfw::record::Outcome;
use evalfw::verify::derived::derive;
use evalfw::verify::reference::Reference;
use evalfw::verify::{Scope, Verdict, verify};
use evalfw::worker::WorkerCommand;
use predicates::prelude::*;
use sha2::{Digest, Sha256};
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
fn stock_burn_on_flex_holds_against_the_whole_reference_and_refuses_dropout() {
    let refusal = predicate::str::contains("dropout is refused, not left out")
        .and(predicate::str::contains("lora_dropout 0.25"))
        .and(predicate::str::contains("native: weights from the checkpoint's"))
        .and(predicate::str::contains("native: greedy tokens through the KV cache"))
        .and(predicate::str::contains("NF4:").not());
    evalfw(&["verify", "--engine", "burn-flex-stock"]).success().stdout(refusal);
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

/// With a model that has no golden files.
fn micro_model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    support::micro_model(&folder.path().join("micro"));
    folder
}

#[test]
fn on_a_model_without_golden_files_engines_hold_against_each_other() {
    let folder = micro_model();
    let model = folder.path().join("micro");
    let engines = "burn-flex,candle-cpu-stock,candle-cpu";
    let run =
        evalfw(&["verify", "--model", model.to_str().unwrap(), "--engine", engines, "--json"]).success();
    let verdicts: Vec<serde_json::Value> = serde_json::from_slice(&run.get_output().stdout).unwrap();
    // The one that the others are held against is not among them.
    let names: Vec<_> = verdicts.iter().map(|v| v["engine"].as_str().unwrap()).collect();
    assert_eq!(names, ["burn-flex", "candle-cpu-stock", "burn-flex, candle-cpu-stock"]);
    for verdict in &verdicts[..2] {
        let checks = verdict["checks"].as_array().unwrap();
        assert!(checks.iter().any(|c| c["name"] == "NF4: adapter gradients"), "{verdict}");
        assert!(checks.iter().all(|c| c["model"] == "micro" && c["deviation"].is_f64()), "{verdict}");
    }
}

#[test]
fn errors_show_against_another_engine_as_they_do_against_golden_files() {
    let folder = micro_model();
    let reference = WorkerCommand {
        program: cargo_bin("evalfw"),
        arguments: vec!["worker".into(), "burn-flex".into()],
        environment: Vec::new(),
        agent: false,
    };
    let reference = derive(&reference, "micro", &folder.path().join("micro")).unwrap();
    let errors = [
        ("none", None),
        ("rope", Some("logits")),
        ("cache", Some("greedy tokens through the KV cache")),
        ("gradient", Some("NF4: adapter gradients")),
        ("swapped-factors", Some("losses with adapter")),
        ("dropout-rate", Some("adapter gradients with dropout")),
        ("no-bias-correction", Some("NF4: 3 losses of the curve nf4")),
    ];
    for (mutation, check) in errors {
        let verdict = verify("mutant", &mutant_command(mutation), &reference, Scope::Short);
        let failed: Vec<_> = verdict.failed_checks().map(|c| c.name.as_str()).collect();
        match check {
            Some(check) => assert!(failed.contains(&check), "{mutation}: {}", verdict.summary()),
            None => assert_eq!(verdict.outcome, Outcome::Ok, "{}", verdict.summary()),
        }
    }
}

#[test]
fn only_an_engine_that_computes_in_f32_is_held_against() {
    let error = predicate::str::contains("candle-cpu-bf16, which must compute in f32");
    let unavailable = predicate::str::contains("nothing can be held against candle-cpu-bf16");
    evalfw(&["verify", "--model", "tiny", "--against", "candle-cpu-bf16"])
        .code(2)
        .stderr(error.and(unavailable));
    let itself = predicate::str::contains("name another engine");
    evalfw(&["verify", "--model", "tiny", "--engine", "candle-cpu"]).code(2).stderr(itself);
}

#[test]
fn json_has_every_check_with_its_deviation_and_tolerance() {
    let run = evalfw(&["verify", "--engine", "candle-cpu", "--short", "--json"]).success();
    let verdicts: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    let checks = verdicts[0]["checks"].as_array().unwrap();
    assert!(checks.len() >= 10);
    assert!(checks.iter().all(|c| c["deviation"].is_f64() && c["tolerance"].is_f64() && c["passed"] == true));
}

/// A model of the reference that shows all the planted errors.
const MODEL: &str = "untied-6q3kv";

/// The worker with a planted error: built beside the tests.
fn mutant_command(mutation: &str) -> WorkerCommand {
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().parent().unwrap().join("examples/mutant_engine");
    assert!(program.exists(), "{} is built with the tests", program.display());
    let arguments = mutation.split(' ').map(Into::into).collect();
    WorkerCommand { program, arguments, environment: Vec::new(), agent: false }
}

fn mutant(mutation: &str, scope: Scope) -> Verdict {
    verify("mutant", &mutant_command(mutation), &Reference::built_in().unwrap().only(MODEL), scope)
}

fn holds(mutation: &str) {
    let verdict = mutant(mutation, Scope::Full);
    assert_eq!(verdict.outcome, Outcome::Ok, "{mutation}: {}", verdict.summary());
}

/// Each error with checks that it must fail.
fn all_caught(errors: &[(&str, &[&str])], scope: Scope) {
    for (mutation, checks) in errors {
        let verdict = mutant(mutation, scope);
        assert_eq!(verdict.outcome, Outcome::Wrong, "{mutation}: {}", verdict.summary());
        let failed: Vec<_> = verdict.failed_checks().map(|c| c.name.as_str()).collect();
        for check in *checks {
            assert!(
                failed.contains(check),
                "{mutation}: {check} should have failed, but only {failed:?} did"
            );
        }
    }
}

#[test]
fn the_wrapper_of_the_mutants_is_right_itself() {
    holds("none");
}

#[test]
fn errors_of_the_forward_pass_are_caught_before_a_run() {
    let errors: &[(&str, &[&str])] = &[
        ("rope", &["logits", "losses without adapter", "adapter gradients"]),
        // A bias on the keys moves all scores of a query alike, but for its rotation.
        ("bias", &["logits"]),
        ("cache", &["greedy tokens through the KV cache"]),
        ("padding-attended", &["losses without adapter", "NF4: losses without adapter"]),
        ("loss-over-all-positions", &["losses without adapter", "adapter gradients"]),
    ];
    all_caught(errors, Scope::Short);
}

#[test]
fn errors_of_the_adapter_are_caught_before_a_run() {
    let errors: &[(&str, &[&str])] = &[
        ("gradient", &["adapter gradients", "NF4: adapter gradients"]),
        ("scale", &["losses with adapter", "adapter gradients"]),
        ("swapped-factors", &["losses with adapter", "adapter gradients"]),
        ("wrong-layer", &["losses with adapter", "losses with a trained adapter"]),
    ];
    all_caught(errors, Scope::Short);
}

#[test]
fn errors_of_dropout_are_caught_before_a_run() {
    let errors: &[(&str, &[&str])] = &[
        ("dropout-in-evaluation", &["losses with adapter"]),
        ("dropout-unscaled", &["adapter gradients with dropout"]),
        ("dropout-rate", &["adapter gradients with dropout"]),
        ("dropout-never", &["adapter gradients with dropout"]),
    ];
    all_caught(errors, Scope::Short);
}

#[test]
fn errors_of_dropout_show_in_its_losses_too() {
    let errors: &[(&str, &[&str])] = &[
        ("dropout-unscaled", &["3 losses of the curve dropout"]),
        ("dropout-rate", &["3 losses of the curve dropout"]),
        ("dropout-never", &["3 losses of the curve dropout"]),
    ];
    all_caught(errors, Scope::Full);
}

#[test]
fn errors_of_the_optimizer_are_caught_before_a_run() {
    let errors: &[(&str, &[&str])] = &[
        ("no-bias-correction", &["8 losses of the curve adamw", "NF4: 8 losses of the curve nf4"]),
        ("coupled-weight-decay", &["8 losses of the curve adamw"]),
        ("no-clipping", &["8 losses of the curve clipping"]),
        ("mean-of-micro-batches", &["8 losses of the curve accumulation"]),
    ];
    all_caught(errors, Scope::Short);
}

#[test]
fn errors_of_the_optimizer_are_caught() {
    let errors: &[(&str, &[&str])] = &[
        ("no-bias-correction", &["20 losses of the curve adamw"]),
        ("coupled-weight-decay", &["20 losses of the curve adamw"]),
        ("no-clipping", &["20 losses of the curve clipping"]),
        ("mean-of-micro-batches", &["20 losses of the curve accumulation"]),
    ];
    all_caught(errors, Scope::Full);
}

#[test]
fn a_format_of_the_engines_own_holds_and_its_errors_are_caught_before_a_run() {
    holds("none native");
    let distance = "native: weights from the checkpoint's, over the distance of NF4's";
    let arithmetic = ["native: logits", "native: losses without adapter", "native: adapter gradients"];
    let errors: &[(&str, &[&str])] =
        &[("weights-untold native", &arithmetic), ("weights-coarse native", &[distance])];
    all_caught(errors, Scope::Short);
    let untold = mutant("weights-untold native", Scope::Short);
    assert!(untold.failed_checks().all(|check| check.name != distance), "{}", untold.summary());
}

#[test]
fn a_loss_that_is_not_a_number_is_caught() {
    let verdict = mutant("not-finite", Scope::Short);
    assert_eq!(verdict.outcome, Outcome::Wrong);
    assert!(verdict.summary().contains("loss is NaN"), "{}", verdict.summary());
}

#[test]
fn bf16_holds_where_it_is_said_and_only_there() {
    holds("none rounds says-bf16");
    all_caught(&[("none rounds", &["logits", "losses without adapter", "adapter gradients"])], Scope::Short);
}

#[test]
fn errors_are_caught_in_bf16_too() {
    let errors: &[(&str, &[&str])] = &[
        ("rope rounds says-bf16", &["logits"]),
        ("cache rounds says-bf16", &["greedy tokens through the KV cache"]),
        ("gradient rounds says-bf16", &["adapter gradients"]),
        ("scale rounds says-bf16", &["losses with adapter", "adapter gradients"]),
        ("dropout-never rounds says-bf16", &["adapter gradients with dropout"]),
    ];
    all_caught(errors, Scope::Short);
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
fn engines_are_compared_with_each_other() {
    let arguments = ["verify", "--engine", "candle-cpu,burn-flex", "--short"];
    evalfw(&arguments).success().stdout(predicate::str::contains("NF4: losses equal across engines"));
    let run = evalfw(&[&arguments[..], &["--json"]].concat()).success();
    let verdicts: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    let agreement = &verdicts[2];
    assert_eq!(agreement["engine"], "candle-cpu, burn-flex");
    assert_eq!(agreement["checks"].as_array().unwrap().len(), 1);
    assert_eq!(agreement["checks"][0]["passed"], true);
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

/// Spoils the copy at `folder`, brings its digests up to date and expects its refusal.
fn refused(folder: &Path, spoil: impl FnOnce(&Path, &mut serde_json::Value), words: &[&str]) {
    let path = folder.join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    spoil(folder, &mut manifest);
    if let Some(golden) = manifest["golden"].as_object_mut() {
        for (file, digest) in golden {
            let found = Sha256::digest(fs::read(folder.join("golden").join(file)).unwrap());
            *digest = found.iter().map(|b| format!("{b:02x}")).collect::<String>().into();
        }
    }
    fs::write(&path, manifest.to_string()).unwrap();
    let error = Reference::read(folder).err().expect("the reference was accepted");
    let message = format!("{error:#}");
    assert!(words.iter().all(|word| message.contains(word)), "expected {words:?}: {message}");
}

#[test]
fn a_reference_made_by_other_versions_is_refused_on_the_command_line() {
    let (_keep, folder) = reference_copy();
    let path = folder.join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let pinned = manifest["packages"]["torch"].as_str().unwrap().to_owned();
    manifest["packages"]["torch"] = "1.13.0".into();
    fs::write(&path, manifest.to_string()).unwrap();
    let both = predicate::str::contains("torch 1.13.0").and(predicate::str::contains(pinned));
    evalfw(&["verify", "--engine", "candle-cpu", "--reference", folder.to_str().unwrap()])
        .code(2)
        .stderr(both);
}

#[test]
fn a_manifest_that_does_not_say_what_made_the_reference_is_refused() {
    type Spoil = fn(&Path, &mut serde_json::Value);
    let without: [(Spoil, &[&str]); 5] = [
        (|_, m| drop(m.as_object_mut().unwrap().remove("packages")), &["packages"]),
        (|_, m| drop(m.as_object_mut().unwrap().remove("sources")), &["sources"]),
        (|_, m| m["sources"] = serde_json::json!({}), &["sources is empty"]),
        (|_, m| drop(m["packages"].as_object_mut().unwrap().remove("peft")), &["packages has no peft"]),
        (|_, m| m["packages"]["xformers"] = "1".into(), &["xformers 1"]),
    ];
    for (spoil, words) in without {
        let (_keep, folder) = reference_copy();
        refused(&folder, spoil, words);
    }
}

#[test]
fn a_golden_file_that_is_not_listed_is_refused_by_name() {
    let (_keep, folder) = reference_copy();
    refused(
        &folder,
        |f, _| fs::write(f.join("golden/nf4/stray.json"), "{}").unwrap(),
        &["stray.json", "not listed"],
    );
    let (_keep, folder) = reference_copy();
    let unlisted = |_: &Path, manifest: &mut serde_json::Value| {
        drop(manifest["golden"].as_object_mut().unwrap().remove("odd-2q2kv/losses.json"));
    };
    refused(&folder, unlisted, &["odd-2q2kv/losses.json", "not listed"]);
}

#[test]
fn a_reference_that_says_too_little_is_refused() {
    type Edit = fn(&mut serde_json::Value);
    let cases: &[(&str, Edit, &[&str])] = &[
        ("curves.json", |c| *c = serde_json::json!({}), &["no curve accumulation"]),
        ("curves.json", |c| drop(c.as_object_mut().unwrap().remove("nf4")), &["no curve nf4"]),
        (
            "curves.json",
            |c| c["adamw"]["steps"].as_array_mut().unwrap().truncate(19),
            &["adamw", "19 steps of 20"],
        ),
        ("curves.json", |c| c["nf4"]["settings"]["quantization"] = "none".into(), &["nf4", "quantization"]),
        (
            "curves.json",
            |c| c["clipping"]["settings"]["max_grad_norm"] = 1e9.into(),
            &["clipping", "max_grad_norm"],
        ),
        (
            "curves.json",
            |c| c["clipping"]["steps"][3]["lines"] = serde_json::json!([99]),
            &["clipping", "line 99"],
        ),
        (
            "curves.json",
            |c| c["accumulation"]["steps"][3]["lines"] = serde_json::json!([1]),
            &["accumulation"],
        ),
        ("dropout.json", |d| d["steps"] = serde_json::json!([]), &["dropout.json: no steps"]),
        ("dropout.json", |d| d["settings"]["lora_dropout"] = 0.0.into(), &["dropout.json: lora_dropout"]),
        (
            "losses.json",
            |l| l["nf4"]["base"].as_array_mut().unwrap().truncate(1),
            &["losses.json", "1 losses of"],
        ),
        (
            "greedy.json",
            |g| g[1] = serde_json::json!({"tokens": [], "gaps": []}),
            &["greedy.json", "prompt 1"],
        ),
        ("greedy.json", |g| g[1]["gaps"][2] = (-1.0).into(), &["greedy.json", "gap 2"]),
        // The first logits say otherwise, so that such a gap does not excuse every token.
        ("greedy.json", |g| g[0]["gaps"][0] = 1e-9.into(), &["greedy.json", "logits.safetensors"]),
        (
            "prompts.json",
            |p| p[2].as_array_mut().unwrap().push(1.into()),
            &["logits.safetensors", "prompt_2"],
        ),
    ];
    let (_keep, folder) = reference_copy();
    for (file, edit, words) in cases {
        let path = folder.join("golden/untied-6q3kv").join(file);
        let original = fs::read_to_string(&path).unwrap();
        let mut value = serde_json::from_str(&original).unwrap();
        edit(&mut value);
        let spoil = |_: &Path, _: &mut serde_json::Value| fs::write(&path, value.to_string()).unwrap();
        refused(&folder, spoil, &[words, &["untied-6q3kv"][..]].concat());
        fs::write(&path, original).unwrap();
    }
}
