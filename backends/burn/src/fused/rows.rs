//! What is computed row by row: normalisation and rotation.

use super::{like, register, tracked};
use crate::packed::values;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use evalfw_kernels::norm::{rms_norm, rms_norm_gradient};
use evalfw_kernels::rope::Angles;
use std::sync::Arc;

/// An operation on `[n, width]`.
#[derive(Debug, Clone)]
pub enum RowOp {
    RmsNorm {
        weight: Arc<[f32]>,
        epsilon: f32,
    },
    /// Of as many heads as the width has.
    Rotation(Arc<Tables>),
}

/// Of the positions of a pass, each `[positions, dim / 2]`.
#[derive(Debug)]
pub struct Tables {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    pub dim: usize,
}

impl RowOp {
    pub fn apply(self, x: Tensor<2>) -> Tensor<2> {
        Tensor::from_dispatch(Dispatch::fused_rows(x.into_dispatch(), self))
    }
}

impl Tables {
    fn angles(&self) -> Angles<'_> {
        Angles { cos: &self.cos, sin: &self.sin, dim: self.dim }
    }
}

#[backend_extension(Flex, Autodiff)]
trait FusedRows: Backend {
    fn fused_rows(x: FloatTensor<Self>, op: RowOp) -> FloatTensor<Self>;
}

trait RowGradients: FusedRows {
    fn row_gradient(x: FloatTensor<Self>, op: RowOp, grad: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl FusedRows for Flex {
    fn fused_rows(x: FloatTensor<Self>, op: RowOp) -> FloatTensor<Self> {
        let x = x.to_contiguous();
        let width = x.layout().shape()[1];
        let out = match op {
            RowOp::RmsNorm { weight, epsilon } => rms_norm(values(&x), &weight, epsilon),
            RowOp::Rotation(tables) => tables.angles().rotate(values(&x), width / tables.dim),
        };
        like(&x, out)
    }
}

impl RowGradients for Flex {
    fn row_gradient(x: FloatTensor<Self>, op: RowOp, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let (x, grad) = (x.to_contiguous(), grad.to_contiguous());
        let width = x.layout().shape()[1];
        let of_x = match op {
            RowOp::RmsNorm { weight, epsilon } => {
                rms_norm_gradient(values(&x), &weight, epsilon, values(&grad))
            }
            RowOp::Rotation(tables) => tables.angles().rotate_back(values(&grad), width / tables.dim),
        };
        like(&x, of_x)
    }
}

impl<B: RowGradients, C: CheckpointStrategy> FusedRows for Autodiff<B, C> {
    fn fused_rows(x: FloatTensor<Self>, op: RowOp) -> FloatTensor<Self> {
        tracked::<B, C, _, _>(Rows(op.clone()), [x], |[x]| B::fused_rows(x, op))
    }
}

#[derive(Debug)]
struct Rows(RowOp);

impl<B: RowGradients> Backward<B, 1> for Rows {
    type State = [FloatTensor<B>; 1];

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x] = ops.state;
        let of_x = B::row_gradient(x, self.0, grads.consume::<B>(&ops.node));
        register::<B, 1>(ops.parents.map(|parent| parent.map(|parent| parent.id)), [of_x], grads);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_alike, leaf};
    use super::*;
    use burn::tensor::{Device, TensorData};
    use evalfw_engine::rope::tables;

    fn constant(values: Vec<f32>, shape: [usize; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    #[test]
    fn normalisation_is_that_of_its_definition() {
        let x = leaf([5, 37], 0.3);
        let weight: Vec<f32> = (0..37).map(|i| 1.0 + (i as f32).sin()).collect();
        let mean = x.clone().square().mean_dim(1);
        let composed = x.clone() / (mean + 1e-3).sqrt() * constant(weight.clone(), [1, 37]);
        let fused = RowOp::RmsNorm { weight: weight.into(), epsilon: 1e-3 }.apply(x.clone());
        assert_alike(&[x], fused, composed);
    }

    /// Of two examples, with two heads each.
    #[test]
    fn rotation_is_that_of_its_definition() {
        let (positions, dim) = (3, 4);
        let (cos, sin) = tables(100.0, dim, 7, positions);
        let x = leaf([2 * positions, 2 * dim], 0.3);
        // For each element: the cosine of its angle, and the sine with the sign that its partner has.
        let factor = |of: &dyn Fn(usize, usize) -> f32| {
            let place =
                |i: usize| (i / (2 * dim) % positions * (dim / 2) + i % (dim / 2), i % dim / (dim / 2));
            let all = (0..2 * positions * 2 * dim).map(|i| of(place(i).0, place(i).1));
            constant(all.collect(), [2 * positions, 2 * dim])
        };
        let cosines = factor(&|at, _| cos[at]);
        let sines = factor(&|at, half| if half == 0 { -sin[at] } else { sin[at] });
        let parts: Vec<_> = [2, 0, 6, 4].map(|first| x.clone().narrow(1, first, 2)).into();
        let composed = x.clone() * cosines + Tensor::cat(parts, 1) * sines;
        let fused = RowOp::Rotation(Arc::new(Tables { cos, sin, dim })).apply(x.clone());
        assert_alike(&[x], fused, composed);
    }
}
