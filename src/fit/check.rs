//! Predictions held against what was measured.

use super::{InferJob, Job, NoPrediction, TrainJob, engines, predict_by, without_model};
use crate::model::Preset;
use crate::record::{CellRecord, Outcome};
use crate::scenario::{Scenario, TrainScenario};
use evalfw_engine::config::ModelConfig;
use serde::Serialize;

/// One cell of a record.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Checked {
    pub cell: String,
    pub engine: String,
    pub started_at: String,
    /// Whether the figures are of the GPU's memory.
    pub is_device: bool,
    /// Bytes.
    pub predicted: Option<u64>,
    /// Bytes.
    pub measured: Option<u64>,
    /// `predicted / measured − 1`, where there are both.
    pub error: Option<f64>,
    /// Why one of them is missing, or what sets the cell apart.
    pub note: Option<String>,
}

/// Every cell that ran, against the engine as it was when the cell was measured.
pub fn check(cells: &[CellRecord]) -> Vec<Checked> {
    cells.iter().map(of_cell).collect()
}

fn of_cell(cell: &CellRecord) -> Checked {
    let mut checked = Checked {
        cell: cell.cell.clone(),
        engine: cell.engine.clone(),
        started_at: cell.started_at.clone(),
        is_device: false,
        predicted: None,
        measured: None,
        error: None,
        note: None,
    };
    if cell.outcome != Outcome::Ok {
        checked.note = Some(format!("not measured: {}", cell.outcome.as_str()));
        return checked;
    }
    let (prediction, is_known) = match predicted(cell) {
        Ok(predicted) => predicted,
        Err(none) => {
            checked.note = Some(none.to_string());
            return checked;
        }
    };
    checked.is_device = prediction.is_device;
    checked.predicted = Some(prediction.total_bytes);
    checked.measured = match prediction.is_device {
        true => cell.samples.device_memory.as_ref().and_then(|memory| memory.peak_bytes),
        false => cell.peak_memory_bytes,
    }
    .filter(|&bytes| bytes > 0);
    let measured = checked.measured.map(|bytes| bytes as f64);
    checked.error = measured.map(|measured| prediction.total_bytes as f64 / measured - 1.0);
    checked.note = match (checked.measured, is_known, prediction.caveat) {
        (None, ..) => Some("not measured: the record has no such figure".to_owned()),
        (_, false, _) => Some("older than what the engine does with memory now".to_owned()),
        (.., caveat) => caveat.map(str::to_owned),
    };
    checked
}

/// And whether the engine's ways of that time are known.
fn predicted(cell: &CellRecord) -> Result<(super::Prediction, bool), NoPrediction> {
    let none = |why: &str| NoPrediction(format!("{}: {why}", cell.engine));
    let (model, is_known) =
        engines::at(&cell.engine, &cell.started_at).ok_or_else(|| without_model(&cell.engine))?;
    if cell.device.as_ref().is_some_and(|device| device.software) {
        return Err(none("a software adapter's memory is that of a driver on the CPU"));
    }
    let job = job_of(cell).ok_or_else(|| none("a model so small is less than the process around it"))?;
    let config = config_of(cell).ok_or_else(|| none("the record does not have the model's shape"))?;
    Ok((predict_by(model, &config, &job)?, is_known))
}

/// Older records name the model only.
fn config_of(cell: &CellRecord) -> Option<ModelConfig> {
    cell.model.config.clone().or_else(|| Some(Preset::parse(&cell.model.name).ok()?.config))
}

fn job_of(cell: &CellRecord) -> Option<Job> {
    match &cell.parameters {
        Scenario::Load(load) => Some(Job::Load { quantization: load.quantization }),
        Scenario::Train(train) => Some(Job::Train(train_job(train, trained_tokens(cell, train)))),
        Scenario::Infer(infer) => Some(Job::Infer(InferJob {
            quantization: infer.quantization,
            prompt_tokens: infer.prompt_tokens as u64,
            generated_tokens: infer.generate_tokens as u64,
            prompts: (infer.warmup + infer.repeats) as u64,
        })),
        Scenario::Quality(_) => None,
    }
}

fn train_job(train: &TrainScenario, trained_tokens: Option<u64>) -> TrainJob {
    TrainJob {
        quantization: train.quantization,
        sequence: train.sequence_length as u64,
        batch: train.batch_size as u64,
        rank: train.lora_r as u64,
        dropout: train.lora_dropout > 0.0,
        gradient_checkpointing: train.gradient_checkpointing,
        kept_activations_bytes: (train.kept_activations_gb * 1e9) as u64,
        trained_tokens,
    }
}

/// Of the micro-batches of the step with the most.
fn trained_tokens(cell: &CellRecord, train: &TrainScenario) -> Option<u64> {
    let of_step = cell.samples.train.iter().map(|step| step.trained_tokens).max()?;
    Some(of_step.div_ceil(train.gradient_accumulation_steps.max(1)) as u64)
}
