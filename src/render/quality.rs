//! Time to quality: how long each engine trains until the evaluation loss is at the target.

use super::trace::{CellRef, Lines};
use crate::decide::figures::Spread;
use crate::decide::jobs::{Job, is_software_adapter};
use crate::measure::metrics::{TimeToTarget, time_to_target};
use crate::record::CellRecord;
use crate::scenario::{QualityScenario, Scenario};
use serde::Serialize;

#[derive(Debug, Clone, Serialize)]
pub struct QualityRow {
    pub engine: String,
    /// Whether its device renders on the CPU, so that the time says nothing.
    pub software: bool,
    pub model: String,
    pub job: String,
    pub target_loss: f64,
    /// Steps after which training gave up.
    pub limit: usize,
    /// Optimizer steps until the target was met, in every repetition that met it.
    pub steps: Option<Spread>,
    /// Of training and evaluation, by the worker's clock.
    pub seconds: Option<Spread>,
    /// Evaluation loss before the first step and at the end, of the first repetition that ended ok.
    pub loss_before: Option<f64>,
    pub loss_after: Option<f64>,
    pub outcomes: String,
    pub cells: Vec<CellRef>,
}

pub fn quality_rows(jobs: &[Job], cells: &[CellRecord], lines: &Lines) -> Vec<QualityRow> {
    let of_job = |job: &Job| match job.parameters {
        Scenario::Quality(scenario) => Some(row(job, scenario, cells, lines)),
        _ => None,
    };
    jobs.iter().filter_map(of_job).collect()
}

fn row(job: &Job, scenario: &QualityScenario, cells: &[CellRecord], lines: &Lines) -> QualityRow {
    let reached: Vec<TimeToTarget> =
        job.ok().filter_map(|c| time_to_target(&c.samples, scenario.target_loss)).collect();
    // A median over those that got there would hide those that did not.
    let all_reached = reached.len() == job.ok().count();
    let spread = |of: fn(&TimeToTarget) -> f64| Spread::of(reached.iter().map(of)).filter(|_| all_reached);
    let evaluations = || job.ok().next().into_iter().flat_map(|c| &c.samples.evaluations);
    QualityRow {
        engine: job.engine.to_owned(),
        software: is_software_adapter(cells, job.engine),
        model: job.model.name.clone(),
        job: job.label(),
        target_loss: scenario.target_loss,
        limit: scenario.train.steps,
        steps: spread(|t| t.steps as f64),
        seconds: spread(|t| t.seconds),
        loss_before: evaluations().next().map(|e| e.loss),
        loss_after: evaluations().last().map(|e| e.loss),
        outcomes: job.outcomes(),
        cells: job.ok().map(|c| lines.refer(c)).collect(),
    }
}
