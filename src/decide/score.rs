//! The score of one engine in one criterion, with what is unknown kept unknown.

use super::criteria::{Check, Criterion, Judgement, Part, Source};
use super::jobs::Job;
use super::metric::{Measured, Metric};
use super::value::BEST;
use crate::record::CellRecord;
use serde::Serialize;
use std::cmp::Ordering;

/// Scores and totals closer than this are a tie: half of the last digit that the report prints.
pub const RESOLUTION: f64 = 0.05;

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Score {
    Measured {
        /// From 0 to 10, of what was measured: the weighted mean of the parts, or the share of the probes that passed.
        score: f64,
        /// What the score may become once the rest is measured.
        range: Interval,
        basis: Basis,
    },
    NotMeasured {
        reason: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Basis {
    Metrics { parts: Vec<PartScore> },
    Checklist { passed: Vec<CheckResult>, failed: Vec<CheckResult>, not_probed: Vec<Check> },
    Judgement(Judgement),
}

/// One measured quantity with its score.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PartScore {
    pub metric: Metric,
    pub title: &'static str,
    /// Percent of the criterion.
    pub weight: f64,
    /// `None` where it was not measured.
    pub score: Option<f64>,
    pub measured: Option<Measured>,
    /// Why it was not measured.
    pub reason: Option<String>,
}

/// A probe with its evidence and the cell that gave it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckResult {
    pub probe: String,
    pub title: String,
    pub evidence: String,
    pub cell: String,
}

impl Score {
    /// Scores one engine on one model in one criterion.
    pub fn of(criterion: &Criterion, jobs: &[Job], model: &str, engine: &str) -> Self {
        match &criterion.source {
            Source::Metrics { parts } => from_metrics(parts, jobs, model, engine),
            Source::Checklist { checks } => from_checklist(checks, jobs, model, engine),
            Source::Judgement { judgements } => from_judgements(judgements, engine),
            Source::NotMeasured { reason } => not_measured(reason),
        }
    }

    pub fn value(&self) -> Option<f64> {
        match self {
            Self::Measured { score, .. } => Some(*score),
            Self::NotMeasured { .. } => None,
        }
    }

    /// What the score can be: everything, where it was not measured.
    pub fn range(&self) -> Interval {
        match self {
            Self::Measured { range, .. } => *range,
            Self::NotMeasured { .. } => Interval { low: 0.0, high: BEST },
        }
    }

    /// What was measured for a metric.
    pub fn metric(&self, metric: Metric) -> Option<&Measured> {
        let Self::Measured { basis: Basis::Metrics { parts }, .. } = self else { return None };
        parts.iter().find(|part| part.metric == metric)?.measured.as_ref()
    }

    /// The quantities that it is made of; none where it is no sum of such.
    pub fn parts(&self) -> &[PartScore] {
        match self {
            Self::Measured { basis: Basis::Metrics { parts }, .. } => parts,
            _ => &[],
        }
    }

    /// Which of two engines is better in a criterion; `None` where the record cannot say. Where other things were
    /// measured of the one than of the other, they compare by what they can become.
    pub fn compare(&self, other: &Self) -> Option<Ordering> {
        let (Self::Measured { score: a, .. }, Self::Measured { score: b, .. }) = (self, other) else {
            return None;
        };
        if self.known() == other.known() {
            return Some(compare(*a, *b));
        }
        let (a, b) = (self.range(), other.range());
        if a.low > b.high + RESOLUTION {
            Some(Ordering::Greater)
        } else if b.low > a.high + RESOLUTION {
            Some(Ordering::Less)
        } else {
            None
        }
    }

    /// The titles of what was measured or probed, sorted.
    fn known(&self) -> Vec<&str> {
        let Self::Measured { basis, .. } = self else { return Vec::new() };
        let mut names: Vec<&str> = match basis {
            Basis::Metrics { parts } => parts.iter().filter(|p| p.score.is_some()).map(|p| p.title).collect(),
            Basis::Checklist { passed, failed, .. } => {
                passed.iter().chain(failed).map(|r| r.probe.as_str()).collect()
            }
            Basis::Judgement(_) => Vec::new(),
        };
        names.sort_unstable();
        names
    }
}

