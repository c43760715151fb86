//! The output head and the loss on it.
//!
//! The loss takes some hidden rows at a time, so that the logits of all positions never exist together. Its gradient is
//! written by hand: `(softmax − onehot) · W`. On a GPU the head is cut into shards of vocabulary rows, as a buffer has a
//! largest size.

use crate::device::OpenDevice;
use crate::frozen::{FrozenMatrix, rows_at_a_time};
use crate::guard::read;
use crate::packed::HostMatrix;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};
use evalfw_engine::weights::DenseTensor;
use evalfw_engine::{Error, Result};
use evalfw_kernels::loss;
use std::ops::Range;

pub struct Head {
    shards: Vec<Shard>,
    /// Hidden rows whose logits may exist together.
    rows_at_a_time: usize,
    device: Device,
}

struct Shard {
    tokens: Range<usize>,
    weight: FrozenMatrix,
}

impl Head {
    /// The whole in host memory.
    pub fn on_host(table: HostMatrix, device: &OpenDevice) -> Self {
        let [vocab_size, _] = table.shape();
        let shard = Shard { tokens: 0..vocab_size, weight: FrozenMatrix::on_host(table, device) };
        let rows_at_a_time = loss::rows_at_a_time(vocab_size);
        Self { shards: vec![shard], rows_at_a_time, device: device.device.clone() }
    }

    /// In as many buffers as the device needs.
    pub fn in_shards(table: &DenseTensor, device: &OpenDevice) -> Self {
        let [vocab_size, hidden] = table.shape;
        Self::in_shards_of(table, device, rows_at_a_time(hidden, device), loss::rows_at_a_time(vocab_size))
    }

    fn in_shards_of(
        table: &DenseTensor,
        device: &OpenDevice,
        shard_rows: usize,
        rows_at_a_time: usize,
    ) -> Self {
        let vocab_size = table.shape[0];
        let shards = (0..vocab_size).step_by(shard_rows).map(|first| {
            let tokens = first..vocab_size.min(first + shard_rows);
            Shard { weight: FrozenMatrix::rows_of(table, tokens.clone(), device), tokens }
        });
        Self { shards: shards.collect(), rows_at_a_time, device: device.device.clone() }
    }

    fn host(&self) -> Option<&HostMatrix> {
        match &self.shards[..] {
            [shard] => shard.weight.host(),
            _ => None,
        }
    }

    /// The most likely token after `hidden` `[1, hidden]`, the first of several.
    pub fn most_likely(&self, hidden: Tensor<2>) -> Result<u32> {
        match self.host() {
            Some(head) => {
                let not_a_number = || Error::not_finite("a logit is not a number");
                head.argmax(&read(hidden)?).map(|token| token as u32).ok_or_else(not_a_number)
            }
            None => most_likely(&self.logits(hidden)?),
        }
    }

    /// The logits of `hidden` `[n, hidden]`, row-major `[n, vocab_size]`.
    pub fn logits(&self, hidden: Tensor<2>) -> Result<Vec<f32>> {
        read(Tensor::cat(self.sharded_logits(&hidden), 1))
    }

    /// The sum of the negative log-likelihoods of the targets.
    pub fn loss(&self, hidden: Tensor<2>, targets: &[u32]) -> Result<f64> {
        if let Some(head) = self.host() {
            let losses = self.chunks(targets).map(|rows| {
                let hidden = read(take(&hidden, &rows))?;
                Ok(head.cross_entropy(&hidden, &targets[rows], None).0)
            });
            return losses.sum();
        }
        let losses = self.chunks(targets).map(|rows| {
            let logits = self.sharded_logits(&take(&hidden, &rows));
            self.negative_log_likelihood(&logits, &targets[rows]).0
        });
        sum(Tensor::cat(losses.collect(), 0))
    }

