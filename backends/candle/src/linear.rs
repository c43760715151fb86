//! A frozen linear layer with a LoRA adapter beside it.

use crate::kernels::PIECE;
use crate::kernels::product::{Threads, View, ViewMut, add_product};
use crate::matrix::FrozenMatrix;
use crate::network::{Kept, Pass};
use crate::values::{CpuValues, stored};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, Device, Layout, MetalStorage, Result, Shape, Storage,
    Tensor, Var, bail,
};
use evalfw_engine::dropout::MaskKey;
use evalfw_engine::lora::Target;
use rayon::prelude::*;
use std::sync::Arc;

/// One of the seven projections of a block.
pub struct Linear {
    pub layer: usize,
    pub target: Target,
    frozen: Arc<Frozen>,
    pub lora: Option<Lora>,
}

/// The trainable factors.
pub struct Lora {
    /// `[r, in_features]`
    pub a: Var,
    /// `[out_features, r]`
    pub b: Var,
    /// alpha / r
    pub scale: f64,
}

impl Linear {
    pub fn new(layer: usize, target: Target, matrix: FrozenMatrix, bias: Option<Tensor>) -> Self {
        Self { layer, target, frozen: Arc::new(Frozen { matrix, bias }), lora: None }
    }

    /// `x Wᵀ + b + scale · (mask ⊙ x) Aᵀ Bᵀ` for `x` `[rows, in_features]`.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let result = self.project(x, pass)?;
        if let Kept::Keep(kept) = pass.kept
            && self.is_needed_again()
        {
            kept.borrow_mut().insert(self.target, result.detach());
        }
        Ok(result)
    }

    /// Whether a block's backward needs the result: that of the last projection is only added to the
    /// residual.
    fn is_needed_again(&self) -> bool {
        self.target != Target::Down
    }

    fn project(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let Some(lora) = &self.lora else { return x.apply_op1(FrozenOp(self.frozen.clone())) };
        // Detached factors leave no graph behind.
        let (a, b) = match pass.trace {
            true => (lora.a.as_tensor().clone(), lora.b.as_tensor().clone()),
            false => (lora.a.as_detached_tensor(), lora.b.as_detached_tensor()),
        };
        let op = LoraOp {
            frozen: self.frozen.clone(),
            scale: lora.scale,
            mask: pass
                .dropout
                .map(|dropout| Mask { key: dropout.key(self.layer, self.target), rate: dropout.rate }),
            known: match pass.kept {
                Kept::Again(kept) if self.is_needed_again() => {
                    kept.borrow_mut().remove(&self.target).map(Known::Result)
                }
                Kept::Again(_) => Some(Known::NotNeeded),
                Kept::No | Kept::Keep(_) => None,
            },
        };
        match x.device() {
            Device::Cpu => x.apply_op3(&a, &b, op),
            Device::Cuda(_) | Device::Metal(_) => op.composed(x, &a, &b),
        }
    }
}

/// The part that is not trained. Its gradient goes to the input only: a plain matmul would compute the
/// gradient of the whole matrix, and keep it.
struct Frozen {
    matrix: FrozenMatrix,
    /// `[out_features]`
    bias: Option<Tensor>,
}

impl Frozen {
    /// `x Wᵀ + b` on the CPU.
    fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let FrozenMatrix::Host(matrix) = &self.matrix else { bail!("the matrix is not on the cpu") };
        let [out_features, in_features] = matrix.shape();
        let mut out = vec![0.0; x.len() / in_features * out_features];
        if let Some(bias) = &self.bias {
            let bias = CpuValues::new(bias)?;
            let bias = bias.slice()?;
            out.par_chunks_mut(out_features).for_each(|row| row.copy_from_slice(bias));
        }
        matrix.add_product(x, &mut out);
        Ok(out)
    }

    /// The same where the matrix is a tensor; `storage_of` picks the storage of the device's kind.
    fn forward_on_device<S: BackendStorage>(
        &self,
        x: &S,
        layout: &Layout,
        storage_of: fn(&Storage) -> Option<&S>,
    ) -> Result<(S, Shape)> {
        let FrozenMatrix::Device(matrix) = &self.matrix else { bail!("the matrix is not on the device") };
        let (rows, in_features) = layout.shape().dims2()?;
        let [out_features, _] = matrix.shape();
        let shape = Shape::from((rows, out_features));
        let weight = matrix.decode()?;
        let (weight, weight_layout) = weight.storage_and_layout();
        let Some(weight) = storage_of(&weight) else { bail!("matrix and input are on different devices") };
        let sizes = (1, rows, out_features, in_features);
        let out = x.matmul(weight, sizes, layout, &weight_layout.transpose(0, 1)?)?;
        let Some(bias) = &self.bias else { return Ok((out, shape)) };
        let (bias, bias_layout) = bias.storage_and_layout();
        let Some(bias) = storage_of(&bias) else { bail!("bias and input are on different devices") };
        let out_layout = Layout::contiguous(shape.clone());
        let bias_layout = bias_layout.broadcast_as(shape.clone())?;
        Ok((out.binary_impl::<candle_core::op::Add>(bias, &out_layout, &bias_layout)?, shape))
    }
}

