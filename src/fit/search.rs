//! The longest sequence, or the largest batch, that fits.

use super::{Job, NoPrediction, TrainJob, predict};
use evalfw_engine::config::ModelConfig;

/// The largest size up to `limit` for which it and all below it fit; 0 where 1 does not.
///
/// What a job keeps falls by a block where one more no longer fits, so that memory does not grow with every step. The
/// search goes by halves over `surely`, which must never come back once it has failed and never hold where `fits` does
/// not, and from there step by step.
fn largest(limit: u64, surely: impl Fn(u64) -> bool, fits: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (0, limit);
    while low < high {
        let middle = high - (high - low) / 2;
        if surely(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    while low < limit && fits(low + 1) {
        low += 1;
    }
    low
}

/// The longest sequence of a training job within `bytes`, up to the model's own longest.
pub fn longest_sequence(
    engine: &str,
    config: &ModelConfig,
    job: &TrainJob,
    bytes: u64,
) -> Result<u64, NoPrediction> {
    let of = |sequence| TrainJob { sequence, ..job.clone() };
    search(engine, config, config.max_position_embeddings as u64, of, bytes)
}

/// More rows than this in a batch are nobody's question.
const LARGEST_BATCH: u64 = 4096;

/// The largest batch of a training job within `bytes`.
pub fn largest_batch(
    engine: &str,
    config: &ModelConfig,
    job: &TrainJob,
    bytes: u64,
) -> Result<u64, NoPrediction> {
    search(engine, config, LARGEST_BATCH, |batch| TrainJob { batch, ..job.clone() }, bytes)
}

fn search(
    engine: &str,
    config: &ModelConfig,
    limit: u64,
    of: impl Fn(u64) -> TrainJob,
    bytes: u64,
) -> Result<u64, NoPrediction> {
    let total = |job| predict(engine, config, &Job::Train(job)).map(|prediction| prediction.total_bytes);
    // What cannot be predicted at one size cannot at any.
    total(of(1))?;
    let fits = |job, bytes| total(job).is_ok_and(|total| total <= bytes);
    let surely = |size| {
        let job = of(size);
        let kept = job.kept_activations_bytes;
        bytes.checked_sub(kept).is_some_and(|rest| fits(TrainJob { kept_activations_bytes: 0, ..job }, rest))
    };
    Ok(largest(limit, surely, |size| fits(of(size), bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::engines::MODELS;
    use crate::model::Preset;
    use evalfw_engine::protocol::Quantization;
    use proptest::prelude::*;

    #[test]
    fn the_largest_size_is_found_where_memory_falls_once() {
        // 7 does not fit, 8 would: the answer is 6, for all below it fit too.
        let fits = |size| size != 7 && size < 20;
        for sure in 0..=6 {
            assert_eq!(largest(100, |size| size <= sure, fits), 6);
        }
        assert_eq!(largest(5, |_| true, |_| true), 5);
        assert_eq!(largest(5, |_| false, |_| false), 0);
    }

    proptest! {
        #[test]
        fn the_longest_sequence_fits_and_one_step_longer_does_not(
            gb in 1u64..60, batch in 1u64..5, rank in 1u64..65, kept in 0u64..1_000_000_000,
            engine in 0..MODELS.len(), model in 0usize..9,
        ) {
            let config = Preset::all().nth(model).unwrap().config;
            let engine = MODELS[engine].engine;
            let job = TrainJob {
                quantization: Quantization::Nf4, sequence: 1, batch, rank, dropout: true,
                gradient_checkpointing: true, kept_activations_bytes: kept, trained_tokens: None,
            };
            let bytes = gb * 1_000_000_000;
            let longest = longest_sequence(engine, &config, &job, bytes).unwrap();
            let fits = |sequence| {
                let job = Job::Train(TrainJob { sequence, ..job.clone() });
                predict(engine, &config, &job).unwrap().total_bytes <= bytes
            };
            prop_assert!(longest == 0 || fits(longest));
            prop_assert!(longest == config.max_position_embeddings as u64 || !fits(longest + 1));
            if longest > 0 {
                let job = TrainJob { sequence: longest, ..job.clone() };
                prop_assert!(largest_batch(engine, &config, &job, bytes).unwrap() >= batch);
            }
        }
    }
}
