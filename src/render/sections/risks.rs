//! What may go wrong with the choice, with a probability where the record gives one.

use crate::decide::Decision;
use crate::decide::criteria::Criteria;
use crate::decide::jobs::Job;
use crate::decide::metric::Metric;
use crate::decide::ranking::Ranking;
use crate::measure::metrics::counted_steps;
use crate::record::{CellRecord, Outcome};
use crate::render::format::{gb, markdown, percent, plain};
use crate::render::sections::predictions::{LARGE_MODEL, Predictions};
use crate::stats::median;
use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Risk {
    pub risk: String,
    /// In words: a share, a bound, or why there is none.
    pub probability: String,
    pub evidence: String,
    pub remedy: String,
    pub cells: Vec<String>,
}

/// Of the engine that the report names first.
pub fn risks(
    cells: &[CellRecord],
    jobs: &[Job],
    decision: &Decision,
    criteria: &Criteria,
    predictions: Option<&Predictions>,
) -> Vec<Risk> {
    let Some((ranking, engine)) = decision.headline().and_then(|r| Some((r, r.first()?))) else {
        return Vec::new();
    };
    let own: Vec<&CellRecord> = cells.iter().filter(|c| c.engine == engine).collect();
    [
        other_choice(ranking, engine),
        memory(ranking, engine, criteria, predictions),
        failures(&own),
        Some(numerics(&own)),
        variation(jobs, ranking, engine),
        disturbed(&own),
        weights(&own),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn other_choice(ranking: &Ranking, engine: &str) -> Option<Risk> {
    let drawn = ranking.acceptability.as_ref()?;
    let own = drawn.engines.iter().find(|e| e.engine == engine)?;
    let beaten = ((1.0 - own.ranks[0]) * drawn.draws as f64).round() as usize;
    Some(Risk {
        risk: "another framework would have been the better choice".to_owned(),
        probability: format!("{} of the draws", percent(1.0 - own.ranks[0])),
        evidence: format!(
            "it is first in {} of {} draws, which vary the weights and what the processes of this run measured; another \
             day, another machine and what has no criterion are in none",
            drawn.draws - beaten,
            drawn.draws
        ),
        remedy: "measure what is missing, and on the machine that it is for; agree on the weights".to_owned(),
        cells: Vec::new(),
    })
}

fn memory(
    ranking: &Ranking,
    engine: &str,
    criteria: &Criteria,
    predictions: Option<&Predictions>,
) -> Option<Risk> {
    let large = predictions.and_then(|p| p.large.iter().find(|row| row.engine == engine));
    let beyond = large.map_or(String::new(), |row| {
        format!("; predicted, not measured, for {LARGE_MODEL}: up to {} tokens fit", row.longest)
    });
    let scores = &ranking.candidate(engine)?.scores;
    let peak = scores.iter().find_map(|s| s.metric(Metric::PeakTrainingMemoryGb))?;
    let target = criteria.memory_target_gb;
    Some(Risk {
        risk: format!("out of memory with a longer sequence or a larger model than {}", markdown(&peak.of)),
        probability: format!("{} of the target is left", percent((1.0 - peak.value / target).max(0.0))),
        evidence: format!("{} of {} GB at the peak{beyond}", gb(peak.value * 1e9), plain(target)),
        remedy: format!("`evalfw fit --engine {engine} --model 7b` tells the longest sequence that fits"),
        cells: peak.cells.clone(),
    })
}

fn failures(own: &[&CellRecord]) -> Option<Risk> {
    let ran: Vec<&&CellRecord> = own.iter().filter(|c| c.outcome != Outcome::Unavailable).collect();
    let failed: Vec<&&&CellRecord> = ran.iter().filter(|c| c.outcome != Outcome::Ok).collect();
    (!ran.is_empty()).then(|| Risk {
        risk: "a run ends with an error".to_owned(),
        probability: share_or_bound(failed.len(), ran.len()),
        evidence: format!(
            "{} of {} cells, those on other models too, did not end ok",
            failed.len(),
            ran.len()
        ),
        remedy: "the report lists each with its error".to_owned(),
        cells: failed.iter().map(|c| c.cell.clone()).collect(),
    })
}

fn numerics(own: &[&CellRecord]) -> Risk {
    let probe = own.iter().find_map(|c| {
        let probe = c.samples.probes.iter().find(|p| p.name == crate::record::REFERENCE_PROBE)?;
        Some((probe, c.cell.clone()))
    });
    let (probability, evidence, cells) = match probe {
        None => {
            ("not checked".to_owned(), "the run did not hold it against the reference".to_owned(), Vec::new())
        }
        Some((probe, cell)) => {
            let probability = if probe.passed { "none seen" } else { "certain" };
            (probability.to_owned(), markdown(&probe.evidence), vec![cell])
        }
    };
    Risk {
        risk: "it computes something else than QLoRA".to_owned(),
        probability,
        evidence,
        remedy: "`evalfw verify` after each update of the framework".to_owned(),
        cells,
    }
}

/// How far the processes are apart in their median step.
fn variation(jobs: &[Job], ranking: &Ranking, engine: &str) -> Option<Risk> {
    let scenario = &ranking.speed.as_ref()?.scenario;
    let job = jobs
        .iter()
        .find(|j| j.engine == engine && j.model.name == ranking.model && j.scenario == *scenario)?;
    let of_cell = |cell: &CellRecord| median(counted_steps(&cell.samples).map(|step| step.seconds));
    let medians: Vec<f64> = job.ok().filter_map(of_cell).collect();
    let longest = medians.iter().copied().reduce(f64::max)?;
    let shortest = medians.iter().copied().reduce(f64::min)?;
    (medians.len() > 1).then(|| Risk {
        risk: "a training takes longer than this report lets expect".to_owned(),
        probability: format!("processes are up to {} apart", percent(longest / shortest - 1.0)),
        evidence: format!("median steps of {} processes", medians.len()),
        remedy: "plan with the slowest process; `--repetitions 6` shows more of them".to_owned(),
        cells: job.ok().map(|cell| cell.cell.clone()).collect(),
    })
}

fn disturbed(own: &[&CellRecord]) -> Option<Risk> {
    let watched: Vec<&&CellRecord> =
        own.iter().filter(|c| c.outcome == Outcome::Ok && c.samples.surroundings.is_some()).collect();
    let doubtful: Vec<&&&CellRecord> = watched
        .iter()
        .filter(|c| !c.samples.disturbances.is_empty() || c.samples.steady == Some(false))
        .collect();
    (!watched.is_empty()).then(|| Risk {
        risk: "a speed was disturbed by other programs".to_owned(),
        probability: share_or_bound(doubtful.len(), watched.len()),
        evidence: format!("{} of {} cells were disturbed or never settled", doubtful.len(), watched.len()),
        remedy: "run it on a machine that does nothing else".to_owned(),
        cells: doubtful.iter().map(|c| c.cell.clone()).collect(),
    })
}

fn weights(own: &[&CellRecord]) -> Option<Risk> {
    let synthetic = own.iter().any(|c| c.model.synthetic);
    synthetic.then(|| Risk {
        risk: "the fine-tuned model is no good".to_owned(),
        probability: "not measured".to_owned(),
        evidence: "the weights of this run are random: speed and memory hold, text does not".to_owned(),
        remedy: "a run with `--model Qwen/…` and data of your own by `--data`".to_owned(),
        cells: Vec::new(),
    })
}

/// A share; of none at all the bound below which it lies with 95 %: the rule of three (Hanley and Lippman-Hand 1983).
fn share_or_bound(count: usize, of: usize) -> String {
    match count {
        0 => {
            let bound = (3.0 / of as f64).min(1.0);
            format!("none of {of}: with 95 % confidence below {} (3/n)", percent(bound))
        }
        _ => percent(count as f64 / of as f64),
    }
}