struct FrozenOp(Arc<Frozen>);

impl CustomOp1 for FrozenOp {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match &self.0.matrix {
            FrozenMatrix::Host(matrix) => {
                let (rows, _) = layout.shape().dims2()?;
                let out = self.0.forward(stored(storage, layout)?)?;
                Ok((CpuStorage::F32(out), Shape::from((rows, matrix.shape()[0]))))
            }
            FrozenMatrix::Device(_) => self.0.forward_on_device(storage, layout, |storage| match storage {
                Storage::Cpu(storage) => Some(storage),
                _ => None,
            }),
        }
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.forward_on_device(storage, layout, |storage| match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        })
    }

    fn metal_fwd(&self, storage: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        self.0.forward_on_device(storage, layout, |storage| match storage {
            Storage::Metal(storage) => Some(storage),
            _ => None,
        })
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.0.matrix.transposed_product(&grad.contiguous()?).map(Some)
    }
}

/// The whole projection as one operation on (x, A, B): nothing in between is kept for the backward,
/// and the dropout mask is made again.
struct LoraOp {
    frozen: Arc<Frozen>,
    scale: f64,
    mask: Option<Mask>,
    /// On the CPU, where the operation has been computed before with the same inputs.
    known: Option<Known>,
}

enum Known {
    Result(Tensor),
    /// Only the gradients are wanted.
    NotNeeded,
}

struct Mask {
    key: MaskKey,
    rate: f32,
}

impl Mask {
    fn values(&self, len: usize) -> Vec<f32> {
        let mut mask = vec![0.0; len];
        mask.par_chunks_mut(PIECE)
            .enumerate()
            .for_each(|(i, piece)| self.key.fill_from(self.rate, i * PIECE, piece));
        mask
    }
}

impl LoraOp {
    fn composed(&self, x: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let masked = match &self.mask {
            Some(mask) => (x * Tensor::from_vec(mask.values(x.elem_count()), x.shape(), x.device())?)?,
            None => x.clone(),
        };
        let delta = (masked.matmul(&a.t()?)? * self.scale)?.matmul(&b.t()?)?;
        x.apply_op1(FrozenOp(self.frozen.clone()))? + delta
    }

    /// `mask ⊙ x`, and the mask.
    fn masked(&self, x: &[f32]) -> Option<(Vec<f32>, Vec<f32>)> {
        let mask = self.mask.as_ref()?.values(x.len());
        let mut masked = mask.clone();
        multiply(&mut masked, x);
        Some((masked, mask))
    }
}

fn multiply(values: &mut [f32], factors: &[f32]) {
    values.par_chunks_mut(PIECE).zip(factors.par_chunks(PIECE)).for_each(|(values, factors)| {
        values.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
    });
}

/// `a · b` for row-major results with `width` columns.
fn product(width: usize, factor: f64, a: View<'_>, b: View<'_>) -> Vec<f32> {
    let mut out = vec![0.0; a.height() * width];
    add_product(ViewMut::new(&mut out, width), factor as f32, a, b, Threads::All);
    out
}

