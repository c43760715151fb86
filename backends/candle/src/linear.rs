//! A frozen linear layer with a LoRA adapter beside it.

use crate::kept::{Inner, Known, Part};
use crate::matrix::{FrozenMatrix, HostMatrix};
use crate::network::Pass;
use crate::ops::{Form, Graph, by_hand};
use crate::values::{CpuValues, stored};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp3, Device, Error, Layout, Result, Shape, Tensor, Var, bail,
};
use evalfw_engine::dropout::MaskKey;
use evalfw_engine::lora::Target;
use evalfw_kernels::filled::{PIECE, filled};
use evalfw_kernels::lora::{self, Factors, Masked};
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
        pass.kept.keep(Part::Projection(self.target), &result)?;
        Ok(result)
    }

    /// [`forward`](Self::forward) of several layers for the same `x`. One row goes through the matrices of all of them in
    /// one loop, as the threads would otherwise wait for each other after each matrix.
    pub fn forward_all<const N: usize>(
        layers: [&Self; N],
        x: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<[Tensor; N]> {
        let plain = |layer: &&Self| layer.lora.is_none() && layer.frozen.on_host().is_ok();
        if pass.form == Form::Host && !pass.training && x.dim(0)? == 1 && layers.iter().all(plain) {
            let together = x.apply_op1(FrozenRow(layers.map(|layer| layer.frozen.clone())))?;
            let mut start = 0;
            return array(layers, |layer| {
                let width = layer.frozen.matrix.shape()[0];
                start += width;
                together.narrow(1, start - width, width)
            });
        }
        array(layers, |layer| layer.forward(x, pass))
    }

    fn project(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let Some(lora) = &self.lora else { return self.frozen.forward(pass, x) };
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
            known: pass.kept.known(Part::Projection(self.target)),
            inner: pass.kept.inner(self.target),
        };
        let graph = pass.graph();
        match pass.form {
            Form::Host => match self.frozen.matrix {
                FrozenMatrix::Host(_) => graph.op3([x, &a, &b], op),
                FrozenMatrix::Device(_) | FrozenMatrix::Native(_) => op.on_device(graph, x, &a, &b),
            },
            Form::Device => op.on_device(graph, x, &a, &b),
            Form::Stock => op.composed(x, &a, &b, pass.training),
        }
    }
}

/// Like [`array::map`](array), up to the first error.
fn array<T, R, const N: usize>(items: [T; N], of: impl FnMut(T) -> Result<R>) -> Result<[R; N]> {
    let all = items.into_iter().map(of).collect::<Result<Vec<_>>>()?;
    all.try_into().map_err(|all: Vec<R>| Error::Msg(format!("{} of {N} items", all.len())))
}

/// The part that is not trained. Its gradient goes to the input only: a plain matmul would compute the
/// gradient of the whole matrix, and keep it.
struct Frozen {
    matrix: FrozenMatrix,
    /// `[out_features]`
    bias: Option<Tensor>,
}

impl Frozen {
    /// `x Wᵀ + b`, with a gradient of `x` only; the stock form has candle's own.
    fn forward(self: &Arc<Self>, pass: &Pass<'_>, x: &Tensor) -> Result<Tensor> {
        match (pass.form, &self.matrix) {
            (Form::Host, FrozenMatrix::Host(_)) => pass.graph().op1(x, FrozenOp(self.clone())),
            (Form::Host | Form::Device, _) => self.on_device(pass.graph(), x),
            (Form::Stock, _) => self.composed(x, pass.training),
        }
    }

    fn on_device(self: &Arc<Self>, graph: Graph<'_>, x: &Tensor) -> Result<Tensor> {
        let frozen = self.clone();
        by_hand::op1(graph, "frozen-linear", x, self.untraced(&x.detach())?, move |_, grad| {
            frozen.matrix.transposed_product(grad)
        })
    }

    /// On whatever device the matrix is.
    fn untraced(&self, x: &Tensor) -> Result<Tensor> {
        self.add_bias(self.matrix.product(x)?)
    }

    /// As with a plain matrix: where candle traces, it also computes the gradient of the weight. Its own quantized
    /// product has no gradient, and serves where none is wanted.
    fn composed(&self, x: &Tensor, training: bool) -> Result<Tensor> {
        let product = match &self.matrix {
            FrozenMatrix::Native(matrix) if !training => matrix.product(x)?,
            matrix => x.matmul(&matrix.decode()?.t()?)?,
        };
        self.add_bias(product)
    }

    fn add_bias(&self, product: Tensor) -> Result<Tensor> {
        match &self.bias {
            Some(bias) => product.broadcast_add(bias),
            None => Ok(product),
        }
    }

