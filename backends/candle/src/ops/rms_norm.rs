//! Root mean square layer normalisation (Zhang and Sennrich 2019) with a frozen weight.

use crate::values::{CpuValues, stored};
use candle_core::{CpuStorage, CustomOp1, D, Device, Layout, Result, Shape, Tensor};
use evalfw_kernels::dot;
use rayon::prelude::*;

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension, in f32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    match x.device() {
        Device::Cpu => x.contiguous()?.apply_op1(RmsNorm { weight: weight.clone(), eps: eps as f32 }),
        Device::Cuda(_) | Device::Metal(_) => composed(x, weight, eps),
    }
}

fn composed(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let norm = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&norm)?.broadcast_mul(weight)
}

struct RmsNorm {
    /// `[width]`
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    fn inverse(&self, x: &[f32]) -> f32 {
        1.0 / (dot(x, x) / x.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = stored(storage, layout)?;
        let weight = CpuValues::new(&self.weight)?;
        let weight = weight.slice()?;
        let width = weight.len();
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(width).zip(x.par_chunks(width)).for_each(|(out, x)| {
            let inverse = self.inverse(x);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * inverse * weight;
            }
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (x_values, grad, weight) =
            (CpuValues::new(x)?, CpuValues::new(&grad)?, CpuValues::new(&self.weight)?);
        let (values, grad, weight) = (x_values.slice()?, grad.slice()?, weight.slice()?);
        let width = weight.len();
        let mut out = vec![0.0; values.len()];
        out.par_chunks_mut(width).zip(values.par_chunks(width)).zip(grad.par_chunks(width)).for_each(
            |((out, x), grad)| {
                let inverse = self.inverse(x);
                for ((out, grad), weight) in out.iter_mut().zip(grad).zip(weight) {
                    *out = grad * weight;
                }
                let along = dot(out, x) * inverse * inverse / width as f32;
                for (out, x) in out.iter_mut().zip(x) {
                    *out = inverse * (*out - along * x);
                }
            },
        );
        Tensor::from_vec(out, x.shape(), &Device::Cpu).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_alike, var};

    #[test]
    fn the_fused_form_is_the_composed_one() {
        let x = var(&[5, 37], 1);
        let weight = var(&[37], 2).as_detached_tensor();
        assert_alike(&[&x], || rms_norm(&x, &weight, 1e-3), || composed(&x, &weight, 1e-3));
    }
}
