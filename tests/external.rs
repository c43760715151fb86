//! Engines outside this program: declared, installed, checked and run through the real binary. The engine is the one in
//! plain Python that the protocol's document shows.
#![cfg(unix)]

mod support;

use assert_cmd::Command;
use evalfw::record::{CellRecord, Outcome};
use predicates::prelude::*;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use support::Workspace;

const PYTHON: &str = "python3";

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn plain() -> String {
    repository("backends/python/examples/plain.py").display().to_string()
}

/// A model of the reference: plain Python is slow.
fn model() -> PathBuf {
    repository("tests/reference/golden/untied-6q3kv/model")
}

/// A workspace with scenarios of some rows, and an `engines.toml` where it looks for one.
fn workspace(engines: &[(&str, &[&str])]) -> Workspace {
    let workspace = Workspace::new();
    let scenarios = workspace.scenarios();
    let quick = "description = \"Some rows.\"\nmodel = \"tiny\"\nsoftware_adapter_model = \"tiny\"\nseed = 42\n\
        [[cells]]\nscenario = \"load\"\nrepetitions = 1\nquantization = \"none\"\n\
        [[cells]]\nscenario = \"train\"\nrepetitions = 1\nquantization = \"none\"\nsequence_length = 16\n\
        warmup_steps = 1\nsteps = 1\nlora_dropout = 0.0\ntimeout_seconds = 20\nkept_activations_gb = 0.0\n\
        [[cells]]\nscenario = \"infer\"\nrepetitions = 1\nquantization = \"none\"\nprompt_tokens = 4\n\
        generate_tokens = 2\nwarmup = 0\nrepeats = 1\n";
    fs::write(scenarios.join("suites/quick.toml"), quick).unwrap();
    let declared: Vec<String> = engines
        .iter()
        .map(|(name, command)| {
            let command = serde_json::to_string(command).unwrap();
            format!("[[engine]]\nname = \"{name}\"\nsummary = \"A test's\"\ncommand = {command}\n")
        })
        .collect();
    fs::write(workspace.path("engines.toml"), declared.join("\n")).unwrap();
    workspace
}

fn run(workspace: &Workspace, engines: &str) -> Command {
    let mut command = workspace.evalfw();
    command.args(["run", "--suite", "quick", "--engine", engines, "--model"]).arg(model());
    command
}

fn of<'a>(records: &'a [CellRecord], engine: &str, kind: &str) -> &'a CellRecord {
    records.iter().find(|r| r.engine == engine && r.parameters.kind() == kind).unwrap()
}

#[test]
fn an_engine_in_plain_python_holds_every_rule_and_the_numbers() {
    let workspace = workspace(&[]);
    let output = workspace.evalfw().args(["engines", "check", "--json", PYTHON, &plain()]).output().unwrap();
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let broken: Vec<&Value> =
        told["findings"].as_array().unwrap().iter().filter(|f| f["held"] != true).collect();
    assert!(broken.is_empty(), "{broken:#?}");
    assert_eq!(told["numbers"]["outcome"], "ok", "{:#}", told["numbers"]);
    assert!(output.status.success());
}

#[test]
fn what_an_engine_lacks_is_told_rule_by_rule() {
    let workspace = workspace(&[]);
    // Answers everything as if it were hello, and knows no end.
    let parrot =
        "import json,sys\nfor line in sys.stdin:\n  print(json.dumps({'id': 1, 'result': {}}), flush=True)";
    let check = workspace.evalfw().args(["engines", "check", PYTHON, "-c", parrot]).assert().code(1);
    check.stdout(predicate::str::contains("has the id 1").and(predicate::str::contains("Hello")));
    let check = workspace.evalfw().args(["engines", "check", "/no/such/program"]).assert().code(2);
    check.stderr(predicate::str::contains("no program /no/such/program"));
    let check = workspace.evalfw().args(["engines", "check", "no-such-engine"]).assert().code(2);
    check.stderr(
        predicate::str::contains("no-such-engine is no program").and(predicate::str::contains("peft")),
    );
}

