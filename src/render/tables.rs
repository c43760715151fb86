//! The measured figures of one model, as rows.

use super::pools::{PoolRow, pool_rows};
use super::stock::{StockRow, stock_rows};
use super::trace::{CellRef, Lines};
use crate::decide::figures::{Footprint, InferFigures, LoadFigures, TrainFigures};
use crate::decide::jobs::{Job, reference_scenario};
use crate::decide::work::{Shares, load_share};
use crate::measure::memory::PhaseMemory;
use crate::record::{CellRecord, LoadSample, ModelRecord, Outcome};
use crate::stats::median;
use evalfw_engine::protocol::Quantization;
use serde::Serialize;

/// The order in which phases come; others follow as they appear.
const PHASES: &[&str] = &["start", "load", "attach", "tune", "train", "evaluate", "prefill", "decode"];

/// All tables of one model.
#[derive(Debug, Clone, Serialize)]
pub struct ModelTables {
    pub model: ModelRecord,
    pub verdicts: Vec<VerdictRow>,
    pub phases: Vec<PhaseTable>,
    pub pools: Vec<PoolRow>,
    pub load: Vec<LoadRow>,
    pub train: Vec<TrainRow>,
    pub losses: Vec<LossRow>,
    pub agreement: Vec<LossAgreement>,
    pub infer: Vec<InferRow>,
    pub stock: Vec<StockRow>,
}

impl ModelTables {
    /// `jobs` are of `model` alone.
    pub fn of(model: &ModelRecord, jobs: &[&Job], target_bytes: u64, lines: &Lines) -> Self {
        Self {
            model: model.clone(),
            verdicts: verdicts(jobs, target_bytes, lines),
            phases: ["load", "train", "infer"]
                .iter()
                .filter_map(|k| PhaseTable::of(k, jobs, lines))
                .collect(),
            pools: pool_rows(jobs, lines),
            load: load_rows(jobs, lines),
            train: jobs.iter().filter_map(|j| TrainRow::of(j, lines)).collect(),
            losses: jobs.iter().filter_map(|j| LossRow::of(j, lines)).collect(),
            agreement: agreement(jobs),
            infer: jobs.iter().filter_map(|j| InferRow::of(j, lines)).collect(),
            stock: stock_rows(jobs, lines),
        }
    }
}

/// Does the engine train within the memory target? Only the job that engines are compared on can say.
#[derive(Debug, Clone, Serialize)]
pub struct VerdictRow {
    pub engine: String,
    pub quantization: Quantization,
    pub verdict: Fit,
    /// What the verdict rests on where it is not the peak.
    pub reason: Option<String>,
    /// Of the reference job, or else the largest of the other jobs that ended ok.
    pub bytes: Option<u64>,
    /// Training may need more: it is not the peak of the reference job, or what a GPU held
    /// is known at the end only.
    pub at_least: bool,
    pub scenario: Option<String>,
    /// Target minus peak, where it fits.
    pub headroom_bytes: Option<i64>,
    /// Host memory beside the GPU's own.
    pub host_bytes: Option<u64>,
    /// Other scenarios that ran out of memory.
    pub out_of_memory: Vec<String>,
    /// Other scenarios whose peak is above the target.
    pub over_in: Vec<String>,
    pub outcomes: String,
    pub source: Option<CellRef>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    Fits,
    Over,
    /// The reference job ran and shows neither.
    NotShown,
    NotMeasured,
}

fn verdicts(jobs: &[&Job], target_bytes: u64, lines: &Lines) -> Vec<VerdictRow> {
    let mut keys: Vec<(&str, Quantization)> = jobs.iter().map(|j| (j.engine, j.quantization)).collect();
    keys.sort_by_key(|(engine, quantization)| (*engine, place(*quantization)));
    keys.dedup();
    let all: Vec<Job> = jobs.iter().map(|j| (*j).clone()).collect();
    let reference = jobs.first().and_then(|j| reference_scenario(&all, &j.model.name, "train"));
    let row = |(engine, quantization)| {
        let own: Vec<&Job> =
            jobs.iter().copied().filter(|j| j.engine == engine && j.quantization == quantization).collect();
        verdict(&own, reference, target_bytes, lines)
    };
    keys.into_iter().filter_map(row).collect()
}

/// What the target is for comes first, then the framework's own format, and last what is not quantized.
fn place(quantization: Quantization) -> u8 {
    match quantization {
        Quantization::Nf4 => 0,
        Quantization::Native => 1,
        Quantization::None => 2,
    }
}

