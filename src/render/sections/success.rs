//! What the choice has to hold, ticked from the record.

use super::LARGE;
use crate::decide::Decision;
use crate::decide::criteria::Criteria;
use crate::decide::figures::Footprint;
use crate::decide::jobs::Job;
use crate::decide::metric::Metric;
use crate::decide::ranking::Verdict;
use crate::record::{CellRecord, REFERENCE_PROBE};
use crate::render::format::{gb, markdown, parameters, percent, plain};
use crate::render::sections::predictions::Predictions;
use crate::render::tables::LossAgreement;
use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SuccessCriterion {
    pub text: String,
    /// `None` where the record does not tell.
    pub met: Option<bool>,
    pub evidence: String,
    pub cells: Vec<String>,
}

/// Losses of different engines that are further apart than this, in nats, would be another training.
const SAME_LOSS: f64 = 0.02;

/// Of the engine that the report names first.
pub fn success(
    jobs: &[Job],
    decision: &Decision,
    criteria: &Criteria,
    agreement: &[&LossAgreement],
    predictions: Option<&Predictions>,
) -> Vec<SuccessCriterion> {
    let Some((ranking, engine)) = decision.headline().and_then(|r| Some((r, r.first()?))) else {
        return Vec::new();
    };
    let own: Vec<&CellRecord> = jobs.iter().filter(|j| j.engine == engine).flat_map(|j| j.ok()).collect();
    let target = plain(criteria.memory_target_gb);
    let probe = |name: &str, text: &str| of_probe(&own, name, text);
    let mut all = vec![
        probe(REFERENCE_PROBE, "Its answers are those of transformers, peft and bitsandbytes"),
        probe("load_nf4", "The base is stored in 4 bits"),
        probe("train_nf4", "Gradients flow through the 4-bit base"),
        probe("gradient_checkpointing", "Gradient checkpointing works"),
        probe("save_peft_adapter", "Adapters are saved in PEFT's format"),
    ];
    let peak = ranking
        .candidate(engine)
        .and_then(|c| c.scores.iter().find_map(|s| s.metric(Metric::PeakTrainingMemoryGb)));
    all.push(SuccessCriterion {
        text: format!("QLoRA of {} stays within {target} GB", markdown(&ranking.model)),
        met: peak.map(|peak| peak.value <= criteria.memory_target_gb),
        evidence: peak.map_or_else(
            || "the record has no peak of it".to_owned(),
            |peak| format!("{} GB in {}", gb(peak.value * 1e9), markdown(&peak.of)),
        ),
        cells: peak.map(|peak| peak.cells.clone()).unwrap_or_default(),
    });
    all.push(large_model(jobs, engine, criteria, &target, predictions));
    let apart = agreement.iter().map(|a| a.largest_difference).fold(None, |most: Option<f64>, difference| {
        Some(most.map_or(difference, |most| most.max(difference)))
    });
    all.push(SuccessCriterion {
        text: format!(
            "Engines that train the same job lose alike: at most {SAME_LOSS} nats apart at any step"
        ),
        met: apart.map(|apart| apart <= SAME_LOSS),
        evidence: apart.map_or_else(
            || "fewer than two engines trained the same steps".to_owned(),
            |apart| format!("{apart:.1e} nats apart at most; another base is another job"),
        ),
        cells: Vec::new(),
    });
    let (met, evidence) = match &ranking.verdict {
        Verdict::Winner { acceptability, .. } => {
            (true, format!("first in {} of the draws", percent(*acceptability)))
        }
        Verdict::OnlyOne { .. } => (false, "only one framework is left: nothing was compared".to_owned()),
        _ => (false, "no framework is first often enough".to_owned()),
    };
    let text = "The decision holds if weights and measurements vary".to_owned();
    all.push(SuccessCriterion { text, met: Some(met), evidence, cells: Vec::new() });
    all
}

fn of_probe(own: &[&CellRecord], name: &str, text: &str) -> SuccessCriterion {
    let found =
        || own.iter().flat_map(|c| c.samples.probes.iter().filter(|p| p.name == name).map(move |p| (p, c)));
    let shown = found().find(|(probe, _)| !probe.passed).or_else(|| found().next());
    SuccessCriterion {
        text: text.to_owned(),
        met: shown.map(|(probe, _)| probe.passed),
        evidence: shown.map_or_else(|| "not probed".to_owned(), |(probe, _)| markdown(&probe.evidence)),
        cells: shown.map(|(_, cell)| vec![cell.cell.clone()]).unwrap_or_default(),
    }
}

/// The largest model that it trained, if that is a large one.
fn large_model(
    jobs: &[Job],
    engine: &str,
    criteria: &Criteria,
    target: &str,
    predictions: Option<&Predictions>,
) -> SuccessCriterion {
    let predicted = predictions.and_then(|p| Some((p, p.large.iter().find(|row| row.engine == engine)?)));
    let without = predicted.map_or_else(
        || "not measured in this run; `evalfw run --suite large` does".to_owned(),
        |(all, row)| {
            format!(
                "not measured in this run; predicted are {} GB at {} tokens, and up to {} tokens fit",
                gb(row.bytes[0] as f64),
                all.lengths[0],
                row.longest
            )
        },
    );
    let is_large = |j: &&Job| j.engine == engine && j.is_kind("train") && j.model.parameters > LARGE;
    let found = jobs.iter().filter(is_large).filter_map(|j| Some((j, Footprint::of_job(j)?)));
    let largest = found
        .filter_map(|(job, (footprint, cell))| Some((job, footprint.bytes()?, cell)))
        .max_by_key(|(_, bytes, _)| *bytes);
    SuccessCriterion {
        text: format!("The 7B model trains within {target} GB"),
        met: largest.map(|(_, bytes, _)| bytes <= criteria.memory_target_bytes()),
        evidence: largest.map_or_else(
            || without,
            |(job, bytes, _)| {
                let size = parameters(job.model.parameters);
                format!("{} GB in {} of {size} parameters", gb(bytes as f64), markdown(job.scenario))
            },
        ),
        cells: largest.map(|(_, _, cell)| vec![cell.cell.clone()]).unwrap_or_default(),
    }
}
