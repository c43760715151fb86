//! Figures from samples, by the definitions in the README. Nothing here is stored without its samples.

use crate::record::{Samples, TrainSample};
use crate::stats::median;

/// Rates of the steps that count, each the median over steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainRates {
    /// Source examples.
    pub examples: f64,
    /// Positions with a loss.
    pub trained_tokens: f64,
    /// Positions that are not padding.
    pub real_tokens: f64,
    /// All positions.
    pub slot_tokens: f64,
    /// Share of slots that are padding, over all counted steps.
    pub pad_fraction: f64,
    pub seconds_per_step: f64,
}

pub fn train_rates(samples: &Samples) -> Option<TrainRates> {
    let counted: Vec<&TrainSample> = samples.train.iter().filter(|s| !s.warmup).collect();
    let rate = |of: fn(&TrainSample) -> usize| median(counted.iter().map(|s| of(s) as f64 / s.seconds));
    let slots: usize = counted.iter().map(|s| s.slot_tokens).sum();
    let real: usize = counted.iter().map(|s| s.real_tokens).sum();
    Some(TrainRates {
        examples: rate(|s| s.examples)?,
        trained_tokens: rate(|s| s.trained_tokens)?,
        real_tokens: rate(|s| s.real_tokens)?,
        slot_tokens: rate(|s| s.slot_tokens)?,
        pad_fraction: 1.0 - real as f64 / slots as f64,
        seconds_per_step: median(counted.iter().map(|s| s.seconds))?,
    })
}

/// Prompt tokens per second: llama-bench's `pp`, the median over rounds.
pub fn prefill_rate(samples: &Samples) -> Option<f64> {
    median(samples.prefill.iter().filter(|s| !s.warmup).map(|s| s.tokens as f64 / s.seconds))
}

/// Generated tokens per second: llama-bench's `tg`, N intervals over their time, the median over rounds.
pub fn decode_rate(samples: &Samples) -> Option<f64> {
    let rate = |seconds: &[f64]| seconds.len() as f64 / seconds.iter().sum::<f64>();
    median(samples.decode.iter().filter(|s| !s.warmup).map(|s| rate(&s.seconds)))
}

/// Largest memory over all phases.
pub fn peak_memory(samples: &Samples) -> Option<u64> {
    samples.phases.iter().map(|p| p.peak_bytes).max()
}