/// Compares two scores at the resolution of the report.
pub fn compare(a: f64, b: f64) -> Ordering {
    if (a - b).abs() < RESOLUTION { Ordering::Equal } else { a.total_cmp(&b) }
}

/// The weighted total, between all that is unknown at its worst and all at its best.
pub fn total<'a>(scores: impl Iterator<Item = (f64, &'a Score)>) -> Interval {
    let mut total = Interval { low: 0.0, high: 0.0 };
    for (weight, score) in scores {
        let range = score.range();
        total.low += weight / 100.0 * range.low;
        total.high += weight / 100.0 * range.high;
    }
    total
}

fn not_measured(reason: impl Into<String>) -> Score {
    Score::NotMeasured { reason: reason.into() }
}

fn from_metrics(parts: &[Part], jobs: &[Job], model: &str, engine: &str) -> Score {
    let parts: Vec<PartScore> = parts.iter().map(|part| part_score(part, jobs, model, engine)).collect();
    let known = || parts.iter().filter_map(|part| Some((part.weight, part.score?)));
    let weight: f64 = known().map(|(weight, _)| weight).sum();
    if weight == 0.0 {
        let mut reasons: Vec<&str> = parts.iter().filter_map(|part| part.reason.as_deref()).collect();
        reasons.dedup();
        return not_measured(reasons.join("; "));
    }
    let sum: f64 = known().map(|(weight, score)| weight * score).sum();
    // Parts that are not known may be worth nothing or everything.
    let range = match parts.iter().all(|part| part.score.is_some()) {
        true => Interval { low: sum / weight, high: sum / weight },
        false => Interval { low: sum / 100.0, high: (sum + (100.0 - weight) * BEST) / 100.0 },
    };
    Score::Measured { score: sum / weight, range, basis: Basis::Metrics { parts } }
}

fn part_score(part: &Part, jobs: &[Job], model: &str, engine: &str) -> PartScore {
    let (measured, reason) = match part.metric.measure(jobs, model, engine) {
        Ok(measured) => (Some(measured), None),
        Err(reason) => (None, Some(reason)),
    };
    PartScore {
        metric: part.metric,
        title: part.title,
        weight: part.weight,
        score: measured.as_ref().map(|measured| part.anchors.score(measured.value)),
        measured,
        reason,
    }
}

fn from_judgements(judgements: &[Judgement], engine: &str) -> Score {
    match judgements.iter().find(|judgement| judgement.engine == engine) {
        None => not_measured("nobody has judged it"),
        Some(judgement) => {
            let score = judgement.score;
            let range = Interval { low: score, high: score };
            Score::Measured { score, range, basis: Basis::Judgement(judgement.clone()) }
        }
    }
}

fn from_checklist(checks: &[Check], jobs: &[Job], model: &str, engine: &str) -> Score {
    let of_engine = jobs.iter().filter(|j| j.engine == engine && j.model.name == model);
    let cells: Vec<&CellRecord> = of_engine.flat_map(|j| j.cells.iter().copied()).collect();
    let (mut passed, mut failed, mut not_probed) = (Vec::new(), Vec::new(), Vec::new());
    for check in checks {
        match probe(&cells, check) {
            None => not_probed.push(check.clone()),
            Some((true, result)) => passed.push(result),
            Some((false, result)) => failed.push(result),
        }
    }
    let probed = passed.len() + failed.len();
    if probed == 0 {
        return not_measured("no cell got far enough to probe it");
    }
    let share = |count: usize, of: usize| BEST * count as f64 / of as f64;
    let range = Interval {
        low: share(passed.len(), checks.len()),
        high: share(passed.len() + not_probed.len(), checks.len()),
    };
    let score = share(passed.len(), probed);
    Score::Measured { score, range, basis: Basis::Checklist { passed, failed, not_probed } }
}

