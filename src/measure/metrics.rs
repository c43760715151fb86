//! Figures from samples, by the definitions in the README. Nothing here is stored without its samples.

use crate::record::{Samples, TrainSample};
use crate::stats::median;

/// The training steps that count.
pub fn counted_steps(samples: &Samples) -> impl Iterator<Item = &TrainSample> {
    samples.train.iter().filter(|s| !s.warmup)
}

/// (prompt tokens, seconds) of each prefill that counts.
pub fn counted_prefills(samples: &Samples) -> impl Iterator<Item = (f64, f64)> {
    samples.prefill.iter().filter(|s| !s.warmup).map(|s| (s.tokens as f64, s.seconds))
}

/// (intervals, seconds of all of them) of each decode round that counts.
pub fn counted_decodes(samples: &Samples) -> impl Iterator<Item = (f64, f64)> {
    let counted = samples.decode.iter().filter(|s| !s.warmup);
    counted.map(|s| (s.seconds.len() as f64, s.seconds.iter().sum()))
}

/// The mean amount over the median time.
///
/// Training rows have a fixed number of slots, so that a step takes the same time however much of it is
/// padding: dividing each step's own tokens by its time would measure the data set and not the engine.
/// One definition for all rates keeps every rate equal to the amount over the time in its row.
pub fn rate(samples: impl IntoIterator<Item = (f64, f64)>) -> Option<f64> {
    let (mean, seconds) = mean_amount(samples);
    median(seconds).map(|seconds| mean / seconds).filter(|rate| rate.is_finite())
}

/// What each sample took for one of the mean amount: its median is the inverse of [`rate`].
pub fn seconds_per_amount(samples: impl IntoIterator<Item = (f64, f64)>) -> Vec<f64> {
    let (mean, seconds) = mean_amount(samples);
    seconds.into_iter().map(|seconds| seconds / mean).collect()
}

/// And the seconds of each sample.
fn mean_amount(samples: impl IntoIterator<Item = (f64, f64)>) -> (f64, Vec<f64>) {
    let (amounts, seconds): (Vec<f64>, Vec<f64>) = samples.into_iter().unzip();
    (amounts.iter().sum::<f64>() / amounts.len() as f64, seconds)
}

/// Fewer times than this tell no plateau from a slope.
const PLATEAU_LEAST: usize = 3;
/// Of the median of the times' first half, how far that of the second half may lie from it.
const PLATEAU_WIDTH: f64 = 0.1;

/// Whether the last `counted` of the times have settled: the medians of their two halves lie together. `None` if they
/// are too few to tell.
pub fn plateau(seconds: impl IntoIterator<Item = f64>, counted: usize) -> Option<bool> {
    let seconds: Vec<f64> = seconds.into_iter().collect();
    let last = &seconds[seconds.len().saturating_sub(counted)..];
    if last.len() < PLATEAU_LEAST {
        return None;
    }
    let (first, second) = last.split_at(last.len() / 2);
    let (first, second) = (median(first.iter().copied())?, median(second.iter().copied())?);
    Some((second - first).abs() <= PLATEAU_WIDTH * first)
}

/// Non-padding tokens per second of training.
pub fn train_tokens_rate(samples: &Samples) -> Option<f64> {
    rate(counted_steps(samples).map(|s| (s.real_tokens as f64, s.seconds)))
}

/// Source examples per second of training.
pub fn train_examples_rate(samples: &Samples) -> Option<f64> {
    rate(counted_steps(samples).map(|s| (s.examples as f64, s.seconds)))
}

/// What it took to bring the evaluation loss down to a target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimeToTarget {
    pub steps: u64,
    /// All training steps and all evaluations between them, up to the evaluation that met the target, by
    /// the worker's clock. As in MLPerf Training, compiling and evaluating count; loading the model and
    /// the evaluation before the first step do not.
    pub seconds: f64,
}

