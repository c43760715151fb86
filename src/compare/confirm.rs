//! Runs the suspicious jobs of a comparison again, on both sides in turn, and decides again.

use super::{Comparison, Row, Verdict};
use crate::decide::jobs::arrange;
use crate::interrupt;
use crate::record::{self, CELLS_FILE, CellRecord, record_folder};
use crate::run::settings::Settings;
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// One side of what is run again.
pub struct Side {
    pub name: &'static str,
    /// The record that tells what was run; its folder holds the settings.
    pub record: PathBuf,
    /// The build of this side.
    pub program: PathBuf,
}

/// Names of the jobs that are worse or undecided.
pub fn suspicious(comparison: &Comparison) -> BTreeSet<String> {
    let doubtful = |row: &&Row| matches!(row.verdict, Verdict::Worse | Verdict::Inconclusive);
    comparison.rows.iter().filter(doubtful).map(|row| row.job.clone()).collect()
}

/// Fresh cells of the base and of the head, of these jobs: so many processes of each, in turn from either side. `None` if
/// the user interrupted.
pub fn rerun(
    [base, head]: [&Side; 2],
    jobs: &BTreeSet<String>,
    rounds: usize,
    out: &Path,
) -> Result<Option<[Vec<CellRecord>; 2]>> {
    let settings = [settings(base, jobs)?, settings(head, jobs)?];
    let mut fresh = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        // A B B A: a drift of the machine hits both sides alike.
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for side in order {
            let folder = out.join(format!("{}-{}", [base, head][side].name, round + 1));
            let Some(cells) = run_once([base, head][side], &settings[side], &folder)? else {
                return Ok(None);
            };
            fresh[side].extend(cells.into_iter().filter(|cell| jobs.contains(&job_name(cell))));
        }
    }
    Ok(Some(fresh))
}

/// Of the first comparison what was sure, of what was run again the new verdict. A regression has to show in the fresh
/// processes alone, as those that raised the suspicion were picked for being slow; what was undecided is decided by all
/// processes together.
pub fn decided(first: Comparison, fresh: &Comparison, all: &Comparison) -> Comparison {
    let again = |row: Row| -> Row {
        let find = |comparison: &Comparison| {
            comparison.rows.iter().find(|r| r.job == row.job && r.metric == row.metric).cloned()
        };
        let (found, how) = match row.verdict {
            Verdict::Worse => (find(fresh), "run again"),
            Verdict::Inconclusive => (find(all), "with more processes"),
            Verdict::Better | Verdict::Same => return row,
        };
        let Some(mut found) = found else {
            // Outcomes have a row only where some cell failed: now none did.
            let reason = Some("run again: all ended ok".to_owned());
            return Row {
                verdict: if row.metric.is_none() { Verdict::Same } else { row.verdict },
                reason,
                ..row
            };
        };
        let reason = found.reason.take().map(|reason| format!("; {reason}")).unwrap_or_default();
        Row { reason: Some(format!("{how}{reason}")), ..found }
    };
    let rows: Vec<Row> = first.rows.into_iter().map(again).collect();
    let verdict = rows.iter().map(|row| row.verdict).min().unwrap_or(Verdict::Same);
    Comparison { verdict, rows, ..first }
}

/// As in [`Row::job`].
fn job_name(cell: &CellRecord) -> String {
    arrange(std::slice::from_ref(cell)).iter().map(super::name).next().unwrap_or_default()
}

/// Whether the side can be run again.
pub fn check(side: &Side) -> Result<()> {
    recorded_settings(side)?;
    let program = || format!("the {} would be run again by {}", side.name, side.program.display());
    let answer = Command::new(&side.program).arg("--version").output().with_context(program)?;
    if !answer.stdout.starts_with(b"evalfw ") {
        bail!("{}, which is no evalfw", program());
    }
    Ok(())
}

fn recorded_settings(side: &Side) -> Result<Settings> {
    Settings::read(&record_folder(&side.record)).with_context(|| {
        format!("the {} cannot be run again: its folder needs run.json beside {CELLS_FILE}", side.name)
    })
}

/// What the side's run was told, cut down to these jobs.
fn settings(side: &Side, jobs: &BTreeSet<String>) -> Result<Settings> {
    let mut settings = recorded_settings(side)?;
    let cells = record::read(&side.record)?;
    let wanted: Vec<&CellRecord> = cells.iter().filter(|cell| jobs.contains(&job_name(cell))).collect();
    settings.suite.cells.retain(|cell| {
        wanted
            .iter()
            .any(|w| w.scenario == cell.scenario.label() && w.quantization == cell.scenario.quantization())
    });
    if settings.suite.cells.is_empty() {
        bail!("the {}: none of {jobs:?} is in its run.json", side.name);
    }
    settings.suite.cells.iter_mut().for_each(|cell| cell.repetitions = 1);
    let mut engines: Vec<String> = wanted.iter().map(|cell| cell.engine.clone()).collect();
    engines.sort();
    engines.dedup();
    settings.engines = engines;
    settings.engines_named = true;
    // Nothing is made of them here.
    settings.no_limits = true;
    Ok(settings)
}

/// `None` if the user interrupted.
fn run_once(side: &Side, settings: &Settings, folder: &Path) -> Result<Option<Vec<CellRecord>>> {
    let place = || format!("{}: cannot be written", folder.display());
    std::fs::create_dir_all(folder.parent().unwrap_or(Path::new(""))).with_context(place)?;
    // What is there already was measured for another question.
    std::fs::create_dir(folder).with_context(place)?;
    settings.write(folder)?;
    let mut command = Command::new(&side.program);
    command.args(["run", "--resume"]).arg(folder).stdout(Stdio::null());
    let program = || format!("the {} is run again by {}", side.name, side.program.display());
    let status = wait(command.spawn().with_context(program)?).with_context(program)?;
    if interrupt::requested() || status.code() == Some(interrupt::EXIT_CODE.into()) {
        return Ok(None);
    }
    // 1: a cell failed, which is for the comparison to judge.
    if !matches!(status.code(), Some(0 | 1)) {
        bail!("{}, which ended with {status}", program());
    }
    record::read(folder).with_context(program).map(Some)
}

/// Waits for the run, and hands Ctrl-C on to it: it ends its cell and its worker itself.
fn wait(mut run: Child) -> std::io::Result<ExitStatus> {
    let mut told = false;
    loop {
        if let Some(status) = run.try_wait()? {
            return Ok(status);
        }
        if interrupt::requested() && !told {
            told = true;
            interrupt::pass_on(&mut run)?;
        }
        std::thread::sleep(POLL);
    }
}

const POLL: Duration = Duration::from_millis(50);