    fn on_host(&self) -> Result<&HostMatrix> {
        match &self.matrix {
            FrozenMatrix::Host(matrix) => Ok(matrix),
            FrozenMatrix::Device(_) | FrozenMatrix::Native(_) => bail!("the matrix is not on the host"),
        }
    }

    /// Computes something of the matrix and the bias on the CPU.
    fn with_host<R>(&self, compute: impl FnOnce(&HostMatrix, Option<&[f32]>) -> R) -> Result<R> {
        let bias = self.bias.as_ref().map(CpuValues::new).transpose()?;
        Ok(compute(self.on_host()?, bias.as_ref().map(CpuValues::slice).transpose()?))
    }
}

struct FrozenOp(Arc<Frozen>);

impl CustomOp1 for FrozenOp {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, _) = layout.shape().dims2()?;
        let x = stored(storage, layout)?;
        let out = self.0.with_host(|matrix, bias| matrix.product(x, bias))?;
        Ok((CpuStorage::F32(out), Shape::from((rows, self.0.matrix.shape()[0]))))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.0.matrix.transposed_product(&grad.contiguous()?).map(Some)
    }
}

/// What several layers make of one row, one after the other, without a backward.
struct FrozenRow<const N: usize>([Arc<Frozen>; N]);

impl<const N: usize> CustomOp1 for FrozenRow<N> {
    fn name(&self) -> &'static str {
        "frozen-row"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let biases = array(self.0.each_ref(), |layer| layer.bias.as_ref().map(CpuValues::new).transpose())?;
        let mut layers = Vec::with_capacity(N);
        for (layer, bias) in self.0.iter().zip(&biases) {
            layers.push((layer.on_host()?, bias.as_ref().map(CpuValues::slice).transpose()?));
        }
        let out = HostMatrix::products_of_row(&layers, stored(storage, layout)?);
        let shape = Shape::from((1, out.len()));
        Ok((CpuStorage::F32(out), shape))
    }
}

/// The whole projection as one operation on (x, A, B): nothing in between is kept for the backward,
/// and the dropout mask is made again.
struct LoraOp {
    frozen: Arc<Frozen>,
    scale: f64,
    mask: Option<Mask>,
    /// Where the operation has been computed before with the same inputs.
    known: Option<Known>,
    /// On the CPU, for the backward.
    inner: Inner,
}

#[derive(Clone, Copy)]
struct Mask {
    key: MaskKey,
    rate: f32,
}

impl Mask {
    fn values(&self, len: usize) -> Vec<f32> {
        filled(len, PIECE, |start, piece| self.key.fill_from(self.rate, start, piece))
    }

    /// `mask ⊙ x` on the device of `x`, by candle's operations.
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        x * Tensor::from_vec(self.values(x.elem_count()), x.shape(), x.device())?
    }

    /// The same for what is not traced, by our kernel where there is one.
    fn apply_untraced(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return crate::cuda::dropout(&x.contiguous()?, &self.key.parameters(self.rate));
        }
        self.apply(x)
    }
}

/// `mask ⊙ x`, or `x` where nothing is dropped.
fn masked_untraced(mask: Option<&Mask>, x: &Tensor) -> Result<Tensor> {
    mask.map_or_else(|| Ok(x.clone()), |mask| mask.apply_untraced(x))
}

impl LoraOp {
    /// With candle's own autograd.
    fn composed(&self, x: &Tensor, a: &Tensor, b: &Tensor, training: bool) -> Result<Tensor> {
        let masked = self.mask.as_ref().map_or_else(|| Ok(x.clone()), |mask| mask.apply(x))?;
        let delta = (masked.matmul(&a.t()?)? * self.scale)?.matmul(&b.t()?)?;
        self.frozen.composed(x, training)? + delta
    }