impl CustomOp3 for LoraOp {
    fn name(&self) -> &'static str {
        "lora-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, in_features) = x_layout.shape().dims2()?;
        let (out_features, r) = b_layout.shape().dims2()?;
        let known = match &self.known {
            Some(Known::Result(result)) => Some(CpuValues::new(result)?.slice()?.to_vec()),
            Some(Known::NotNeeded) => Some(vec![0.0; rows * out_features]),
            None => None,
        };
        if let Some(known) = known {
            return Ok((CpuStorage::F32(known), Shape::from((rows, out_features))));
        }
        let (x, a, b) = (stored(x, x_layout)?, stored(a, a_layout)?, stored(b, b_layout)?);
        let mut out = self.frozen.forward(x)?;
        let masked = self.masked(x);
        let input = View::new(masked.as_ref().map_or(x, |(masked, _)| masked), in_features);
        let inner = product(r, 1.0, input, View::new(a, in_features).t());
        let (inner, b) = (View::new(&inner, r), View::new(b, r));
        add_product(ViewMut::new(&mut out, out_features), self.scale as f32, inner, b.t(), Threads::All);
        Ok((CpuStorage::F32(out), Shape::from((rows, out_features))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let FrozenMatrix::Host(matrix) = &self.frozen.matrix else { bail!("the matrix is not on the cpu") };
        let (_, in_features) = x.dims2()?;
        let (out_features, r) = b.dims2()?;
        let grad = grad.contiguous()?;
        let (x_values, a_values, b_values, grad) =
            (CpuValues::new(x)?, CpuValues::new(a)?, CpuValues::new(b)?, CpuValues::new(&grad)?);
        let grad_values = grad.slice()?;
        let grad = View::new(grad_values, out_features);
        let masked = self.masked(x_values.slice()?);
        let input = masked.as_ref().map_or(x_values.slice()?, |(masked, _)| masked);
        let input = View::new(input, in_features);
        let a_view = View::new(a_values.slice()?, in_features);

        let inner = product(r, 1.0, input, a_view.t());
        let of_b = product(r, self.scale, grad.t(), View::new(&inner, r));
        let of_inner = product(r, self.scale, grad, View::new(b_values.slice()?, r));
        let of_inner = View::new(&of_inner, r);
        let of_a = product(in_features, 1.0, of_inner.t(), input);
        let mut of_x = product(in_features, 1.0, of_inner, a_view);
        if let Some((_, mask)) = &masked {
            multiply(&mut of_x, mask);
        }
        matrix.add_transposed_product(grad_values, &mut of_x);
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu).map(Some);
        Ok((tensor(of_x, x)?, tensor(of_a, a)?, tensor(of_b, b)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::{DeviceMatrix, HostMatrix, Nf4Tables};
    use crate::ops::testing::{assert_alike, var};
    use evalfw_engine::nf4::Nf4Tensor;
    use evalfw_engine::weights::Weight;
    use evalfw_kernels::Products;

    /// The fused operation on the host's matrix, against the composition for GPUs on a tensor matrix.
    #[test]
    fn the_fused_form_is_the_composed_one() {
        let (rows, in_features, out_features, r) = (9, 40, 70, 4);
        let values: Vec<f32> = (0..out_features * in_features).map(|i| (i as f32 * 0.9).sin()).collect();
        let weight = Weight::Nf4(Nf4Tensor::quantize([out_features, in_features], &values));
        let tables = Nf4Tables::new(&Device::Cpu).unwrap();
        let bias = Some(var(&[out_features], 5).as_detached_tensor());
        let device = DeviceMatrix::new(weight.clone(), &Device::Cpu, &tables).unwrap();
        let key = MaskKey { seed: 1, step: 2, micro_batch: 3, layer: 4, target: Target::Up };
        let (x, a, b) = (var(&[rows, in_features], 1), var(&[r, in_features], 2), var(&[out_features, r], 3));
        for rate in [None, Some(0.3)] {
            let op = |matrix, bias: &Option<Tensor>| LoraOp {
                frozen: Arc::new(Frozen { matrix, bias: bias.clone() }),
                scale: 2.0,
                mask: rate.map(|rate| Mask { key, rate }),
                known: None,
            };
            let fused = || {
                let host = HostMatrix::new(weight.clone(), Products::F32);
                x.apply_op3(&a, &b, op(FrozenMatrix::Host(host), &bias))
            };
            let composed = || op(FrozenMatrix::Device(device.clone()), &bias).composed(x.as_tensor(), &a, &b);
            assert_alike(&[&x, &a, &b], fused, composed);
        }
    }
}