/// `None` if no evaluation met the target. One that was met before the first step took no steps and no time.
pub fn time_to_target(samples: &Samples, target_loss: f64) -> Option<TimeToTarget> {
    evaluation_curve(samples).find(|(_, loss)| *loss <= target_loss).map(|(time, _)| time)
}

/// The time at which each evaluation ended, and its loss.
pub fn evaluation_curve(samples: &Samples) -> impl Iterator<Item = (TimeToTarget, f64)> {
    samples.evaluations.iter().map(|evaluation| {
        let steps = evaluation.after_steps;
        let training: f64 = samples.train.iter().filter(|s| s.step < steps).map(|s| s.seconds).sum();
        let after_training = samples.evaluations.iter().filter(|e| (1..=steps).contains(&e.after_steps));
        let evaluating: f64 = after_training.map(|e| e.seconds).sum();
        (TimeToTarget { steps, seconds: training + evaluating }, evaluation.loss)
    })
}

/// The phase in which an engine measures its kernels.
pub const TUNE_PHASE: &str = "tune";
pub const LOAD_PHASE: &str = "load";
/// All training steps, warm-up included.
pub const TRAIN_PHASE: &str = "train";

/// Largest memory over all phases but that of tuning, which is no part of the job.
pub fn peak_memory(samples: &Samples) -> Option<u64> {
    samples.phases.iter().filter(|p| p.name != TUNE_PHASE).map(|p| p.peak_bytes).max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::EvaluationSample;

    fn step(warmup: bool, seconds: f64, real_tokens: usize) -> TrainSample {
        TrainSample {
            step: 0,
            warmup,
            seconds,
            loss: 1.0,
            grad_norm: 1.0,
            examples: 1,
            trained_tokens: 10,
            real_tokens,
            slot_tokens: 100,
        }
    }

    #[test]
    fn the_time_to_a_target_ends_with_the_evaluation_that_meets_it() {
        let evaluation = |after_steps, loss| EvaluationSample { after_steps, loss, tokens: 1, seconds: 0.5 };
        let samples = Samples {
            train: (0..6).map(|i| TrainSample { step: i, ..step(false, 10.0, 1) }).collect(),
            evaluations: vec![evaluation(0, 5.0), evaluation(2, 4.0), evaluation(4, 2.0), evaluation(6, 1.0)],
            ..Samples::default()
        };
        assert_eq!(time_to_target(&samples, 2.0), Some(TimeToTarget { steps: 4, seconds: 41.0 }));
        assert_eq!(time_to_target(&samples, 0.5), None);
        // Met before the first step.
        assert_eq!(time_to_target(&samples, 5.0), Some(TimeToTarget { steps: 0, seconds: 0.0 }));
    }

    #[test]
    fn a_plateau_is_told_from_a_slope_and_from_too_little() {
        assert_eq!(plateau([1.0, 1.05, 0.97, 1.02], 4), Some(true));
        assert_eq!(plateau([2.0, 1.6, 1.2, 1.0], 4), Some(false));
        // The slope lies before what counts.
        assert_eq!(plateau([5.0, 2.0, 1.0, 1.02, 0.99, 1.01], 4), Some(true));
        assert_eq!(plateau([1.0, 1.0], 2), None);
        // One outlier is no slope.
        assert_eq!(plateau([1.0, 1.0, 9.0, 1.0, 1.0, 1.0], 6), Some(true));
    }

    #[test]
    fn a_rate_is_the_mean_amount_over_the_median_time() {
        // 80 tokens in the mean; an even number of steps, so that the median lies between two of them.
        let train = vec![
            step(true, 50.0, 100),
            step(false, 1.0, 100),
            step(false, 2.0, 60),
            step(false, 3.0, 80),
            step(false, 9.0, 80),
        ];
        let samples = Samples { train, ..Samples::default() };
        assert_eq!(train_tokens_rate(&samples), Some(80.0 / 2.5));
        assert_eq!(train_examples_rate(&samples), Some(1.0 / 2.5));
        assert_eq!(train_tokens_rate(&Samples::default()), None);
    }
}
