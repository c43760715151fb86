//! Softmax cross-entropy over a large vocabulary: a few rows at a time, with the gradient written down
//! by hand. The logits of all positions never exist at once, and autograd keeps none of them.

use crate::matrix::FrozenMatrix;
use crate::values::CpuValues;
use candle_core::{D, Device, Result, Tensor, bail};
use evalfw_kernels::loss::{rows_at_a_time, rows_of_a_chunk};

pub struct CrossEntropy<'a> {
    /// `[vocab_size, hidden_size]`
    head: &'a FrozenMatrix,
    rows_at_a_time: usize,
}

impl<'a> CrossEntropy<'a> {
    pub fn new(head: &'a FrozenMatrix) -> Self {
        let [vocab_size, _] = head.shape();
        Self { head, rows_at_a_time: rows_at_a_time(vocab_size) }
    }

    /// The sum over rows of −ln p(target), in nats. `hidden` is `[rows, hidden_size]`, after the final
    /// norm.
    pub fn sum(&self, hidden: &Tensor, targets: &[u32]) -> Result<f64> {
        let mut sum = 0.0;
        for (hidden, targets) in self.chunks(hidden, targets)? {
            sum += match self.head {
                FrozenMatrix::Host(head) => {
                    head.cross_entropy(CpuValues::new(&hidden)?.slice()?, targets, None).0
                }
                head => device_logits(head, &hidden, targets, None)?.0,
            };
        }
        Ok(sum)
    }

    /// The same sum, and the gradient of `weight` times the sum with respect to `hidden`.
    pub fn sum_and_gradient(&self, hidden: &Tensor, targets: &[u32], weight: f64) -> Result<(f64, Tensor)> {
        let mut sum = 0.0;
        let mut gradients = Vec::new();
        for (hidden, targets) in self.chunks(hidden, targets)? {
            let (loss, of_logits) = match self.head {
                FrozenMatrix::Host(head) => {
                    let hidden = CpuValues::new(&hidden)?;
                    let (loss, of_logits) = head.cross_entropy(hidden.slice()?, targets, Some(weight));
                    let shape = (targets.len(), head.shape()[0]);
                    (loss, Tensor::from_vec(of_logits, shape, &Device::Cpu)?)
                }
                head => device_logits(head, &hidden, targets, Some(weight))?,
            };
            sum += loss;
            gradients.push(self.head.transposed_product(&of_logits)?);
        }
        Ok((sum, Tensor::cat(&gradients, 0)?))
    }

    fn chunks<'t>(&self, hidden: &Tensor, targets: &'t [u32]) -> Result<Vec<(Tensor, &'t [u32])>> {
        let [vocab_size, _] = self.head.shape();
        if let Some(target) = targets.iter().find(|&&target| target as usize >= vocab_size) {
            bail!("target {target} is not below the vocabulary of {vocab_size}");
        }
        let rows = rows_of_a_chunk(targets.len(), self.rows_at_a_time);
        let cut =
            |(i, targets): (usize, &'t [u32])| Ok((hidden.narrow(0, i * rows, targets.len())?, targets));
        targets.chunks(rows).enumerate().map(cut).collect()
    }
}

/// The loss, and the logits, which with a `weight` have been turned into their gradient, with candle's operations.
fn device_logits(
    head: &FrozenMatrix,
    hidden: &Tensor,
    targets: &[u32],
    weight: Option<f64>,
) -> Result<(f64, Tensor)> {
    let logits = head.product(hidden)?;
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let max = logits.max_keepdim(D::Minus1)?;
    let exps = logits.broadcast_sub(&max)?.exp()?;
    let sum = exps.sum_keepdim(D::Minus1)?;
    let losses = ((max + sum.log()?)? - logits.gather(&targets, 1)?)?;
    let loss = losses.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).sum();
    let Some(weight) = weight else { return Ok((loss, logits)) };
    let softmax = exps.broadcast_div(&sum)?;
    let one = losses.ones_like()?.neg()?;
    Ok((loss, (softmax.scatter_add(&targets, &one, 1)? * weight)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::{Decoding, DeviceMatrix, HostMatrix, Nf4Tables};
    use candle_core::Var;
    use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
    use evalfw_kernels::Products;

    fn weight(shape: [usize; 2]) -> Weight {
        let values = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.77).sin()).collect();
        Weight::Dense(DenseTensor { shape, data: DenseData::F32(values) })
    }

    #[test]
    fn chunks_give_the_loss_and_the_gradient_of_autograd() {
        let (rows, vocab_size, width) = (7, 300, 16);
        let head = FrozenMatrix::Host(HostMatrix::new(weight([vocab_size, width]), Products::F32));
        let cross_entropy = CrossEntropy { head: &head, rows_at_a_time: 3 };
        let hidden = Var::from_vec(weight([rows, width]).dense(), (rows, width), &Device::Cpu).unwrap();
        let targets = [5, 299, 0, 5, 120, 7, 8];
        let (loss, gradient) = cross_entropy.sum_and_gradient(&hidden.detach(), &targets, 1.0 / 7.0).unwrap();

        let dense = Tensor::from_vec(weight([vocab_size, width]).dense(), (vocab_size, width), &Device::Cpu);
        let logits = hidden.matmul(&dense.unwrap().t().unwrap()).unwrap();
        let ids = Tensor::new(&targets, &Device::Cpu).unwrap();
        let expected = candle_nn::loss::cross_entropy(&logits, &ids).unwrap();
        assert!((loss / 7.0 - f64::from(expected.to_scalar::<f32>().unwrap())).abs() < 1e-5);
        assert_close(&gradient, expected.backward().unwrap().get(&hidden).unwrap());
        assert_eq!(loss, cross_entropy.sum(&hidden.detach(), &targets).unwrap());
    }

    #[test]
    fn host_and_device_form_agree() {
        let shape = [300, 16];
        let host = FrozenMatrix::Host(HostMatrix::new(weight(shape), Products::F32));
        let tables = Nf4Tables::new(&Device::Cpu).unwrap();
        let plain = (Decoding::Composed, Products::F32);
        let device = DeviceMatrix::new(weight(shape), &Device::Cpu, &tables, plain).unwrap();
        let device = FrozenMatrix::Device(device);
        let hidden = Tensor::from_vec(weight([4, 16]).dense(), (4, 16), &Device::Cpu).unwrap();
        let both = |head| CrossEntropy::new(head).sum_and_gradient(&hidden, &[0, 299, 7, 7], 0.25).unwrap();
        let ((host_loss, host_gradient), (device_loss, device_gradient)) = (both(&host), both(&device));
        assert!((host_loss - device_loss).abs() < 1e-4);
        assert_close(&host_gradient, &device_gradient);
    }

    #[test]
    fn a_target_beyond_the_vocabulary_is_an_error() {
        let head = FrozenMatrix::Host(HostMatrix::new(weight([10, 4]), Products::F32));
        let hidden = Tensor::zeros((1, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        let error = CrossEntropy::new(&head).sum(&hidden, &[10]).unwrap_err();
        assert!(error.to_string().contains("target 10"));
    }

    trait Dense {
        fn dense(self) -> Vec<f32>;
    }

    impl Dense for Weight {
        fn dense(self) -> Vec<f32> {
            match self {
                Weight::Dense(tensor) => tensor.into_f32(),
                Weight::Nf4(tensor) => tensor.dequantize(),
            }
        }
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-5, "{difference}");
    }
}