/// `jobs` are those of one engine and one storage of the base.
fn verdict(jobs: &[&Job], reference: Option<&str>, target_bytes: u64, lines: &Lines) -> Option<VerdictRow> {
    let first = jobs.first()?;
    let is_reference = |j: &&&Job| j.is_qlora && Some(j.scenario) == reference;
    let judged = jobs.iter().find(is_reference).copied();
    let others = || jobs.iter().filter(|j| !is_reference(j));
    let (verdict, reason) = match judged {
        Some(job) => fit(job, target_bytes),
        None => (Fit::NotMeasured, Some(why_not_judged(jobs, reference))),
    };

    let known = |(footprint, _): &(Footprint, &CellRecord)| footprint.bytes().is_some();
    let of_reference = judged.and_then(Footprint::of_job).filter(known);
    let is_bound = of_reference.is_none();
    let of_others = || others().filter_map(|j| Footprint::of_job(j)).max_by_key(|(f, _)| f.bytes());
    let (footprint, cell) = of_reference.or_else(of_others).filter(known).unzip();
    let bytes = footprint.and_then(|f: Footprint| f.bytes());
    let is_floor = matches!(footprint, Some(Footprint::AtLeast { .. }));

    let ran_out = |j: &&&Job| j.cells.iter().any(|c| c.outcome == Outcome::Oom);
    let is_over = |j: &&&Job| {
        Footprint::of_job(j).and_then(|(f, _)| f.bytes()).is_some_and(|bytes| bytes > target_bytes)
    };
    let cells: Vec<&CellRecord> = jobs.iter().flat_map(|j| j.cells.iter().copied()).collect();
    Some(VerdictRow {
        engine: first.engine.to_owned(),
        quantization: first.quantization,
        verdict,
        reason,
        bytes,
        at_least: bytes.is_some() && (is_bound || is_floor),
        scenario: cell.map(|c| c.scenario.clone()),
        headroom_bytes: bytes.filter(|_| verdict == Fit::Fits).map(|b| target_bytes as i64 - b as i64),
        host_bytes: cell.filter(|c| Footprint::is_of_device(c)).and_then(|c| c.peak_memory_bytes),
        out_of_memory: others().filter(ran_out).map(|j| j.scenario.to_owned()).collect(),
        over_in: others().filter(is_over).map(|j| j.scenario.to_owned()).collect(),
        outcomes: crate::decide::jobs::outcomes(&cells),
        source: cell.map(|c| lines.refer(c)),
    })
}

/// What the reference job says about the target.
fn fit(job: &Job, target_bytes: u64) -> (Fit, Option<String>) {
    let ended = |outcome: Outcome| job.cells.iter().any(|c| c.outcome == outcome);
    let all_failed = !ended(Outcome::Ok);
    let scenario = job.scenario;
    let ending = [
        (Outcome::Oom, "ran out of memory"),
        (Outcome::Wrong, "gave a wrong answer"),
        (Outcome::Crashed, "crashed"),
        (Outcome::Timeout, "timed out"),
        (Outcome::Failed, "failed"),
    ]
    .into_iter()
    // A repetition that was lost otherwise says nothing about memory.
    .find(|(o, _)| ended(*o) && (all_failed || matches!(o, Outcome::Oom | Outcome::Wrong)));
    match (ending, Footprint::of_job(job).map(|(footprint, _)| footprint)) {
        (_, Some(Footprint::Peak { bytes } | Footprint::AtLeast { bytes })) if bytes > target_bytes => {
            (Fit::Over, None)
        }
        (Some((Outcome::Oom, _)), _) if all_failed => {
            (Fit::Over, Some(format!("out of memory in {scenario}")))
        }
        (Some((_, how)), _) if all_failed => (Fit::NotShown, Some(format!("{scenario} {how}"))),
        (Some((_, how)), _) => (Fit::NotShown, Some(format!("{scenario} {how} ({})", job.outcomes()))),
        (None, Some(Footprint::Peak { .. })) => (Fit::Fits, None),
        (None, Some(_)) => (Fit::NotShown, Some(format!("the peak in {scenario} is not in the record"))),
        (None, None) => (Fit::NotMeasured, Some("the engine does not run here".to_owned())),
    }
}

/// Why there is no reference job among `jobs`.
fn why_not_judged(jobs: &[&Job], reference: Option<&str>) -> String {
    let is_nf4 = jobs.iter().any(|j| j.is_qlora);
    match reference {
        _ if !is_nf4 => "the target is for an NF4 base".to_owned(),
        Some(scenario) if jobs.iter().any(|j| j.is_kind("train")) => format!("{scenario} was not run"),
        _ => "training was not run".to_owned(),
    }
}

