//! The products of tensors: on a GPU by the kernel that [`tune`](crate::tune) chose, elsewhere burn's own.

use crate::tune::Tuner;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Cube, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;

/// `lhs [.., n, inner] · rhs [.., inner, m]`, with the same number of both; differentiable in both.
pub fn product<const D: usize>(lhs: Tensor<D>, rhs: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::product(lhs.into_dispatch(), rhs.into_dispatch()))
}

#[backend_extension(Cube, Flex, Autodiff)]
pub trait ProductOps: Backend {
    fn product(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl ProductOps for Cube {
    fn product(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self> {
        match Tuner::get() {
            Some(tuner) => tuner.multiply(lhs, rhs),
            None => Self::float_matmul(lhs, rhs),
        }
    }
}

impl ProductOps for Flex {
    fn product(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(lhs, rhs)
    }
}

impl<B: ProductOps, C: CheckpointStrategy> ProductOps for Autodiff<B, C> {
    fn product(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self> {
        // The gradient of either takes the other.
        let of_rhs = rhs.is_tracked().then(|| lhs.primitive().clone());
        let of_lhs = lhs.is_tracked().then(|| rhs.primitive().clone());
        let nodes = [lhs.node(), rhs.node()];
        let product = || B::product(lhs.into_primitive(), rhs.into_primitive());
        match Backward::<B, 2>::prepare::<C>(Product, nodes).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish([of_rhs, of_lhs], product()),
            OpsKind::UnTracked(step) => step.finish(product()),
        }
    }
}

#[derive(Debug)]
struct Product;

impl<B: ProductOps> Backward<B, 2> for Product {
    /// The factors, where they are needed.
    type State = [Option<FloatTensor<B>>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let ([lhs_parent, rhs_parent], [lhs, rhs]) = (ops.parents, ops.state);
        if let (Some(parent), Some(rhs)) = (lhs_parent, rhs) {
            grads.register::<B>(parent.id, B::product(grad.clone(), B::float_transpose(rhs)));
        }
        if let (Some(parent), Some(lhs)) = (rhs_parent, lhs) {
            grads.register::<B>(parent.id, B::product(B::float_transpose(lhs), grad));
        }
    }
}
