//! Predicted memory beside the measured, and of the model that no run of a small machine holds.

use crate::decide::criteria::Criteria;
use crate::decide::jobs::{Job, reference_scenario};
use crate::fit::search::longest_sequence;
use crate::fit::{self, Checked, TrainJob, check, predict};
use crate::model::Preset;
use crate::record::CellRecord;
use crate::scenario::Scenario;
use serde::Serialize;

/// The model that has to fit in the end.
pub const LARGE_MODEL: &str = "7b";
const LENGTHS: [u64; 3] = [512, 2048, 4096];

#[derive(Debug, Clone, Serialize)]
pub struct Predictions {
    /// Cells with both figures.
    pub checked: Vec<Checked>,
    /// Of the largest model among the checked cells.
    pub checked_parameters: Option<u64>,
    /// The largest error of the checked cells, as a share.
    pub worst: Option<f64>,
    pub lengths: [u64; 3],
    /// Of each engine of the record that there is a model of.
    pub large: Vec<LargeRow>,
    pub large_parameters: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct LargeRow {
    pub engine: String,
    /// Whether it is the memory of a GPU.
    pub is_device: bool,
    /// Peak bytes in training, in the order of the lengths.
    pub bytes: Vec<u64>,
    /// The longest sequence in the target.
    pub longest: u64,
    pub caveat: Option<&'static str>,
}

/// `None` where nothing can be predicted.
pub fn predictions(cells: &[CellRecord], jobs: &[Job], criteria: &Criteria) -> Option<Predictions> {
    let checked: Vec<Checked> = check(cells).into_iter().filter(|c| c.error.is_some()).collect();
    let worst = checked.iter().filter_map(|c| c.error).map(f64::abs).reduce(f64::max);
    let is_checked = |cell: &&CellRecord| checked.iter().any(|c| c.cell == cell.cell);
    let checked_parameters = cells.iter().filter(is_checked).map(|cell| cell.model.parameters).max();
    let preset = Preset::parse(LARGE_MODEL).ok()?;
    let training = training(jobs)?;
    let mut engines: Vec<&str> = cells.iter().map(|cell| cell.engine.as_str()).collect();
    engines.sort_unstable();
    engines.dedup();
    let row = |engine: &str| {
        let of = |sequence| {
            let job = fit::Job::Train(TrainJob { sequence, ..training.clone() });
            predict(engine, &preset.config, &job).ok()
        };
        let found: Vec<fit::Prediction> = LENGTHS.into_iter().map(of).collect::<Option<_>>()?;
        Some(LargeRow {
            engine: engine.to_owned(),
            is_device: found[0].is_device,
            bytes: found.iter().map(|prediction| prediction.total_bytes).collect(),
            longest: longest_sequence(engine, &preset.config, &training, criteria.memory_target_bytes())
                .ok()?,
            caveat: found[0].caveat,
        })
    };
    let large: Vec<LargeRow> = engines.into_iter().filter_map(row).collect();
    let large_parameters = preset.config.parameters();
    let is_empty = checked.is_empty() && large.is_empty();
    (!is_empty).then_some(Predictions {
        checked,
        checked_parameters,
        worst,
        lengths: LENGTHS,
        large,
        large_parameters,
    })
}

/// As the run trained, but of any length.
fn training(jobs: &[Job]) -> Option<TrainJob> {
    let model = jobs.last()?.model.name.as_str();
    let scenario = reference_scenario(jobs, model, "train")?;
    let job = jobs.iter().find(|job| job.scenario == scenario)?;
    let Scenario::Train(train) = job.parameters else { return None };
    Some(TrainJob {
        quantization: train.quantization,
        sequence: train.sequence_length as u64,
        batch: train.batch_size as u64,
        rank: train.lora_r as u64,
        dropout: train.lora_dropout > 0.0,
        gradient_checkpointing: true,
        kept_activations_bytes: (train.kept_activations_gb * 1e9) as u64,
        trained_tokens: None,
    })
}
