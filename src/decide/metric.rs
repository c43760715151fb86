//! Measured quantities that a criterion can be built from.

use super::figures::Footprint;
use super::jobs::{Job, reference_scenario};
use super::work::{self, Best};
use crate::adoption::Adoption;
use crate::record::CellRecord;
use crate::stats::median;
use anyhow::{Context, Result};
use serde::Serialize;

/// By its name in the criteria file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Largest memory of a QLoRA training job from start to end, in GB (10^9 bytes).
    PeakTrainingMemoryGb,
    /// As above, of an inference job.
    PeakInferenceMemoryGb,
    /// Of the machine's rate of matrix products, in percent, in training.
    TrainingSharePercent,
    /// The same, of the prompt.
    PromptSharePercent,
    /// Of the rate at which memory is read, in percent, when a token is generated.
    GeneratingSharePercent,
    /// From a fresh machine to a first result.
    Commands,
    /// Third-party packages.
    Packages,
    DownloadedMegabytes,
    /// Processor time of a clean build or install.
    BuildCpuSeconds,
    /// Lines of code that the engine needed on top of the framework.
    GlueLines,
    /// Public items with a text, in percent.
    DocumentedPercent,
}

/// Where a metric comes from.
enum Origin {
    /// Of the reference job of this kind, a figure of each process.
    Job {
        kind: &'static str,
        of_cell: fn(&CellRecord, &Best) -> Option<f64>,
        combine: fn(&[f64]) -> Option<f64>,
    },
    Adoption(fn(&Adoption) -> Option<f64>),
}

fn of_job(
    kind: &'static str,
    of_cell: fn(&CellRecord, &Best) -> Option<f64>,
    combine: fn(&[f64]) -> Option<f64>,
) -> Origin {
    Origin::Job { kind, of_cell, combine }
}

/// A metric's value with everything it is made of.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    pub value: f64,
    /// The scenario, or what else it was measured by.
    pub of: String,
    pub cells: Vec<String>,
    /// One figure of each process; one alone where it is no sample.
    pub processes: Vec<f64>,
}

impl Metric {
    const ALL: &[(&str, Metric, &str)] = &[
        ("peak_training_memory_gb", Metric::PeakTrainingMemoryGb, "peak memory of a training run, GB"),
        ("peak_inference_memory_gb", Metric::PeakInferenceMemoryGb, "peak memory of an inference run, GB"),
        (
            "training_share_percent",
            Metric::TrainingSharePercent,
            "training, % of the machine's best matrix rate",
        ),
        ("prompt_share_percent", Metric::PromptSharePercent, "prompt, % of the machine's best matrix rate"),
        (
            "generating_share_percent",
            Metric::GeneratingSharePercent,
            "generating, % of the machine's best read rate",
        ),
        ("commands", Metric::Commands, "commands to a first result"),
        ("packages", Metric::Packages, "third-party packages"),
        ("downloaded_megabytes", Metric::DownloadedMegabytes, "download, MB"),
        ("build_cpu_seconds", Metric::BuildCpuSeconds, "clean build, s of processor time"),
        ("glue_lines", Metric::GlueLines, "lines of glue"),
        ("documented_percent", Metric::DocumentedPercent, "documented public items, %"),
    ];