    /// The same, and the gradient of its sum divided by `divisor`, `[n, hidden]`.
    pub fn loss_and_gradient(
        &self,
        hidden: Tensor<2>,
        targets: &[u32],
        divisor: usize,
    ) -> Result<(f64, Tensor<2>)> {
        if let Some(head) = self.host() {
            let (mut sum, mut gradients) = (0.0, Vec::new());
            for rows in self.chunks(targets) {
                let hidden = read(take(&hidden, &rows))?;
                let weight = 1.0 / divisor as f64;
                let (loss, of_logits) = head.cross_entropy(&hidden, &targets[rows.clone()], Some(weight));
                sum += loss;
                gradients.extend(head.transposed_product(&of_logits));
            }
            let gradient = TensorData::new(gradients, hidden.dims());
            return Ok((sum, Tensor::from_data(gradient, &self.device)));
        }
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
        Ok((sum(Tensor::cat(losses, 0))?, Tensor::cat(gradients, 0)))
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

    fn chunks(&self, targets: &[u32]) -> impl Iterator<Item = Range<usize>> + use<> {
        let count = targets.len();
        let step = loss::rows_of_a_chunk(count, self.rows_at_a_time);
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

/// Adds up in f64 what the device computed in f32.
fn sum(losses: Tensor<1>) -> Result<f64> {
    Ok(read(losses)?.into_iter().map(f64::from).sum())
}

/// Index of the largest logit, the first of several.
fn most_likely(logits: &[f32]) -> Result<u32> {
    if let Some(bad) = logits.iter().find(|v| !v.is_finite()) {
        return Err(Error::not_finite(format_args!("a logit is {bad}")));
    }
    let best = logits.iter().enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map(|(token, _)| token as u32).ok_or_else(|| Error::framework("the model gave no logits"))
}

fn take(hidden: &Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
    hidden.clone().narrow(0, rows.start, rows.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BurnDevice;
    use crate::device::all_for_tests;
    use evalfw_engine::weights::{DenseData, Weight};
    use half::bf16;

    /// Targets stand in the first shard, in the last, and at a boundary.
    #[test]
    fn shards_and_chunks_give_the_loss_and_gradient_of_the_whole() {
        let shape @ [vocab_size, width] = [150, 44];
        let values: Vec<_> =
            (0..vocab_size * width).map(|i| bf16::from_f32((i as f32 * 0.37).sin() * 0.5)).collect();
        let hidden: Vec<f32> = (0..3 * width).map(|i| (i as f32 * 0.11).cos()).collect();
        let targets = [0, 63, 149];
        let (loss, gradient) = by_definition(&values, &hidden, &targets, shape);
        let table = DenseTensor { shape, data: DenseData::Bf16(values) };
        for device in all_for_tests() {
            let head = match device.kind {
                BurnDevice::Flex => {
                    let weight = Weight::Dense(table.clone());
                    let whole = Head::on_host(HostMatrix::new(weight, device.products), &device);
                    Head { rows_at_a_time: 2, ..whole }
                }
                BurnDevice::Wgpu => Head::in_shards_of(&table, &device, 64, 2),
            };
            let hidden = || Tensor::from_data(TensorData::new(hidden.clone(), [3, width]), &device.device);
            let (with_gradient, found) = head.loss_and_gradient(hidden(), &targets, 7).unwrap();
            for found in [with_gradient, head.loss(hidden(), &targets).unwrap()] {
                assert!((found - loss).abs() < 3e-4, "{found} {loss}");
            }
            for (found, expected) in read(found).unwrap().into_iter().zip(&gradient) {
                assert!((f64::from(found) - expected / 7.0).abs() < 1e-6, "{found} {expected}");
            }
        }
    }

    fn by_definition(
        weight: &[bf16],
        hidden: &[f32],
        targets: &[u32],
        [vocab_size, width]: [usize; 2],
    ) -> (f64, Vec<f64>) {
        let (mut loss, mut gradient) = (0.0, Vec::new());
        for (hidden, &target) in hidden.chunks(width).zip(targets) {
            let rows = || weight.chunks(width);
            let dot = |row: &[bf16]| row.iter().zip(hidden).map(|(w, &h)| w.to_f64() * f64::from(h)).sum();
            let logits: Vec<f64> = rows().map(dot).collect();
            assert_eq!(logits.len(), vocab_size);
            let largest = logits.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = logits.iter().map(|l| (l - largest).exp()).sum();
            loss += sum.ln() + largest - logits[target as usize];
            let mut total = vec![0.0; width];
            for (token, (row, logit)) in rows().zip(&logits).enumerate() {
                let error = (logit - largest).exp() / sum - f64::from(u8::from(token == target as usize));
                total.iter_mut().zip(row).for_each(|(t, w)| *t += error * w.to_f64());
            }
            gradient.extend(total);
        }
        (loss, gradient)
    }
}
