//! Root mean square layer normalisation (Zhang and Sennrich 2019) with a frozen weight.

use super::{Form, Graph, by_hand};
use crate::values::{CpuValues, stored};
use candle_core::{CpuStorage, CustomOp1, D, Device, Layout, Result, Shape, Tensor};
use evalfw_kernels::norm;

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension, in f32.
pub fn rms_norm(graph: Graph<'_>, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    match graph.form {
        Form::Host => graph.op1(x, RmsNorm { weight: weight.clone(), eps: eps as f32 }),
        Form::Device => fused(graph, x, weight, eps),
        Form::Stock => composed(x, weight, eps),
    }
}

fn composed(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let norm = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&norm)?.broadcast_mul(weight)
}

fn fused(graph: Graph<'_>, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let x = x.contiguous()?;
    let result = candle_nn::ops::rms_norm(&x, weight, eps as f32)?;
    let weight = weight.clone();
    by_hand::op1(graph, "rms-norm", &x, result, move |x, grad| {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return crate::cuda::rms_norm_backward(&x.contiguous()?, &weight, grad, eps);
        }
        let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
        let of_normed = grad.broadcast_mul(&weight)?;
        let along = ((&of_normed * x)?.mean_keepdim(D::Minus1)? * inverse.sqr()?)?;
        (of_normed - x.broadcast_mul(&along)?)?.broadcast_mul(&inverse)
    })
}

struct RmsNorm {
    /// `[width]`
    weight: Tensor,
    eps: f32,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = stored(storage, layout)?;
        let weight = CpuValues::new(&self.weight)?;
        let out = norm::rms_norm(x, weight.slice()?, self.eps);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (x_values, grad, weight) =
            (CpuValues::new(x)?, CpuValues::new(&grad)?, CpuValues::new(&self.weight)?);
        let out = norm::rms_norm_gradient(x_values.slice()?, weight.slice()?, self.eps, grad.slice()?);
        Tensor::from_vec(out, x.shape(), &Device::Cpu).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_alike, var};

    #[test]
    fn all_forms_are_alike() {
        let x = var(&[5, 37], 1);
        let weight = var(&[37], 2).as_detached_tensor();
        let of = |form: Form| rms_norm(form.into(), &x, &weight, 1e-3);
        for form in [Form::Host, Form::Device] {
            assert_alike(&[&x], || of(form), || of(Form::Stock));
        }
    }
}