    pub fn named(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(known, _, _)| *known == name);
        let known = || Self::ALL.iter().map(|(name, _, _)| *name).collect::<Vec<_>>().join(", ");
        Ok(found.with_context(|| format!("metric: unknown metric {name}; there are {}", known()))?.1)
    }

    /// With its unit.
    pub fn title(self) -> &'static str {
        Self::ALL.iter().find(|(_, metric, _)| *metric == self).map_or("", |(_, _, title)| title)
    }

    /// Whether it is a speed, as a share of what the machine can do.
    pub fn is_speed(self) -> bool {
        matches!(self, Self::TrainingSharePercent | Self::PromptSharePercent | Self::GeneratingSharePercent)
    }

    fn origin(self) -> Origin {
        match self {
            Self::PeakTrainingMemoryGb => of_job("train", peak_gb, largest),
            Self::PeakInferenceMemoryGb => of_job("infer", peak_gb, largest),
            // An engine on the CPU leaves the GPU of the machine idle: all are held against the machine's best.
            Self::TrainingSharePercent => of_job("train", train_percent, middle),
            Self::PromptSharePercent => of_job("infer", prompt_percent, middle),
            Self::GeneratingSharePercent => of_job("infer", generating_percent, middle),
            Self::Commands => Origin::Adoption(|facts| Some(facts.commands.len() as f64)),
            Self::Packages => Origin::Adoption(|facts| Some(facts.packages as f64)),
            Self::DownloadedMegabytes => Origin::Adoption(|facts| Some(facts.downloaded_bytes as f64 / 1e6)),
            Self::BuildCpuSeconds => Origin::Adoption(|facts| Some(facts.build_cpu_seconds)),
            Self::GlueLines => Origin::Adoption(|facts| Some(facts.glue_lines as f64)),
            Self::DocumentedPercent => Origin::Adoption(|facts| facts.documented_share().map(|s| 100.0 * s)),
        }
    }

    /// The value that some processes' figures stand for; `None` without figures.
    pub fn combined(self, processes: &[f64]) -> Option<f64> {
        match self.origin() {
            Origin::Job { combine, .. } => combine(processes),
            Origin::Adoption(_) => processes.first().copied(),
        }
    }

    /// Of an engine on a model, or why it is not known.
    pub fn measure(self, jobs: &[Job], model: &str, engine: &str) -> Result<Measured, String> {
        match self.origin() {
            Origin::Job { kind, of_cell, .. } => {
                let job = reference_job(jobs, model, engine, kind)?;
                let best = Best::of(jobs.iter().flat_map(|job| job.ok()));
                self.of_job(&job, |cell| of_cell(cell, &best))
            }
            Origin::Adoption(of) => of_adoption(jobs, engine, of),
        }
    }

    fn of_job(self, job: &Job, of_cell: impl Fn(&CellRecord) -> Option<f64>) -> Result<Measured, String> {
        let found: Vec<(f64, &CellRecord)> = job.ok().filter_map(|c| Some((of_cell(c)?, c))).collect();
        let processes: Vec<f64> = found.iter().map(|(value, _)| *value).collect();
        let Some(value) = self.combined(&processes) else { return Err(self.why_missing(job)) };
        // A peak is of one cell, a median of all.
        let shows = |figure: f64| !self.is_peak() || figure == value;
        let mut cells: Vec<String> =
            found.iter().filter(|(figure, _)| shows(*figure)).map(|(_, c)| c.cell.clone()).collect();
        if self.is_peak() {
            cells.truncate(1);
        }
        Ok(Measured { value, of: job.scenario.to_owned(), cells, processes })
    }

    fn is_peak(self) -> bool {
        matches!(self, Self::PeakTrainingMemoryGb | Self::PeakInferenceMemoryGb)
    }

    fn why_missing(self, job: &Job) -> String {
        match (job.ok().next(), self.is_peak()) {
            (None, _) => format!("no {} of it ended ok ({})", job.scenario, job.outcomes()),
            (Some(_), true) => "of a GPU's memory the record tells only what it is at least".to_owned(),
            (Some(cell), false) if cell.limits.is_none() => {
                "the run did not measure what the machine can do at best".to_owned()
            }
            (Some(_), false) => {
                "the limit of this device, or the model's shape, is not in the record".to_owned()
            }
        }
    }
}

/// The job of `engine` that its kind is compared on.
fn reference_job<'a>(jobs: &[Job<'a>], model: &str, engine: &str, kind: &str) -> Result<Job<'a>, String> {
    let scenario = reference_scenario(jobs, model, kind)
        .ok_or_else(|| format!("the run holds no {kind} scenario with an NF4 base"))?;
    let is_reference =
        |j: &&Job| j.engine == engine && j.model.name == model && j.scenario == scenario && j.is_qlora;
    let job = jobs.iter().find(is_reference);
    job.cloned().ok_or_else(|| format!("the run holds no {scenario} of this engine"))
}

fn of_adoption(jobs: &[Job], engine: &str, of: fn(&Adoption) -> Option<f64>) -> Result<Measured, String> {
    let mut cells = jobs.iter().filter(|j| j.engine == engine).flat_map(|j| j.ok());
    let found = cells.find_map(|cell| Some((cell.adoption.as_ref()?, cell)));
    let Some((facts, cell)) = found else {
        return Err(
            "what it takes to adopt this build was not measured (benches/adoption/measure)".to_owned()
        );
    };
    let Some(value) = of(facts) else { return Err("its adoption record does not tell".to_owned()) };
    let of = format!("{}, {}", facts.measured_by, facts.measured_at);
    Ok(Measured { value, of, cells: vec![cell.cell.clone()], processes: vec![value] })
}

fn train_percent(cell: &CellRecord, best: &Best) -> Option<f64> {
    Some(100.0 * work::train_share(cell)? * work::matrix_limit_of(cell)? / best.flops)
}

fn prompt_percent(cell: &CellRecord, best: &Best) -> Option<f64> {
    Some(100.0 * work::prefill_share(cell)? * work::matrix_limit_of(cell)? / best.flops)
}

fn generating_percent(cell: &CellRecord, best: &Best) -> Option<f64> {
    Some(100.0 * work::decode_share(cell)? * work::read_limit_of(cell)? / best.bytes_per_second)
}

fn peak_gb(cell: &CellRecord, _: &Best) -> Option<f64> {
    match Footprint::of_cell(cell) {
        Footprint::Peak { bytes } => Some(bytes as f64 / 1e9),
        Footprint::AtLeast { .. } | Footprint::Unknown => None,
    }
}

fn largest(values: &[f64]) -> Option<f64> {
    values.iter().copied().reduce(f64::max)
}

fn middle(values: &[f64]) -> Option<f64> {
    median(values.iter().copied())
}
