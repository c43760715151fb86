//! Predicts the peak memory of QLoRA by component, from a model's shape and what the engines do with it.
//!
//! [`components`] has what follows from shapes alone, [`host`] and [`device`] in which moments of a step they are there
//! together, [`engines`] the few constants that were measured, [`check`] holds predictions against records and
//! [`search`] finds the longest sequence that fits.

pub mod check;
pub mod components;
mod device;
pub mod engines;
mod host;
pub mod records;
pub mod search;

pub use check::{Checked, check};

use components::{product, sum};
use engines::{EngineModel, Family};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::protocol::Quantization;
use serde::Serialize;

/// What memory is predicted for.
#[derive(Debug, Clone, PartialEq)]
pub enum Job {
    Load { quantization: Quantization },
    Train(TrainJob),
    Infer(InferJob),
}

#[derive(Debug, Clone, PartialEq)]
pub struct TrainJob {
    pub quantization: Quantization,
    /// Slots of a row.
    pub sequence: u64,
    /// Rows of a micro-batch.
    pub batch: u64,
    pub rank: u64,
    pub dropout: bool,
    pub gradient_checkpointing: bool,
    /// What checkpointing may keep beside the input of each block.
    pub kept_activations_bytes: u64,
    /// Positions of a micro-batch with a loss; `None`: up to all.
    pub trained_tokens: Option<u64>,
}

impl TrainJob {
    /// Positions of a micro-batch.
    pub fn rows(&self) -> u64 {
        product(&[self.batch, self.sequence])
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct InferJob {
    pub quantization: Quantization,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    /// How many are answered, one after the other.
    pub prompts: u64,
}

/// The peak and what is in it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// What is there at the peak, in the order in which it comes; their sum is the total.
    pub components: Vec<Component>,
    pub total_bytes: u64,
    /// Whether it is memory of the GPU; else of the process tree.
    pub is_device: bool,
    /// When it is reached.
    pub at: &'static str,
    /// The records that the measured constants are from.
    pub calibrated: &'static str,
    /// What to know before relying on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caveat: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Component {
    pub name: &'static str,
    pub bytes: u64,
}

/// Why there is no figure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no prediction: {0}")]
pub struct NoPrediction(pub String);

/// The peak memory of a job on an engine as it is now.
pub fn predict(engine: &str, config: &ModelConfig, job: &Job) -> Result<Prediction, NoPrediction> {
    match engines::now(engine) {
        Some(model) => predict_by(model, config, job),
        None => Err(without_model(engine)),
    }
}

fn without_model(engine: &str) -> NoPrediction {
    let why = match engine.ends_with("-stock") {
        true => "a stock form holds what the framework's own graph keeps, which no model here follows",
        false => "there is no model of its memory",
    };
    NoPrediction(format!("{engine}: {why} (there is one of {})", engines::names()))
}

fn predict_by(model: &EngineModel, config: &ModelConfig, job: &Job) -> Result<Prediction, NoPrediction> {
    let none = |why: &str| Err(NoPrediction(format!("{}: {why}", model.engine)));
    let is_device = matches!(model.family, Family::CandleDevice | Family::BurnDevice);
    if job.quantization() == Quantization::Native {
        return none("formats of a framework's own are not modelled");
    }
    let phases = match (job, is_device) {
        (Job::Load { quantization }, false) => {
            vec![Phase::new("loading", &base(model, config, *quantization), &[])]
        }
        (Job::Load { .. }, true) => return none("what uploading takes for a moment is not modelled"),
        (Job::Train(job), true) if !job.gradient_checkpointing => {
            return none("on a GPU, training without checkpointing was never measured");
        }
        (Job::Train(job), true) => device::train(model, config, job),
        (Job::Train(job), false) => host::train(model, config, job),
        (Job::Infer(job), true) => device::infer(model, config, job),
        (Job::Infer(job), false) => host::infer(model, config, job),
    };
    let Some(peak) = phases.into_iter().max_by_key(Phase::bytes) else { return none("the job has no phase") };
    let total_bytes = peak.bytes();
    let components = peak.components.into_iter().filter(|component| component.bytes > 0).collect();
    let (calibrated, caveat) = (model.calibrated, model.caveat);
    Ok(Prediction { components, total_bytes, is_device, at: peak.at, calibrated, caveat })
}

impl Job {
    pub fn quantization(&self) -> Quantization {
        match self {
            Self::Load { quantization } => *quantization,
            Self::Train(job) => job.quantization,
            Self::Infer(job) => job.quantization,
        }
    }
}

/// A moment that may be the peak.
struct Phase {
    at: &'static str,
    components: Vec<Component>,
}

impl Phase {
    fn new(at: &'static str, always: &[Component], then: &[Component]) -> Self {
        Self { at, components: [always, then].concat() }
    }