    /// By candle's operations on any device, with a backward that keeps nothing but the arguments.
    fn on_device(self, graph: Graph<'_>, x: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let result = match &self.known {
            Some(known) => {
                known.on_device(&Shape::from((x.dim(0)?, self.frozen.matrix.shape()[0])), x.device())?
            }
            None => {
                let (x, a, b) = (x.detach(), a.detach(), b.detach());
                let inner = masked_untraced(self.mask.as_ref(), &x)?.matmul(&a.t()?)?;
                (self.frozen.untraced(&x)? + (inner * self.scale)?.matmul(&b.t()?)?)?
            }
        };
        let Self { frozen, scale, mask, .. } = self;
        by_hand::op3(graph, "lora-linear", [x, a, b], result, move |[x, a, b], grad| {
            let masked = masked_untraced(mask.as_ref(), x)?;
            let inner = (masked.matmul(&a.t()?)? * scale)?;
            let of_b = grad.t()?.matmul(&inner)?;
            let of_inner = (grad.matmul(b)? * scale)?;
            let of_a = of_inner.t()?.matmul(&masked)?;
            let through_a = masked_untraced(mask.as_ref(), &of_inner.matmul(a)?)?;
            Ok([(frozen.matrix.transposed_product(grad)? + through_a)?, of_a, of_b])
        })
    }

    fn masked(&self, x: &[f32]) -> Option<Masked> {
        self.mask.as_ref().map(|mask| Masked::new(mask.values(x.len()), x))
    }
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
        let (rows, _) = x_layout.shape().dims2()?;
        let (out_features, r) = b_layout.shape().dims2()?;
        if let Some(known) = &self.known {
            return Ok((known.on_host(rows * out_features)?, Shape::from((rows, out_features))));
        }
        let (x, a, b) = (stored(x, x_layout)?, stored(a, a_layout)?, stored(b, b_layout)?);
        let factors = Factors { a, b, r, scale: self.scale as f32 };
        let masked = self.masked(x);
        let input = (x, masked.as_ref());
        let (out, inner) =
            self.frozen.with_host(|matrix, bias| lora::forward(matrix, factors, input, bias))?;
        self.inner.put(inner);
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
        let (out_features, r) = b.dims2()?;
        let grad = grad.contiguous()?;
        let (x_values, a_values, b_values, grad) =
            (CpuValues::new(x)?, CpuValues::new(a)?, CpuValues::new(b)?, CpuValues::new(&grad)?);
        let x_values = x_values.slice()?;
        let factors = Factors { a: a_values.slice()?, b: b_values.slice()?, r, scale: self.scale as f32 };
        let masked = self.masked(x_values);
        let input = (x_values, masked.as_ref());
        let gradients =
            lora::backward(self.frozen.on_host()?, factors, input, self.inner.take(), grad.slice()?);
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu).map(Some);
        let of_b = Tensor::from_vec(gradients.b, (r, out_features), &Device::Cpu)?.t()?.contiguous()?;
        Ok((tensor(gradients.x, x)?, tensor(gradients.a, a)?, Some(of_b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::{Decoding, DeviceMatrix, Nf4Tables};
    use crate::ops::testing::{assert_alike, var};
    use evalfw_engine::nf4::Nf4Tensor;
    use evalfw_engine::weights::Weight;
    use evalfw_kernels::Products;

    /// On the host's matrix, and by candle's operations on a tensor matrix, against candle's autograd.
    #[test]
    fn all_forms_are_alike() {
        let (rows, in_features, out_features, r) = (9, 40, 70, 4);
        let values: Vec<f32> = (0..out_features * in_features).map(|i| (i as f32 * 0.9).sin()).collect();
        let weight = Weight::Nf4(Nf4Tensor::quantize([out_features, in_features], &values));
        let tables = Nf4Tables::new(&Device::Cpu).unwrap();
        let bias = Some(var(&[out_features], 5).as_detached_tensor());
        let plain = (Decoding::Composed, Products::F32);
        let device = DeviceMatrix::new(weight.clone(), &Device::Cpu, &tables, plain).unwrap();
        let key = MaskKey { seed: 1, step: 2, micro_batch: 3, layer: 4, target: Target::Up };
        let (x, a, b) = (var(&[rows, in_features], 1), var(&[r, in_features], 2), var(&[out_features, r], 3));
        for rate in [None, Some(0.3)] {
            let op = |matrix| LoraOp {
                frozen: Arc::new(Frozen { matrix, bias: bias.clone() }),
                scale: 2.0,
                mask: rate.map(|rate| Mask { key, rate }),
                known: None,
                inner: Inner::default(),
            };
            let of_host = || FrozenMatrix::Host(HostMatrix::new(weight.clone(), Products::F32));
            let of_device = || FrozenMatrix::Device(device.clone());
            let composed = || op(of_device()).composed(&x, &a, &b, true);
            assert_alike(&[&x, &a, &b], || x.apply_op3(&a, &b, op(of_host())), composed);
            assert_alike(
                &[&x, &a, &b],
                || op(of_device()).on_device(Form::Device.into(), &x, &a, &b),
                composed,
            );
        }
        let frozen = |matrix| Arc::new(Frozen { matrix, bias: bias.clone() });
        let host = frozen(FrozenMatrix::Host(HostMatrix::new(weight, Products::F32)));
        let device = frozen(FrozenMatrix::Device(device));
        assert_alike(&[&x], || x.apply_op1(FrozenOp(host.clone())), || device.composed(&x, true));
        assert_alike(&[&x], || device.on_device(Form::Device.into(), &x), || device.composed(&x, true));
    }
}
