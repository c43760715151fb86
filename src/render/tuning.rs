//! What engines measured to choose their kernels: outside of every other figure, and so a figure of its own.

use super::trace::{CellRef, Lines};
use crate::decide::jobs::Job;
use crate::record::CellRecord;
use evalfw_engine::protocol::Tuning;
use serde::Serialize;

#[derive(Debug, Clone, Serialize)]
pub struct TuningRow {
    pub engine: String,
    pub model: String,
    pub job: String,
    /// Over all repetitions that ended ok.
    pub measured: u64,
    pub seconds: f64,
    /// The most of one repetition.
    pub cached: u64,
    pub late: u64,
    pub cells: Vec<CellRef>,
}

pub fn tuning_rows(jobs: &[Job], lines: &Lines) -> Vec<TuningRow> {
    jobs.iter().filter_map(|job| row(job, lines)).collect()
}

/// A cell that only loads a model has no choice to make.
fn chose(tuning: &Tuning) -> bool {
    tuning.measured + tuning.cached + tuning.late > 0
}

fn row(job: &Job, lines: &Lines) -> Option<TuningRow> {
    let tuned: Vec<(&CellRecord, Tuning)> =
        job.ok().filter_map(|cell| Some((cell, cell.samples.tuning.filter(chose)?))).collect();
    let each = || tuned.iter().map(|(_, tuning)| tuning);
    (!tuned.is_empty()).then(|| TuningRow {
        engine: job.engine.to_owned(),
        model: job.model.name.clone(),
        job: job.label(),
        measured: each().map(|t| t.measured).sum(),
        seconds: each().map(|t| t.seconds).sum(),
        cached: each().map(|t| t.cached).max().unwrap_or(0),
        late: each().map(|t| t.late).max().unwrap_or(0),
        cells: tuned.iter().map(|(cell, _)| lines.refer(cell)).collect(),
    })
}