    fn bytes(&self) -> u64 {
        sum(self.components.iter().map(|component| component.bytes))
    }
}

fn part(name: &'static str, bytes: u64) -> Component {
    Component { name, bytes }
}

/// What is there from loading on.
fn base(model: &EngineModel, config: &ModelConfig, quantization: Quantization) -> Vec<Component> {
    let mut parts = vec![part("process and libraries", model.constants.process)];
    match quantization {
        Quantization::Nf4 => {
            parts.push(part("4-bit weights", components::nf4_codes(config)));
            parts.push(part("their scales", components::nf4_scales(config)));
        }
        Quantization::None | Quantization::Native => {
            parts.push(part("weights", components::dense_projections(config)));
        }
    }
    parts.push(match model.family {
        // The embedding stays in the host's memory.
        Family::BurnDevice => part("head", components::embedding(config)),
        _ => part("embedding and head", components::embedding_and_head(config)),
    });
    parts.push(part("norms and biases", components::norms_and_biases(config)));
    parts
}

/// Rows of the logits that exist together.
fn logit_rows(config: &ModelConfig, job: &TrainJob, at_most_bytes: u64) -> u64 {
    match job.trained_tokens {
        Some(rows) => components::logit_rows(config, rows, at_most_bytes),
        None => components::most_logit_rows(config, job.rows(), at_most_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;
    use proptest::prelude::*;

    fn job() -> TrainJob {
        TrainJob {
            quantization: Quantization::Nf4,
            sequence: 512,
            batch: 1,
            rank: 16,
            dropout: true,
            gradient_checkpointing: true,
            kept_activations_bytes: 400_000_000,
            trained_tokens: None,
        }
    }

    fn total(engine: &str, config: &ModelConfig, job: TrainJob) -> u64 {
        let prediction = predict(engine, config, &Job::Train(job)).unwrap();
        let parts: u64 = prediction.components.iter().map(|component| component.bytes).sum();
        assert_eq!(parts, prediction.total_bytes);
        parts
    }

    fn bytes_of(engine: &str, config: &ModelConfig, job: TrainJob, name: &str) -> u64 {
        let prediction = predict(engine, config, &Job::Train(job)).unwrap();
        prediction.components.iter().find(|component| component.name == name).map_or(0, |c| c.bytes)
    }

    /// 7b on candle with 2048 positions, by hand: a block keeps 2048 · 2 · (3584 · 3 + 2 · 512 + 2 · 18 944) bytes, 203 MB,
    /// so that 0.4 GB hold one; Burn keeps no attention, 189 MB, two; in f32 candle's take more than there is.
    #[test]
    fn whole_blocks_are_kept_as_far_as_the_memory_for_them_goes() {
        let config = Preset::parse("7b").unwrap().config;
        let long = || TrainJob { sequence: 2048, ..job() };
        let kept = |engine| bytes_of(engine, &config, long(), "kept activations");
        assert_eq!(kept("candle-cpu-bf16"), 2048 * 2 * 49_664);
        assert_eq!(kept("burn-flex-bf16"), 2 * 2048 * 2 * 46_080);
        assert_eq!(kept("candle-cpu"), 0);
        assert_eq!(kept("burn-wgpu"), 0);
        assert_eq!(bytes_of("candle-cpu", &config, long(), "block inputs"), 28 * 2048 * 3584 * 4);
    }

    #[test]
    fn without_checkpointing_all_graphs_are_there() {
        let config = Preset::parse("0.5b").unwrap().config;
        let whole = TrainJob { gradient_checkpointing: false, ..job() };
        let graph = 24 * 512 * 4 * (3 * 4864 + 6 * 896 + 3 * 896 + 3 * 128);
        assert_eq!(bytes_of("candle-cpu", &config, whole.clone(), "graph of all blocks"), graph);
        assert!(total("candle-cpu", &config, whole.clone()) > total("candle-cpu", &config, job()));
        let refused = predict("candle-cuda", &config, &Job::Train(whole)).unwrap_err();
        assert!(refused.to_string().contains("no prediction: candle-cuda"), "{refused}");
    }

    #[test]
    fn what_has_no_model_says_so() {
        let config = Preset::parse("0.5b").unwrap().config;
        for (engine, why) in [("candle-cpu-stock", "stock form"), ("mlx-lm", "no model of its memory")] {
            let refused = predict(engine, &config, &Job::Train(job())).unwrap_err().to_string();
            assert!(refused.starts_with("no prediction: ") && refused.contains(why), "{refused}");
        }
        let native = Job::Infer(InferJob {
            quantization: Quantization::Native,
            prompt_tokens: 1,
            generated_tokens: 1,
            prompts: 1,
        });
        assert!(predict("candle-cpu", &config, &native).is_err());
    }

    #[test]
    fn the_peak_is_the_larger_of_loss_and_backward() {
        let config = Preset::parse("0.5b").unwrap().config;
        let at = |sequence| {
            let job = TrainJob { sequence, kept_activations_bytes: 0, ..job() };
            predict("candle-cpu", &config, &Job::Train(job)).unwrap().at
        };
        assert_eq!(at(256), "the loss");
        assert_eq!(at(8192), "the backward pass of a block");
    }

    proptest! {
        /// But for what is kept, which falls by a block where one more no longer fits.
        #[test]
        fn more_of_anything_takes_no_less(
            sequence in 1u64..20_000, batch in 1u64..16, rank in 1u64..256, engine in 0..engines::MODELS.len(),
            model in 0usize..9, dropout: bool, kept in 0u64..1_000_000_000,
        ) {
            let config = Preset::all().nth(model).unwrap().config;
            let engine = engines::MODELS[engine].engine;
            let job = TrainJob { sequence, batch, rank, dropout, kept_activations_bytes: 0, ..job() };
            let least = total(engine, &config, job.clone());
            let longer = total(engine, &config, TrainJob { sequence: sequence + 1, ..job.clone() });
            let larger = total(engine, &config, TrainJob { batch: batch + 1, ..job.clone() });
            let of_higher_rank = total(engine, &config, TrainJob { rank: rank + 1, ..job.clone() });
            prop_assert!(longer > least && larger > least && of_higher_rank > least);
            let keeping = total(engine, &config, TrainJob { kept_activations_bytes: kept, ..job });
            prop_assert!((least..=least + kept).contains(&keeping));
        }

        #[test]
        fn a_longer_prompt_takes_no_less(prompt in 1u64..30_000, more in 1u64..1000, model in 0usize..9) {
            let config = Preset::all().nth(model).unwrap().config;
            for model in &engines::MODELS {
                let total = |prompt_tokens| {
                    let (quantization, generated_tokens) = (Quantization::Nf4, 16);
                    let job = Job::Infer(InferJob { quantization, prompt_tokens, generated_tokens, prompts: 2 });
                    predict(model.engine, &config, &job).unwrap().total_bytes
                };
                prop_assert!(total(prompt + more) >= total(prompt));
            }
        }
    }
}
