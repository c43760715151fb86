//! A run that is interrupted, and workers that die or are launched through another command: nothing is left behind, and
//! the record can be gone on with.
#![cfg(target_os = "linux")]

mod support;

use evalfw::measure::memory::process_tree;
use evalfw::record::Outcome;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::{ALONE, Workspace};

/// A launcher that does nothing but launch, as srun does without a cluster.
const LAUNCHER: [&str; 2] = ["--launcher", "env LAUNCHED=1"];

/// A suite whose training takes minutes, so that there is time to interfere.
fn start_long_run(workspace: &Workspace, options: &[&str]) -> Child {
    Command::new(assert_cmd::cargo::cargo_bin("evalfw"))
        .current_dir(workspace.path("."))
        .envs(ALONE)
        .args(["run", "--suite", "quick", "--engine", "candle-cpu", "--scenarios"])
        .arg(workspace.scenarios_of_steps(20_000))
        .arg("--model")
        .arg(workspace.model())
        .args(options)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The worker that trains and what has started it: the run's log of it exists and the processes are there.
fn training_workers(harness: &Child, workspace: &Workspace, processes: usize) -> Vec<u32> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let workers = process_tree(harness.id()).split_off(1);
        if workspace.has_begun("candle-cpu", "train") && workers.len() == processes {
            // Some looks at its memory.
            std::thread::sleep(Duration::from_millis(300));
            return workers;
        }
        assert!(Instant::now() < deadline, "no worker came to training within 60 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

fn assert_gone(workers: &[u32]) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while workers.iter().any(|pid| fs::exists(format!("/proc/{pid}")).unwrap()) {
        assert!(Instant::now() < deadline, "a worker is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sets the training back to what takes a moment, resumes, and checks that all is there.
fn resume(workspace: &Workspace) {
    let run = workspace.runs().pop().unwrap();
    let settings = run.join("run.json");
    let text = fs::read_to_string(&settings).unwrap();
    fs::write(&settings, text.replace("\"steps\": 20000", "\"steps\": 2")).unwrap();
    workspace.evalfw().args(["run", "--resume"]).arg(&run).assert().success();
    let outcomes: Vec<_> = workspace.records().iter().map(|r| (r.parameters.kind(), r.outcome)).collect();
    assert_eq!(outcomes, [("load", Outcome::Ok), ("train", Outcome::Ok), ("infer", Outcome::Ok)]);
}

#[test]
fn a_killed_worker_is_a_crashed_row_and_the_run_goes_on() {
    for (options, processes) in [(&[][..], 1), (&LAUNCHER[..], 2)] {
        let workspace = Workspace::new();
        let mut harness = start_long_run(&workspace, options);
        let workers = training_workers(&harness, &workspace, processes);
        signal(*workers.last().unwrap(), Signal::KILL);
        assert_eq!(harness.wait().unwrap().code(), Some(1));
        let records = workspace.records();
        let train = records.iter().find(|r| r.parameters.kind() == "train").unwrap();
        assert_eq!(train.outcome, Outcome::Crashed);
        let error = train.error.as_ref().unwrap();
        assert!(error.message.contains("signal: 9") && !error.during.is_empty(), "{error:?}");
        assert_eq!((train.tokens_per_second, train.examples_per_second), (None, None));
        assert!(!train.samples.phases.is_empty(), "what was seen until then is kept");
        let infer = records.iter().find(|r| r.parameters.kind() == "infer").unwrap();
        assert_eq!(infer.outcome, Outcome::Ok);
    }
}

#[test]
fn an_interrupted_run_leaves_no_worker_and_can_be_resumed() {
    let workspace = Workspace::new();
    let mut harness = start_long_run(&workspace, &[]);
    let workers = training_workers(&harness, &workspace, 1);
    signal(harness.id(), Signal::INT);
    assert_eq!(harness.wait().unwrap().code(), Some(130));
    assert!(!fs::exists(format!("/proc/{}", workers[0])).unwrap(), "the worker is still there");

    let run = workspace.runs().pop().unwrap();
    // As if power had failed in the middle of a row.
    let cells = run.join("cells.jsonl");
    let before = fs::read_to_string(&cells).unwrap();
    assert_eq!(before.lines().count(), 1, "only the load cell had ended");
    fs::write(&cells, format!("{before}{{\"schema\":2,\"cell\":\"cut")).unwrap();
    resume(&workspace);
    let after = fs::read_to_string(&cells).unwrap();
    assert!(after.starts_with(&before), "the finished cell was kept");
}

#[test]
fn interrupted_twice_it_ends_at_once_and_can_be_resumed_all_the_same() {
    let workspace = Workspace::new();
    let mut harness = start_long_run(&workspace, &[]);
    let workers = training_workers(&harness, &workspace, 1);
    // The worker does not answer any more: the first alone would be heard all the same, as the harness polls.
    signal(workers[0], Signal::STOP);
    signal(harness.id(), Signal::INT);
    signal(harness.id(), Signal::INT);
    assert_eq!(harness.wait().unwrap().code(), Some(130));
    assert_gone(&workers);
    resume(&workspace);
}

#[test]
fn a_harness_that_is_killed_leaves_no_worker() {
    for (options, processes) in [(&[][..], 1), (&LAUNCHER[..], 2)] {
        let workspace = Workspace::new();
        let mut harness = start_long_run(&workspace, options);
        let workers = training_workers(&harness, &workspace, processes);
        signal(harness.id(), Signal::KILL);
        harness.wait().unwrap();
        assert_gone(&workers);
    }
}

#[test]
fn a_launched_worker_is_observed_by_its_agent_and_interrupted_like_any_other() {
    let workspace = Workspace::new();
    let mut harness = start_long_run(&workspace, &LAUNCHER);
    let workers = training_workers(&harness, &workspace, 2);
    signal(harness.id(), Signal::INT);
    assert_eq!(harness.wait().unwrap().code(), Some(130));
    assert_gone(&workers);
    resume(&workspace);
    for cell in workspace.records() {
        assert_eq!(cell.launcher.as_deref(), Some("env LAUNCHED=1"));
        assert_eq!(cell.samples.memory_measure.as_deref(), Some("tree"));
        let loaded = cell.samples.phases.iter().find(|phase| phase.name == "load").unwrap();
        assert!(loaded.peak_bytes > 1_000_000 && !cell.samples.memory.is_empty());
        assert!(cell.samples.surroundings.is_some() && cell.environment.logical_cores > 0);
    }
}

#[test]
fn a_launcher_that_fails_is_told_with_its_own_words() {
    let workspace = Workspace::new();
    let script = "echo 'no such partition' >&2; exit 1";
    let mut run = workspace.quick("candle-cpu");
    run.args(["--launcher", &format!("sh -c \"{script}\"")])
        .assert()
        .code(2)
        .stderr(predicates::str::contains("no such partition"));
    let mut run = workspace.quick("candle-cpu");
    run.args(["--launcher", "sh 'x"]).assert().code(2).stderr(predicates::str::contains("--launcher"));
}
