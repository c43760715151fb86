//! `evalfw compare --confirm`: suspicious jobs are really run again.

mod support;

use evalfw::record::{CellRecord, RunLog, read};
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use support::Workspace;

/// These tests ask what is faster: none measures while another one does.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A run of the inference job in four processes.
fn measured(workspace: &Workspace) -> PathBuf {
    let mut run = workspace.quick("candle-cpu");
    run.args(["--scenario", "infer", "--repetitions", "4"]).assert().success();
    workspace.runs().pop().unwrap()
}

/// The same run, as if it had taken so many times as long.
fn slowed(run: &Path, factor: f64, to: &Path) {
    let mut cells: Vec<CellRecord> = read(run).unwrap();
    std::fs::create_dir(to).unwrap();
    std::fs::copy(run.join("run.json"), to.join("run.json")).unwrap();
    let mut log = RunLog::open(to).unwrap();
    for cell in &mut cells {
        cell.samples.prefill.iter_mut().for_each(|round| round.seconds *= factor);
        cell.samples.decode.iter_mut().flat_map(|round| &mut round.seconds).for_each(|s| *s *= factor);
        log.append(cell).unwrap();
    }
}

#[test]
fn a_slowness_that_does_not_show_again_is_no_regression() {
    let _alone = alone();
    let workspace = Workspace::new();
    let base = measured(&workspace);
    let head = workspace.path("head");
    slowed(&base, 20.0, &head);
    // Other tests run meanwhile: what is asked is whether 20 times as slow shows again, not how quiet the machine is.
    let loose =
        include_str!("../reports/thresholds.toml").replace("= 5.0", "= 400.0").replace("= 2.0", "= 50.0");
    std::fs::write(workspace.path("loose.toml"), loose).unwrap();
    let compare = |options: &[&str]| {
        let mut command = workspace.evalfw();
        command
            .arg("compare")
            .args([&base, &head])
            .args(["--thresholds", "loose.toml"])
            .args(options)
            .assert()
    };
    compare(&[]).code(1).stdout(contains("worse"));
    let out = workspace.path("fresh");
    // So many that one process which stands still among the other tests leaves the interval where it is.
    let rounds = ["--confirm", "--rounds", "7", "--confirm-out", out.to_str().unwrap()];
    let confirmed = compare(&rounds).code(0);
    confirmed.stdout(contains("same: run again")).stderr(contains("running again, 7 times a side"));
    // The fresh records stay: every figure can be looked up.
    let mut fresh: Vec<String> = std::fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("REPORT."))
        .collect();
    fresh.sort();
    let sides = ["base", "head"].iter().flat_map(|side| (1..=7).map(move |round| format!("{side}-{round}")));
    assert_eq!(fresh, sides.collect::<Vec<_>>());
    assert_eq!(read(&out.join("head-3")).unwrap().len(), 1);

    // Records of an earlier time are not fresh.
    compare(&rounds).code(2).stderr(contains("fresh/base-1"));
    // Nor are those of a build that measures nothing.
    let nothing = compare(&["--confirm", "--rounds", "3", "--base-evalfw", "/bin/true"]).code(2);
    nothing.stderr(contains("the base would be run again by /bin/true"));

    compare(&["--confirm", "--rounds", "2"]).code(2).stderr(contains("at least 3"));
    std::fs::remove_file(head.join("run.json")).unwrap();
    compare(&["--confirm"]).code(2).stderr(contains("run.json").and(contains("the head")));
}

#[test]
fn what_another_machine_recorded_is_not_confirmed_here() {
    let _alone = alone();
    let workspace = Workspace::new();
    let run = measured(&workspace);
    let [base, head] = ["base", "head"].map(|name| workspace.path(name));
    slowed(&run, 1.0, &base);
    slowed(&run, 20.0, &head);
    for record in [&base, &head] {
        let file = record.join("cells.jsonl");
        let mut cells = read(record).unwrap();
        std::fs::remove_file(&file).unwrap();
        let mut log = RunLog::open(record).unwrap();
        for cell in &mut cells {
            cell.environment.cpu = "Cray-1".into();
            log.append(cell).unwrap();
        }
    }
    let mut compare = workspace.evalfw();
    compare.arg("compare").args([&base, &head]).args(["--confirm", "--rounds", "3"]);
    compare.assert().code(2).stderr(contains("CPU: Cray-1 and"));
}

#[cfg(target_os = "linux")]
#[test]
fn an_interrupted_confirmation_leaves_no_run_behind() {
    let _alone = alone();
    use rustix::process::{Pid, Signal, kill_process};
    let workspace = Workspace::new();
    let base = measured(&workspace);
    let head = workspace.path("head");
    slowed(&base, 20.0, &head);
    let out = workspace.path("fresh");
    let mut compare = std::process::Command::new(assert_cmd::cargo::cargo_bin("evalfw"))
        .envs(support::ALONE)
        .env("EVALFW_CACHE", workspace.path("cache"))
        .arg("compare")
        .args([&base, &head])
        .args(["--confirm", "--confirm-out"])
        .arg(&out)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let began = || std::fs::read_dir(out.join("base-1/logs")).is_ok_and(|mut logs| logs.next().is_some());
    while !began() {
        assert!(compare.try_wait().unwrap().is_none(), "it ended before anything was run again");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let pid = Pid::from_raw(compare.id() as i32).unwrap();
    let started = evalfw::measure::memory::process_tree(compare.id()).split_off(1);
    kill_process(pid, Signal::INT).unwrap();
    assert_eq!(compare.wait().unwrap().code(), Some(130));
    let left: Vec<_> =
        started.into_iter().filter(|pid| Path::new(&format!("/proc/{pid}")).exists()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    assert!(!out.join("head-4").exists());
}
