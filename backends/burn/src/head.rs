//! The output head and the loss on it.
//!
//! The head is cut into shards of vocabulary rows, and the loss takes some hidden rows at a time, so
//! that the logits of all positions never exist together. Its gradient is written by hand:
//! `(softmax − onehot) · W`.

use crate::BurnDevice;
use crate::device::OpenDevice;
use crate::frozen::FrozenMatrix;
use crate::guard::read;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};
use evalfw_engine::Result;
use evalfw_engine::weights::DenseTensor;
use std::ops::Range;
use std::sync::Arc;

/// Logits that may exist at a time: 128 MiB of them.
const LOGITS: usize = 32 * 1024 * 1024;

pub struct Head {
    shards: Vec<Shard>,
    vocab_size: usize,
    device: Device,
}

struct Shard {
    tokens: Range<usize>,
    weight: FrozenMatrix,
}

impl Head {
    pub fn new(table: &Arc<DenseTensor>, device: &OpenDevice) -> Self {
        let [vocab_size, hidden] = table.shape;
        let rows = shard_rows(hidden, device);
        let shards = (0..vocab_size).step_by(rows).map(|first| {
            let tokens = first..vocab_size.min(first + rows);
            Shard { weight: FrozenMatrix::rows_of(table, tokens.clone(), device), tokens }
        });
        Self { shards: shards.collect(), vocab_size, device: device.device.clone() }
    }

    /// The logits of `hidden` `[n, hidden]`, row-major `[n, vocab_size]`.
    pub fn logits(&self, hidden: Tensor<2>) -> Result<Vec<f32>> {
        read(Tensor::cat(self.sharded_logits(&hidden), 1))
    }

    /// The negative log-likelihood of each target, `[n]`.
    pub fn loss(&self, hidden: Tensor<2>, targets: &[u32]) -> Tensor<1> {
        let losses = self.chunks(targets).map(|rows| {
            let logits = self.sharded_logits(&take(&hidden, &rows));
            self.negative_log_likelihood(&logits, &targets[rows]).0
        });
        Tensor::cat(losses.collect(), 0)
    }

    /// The same, and the gradient of its sum divided by `divisor`, `[n, hidden]`.
    pub fn loss_and_gradient(
        &self,
        hidden: Tensor<2>,
        targets: &[u32],
        divisor: usize,
    ) -> (Tensor<1>, Tensor<2>) {
        let chunks = self.chunks(targets).map(|rows| {
            let logits = self.sharded_logits(&take(&hidden, &rows));
            let targets = &targets[rows];
            let (loss, normalizer) = self.negative_log_likelihood(&logits, targets);
            let gradient = self.shards.iter().zip(logits).map(|(shard, logits)| {
                let probabilities = (logits - normalizer.clone()).exp();
                let (indices, here) = shard.targets(targets, &self.device);
                let error = probabilities.scatter(1, indices, -here, IndexingUpdateOp::Add);
                shard.weight.matmul_transposed(error)
            });
            let gradient = gradient.reduce(|sum, part| sum + part).expect("a head has shards");
            (loss, gradient / divisor as f64)
        });
        let (losses, gradients): (Vec<_>, Vec<_>) = chunks.unzip();
        (Tensor::cat(losses, 0), Tensor::cat(gradients, 0))
    }

    /// The loss of each row, `[n]`, and the logarithm of its sum of exponentials, `[n, 1]`.
    fn negative_log_likelihood(&self, logits: &[Tensor<2>], targets: &[u32]) -> (Tensor<1>, Tensor<2>) {
        let largest = logits.iter().map(|logits| logits.clone().max_dim(1)).reduce(Tensor::max_pair);
        let largest = largest.expect("a head has shards");
        let sum = logits.iter().map(|logits| (logits.clone() - largest.clone()).exp().sum_dim(1));
        let sum = sum.reduce(|sum, part| sum + part).expect("a head has shards");
        let normalizer = sum.log() + largest;
        let of_targets = self.shards.iter().zip(logits).map(|(shard, logits)| {
            let (indices, here) = shard.targets(targets, &self.device);
            logits.clone().gather(1, indices) * here
        });
        let of_targets = of_targets.reduce(|sum, part| sum + part).expect("a head has shards");
        ((normalizer.clone() - of_targets).squeeze_dim(1), normalizer)
    }

    fn sharded_logits(&self, hidden: &Tensor<2>) -> Vec<Tensor<2>> {
        self.shards.iter().map(|shard| shard.weight.matmul(hidden.clone())).collect()
    }

    /// Hidden rows whose logits may exist together.
    fn chunks(&self, targets: &[u32]) -> impl Iterator<Item = Range<usize>> + use<> {
        let (count, step) = (targets.len(), (LOGITS / self.vocab_size).max(1));
        (0..count).step_by(step).map(move |first| first..count.min(first + step))
    }
}

impl Shard {
    /// For each row the index of its target in this shard, `[n, 1]`, and 1 where it is in this shard,
    /// otherwise 0 (and an index that exists).
    fn targets(&self, targets: &[u32], device: &Device) -> (Tensor<2, Int>, Tensor<2>) {
        let shape = [targets.len(), 1];
        let here: Vec<_> = targets.iter().map(|&t| self.tokens.contains(&(t as usize))).collect();
        let index = |(&target, &here): (&u32, &bool)| match here {
            true => target as i32 - self.tokens.start as i32,
            false => 0,
        };
        let indices: Vec<i32> = targets.iter().zip(&here).map(index).collect();
        let here: Vec<f32> = here.into_iter().map(|here| if here { 1.0 } else { 0.0 }).collect();
        (
            Tensor::from_data(TensorData::new(indices, shape), device),
            Tensor::from_data(TensorData::new(here, shape), device),
        )
    }
}

/// Vocabulary rows of one shard: its f32 values fit into one buffer, and on the CPU into the cache.
fn shard_rows(hidden: usize, device: &OpenDevice) -> usize {
    let bytes = match device.kind {
        BurnDevice::Flex => 8 << 20,
        BurnDevice::Wgpu => device.max_buffer_bytes.min(64 << 20),
    };
    (bytes as usize / size_of::<f32>() / hidden).max(1)
}

fn take(hidden: &Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
    hidden.clone().narrow(0, rows.start, rows.len())
}