/// Memory by phase of all jobs of one kind, each from the repetition with the highest peak.
#[derive(Debug, Clone, Serialize)]
pub struct PhaseTable {
    pub kind: String,
    pub phases: Vec<String>,
    pub rows: Vec<PhaseRow>,
}

#[derive(Debug, Clone, Serialize)]
pub struct PhaseRow {
    pub engine: String,
    pub job: String,
    /// In the order of the table's phases.
    pub figures: Vec<Option<PhaseMemory>>,
    pub source: CellRef,
}

impl PhaseTable {
    fn of(kind: &str, jobs: &[&Job], lines: &Lines) -> Option<Self> {
        let chosen: Vec<(&Job, &CellRecord)> = jobs
            .iter()
            .filter(|j| j.is_kind(kind))
            .filter_map(|j| Some((*j, highest(j)?)))
            .filter(|(_, cell)| !cell.samples.phases.is_empty())
            .collect();
        let seen = |name: &str| chosen.iter().any(|(_, c)| c.samples.phases.iter().any(|p| p.name == name));
        let mut phases: Vec<String> = PHASES.iter().filter(|n| seen(n)).map(|n| n.to_string()).collect();
        for phase in chosen.iter().flat_map(|(_, c)| &c.samples.phases) {
            if !phases.contains(&phase.name) {
                phases.push(phase.name.clone());
            }
        }
        let row = |(job, cell): &(&Job, &CellRecord)| PhaseRow {
            engine: job.engine.to_owned(),
            job: job.label(),
            figures: phases.iter().map(|name| phase(cell, name)).collect(),
            source: lines.refer(cell),
        };
        let rows: Vec<PhaseRow> = chosen.iter().map(row).collect();
        (!rows.is_empty()).then(|| Self { kind: kind.to_owned(), phases, rows })
    }
}

/// The repetition with the highest peak; of equal ones the first.
fn highest<'a>(job: &Job<'a>) -> Option<&'a CellRecord> {
    job.ok().max_by_key(|c| (c.peak_memory_bytes, std::cmp::Reverse(c.repetition)))
}

/// A phase that came several times: the highest peak, and the parts at the last end.
fn phase(cell: &CellRecord, name: &str) -> Option<PhaseMemory> {
    let mut of_name = cell.samples.phases.iter().filter(|p| p.name == name);
    let mut merged = of_name.next()?.clone();
    for next in of_name {
        merged.peak_bytes = merged.peak_bytes.max(next.peak_bytes);
        merged.seconds += next.seconds;
        merged.anonymous_bytes = next.anonymous_bytes;
        merged.file_bytes = next.file_bytes;
    }
    Some(merged)
}

#[derive(Debug, Clone, Serialize)]
pub struct LoadRow {
    pub engine: String,
    /// Of the rate at which the page cache is read.
    pub of_limit: Option<f64>,
    pub quantization: Quantization,
    /// `warm` or `unknown`.
    pub page_cache: String,
    pub figures: LoadFigures,
    pub cells: Vec<CellRef>,
}

fn load_rows(jobs: &[&Job], lines: &Lines) -> Vec<LoadRow> {
    let loads: Vec<(&CellRecord, &LoadSample)> = jobs
        .iter()
        .flat_map(|j| j.ok())
        .filter_map(|cell| Some((cell, cell.samples.load.as_ref()?)))
        .collect();
    let key = |cell: &CellRecord, load: &LoadSample| {
        (cell.engine.clone(), cell.quantization, load.page_cache.clone())
    };
    let mut keys: Vec<_> = loads.iter().map(|(cell, load)| key(cell, load)).collect();
    keys.sort();
    keys.dedup();
    let row = |wanted: (String, Quantization, String)| {
        let own = || loads.iter().filter(|(cell, load)| key(cell, load) == wanted);
        let samples: Vec<&LoadSample> = own().map(|(_, load)| *load).collect();
        Some(LoadRow {
            figures: LoadFigures::of(&samples)?,
            of_limit: median(own().filter_map(|(cell, _)| load_share(cell))),
            cells: sorted(own().map(|(cell, _)| lines.refer(cell)).collect()),
            engine: wanted.0,
            quantization: wanted.1,
            page_cache: wanted.2,
        })
    };
    keys.into_iter().filter_map(row).collect()
}

#[derive(Debug, Clone, Serialize)]
pub struct TrainRow {
    pub engine: String,
    pub quantization: Quantization,
    /// See [`Job::is_qlora`].
    #[serde(skip)]
    pub is_qlora: bool,
    pub job: String,
    pub outcomes: String,
    pub figures: TrainFigures,
    pub shares: Shares,
    pub cells: Vec<CellRef>,
}