#[test]
fn an_engine_that_cannot_run_here_breaks_no_rule_by_saying_so() {
    let workspace = workspace(&[]);
    let output = workspace.evalfw().args(["engines", "check", "--json", "peft"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(told["unavailable"].as_str().unwrap().contains("evalfw engines install peft"), "{told}");
    assert!(told["findings"].as_array().unwrap().iter().all(|f| f["held"] == true), "{told}");
}

#[test]
#[cfg(unix)]
fn a_program_on_path_may_have_a_dot_in_its_name() {
    use std::os::unix::fs::PermissionsExt;
    let workspace = workspace(&[]);
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("greets.v2");
    let script = repository("tests/support/greeting_engine.py");
    fs::write(&program, format!("#!/bin/sh\nexec {PYTHON} '{}'\n", script.display())).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", folder.path().display());
    let check = workspace.evalfw().args(["engines", "check", "greets.v2"]).env("PATH", path).assert().code(1);
    check.stdout(predicate::str::contains("numbers are compared once all hold"));
}

/// One thing that is missing is not told as ten.
#[test]
fn rules_that_need_load_are_not_tried_without_it() {
    let workspace = workspace(&[]);
    let script = repository("tests/support/greeting_engine.py").display().to_string();
    let output = workspace.evalfw().args(["engines", "check", "--json", PYTHON, &script]).output().unwrap();
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = told["findings"].as_array().unwrap();
    let load = findings.iter().find(|f| f["section"] == "Load").unwrap();
    assert!(load["held"] == false && load["tried"] == true, "{told}");
    let training: Vec<&Value> = findings.iter().filter(|f| f["section"] == "Training").collect();
    assert!(!training.is_empty() && training.iter().all(|f| f["tried"] == false), "{told}");
}

#[test]
fn a_declared_engine_runs_beside_the_others_and_takes_the_same_steps() {
    let workspace = workspace(&[("plain", &[PYTHON, &plain()])]);
    run(&workspace, "candle-cpu,plain").assert().success();
    let records = workspace.records();
    assert!(records.iter().all(|r| r.outcome == Outcome::Ok), "{records:#?}");
    let (ours, theirs) = (of(&records, "candle-cpu", "train"), of(&records, "plain", "train"));
    for (a, b) in ours.samples.train.iter().zip(&theirs.samples.train) {
        assert!((a.loss - b.loss).abs() / a.loss < 1e-4, "{} {}", a.loss, b.loss);
    }
    assert!(theirs.peak_memory_bytes.unwrap() > 1_000_000);
    assert!(theirs.samples.probes.iter().any(|p| p.name == "tokenizer" && p.passed));
    let report = fs::read_to_string(workspace.runs().pop().unwrap().join("report.md")).unwrap();
    assert!(report.contains("plain"), "{report}");
}

#[test]
fn a_faulty_engine_is_a_typed_outcome_and_the_run_goes_on() {
    let script = repository("tests/support/faulty_engine.py").display().to_string();
    let plain = plain();
    let stray = tempfile::tempdir().unwrap();
    let leak = format!("leak={}", stray.path().join("pid").display());
    let command = |fault: &'static str| [PYTHON, &script, fault, PYTHON, &plain];
    // Verified before it is timed, an engine fails then already.
    for (fault, outcome, words) in [
        ("print", Outcome::Failed, "Some library"),
        ("order", Outcome::Failed, "reply to call 7"),
        ("die", Outcome::Crashed, "exit status: 1"),
        ("version", Outcome::Failed, "version 9"),
    ] {
        let workspace = workspace(&[("faulty", &command(fault))]);
        run(&workspace, "faulty,candle-cpu").assert().code(1);
        let records = workspace.records();
        assert!(records.iter().any(|r| r.engine == "candle-cpu" && r.outcome == Outcome::Ok));
        let record = records.iter().find(|r| r.engine == "faulty").unwrap();
        let error = record.error.as_ref().unwrap();
        assert_eq!(record.outcome, outcome, "{fault}: {error:?}");
        assert!(error.message.contains(words), "{fault}: {}", error.message);
    }
    let words: Vec<&str> = vec![PYTHON, &script, &leak, PYTHON, &plain];
    let workspace = workspace(&[("faulty", &words)]);
    run(&workspace, "faulty,candle-cpu").assert().code(1);
    let left = fs::read_to_string(stray.path().join("pid")).unwrap();
    let (pid, folder) = left.split_once('\n').unwrap();
    let ended = || fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
    let deadline = Instant::now() + Duration::from_secs(10);
    while cfg!(target_os = "linux") && !ended() {
        assert!(Instant::now() < deadline, "what the engine started still runs");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!Path::new(folder).exists(), "{folder} is left behind");
}

#[test]
fn an_engine_that_is_not_installed_says_how_and_the_rest_runs() {
    let workspace = workspace(&[]);
    let output = workspace.evalfw().args(["engines", "--json"]).output().unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let row = rows.iter().find(|row| row["engine"] == "peft").unwrap();
    assert_eq!(row["problem"]["outcome"], "unavailable");
    assert!(row["problem"]["advice"].as_str().unwrap().contains("evalfw engines install peft"), "{row}");
    run(&workspace, "peft,candle-cpu").assert().code(1);
    let records = workspace.records();
    assert_eq!(of(&records, "peft", "train").outcome, Outcome::Unavailable);
    assert_eq!(of(&records, "candle-cpu", "train").outcome, Outcome::Ok);
    let check = workspace.evalfw().args(["engines", "install", "candle-cpu"]).assert().code(2);
    check.stderr(predicate::str::contains("part of this program").and(predicate::str::contains("mlx-lm")));
}

/// An engine whose environment holds one package, made here: the installation needs no network.
fn installable() -> Workspace {
    let workspace = workspace(&[]);
    let wheel = workspace.path("plain_engine-1.0-py3-none-any.whl");
    let script = "import hashlib,sys,zipfile\nwheel,plain=sys.argv[1:]\nwith zipfile.ZipFile(wheel,'w') as z:\n  \
        z.write(plain,'plain_engine.py')\n  d='plain_engine-1.0.dist-info/'\n  \
        z.writestr(d+'METADATA','Metadata-Version: 2.1\\nName: plain-engine\\nVersion: 1.0\\n')\n  \
        z.writestr(d+'WHEEL','Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n  \
        z.writestr(d+'RECORD','')\n\
        print(hashlib.sha256(open(wheel,'rb').read()).hexdigest(),end='')";
    let output = std::process::Command::new(PYTHON).args(["-c", script]).arg(&wheel).arg(plain()).output();
    let digest = String::from_utf8(output.unwrap().stdout).unwrap();
    let requirement = format!("plain-engine @ file://{} --hash=sha256:{digest}\n", wheel.display());
    fs::write(workspace.path("requirements.txt"), requirement).unwrap();
    let declared = "[[engine]]\nname = \"installed\"\nsummary = \"A test's\"\n\
        command = [\"{python}\", \"-m\", \"plain_engine\"]\n\
        version = [\"{python}\", \"-c\", \"print('{\\\"plain\\\": \\\"1.0\\\"}')\"]\n\
        [engine.install]\npython = [\"3.8\", \"3.99\"]\nrequirements = \"requirements.txt\"\n\
        download_gb = 0.001\ninstalled_gb = 0.001\n";
    fs::write(workspace.path("engines.toml"), declared).unwrap();
    workspace
}

#[test]
fn an_environment_is_made_once_used_and_removed() {
    let workspace = installable();
    let install = || workspace.evalfw().args(["engines", "install", "installed"]).assert();
    install().success().stdout(predicate::str::contains("installed installed: plain 1.0"));
    install().success().stdout(predicate::str::contains("is installed already"));
    run(&workspace, "installed").assert().success();
    assert!(workspace.records().iter().all(|r| r.outcome == Outcome::Ok));

    let state = || {
        let output = workspace.evalfw().args(["engines", "--json"]).output().unwrap();
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        let row = rows.into_iter().find(|row| row["engine"] == "installed").unwrap();
        row["problem"]["reason"].as_str().map(str::to_owned)
    };
    assert_eq!(state(), None);
    let folder = workspace.path("data/engines/installed");
    // Cut short; other requirements; a Python that was removed.
    let note = fs::read_to_string(folder.join("installed.json")).unwrap();
    fs::remove_file(folder.join("installed.json")).unwrap();
    assert!(state().unwrap().contains("did not come to its end"));
    fs::write(folder.join("installed.json"), &note).unwrap();
    let requirements = fs::read_to_string(workspace.path("requirements.txt")).unwrap();
    fs::write(workspace.path("requirements.txt"), format!("# newer\n{requirements}")).unwrap();
    assert!(state().unwrap().contains("other versions"));
    install().success().stdout(predicate::str::contains("installed installed"));
    fs::remove_file(folder.join("bin/python")).unwrap();
    assert!(state().unwrap().contains("does not work"));

    let remove = || workspace.evalfw().args(["engines", "remove", "installed"]).assert().success();
    remove().stdout(predicate::str::contains("GB are free again"));
    assert!(!folder.exists());
    remove().stdout(predicate::str::contains("is not installed"));
}

#[test]
fn a_python_that_is_missing_or_too_old_and_a_wrong_hash_are_clear_errors() {
    let workspace = installable();
    let old = workspace.path("old-python");
    fs::write(&old, "#!/bin/sh\necho 3.6.9\n").unwrap();
    std::process::Command::new("chmod").arg("+x").arg(&old).status().unwrap();
    let install = |python: &Path| {
        workspace.evalfw().args(["engines", "install", "installed", "--python"]).arg(python).assert().code(2)
    };
    install(&old).stderr(predicate::str::contains("3.6.9").and(predicate::str::contains("3.8 to 3.99")));
    install(Path::new("/no/python")).stderr(predicate::str::contains("/no/python is no Python"));
    let mut without = workspace.evalfw();
    without.env("PATH", workspace.path("")).args(["engines", "install", "installed"]);
    without.assert().code(2).stderr(predicate::str::contains("there is none on PATH"));

    let text = fs::read_to_string(workspace.path("requirements.txt")).unwrap();
    let digest = text.split("sha256:").nth(1).unwrap().trim().to_owned();
    fs::write(workspace.path("requirements.txt"), text.replace(&digest, &"0".repeat(64))).unwrap();
    let failed = workspace.evalfw().args(["engines", "install", "installed"]).assert().code(2);
    failed.stderr(
        predicate::str::contains("installing")
            .and(predicate::str::contains("hash").or(predicate::str::contains("HASH"))),
    );
    // A second try finds what is half made, and begins again.
    fs::write(workspace.path("requirements.txt"), text).unwrap();
    workspace.evalfw().args(["engines", "install", "installed"]).assert().success();
}

#[test]
fn the_committed_schema_is_that_of_the_messages() {
    let output = workspace(&[]).evalfw().args(["engines", "schema"]).output().unwrap();
    let committed = fs::read_to_string(repository("backends/protocol.schema.json")).unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed == committed, "renew it: evalfw engines schema > backends/protocol.schema.json");
}
