//! A section for each framework: what ran, what speaks for and against it, how it is installed, and its QLoRA.

use super::contrast::{Difference, differences};
use crate::adoption::Adoption;
use crate::decide::Decision;
use crate::decide::criteria::Criteria;
use crate::decide::figures::{Footprint, InferFigures, LoadFigures, Spread, TrainFigures};
use crate::decide::jobs::{Job, reference_scenario};
use crate::decide::ranking::Ranking;
use crate::decide::score::{Basis, Score};
use crate::measure::metrics::TRAIN_PHASE;
use crate::record::{CellRecord, LoadSample, Outcome};
use crate::render::format::{list, markdown, plain};
use crate::scenario::{Scenario, TrainScenario};
use evalfw_engine::lora::Target;
use evalfw_engine::protocol::Quantization;
use serde::Serialize;

#[derive(Debug, Clone, Serialize)]
pub struct FrameworkSection {
    pub framework: String,
    pub version: Option<String>,
    /// The engine that stands for it in the decision; `None` where none passed the knock-outs.
    pub represented_by: Option<String>,
    pub overview: Vec<String>,
    pub strengths: Vec<Difference>,
    pub weaknesses: Vec<Difference>,
    pub adoption: Option<Adoption>,
    pub adoption_cell: Option<String>,
    pub figures: Vec<EngineFigures>,
    /// Name and value of each setting of the training job that engines are compared on.
    pub qlora: Vec<(&'static str, String)>,
}

/// Of the jobs that engines are compared on.
#[derive(Debug, Clone, Serialize)]
pub struct EngineFigures {
    pub engine: String,
    pub device: String,
    pub peak_training_bytes: Option<u64>,
    pub peak_is_bound: bool,
    /// Of the same process in its training steps, where loading and saving took no part.
    pub peak_of_steps_bytes: Option<u64>,
    pub training: Option<Spread>,
    pub prompt: Option<Spread>,
    pub generating: Option<Spread>,
    pub load_seconds: Option<Spread>,
    pub cells: Vec<String>,
}

/// `jobs` are those that engines are compared on, of all models.
pub fn sections(jobs: &[Job], decision: &Decision, criteria: &Criteria) -> Vec<FrameworkSection> {
    let mut names: Vec<&str> = cells(jobs).filter_map(|cell| cell.framework.as_deref()).collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter().map(|name| section(name, jobs, decision, criteria)).collect()
}

fn cells<'a>(jobs: &'a [Job<'a>]) -> impl Iterator<Item = &'a CellRecord> {
    jobs.iter().flat_map(|job| job.cells.iter().copied())
}

fn section(name: &str, jobs: &[Job], decision: &Decision, criteria: &Criteria) -> FrameworkSection {
    let is_own = |cell: &&CellRecord| cell.framework.as_deref() == Some(name);
    let mut engines: Vec<&str> = cells(jobs).filter(is_own).map(|cell| cell.engine.as_str()).collect();
    engines.sort_unstable();
    engines.dedup();
    let ranking = decision.headline();
    let represented_by =
        ranking.and_then(|r| r.finalists.iter().find(|e| engines.contains(&e.as_str()))).cloned();
    let (strengths, weaknesses) = match (ranking, &represented_by) {
        (Some(ranking), Some(engine)) => for_and_against(ranking, engine, criteria),
        _ => (Vec::new(), Vec::new()),
    };
    let adopted =
        cells(jobs).filter(is_own).find_map(|cell| Some((cell.adoption.clone()?, cell.cell.clone())));
    let (adoption, adoption_cell) = adopted.unzip();
    let model = ranking.map(|r| r.model.as_str());
    FrameworkSection {
        framework: name.to_owned(),
        version: cells(jobs).filter(is_own).find_map(|cell| cell.framework_version.clone()),
        overview: overview(name, &engines, jobs, decision, represented_by.as_deref()),
        strengths,
        weaknesses,
        adoption,
        adoption_cell,
        figures: engines.iter().filter_map(|engine| figures(engine, jobs, model?)).collect(),
        qlora: model.and_then(|model| settings(&engines, jobs, model)).unwrap_or_default(),
        represented_by,
    }
}

/// Against the best of the other frameworks in each: of several differences in one thing the smallest counts for it, and
/// the largest against it.
fn for_and_against(
    ranking: &Ranking,
    engine: &str,
    criteria: &Criteria,
) -> (Vec<Difference>, Vec<Difference>) {
    let Some(own) = ranking.candidate(engine) else { return (Vec::new(), Vec::new()) };
    let others = ranking.finalists.iter().filter(|e| *e != engine).filter_map(|e| ranking.candidate(e));
    let found: Vec<Vec<Difference>> = others.map(|other| differences(own, other, criteria)).collect();
    let subject = |d: &Difference| d.text.split(':').next().unwrap_or_default().to_owned();
    let count = found.len();
    let (mut strengths, mut weaknesses): (Vec<Difference>, Vec<Difference>) = (Vec::new(), Vec::new());
    for difference in found.into_iter().flatten() {
        let (side, keeps) = match difference.is_better {
            true => (&mut strengths, f64::le as fn(&f64, &f64) -> bool),
            false => (&mut weaknesses, f64::ge as fn(&f64, &f64) -> bool),
        };
        match side.iter_mut().find(|known| subject(known) == subject(&difference)) {
            Some(known) if keeps(&difference.points, &known.points) => *known = difference,
            Some(_) => {}
            None => side.push(difference),
        }
    }
    // Better than one and worse than another is no strength.
    if count > 1 {
        strengths.retain(|s| weaknesses.iter().all(|w| subject(w) != subject(s)));
    }
    let failed = own.scores.iter().flat_map(|score| match score {
        Score::Measured { basis: Basis::Checklist { failed, .. }, .. } => failed.as_slice(),
        _ => &[],
    });
    let failed = failed.map(|check| {
        let text = format!("{}: failed: {}", markdown(&check.title), markdown(&check.evidence));
        Difference { is_better: false, text, points: 0.0, cells: vec![check.cell.clone()] }
    });
    let failed: Vec<Difference> =
        failed.filter(|failure| weaknesses.iter().all(|known| subject(known) != subject(failure))).collect();
    weaknesses.extend(failed);
    (strengths, weaknesses)
}

fn overview(
    name: &str,
    engines: &[&str],
    jobs: &[Job],
    decision: &Decision,
    represented_by: Option<&str>,
) -> Vec<String> {
    let mut sentences = Vec::new();
    let code = |names: &[&str]| list(&names.iter().map(|e| markdown(e)).collect::<Vec<_>>());
    sentences.push(format!("Engines of {} in this run: {}.", markdown(name), code(engines)));
    match represented_by {
        Some(engine) => {
            sentences.push(format!("In the decision it is represented by {}.", markdown(engine)));
        }
        None => sentences.push("None of them takes part in the decision.".to_owned()),
    }
    let out = decision.headline().map(|r| r.knocked_out.as_slice()).unwrap_or_default();
    for excluded in out.iter().filter(|e| engines.contains(&e.engine.as_str())) {
        let reasons: Vec<String> =
            excluded.reasons.iter().map(|r| format!("{}: {}", r.title, markdown(&r.detail))).collect();
        sentences.push(format!("{} is knocked out ({}).", markdown(&excluded.engine), reasons.join("; ")));
    }
    let own = || cells(jobs).filter(|cell| engines.contains(&cell.engine.as_str()));
    let ran = own().filter(|cell| cell.outcome != Outcome::Unavailable).count();
    let ok = own().filter(|cell| cell.outcome == Outcome::Ok).count();
    sentences.push(format!("{ok} of {ran} cells ended ok."));
    let mut caveats: Vec<(&str, Vec<&str>)> = Vec::new();
    for cell in own() {
        for caveat in &cell.caveats {
            match caveats.iter_mut().find(|(known, _)| known == caveat) {
                Some((_, engines)) if engines.contains(&cell.engine.as_str()) => {}
                Some((_, engines)) => engines.push(&cell.engine),
                None => caveats.push((caveat, vec![&cell.engine])),
            }
        }
    }
    let mut told: Vec<(Vec<&str>, Vec<String>)> = Vec::new();
    for (caveat, engines) in caveats {
        match told.iter_mut().find(|(known, _)| *known == engines) {
            Some((_, all)) => all.push(markdown(caveat)),
            None => told.push((engines, vec![markdown(caveat)])),
        }
    }
    for (engines, caveats) in told {
        sentences.push(format!("To know of {} on this machine: {}.", code(&engines), caveats.join("; ")));
    }
    sentences
}

fn figures(engine: &str, jobs: &[Job], model: &str) -> Option<EngineFigures> {
    let own: Vec<&Job> = jobs.iter().filter(|j| j.engine == engine && j.model.name == model).collect();
    let reference = |kind: &str| {
        let scenario = reference_scenario(jobs, model, kind)?;
        own.iter().find(|j| j.scenario == scenario && j.is_qlora).copied()
    };
    let device = own.iter().flat_map(|j| j.ok()).find_map(|cell| cell.device.as_ref())?;
    let (train, infer) = (reference("train"), reference("infer"));
    let footprint = train.and_then(Footprint::of_job);
    let inference = infer.and_then(InferFigures::of);
    let loads: Vec<&LoadSample> = own
        .iter()
        .filter(|j| j.is_qlora)
        .flat_map(|j| j.ok())
        .filter_map(|cell| cell.samples.load.as_ref())
        .collect();
    let shown = [train, infer].into_iter().flatten().flat_map(|j| j.ok()).map(|cell| cell.cell.clone());
    Some(EngineFigures {
        engine: engine.to_owned(),
        device: device.name.clone(),
        peak_training_bytes: footprint.and_then(|(footprint, _)| footprint.bytes()),
        peak_of_steps_bytes: footprint.and_then(|(_, cell)| peak_of_steps(cell)),
        peak_is_bound: matches!(footprint, Some((Footprint::AtLeast { .. }, _))),
        training: train.and_then(TrainFigures::of).map(|figures| figures.real_tokens),
        prompt: inference.and_then(|figures| figures.prefill),
        generating: inference.and_then(|figures| figures.decode),
        load_seconds: LoadFigures::of(&loads).map(|figures| figures.total),
        cells: shown.collect(),
    })
}

/// `None` where the memory that counts is a GPU's: it is not known by phase.
fn peak_of_steps(cell: &CellRecord) -> Option<u64> {
    let steps = || cell.samples.phases.iter().find(|phase| phase.name == TRAIN_PHASE);
    (!Footprint::is_of_device(cell)).then(steps).flatten().map(|phase| phase.peak_bytes)
}

/// Of the training job that engines are compared on, as this framework ran it.
fn settings(engines: &[&str], jobs: &[Job], model: &str) -> Option<Vec<(&'static str, String)>> {
    let scenario = reference_scenario(jobs, model, "train")?;
    let is_own = |j: &&Job| engines.contains(&j.engine) && j.model.name == model && j.scenario == scenario;
    let job = jobs.iter().find(is_own)?;
    let Scenario::Train(train) = job.parameters else { return None };
    let mut types: Vec<&str> =
        jobs.iter().filter(is_own).flat_map(|j| j.ok()).filter_map(|c| c.compute_dtype.as_deref()).collect();
    types.sort_unstable();
    types.dedup();
    let mut rows = configuration(train);
    rows.push(("compute type", types.join(" | ")));
    Some(rows)
}

fn configuration(train: &TrainScenario) -> Vec<(&'static str, String)> {
    let base = match train.quantization {
        Quantization::Nf4 => "NF4, blocks of 64, double quantisation",
        Quantization::Native => "the framework's own 4-bit format",
        Quantization::None => "as in the checkpoint",
    };
    let modules: Vec<&str> = Target::ALL.iter().map(|target| target.module()).collect();
    let checkpointing = match (train.gradient_checkpointing, train.kept_activations_gb) {
        (false, _) => "off".to_owned(),
        (true, kept) if kept > 0.0 => format!("per block; up to {} GB of activations are kept", plain(kept)),
        (true, _) => "per block".to_owned(),
    };
    vec![
        ("base", base.to_owned()),
        ("LoRA", format!("r {}, alpha {}", train.lora_r, plain(train.lora_alpha))),
        ("LoRA dropout", plain(f64::from(train.lora_dropout))),
        ("target modules", modules.join(", ")),
        ("gradient checkpointing", checkpointing),
        ("sequence length", train.sequence_length.to_string()),
        (
            "batch size × accumulation",
            format!("{} × {}", train.batch_size, train.gradient_accumulation_steps),
        ),
        ("learning rate", train.learning_rate.to_string()),
    ]
}
