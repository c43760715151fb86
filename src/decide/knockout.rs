//! What rules an engine out before any score, so that no other merit can make up for it.

use super::figures::Footprint;
use super::jobs::{Job, outcomes};
use crate::record::{CellRecord, Outcome};
use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    WrongNumerics,
    OverMemoryTarget,
    DoesNotRunHere,
    /// It runs, but was never seen to train, which is the job.
    DoesNotTrain,
}

impl Rule {
    pub fn title(self) -> &'static str {
        match self {
            Self::WrongNumerics => "wrong numerics",
            Self::OverMemoryTarget => "over the memory target",
            Self::DoesNotRunHere => "does not run here",
            Self::DoesNotTrain => "does not train here",
        }
    }
}

/// A reason why an engine is out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KnockOut {
    pub rule: Rule,
    pub title: &'static str,
    pub detail: String,
    /// The cells that show it.
    pub cells: Vec<String>,
}

/// Everything that rules `engine` out on `model`. `jobs` are all of the run: a wrong answer on one
/// model is no reason to trust the others.
pub fn knock_outs(jobs: &[Job], model: &str, engine: &str, target_bytes: u64) -> Vec<KnockOut> {
    let of_engine: Vec<&Job> = jobs.iter().filter(|j| j.engine == engine).collect();
    let on_model: Vec<&Job> = of_engine.iter().copied().filter(|j| j.model.name == model).collect();
    [
        wrong_numerics(&of_engine),
        over_target(&on_model, target_bytes),
        does_not_run(&on_model).or_else(|| does_not_train(&on_model)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn knock_out(rule: Rule, detail: String, cells: &[&CellRecord]) -> KnockOut {
    let cells = cells.iter().map(|c| c.cell.clone()).collect();
    KnockOut { rule, title: rule.title(), detail, cells }
}

fn wrong_numerics(jobs: &[&Job]) -> Option<KnockOut> {
    let cells = jobs.iter().flat_map(|j| j.cells.iter().copied());
    let wrong: Vec<&CellRecord> = cells.filter(|c| c.outcome == Outcome::Wrong).collect();
    let first = wrong.first()?;
    Some(knock_out(Rule::WrongNumerics, explain(first), &wrong))
}

/// Unquantized cells do not count: the target is one for QLoRA.
fn over_target(jobs: &[&Job], target_bytes: u64) -> Option<KnockOut> {
    let peaks = jobs.iter().filter(|j| j.is_qlora).filter_map(|j| {
        let (footprint, cell) = Footprint::of_job(j)?;
        Some((footprint.bytes()?, cell))
    });
    let (bytes, cell) = peaks.max_by_key(|(bytes, _)| *bytes).filter(|(bytes, _)| *bytes > target_bytes)?;
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let detail =
        format!("{:.2} GB in {}, with a target of {} GB", gb(bytes), cell.scenario, gb(target_bytes));
    Some(knock_out(Rule::OverMemoryTarget, detail, &[cell]))
}

fn does_not_run(jobs: &[&Job]) -> Option<KnockOut> {
    let cells: Vec<&CellRecord> = jobs.iter().flat_map(|j| j.cells.iter().copied()).collect();
    none_ok(Rule::DoesNotRunHere, &cells)
}

fn does_not_train(jobs: &[&Job]) -> Option<KnockOut> {
    let train = jobs.iter().filter(|j| j.is_kind("train"));
    let cells: Vec<&CellRecord> = train.flat_map(|j| j.cells.iter().copied()).collect();
    none_ok(Rule::DoesNotTrain, &cells)
}

/// The rule holds if there are cells and none of them ended ok.
fn none_ok(rule: Rule, cells: &[&CellRecord]) -> Option<KnockOut> {
    let first = cells.first()?;
    if cells.iter().any(|c| c.outcome == Outcome::Ok) {
        return None;
    }
    Some(knock_out(rule, format!("{} ({})", explain(first), outcomes(cells)), cells))
}

fn explain(cell: &CellRecord) -> String {
    cell.error.as_ref().map_or_else(|| "without an error message".to_owned(), |e| e.message.clone())
}
