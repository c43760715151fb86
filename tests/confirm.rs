//! `evalfw compare --confirm`: suspicious jobs are really run again.

mod support;

use evalfw::record::{CellRecord, RunLog, read};
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use std::path::{Path, PathBuf};
use support::Workspace;

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
    let confirmed = compare(&["--confirm", "--rounds", "3", "--confirm-out", out.to_str().unwrap()]).code(0);
    confirmed.stdout(contains("same: run again")).stderr(contains("running again, 3 times a side"));
    // The fresh records stay: every figure can be looked up.
    let mut fresh: Vec<String> = std::fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "REPORT.md")
        .collect();
    fresh.sort();
    assert_eq!(fresh, ["base-1", "base-2", "base-3", "head-1", "head-2", "head-3"]);
    assert_eq!(read(&out.join("head-3")).unwrap().len(), 1);

    compare(&["--confirm", "--rounds", "2"]).code(2).stderr(contains("at least 3"));
    std::fs::remove_file(head.join("run.json")).unwrap();
    compare(&["--confirm"]).code(2).stderr(contains("run.json").and(contains("the head")));
}