/// A probe passed if it did in every cell that exercised it; the evidence is the first failure's, or
/// else the first cell's.
fn probe(cells: &[&CellRecord], check: &Check) -> Option<(bool, CheckResult)> {
    let found = || {
        cells.iter().flat_map(|c| {
            let of_check = c.samples.probes.iter().filter(|p| p.name == check.probe);
            of_check.map(move |p| (p, c.cell.as_str()))
        })
    };
    let (probe, cell) = found().find(|(p, _)| !p.passed).or_else(|| found().next())?;
    let result = CheckResult {
        probe: check.probe.clone(),
        title: check.title.clone(),
        evidence: probe.evidence.clone(),
        cell: cell.to_owned(),
    };
    Some((probe.passed, result))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(score: f64) -> Score {
        let basis = Basis::Metrics { parts: Vec::new() };
        Score::Measured { score, range: Interval { low: score, high: score }, basis }
    }

    /// A checklist of five items, of which the first letters passed, `-` failed and `?` was not probed.
    fn checklist(results: &str) -> Score {
        let (mut passed, mut failed, mut not_probed) = (Vec::new(), Vec::new(), Vec::new());
        for (index, result) in results.chars().enumerate() {
            let probe = format!("probe{index}");
            let done = CheckResult {
                probe: probe.clone(),
                title: String::new(),
                evidence: String::new(),
                cell: String::new(),
            };
            match result {
                '+' => passed.push(done),
                '-' => failed.push(done),
                _ => not_probed.push(Check { probe, title: String::new() }),
            }
        }
        let all = results.len() as f64;
        let range = Interval {
            low: 10.0 * passed.len() as f64 / all,
            high: 10.0 * (passed.len() + not_probed.len()) as f64 / all,
        };
        let score = 10.0 * passed.len() as f64 / (passed.len() + failed.len()) as f64;
        Score::Measured { score, range, basis: Basis::Checklist { passed, failed, not_probed } }
    }

    fn missing() -> Score {
        not_measured("nobody looked")
    }

    #[test]
    fn a_total_reaches_from_missing_as_0_to_missing_as_10() {
        let scores = [(50.0, metric(8.0)), (30.0, missing()), (20.0, metric(5.0))];
        let total = total(scores.iter().map(|(w, s)| (*w, s)));
        assert!((total.low - 5.0).abs() < 1e-12 && (total.high - 8.0).abs() < 1e-12, "{total:?}");
    }

    #[test]
    fn the_scorecard_that_was_added_up_wrong_by_hand() {
        let weights = [25.0, 25.0, 20.0, 20.0, 10.0];
        let sum = |scores: [f64; 5]| {
            let scores = scores.map(metric);
            total(weights.into_iter().zip(&scores)).low
        };
        assert!((sum([9.0, 9.0, 8.0, 9.0, 8.0]) - 8.7).abs() < 1e-12);
        assert!((sum([4.0, 6.0, 6.0, 9.0, 10.0]) - 6.5).abs() < 1e-12);
    }

    #[test]
    fn scores_closer_than_the_report_prints_are_a_tie() {
        assert_eq!(metric(7.0).compare(&metric(7.04)), Some(Ordering::Equal));
        assert_eq!(metric(7.0).compare(&metric(7.1)), Some(Ordering::Less));
    }

    #[test]
    fn what_was_not_measured_compares_with_nothing() {
        assert_eq!(missing().compare(&metric(0.0)), None);
        assert_eq!(missing().compare(&missing()), None);
    }

    #[test]
    fn checklists_with_other_items_probed_compare_only_when_the_rest_cannot_turn_it() {
        assert_eq!(checklist("+++??").compare(&checklist("++-??")), Some(Ordering::Greater));
        assert_eq!(checklist("+++??").compare(&checklist("+++++")), None, "3 of 3 is no better than 5 of 5");
        assert_eq!(checklist("++++?").compare(&checklist("-----")), Some(Ordering::Greater));
    }
}
