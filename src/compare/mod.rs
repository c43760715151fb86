//! Two sides of records, held against each other: per job and metric a ratio with its interval, and a verdict.

pub mod bencher;
pub mod confirm;
pub mod figure;
pub mod junit;
pub mod present;
pub mod sameness;
pub mod thresholds;

use crate::decide::jobs::{Job, arrange};
use crate::record::{CellRecord, Outcome};
use crate::stats::{Processes, Ratio, median_of_processes, ratio_of_medians};
use anyhow::{Result, bail};
use figure::Metric;
use serde::Serialize;
use thresholds::Thresholds;

/// Ordered by what a reader has to see first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Worse,
    Inconclusive,
    Better,
    Same,
}

impl Verdict {
    pub const ALL: [Self; 4] = [Self::Worse, Self::Inconclusive, Self::Better, Self::Same];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Worse => "worse",
            Self::Inconclusive => "inconclusive",
            Self::Better => "better",
            Self::Same => "same",
        }
    }

    /// From a ratio of costs, head over base: a side is only cheaper if the whole interval clears the threshold.
    fn of(cost: &Ratio, threshold: f64) -> Self {
        let limit = 1.0 + threshold;
        if cost.low > limit {
            Self::Worse
        } else if cost.high < 1.0 / limit {
            Self::Better
        } else if cost.low >= 1.0 / limit && cost.high <= limit {
            Self::Same
        } else {
            Self::Inconclusive
        }
    }
}

/// One metric of one job, or how its cells ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// `engine/model/scenario`, with the storage of the base where it is not NF4.
    pub job: String,
    /// `None`: the outcomes are compared.
    pub metric: Option<Metric>,
    pub base: Side,
    pub head: Side,
    /// Of the figures, head over base.
    pub ratio: Option<Ratio>,
    pub threshold_percent: Option<f64>,
    pub verdict: Verdict,
    /// Why nothing was decided, or what happened.
    pub reason: Option<String>,
}

/// What one side says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Side {
    /// Median over the processes of each one's median.
    pub figure: Option<f64>,
    pub processes: usize,
    pub samples: usize,
    /// How the cells ended, e.g. `ok 3 of 3`.
    pub outcomes: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    pub verdict: Verdict,
    pub rows: Vec<Row>,
    /// Jobs that only the head has: there is nothing to hold them against.
    pub new_jobs: Vec<String>,
    /// In what the sides differ that should be the same. Empty unless that was allowed.
    pub differences: Vec<String>,
    pub confidence: f64,
}

/// Cells of several records may have the same name: each counts as a process.
pub fn compare(base: &[CellRecord], head: &[CellRecord], thresholds: &Thresholds) -> Result<Comparison> {
    let (base, head) = (arrange(base), arrange(head));
    let partner = |job: &Job, side: &[Job]| side.iter().position(|other| name(other) == name(job));
    let mut rows = Vec::new();
    let mut common = 0;
    for job in &base {
        match partner(job, &head) {
            Some(i) => {
                common += 1;
                rows.extend(rows_of(job, &head[i], thresholds));
            }
            None if is_there(job) => rows.push(missing(job)),
            None => {}
        }
    }
    if common == 0 {
        bail!("the records have no job in common: no engine ran the same scenario on the same model in both");
    }
    if rows.is_empty() {
        bail!("every job that the records have in common is of an engine that cannot run on the machine");
    }
    let new = head.iter().filter(|job| is_there(job) && partner(job, &base).is_none());
    let verdict = rows.iter().map(|row| row.verdict).min().unwrap_or(Verdict::Same);
    let (new_jobs, confidence) = (new.map(name).collect(), thresholds.confidence);
    Ok(Comparison { verdict, rows, new_jobs, differences: Vec::new(), confidence })
}

/// `engine/model/scenario`, with the storage of the base where it is not NF4.
pub fn name(job: &Job) -> String {
    format!("{}/{}/{}", job.engine, job.model.name, job.label())
}

/// Whether the machine can run it at all.
fn is_there(job: &Job) -> bool {
    job.cells.iter().any(|cell| cell.outcome != Outcome::Unavailable)
}

