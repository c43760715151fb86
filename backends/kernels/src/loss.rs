//! Softmax cross-entropy on a head in host memory: the gradient takes the place of the logits.

use crate::elementwise::exponentials;
use crate::matrix::HostMatrix;
use rayon::prelude::*;

/// Bytes of the logits that exist at a time: 256 rows of Qwen's vocabulary. Fewer rows would save memory,
/// but the head is read and widened again for each chunk.
const LOGIT_BYTES: usize = 149 << 20;
/// Rows that a product takes at once: a chunk that does not fill its last panel wastes the rest.
const PANEL: usize = 32;

/// Rows whose logits may exist together.
pub fn rows_at_a_time(vocab_size: usize) -> usize {
    (LOGIT_BYTES / size_of::<f32>() / vocab_size).max(1)
}

/// Cuts `rows` into chunks of at most so many: of about the same size, as a short one would not be worth its price, but
/// of whole panels.
pub fn rows_of_a_chunk(rows: usize, at_most: usize) -> usize {
    let chunks = rows.div_ceil(at_most).max(1);
    rows.div_ceil(chunks).max(1).next_multiple_of(PANEL).min(at_most)
}

impl HostMatrix {
    /// As a head: the sum over rows of −ln p(target), in nats, for `hidden` `[rows, hidden_size]`, and the logits
    /// `[rows, vocab_size]`, which with a `weight` have been turned into their gradient: `weight · (softmax − onehot)`.
    ///
    /// # Panics
    /// If a target is not below the vocabulary's size.
    pub fn cross_entropy(&self, hidden: &[f32], targets: &[u32], weight: Option<f64>) -> (f64, Vec<f32>) {
        let mut logits = self.product(hidden, None);
        let losses = logits.par_chunks_mut(self.shape[0]).zip(targets).map(|(row, &target)| {
            let of_target = row[target as usize];
            let (max, sum) = exponentials(row);
            if let Some(weight) = weight {
                let factor = (weight / sum) as f32;
                row.iter_mut().for_each(|value| *value *= factor);
                row[target as usize] -= weight as f32;
            }
            f64::from(max) + sum.ln() - f64::from(of_target)
        });
        // Collected first, so that the sum does not depend on how threads share the rows.
        let losses: Vec<f64> = losses.collect();
        (losses.iter().sum(), logits)
    }
}
