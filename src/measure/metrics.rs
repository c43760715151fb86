//! Figures from samples, by the definitions in the README. Nothing here is stored without its samples.

use crate::record::{Samples, TrainSample};
use crate::stats::median;

/// The training steps that count.
pub fn counted_steps(samples: &Samples) -> impl Iterator<Item = &TrainSample> {
    samples.train.iter().filter(|s| !s.warmup)
}

/// What one step trains on in the mean (tokens, examples), over the time of each step.
///
/// Rows have a fixed number of slots, so that a step takes the same time however much of it is padding.
/// Dividing a step's own tokens by its time would measure the data set and not the engine.
pub fn rates_per_step(steps: &[&TrainSample], of: fn(&TrainSample) -> usize) -> Vec<f64> {
    let mean = steps.iter().map(|s| of(s)).sum::<usize>() as f64 / steps.len() as f64;
    steps.iter().map(|s| mean / s.seconds).collect()
}

/// Non-padding tokens per second of training: the median over the steps that count.
pub fn train_tokens_rate(samples: &Samples) -> Option<f64> {
    median(rates_per_step(&counted_steps(samples).collect::<Vec<_>>(), |s| s.real_tokens))
}

/// Source examples per second of training: the median over the steps that count.
pub fn train_examples_rate(samples: &Samples) -> Option<f64> {
    median(rates_per_step(&counted_steps(samples).collect::<Vec<_>>(), |s| s.examples))
}

/// Prompt tokens per second, llama-bench's `pp`, of each round that counts.
pub fn prefill_rates(samples: &Samples) -> impl Iterator<Item = f64> {
    samples.prefill.iter().filter(|s| !s.warmup).map(|s| s.tokens as f64 / s.seconds)
}

/// Generated tokens per second, llama-bench's `tg`, of each round that counts: N intervals over their
/// time.
pub fn decode_rates(samples: &Samples) -> impl Iterator<Item = f64> {
    let counted = samples.decode.iter().filter(|s| !s.warmup);
    counted.map(|s| s.seconds.len() as f64 / s.seconds.iter().sum::<f64>())
}

/// Largest memory over all phases.
pub fn peak_memory(samples: &Samples) -> Option<u64> {
    samples.phases.iter().map(|p| p.peak_bytes).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_changes_the_tokens_of_a_step_and_not_the_speed_of_an_engine() {
        let step = |warmup, seconds, real_tokens| TrainSample {
            step: 0,
            warmup,
            seconds,
            loss: 1.0,
            grad_norm: 1.0,
            examples: 1,
            trained_tokens: 10,
            real_tokens,
            slot_tokens: 100,
        };
        let train =
            vec![step(true, 50.0, 100), step(false, 1.0, 100), step(false, 2.0, 60), step(false, 4.0, 80)];
        let samples = Samples { train, ..Samples::default() };
        // 80 tokens in the mean, 2 s in the median.
        assert_eq!(train_tokens_rate(&samples), Some(40.0));
        assert_eq!(train_examples_rate(&samples), Some(0.5));
        assert_eq!(train_tokens_rate(&Samples::default()), None);
    }
}