fn rows_of(base: &Job, head: &Job, thresholds: &Thresholds) -> Vec<Row> {
    if !is_there(base) && !is_there(head) {
        return Vec::new();
    }
    let outcomes = outcomes_row(base, head);
    let metrics = Metric::ALL.into_iter().filter(|metric| metric.belongs_to(base.parameters));
    let both_ok = base.ok().next().is_some() && head.ok().next().is_some();
    let metrics = metrics.filter(|_| both_ok).map(|metric| metric_row(base, head, metric, thresholds));
    outcomes.into_iter().chain(metrics).collect()
}

/// `None` where all cells of both sides ended ok. A side is worse when cells of it failed and none of the other's did, or
/// when all did and not all of the other's.
fn outcomes_row(base: &Job, head: &Job) -> Option<Row> {
    let all_ok = |job: &Job| job.ok().count() == job.cells.len();
    let none_ok = |job: &Job| job.ok().next().is_none();
    let verdict = match (base, head) {
        _ if all_ok(base) && all_ok(head) => return None,
        _ if none_ok(base) && none_ok(head) => Verdict::Inconclusive,
        _ if all_ok(base) || none_ok(head) => Verdict::Worse,
        _ if all_ok(head) || none_ok(base) => Verdict::Better,
        _ => Verdict::Inconclusive,
    };
    let error = head.cells.iter().chain(&base.cells).find_map(|cell| cell.error.as_ref());
    let reason = error.map(|error| format!("{}: {}", error.during, error.message));
    Some(Row { verdict, reason, ..row(base, head) })
}

fn missing(base: &Job) -> Row {
    let empty = Job { cells: Vec::new(), ..base.clone() };
    let reason = Some("the head did not run it".to_owned());
    Row { verdict: Verdict::Inconclusive, reason, ..row(base, &empty) }
}

/// With the outcomes of both sides.
fn row(base: &Job, head: &Job) -> Row {
    let outcome = |job: &Job| Side {
        figure: None,
        processes: job.cells.len(),
        samples: 0,
        outcomes: if job.cells.is_empty() { "not run".to_owned() } else { job.outcomes() },
    };
    Row {
        job: name(base),
        metric: None,
        base: outcome(base),
        head: outcome(head),
        ratio: None,
        threshold_percent: None,
        verdict: Verdict::Inconclusive,
        reason: None,
    }
}

fn metric_row(base: &Job, head: &Job, metric: Metric, thresholds: &Thresholds) -> Row {
    let costs = [base, head].map(|job| metric.processes(job));
    let threshold = thresholds.of(metric);
    let cost = ratio_of_medians(&costs[0], &costs[1], thresholds.confidence);
    let fewest = costs[0].len().min(costs[1].len());
    // A process that ended ok may still have missed what is measured, such as the target.
    let missed = |job: &Job, costs: &Processes| job.ok().count() - costs.len();
    let missed = [missed(base, &costs[0]), missed(head, &costs[1])];
    let (verdict, reason) = match &cost {
        _ if missed[0] == 0 && missed[1] > 0 => {
            (Verdict::Worse, Some(format!("{} of the head's processes do not have it", missed[1])))
        }
        _ if missed[0] > 0 => {
            (Verdict::Inconclusive, Some(format!("{} of the base's processes do not have it", missed[0])))
        }
        None => (Verdict::Inconclusive, Some("a figure is 0 or not finite".to_owned())),
        Some(_) if fewest < thresholds.min_processes => {
            let least = thresholds.min_processes;
            (Verdict::Inconclusive, Some(format!("{fewest} of at least {least} processes on a side")))
        }
        Some(cost) => match Verdict::of(cost, threshold) {
            Verdict::Inconclusive => (Verdict::Inconclusive, Some("the interval is too wide".to_owned())),
            verdict => (verdict, None),
        },
    };
    let side = |job: &Job, costs: &Processes| Side {
        figure: median_of_processes(costs).map(|cost| metric.turned(cost)).filter(|v| v.is_finite()),
        processes: costs.len(),
        samples: costs.iter().map(Vec::len).sum(),
        outcomes: job.outcomes(),
    };
    let turned = |cost: Ratio| match metric.is_rate() {
        false => cost,
        true => Ratio { ratio: 1.0 / cost.ratio, low: 1.0 / cost.high, high: 1.0 / cost.low },
    };
    Row {
        metric: Some(metric),
        base: side(base, &costs[0]),
        head: side(head, &costs[1]),
        ratio: cost.map(turned),
        threshold_percent: Some(threshold * 100.0),
        verdict,
        reason,
        ..row(base, head)
    }
}