impl TrainRow {
    fn of(job: &Job, lines: &Lines) -> Option<Self> {
        Some(Self {
            engine: job.engine.to_owned(),
            quantization: job.quantization,
            is_qlora: job.is_qlora,
            job: job.label(),
            outcomes: job.outcomes(),
            figures: TrainFigures::of(job)?,
            shares: Shares::of(job),
            cells: ok_cells(job, lines),
        })
    }
}

/// The losses of the first repetition that ended ok; the seed is the same in all.
#[derive(Debug, Clone, Serialize)]
pub struct LossRow {
    pub engine: String,
    pub job: String,
    pub steps: usize,
    /// Mean nats per supervised position.
    pub first: f64,
    pub last: f64,
    /// On the validation set, before the first step and after the last.
    pub evaluation_before: Option<f64>,
    pub evaluation_after: Option<f64>,
    pub source: CellRef,
}

impl LossRow {
    fn of(job: &Job, lines: &Lines) -> Option<Self> {
        let cell = job.ok().find(|c| !c.samples.train.is_empty())?;
        let evaluations = &cell.samples.evaluations;
        Some(Self {
            engine: job.engine.to_owned(),
            job: job.label(),
            steps: cell.samples.train.len(),
            first: cell.samples.train.first()?.loss,
            last: cell.samples.train.last()?.loss,
            evaluation_before: evaluations.iter().find(|e| e.after_steps == 0).map(|e| e.loss),
            evaluation_after: evaluations.iter().rfind(|e| e.after_steps > 0).map(|e| e.loss),
            source: lines.refer(cell),
        })
    }
}

/// How far the engines' losses lie apart. They train on the same tokens from the same adapter with the
/// same dropout masks, so that the distance is numerics.
#[derive(Debug, Clone, Serialize)]
pub struct LossAgreement {
    pub job: String,
    pub engines: Vec<String>,
    pub steps: usize,
    /// Largest distance between two engines at one step, in nats.
    pub largest_difference: f64,
    pub at_step: u64,
}

fn agreement(jobs: &[&Job]) -> Vec<LossAgreement> {
    let mut labels: Vec<String> = jobs.iter().filter(|j| j.is_kind("train")).map(|j| j.label()).collect();
    labels.sort();
    labels.dedup();
    labels.into_iter().filter_map(|label| agreement_on(label, jobs)).collect()
}

fn agreement_on<'a>(label: String, jobs: &[&Job<'a>]) -> Option<LossAgreement> {
    let curve = |job: &Job<'a>| {
        let cell: &'a CellRecord = job.ok().find(|c| !c.samples.train.is_empty())?;
        Some((job.engine.to_owned(), &cell.samples.train))
    };
    let own = jobs.iter().filter(|j| j.is_kind("train") && j.label() == label);
    let (engines, curves): (Vec<String>, Vec<_>) = own.filter_map(|j| curve(j)).unzip();
    let steps = curves.iter().map(|c| c.len()).min()?;
    let distance = |step: usize| {
        let losses = || curves.iter().map(|c| c[step].loss);
        losses().fold(f64::NEG_INFINITY, f64::max) - losses().fold(f64::INFINITY, f64::min)
    };
    let largest = (0..steps).max_by(|a, b| distance(*a).total_cmp(&distance(*b)))?;
    (engines.len() > 1).then(|| LossAgreement {
        job: label,
        engines,
        steps,
        largest_difference: distance(largest),
        at_step: curves[0][largest].step,
    })
}

#[derive(Debug, Clone, Serialize)]
pub struct InferRow {
    pub engine: String,
    pub quantization: Quantization,
    /// See [`Job::is_qlora`].
    #[serde(skip)]
    pub is_qlora: bool,
    pub job: String,
    pub outcomes: String,
    pub figures: InferFigures,
    pub shares: Shares,
    pub cells: Vec<CellRef>,
}

impl InferRow {
    fn of(job: &Job, lines: &Lines) -> Option<Self> {
        Some(Self {
            engine: job.engine.to_owned(),
            quantization: job.quantization,
            is_qlora: job.is_qlora,
            job: job.label(),
            outcomes: job.outcomes(),
            figures: InferFigures::of(job)?,
            shares: Shares::of(job),
            cells: ok_cells(job, lines),
        })
    }
}

fn ok_cells(job: &Job, lines: &Lines) -> Vec<CellRef> {
    sorted(job.ok().map(|c| lines.refer(c)).collect())
}

fn sorted(mut cells: Vec<CellRef>) -> Vec<CellRef> {
    cells.sort_by_key(|c| c.line);
    cells
}
