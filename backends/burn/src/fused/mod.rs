//! Operations of a block on flex, each by one kernel of those that the engines on the CPU share, with a backward that
//! keeps nothing but the arguments. Composed of burn's own operations, each would go over memory several times, some of
//! them on one thread.

mod inference;
mod rows;

pub use inference::{KeyValueCache, attend_to_cache, layers};
pub use rows::{RowOp, Tables};

use crate::kept::Kept;
use crate::packed::{HostMatrix, values};
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Tensor, TensorData};
use evalfw_engine::dropout::MaskKey;
use evalfw_engine::lora::Target;
use evalfw_kernels::attention::{self, Shape};
use evalfw_kernels::elementwise::{swiglu_gradients_of, swiglu_of};
use evalfw_kernels::filled::{PIECE, filled};
use evalfw_kernels::lora::{self, Factors, Masked};
use std::sync::Arc;

/// `silu(gate) · up`
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::fused_swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// Causal attention of all heads, from `[examples · queries, heads · dim]` and `[examples · keys, kv_heads · dim]`.
pub fn attend([query, key, value]: [Tensor<2>; 3], shape: Shape) -> Tensor<2> {
    let (query, key, value) = (query.into_dispatch(), key.into_dispatch(), value.into_dispatch());
    Tensor::from_dispatch(Dispatch::fused_attention(query, key, value, shape))
}

/// `x Wᵀ + bias + scale · (mask ⊙ x) Aᵀ Bᵀ` for `x` `[n, in]`, `a` `[r, in]` and `b` `[out, r]`.
pub fn adapted(x: Tensor<2>, [a, b]: [Tensor<2>; 2], projection: Projection) -> Tensor<2> {
    let (x, a, b) = (x.into_dispatch(), a.into_dispatch(), b.into_dispatch());
    Tensor::from_dispatch(Dispatch::fused_adapted(x, a, b, projection))
}

/// A linear layer of the frozen base. Cloning copies references.
#[derive(Debug, Clone)]
pub struct HostLayer {
    pub matrix: HostMatrix,
    pub bias: Option<Arc<[f32]>>,
}

/// What is not trained of an adapted projection.
#[derive(Debug, Clone)]
pub struct Projection {
    pub layer: HostLayer,
    pub scale: f32,
    /// Dropout's rate, and the key of its mask, which is made again when it is needed.
    pub mask: Option<(f32, MaskKey)>,
    pub target: Target,
    pub kept: Kept,
}

impl Projection {
    fn masked(&self, x: &[f32]) -> Option<Masked> {
        let mask = |(rate, key): &(f32, MaskKey)| {
            filled(x.len(), PIECE, |start, piece| key.fill_from(*rate, start, piece))
        };
        self.mask.as_ref().map(|dropout| Masked::new(mask(dropout), x))
    }

    fn factors<'a>(&self, a: &'a FlexTensor, b: &'a FlexTensor) -> Factors<'a> {
        Factors { a: values(a), b: values(b), r: a.layout().shape()[0], scale: self.scale }
    }
}

#[backend_extension(Flex, Autodiff)]
trait FusedOps: Backend {
    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;

    fn fused_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        shape: Shape,
    ) -> FloatTensor<Self>;

    fn fused_adapted(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        projection: Projection,
    ) -> FloatTensor<Self>;
}

/// What the backward passes need of a backend; they have no gradients themselves.
trait FusedGradients: FusedOps {
    fn swiglu_gradients(args: [FloatTensor<Self>; 2], grad: FloatTensor<Self>) -> [FloatTensor<Self>; 2];

    fn attention_gradients(
        args: [FloatTensor<Self>; 3],
        shape: Shape,
        grad: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 3];

    fn adapted_gradients(
        args: [FloatTensor<Self>; 3],
        projection: Projection,
        grad: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 3];
}

impl FusedOps for Flex {
    fn fused_swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        let [gate, up] = [gate, up].map(|x| x.to_contiguous());
        like(&gate, swiglu_of(values(&gate), values(&up)))
    }

    fn fused_attention(query: FlexTensor, key: FlexTensor, value: FlexTensor, shape: Shape) -> FlexTensor {
        let [query, key, value] = [query, key, value].map(|x| x.to_contiguous());
        let out = attention::forward(shape, values(&query), values(&key), values(&value));
        like(&query, out)
    }

    fn fused_adapted(x: FlexTensor, a: FlexTensor, b: FlexTensor, projection: Projection) -> FlexTensor {
        let [x, a, b] = [x, a, b].map(|x| x.to_contiguous());
        let HostLayer { matrix, bias } = &projection.layer;
        let shape = [x.layout().shape()[0], matrix.shape()[0]];
        let out = projection.kept.result(projection.target, shape[0] * shape[1], || {
            let masked = projection.masked(values(&x));
            let input = (values(&x), masked.as_ref());
            lora::forward(matrix, projection.factors(&a, &b), input, bias.as_deref()).0
        });
        FlexTensor::from_data(TensorData::new(out, shape))
    }
}

impl FusedGradients for Flex {
    fn swiglu_gradients(args: [FlexTensor; 2], grad: FlexTensor) -> [FlexTensor; 2] {
        let ([gate, up], grad) = (args.map(|x| x.to_contiguous()), grad.to_contiguous());
        let [of_gate, of_up] = swiglu_gradients_of(values(&gate), values(&up), values(&grad));
        [like(&gate, of_gate), like(&up, of_up)]
    }

    fn attention_gradients(args: [FlexTensor; 3], shape: Shape, grad: FlexTensor) -> [FlexTensor; 3] {
        let ([query, key, value], grad) = (args.map(|x| x.to_contiguous()), grad.to_contiguous());
        let gradients =
            attention::backward(shape, values(&query), values(&key), values(&value), values(&grad));
        [like(&query, gradients.q), like(&key, gradients.k), like(&value, gradients.v)]
    }

    fn adapted_gradients(args: [FlexTensor; 3], projection: Projection, grad: FlexTensor) -> [FlexTensor; 3] {
        let ([x, a, b], grad) = (args.map(|x| x.to_contiguous()), grad.to_contiguous());
        let masked = projection.masked(values(&x));
        let (input, factors) = ((values(&x), masked.as_ref()), projection.factors(&a, &b));
        let matrix = &projection.layer.matrix;
        let gradients = lora::backward(matrix, factors, input, None, values(&grad));
        let of_b = TensorData::new(gradients.b, [factors.r, matrix.shape()[0]]);
        let of_b = FlexTensor::from_data(of_b).transpose(0, 1).to_contiguous();
        [like(&x, gradients.x), like(&a, gradients.a), of_b]
    }
}

/// New values in the shape of a tensor.
fn like(tensor: &FlexTensor, values: Vec<f32>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, tensor.layout().shape().clone()))
}

/// Computes an operation and, where an argument is differentiated, keeps all of them for its backward.
fn tracked<B: Backend, C: CheckpointStrategy, Op, const N: usize>(
    op: Op,
    args: [FloatTensor<Autodiff<B, C>>; N],
    compute: impl FnOnce([FloatTensor<B>; N]) -> FloatTensor<B>,
) -> FloatTensor<Autodiff<B, C>>
where
    Op: Backward<B, N, State = [FloatTensor<B>; N]>,
{
    let nodes = args.each_ref().map(|arg| arg.node());
    let args = args.map(|arg| arg.into_primitive());
    let out = compute(args.clone());
    match op.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(step) => step.finish(args, out),
        OpsKind::UnTracked(step) => step.finish(out),
    }
}

impl<B: FusedGradients, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        tracked::<B, C, _, _>(SwiGlu, [gate, up], |[gate, up]| B::fused_swiglu(gate, up))
    }

    fn fused_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        shape: Shape,
    ) -> FloatTensor<Self> {
        tracked::<B, C, _, _>(Attention(shape), [query, key, value], |[query, key, value]| {
            B::fused_attention(query, key, value, shape)
        })
    }

    fn fused_adapted(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        projection: Projection,
    ) -> FloatTensor<Self> {
        tracked::<B, C, _, _>(Adapted(projection.clone()), [x, a, b], |[x, a, b]| {
            B::fused_adapted(x, a, b, projection)
        })
    }
}

#[derive(Debug)]
struct SwiGlu;

impl<B: FusedGradients> Backward<B, 2> for SwiGlu {
    type State = [FloatTensor<B>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let of_args = B::swiglu_gradients(ops.state, grads.consume::<B>(&ops.node));
        register::<B, 2>(ops.parents.map(|parent| parent.map(|parent| parent.id)), of_args, grads);
    }
}

#[derive(Debug)]
struct Attention(Shape);

impl<B: FusedGradients> Backward<B, 3> for Attention {
    type State = [FloatTensor<B>; 3];

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let of_args = B::attention_gradients(ops.state, self.0, grads.consume::<B>(&ops.node));
        register::<B, 3>(ops.parents.map(|parent| parent.map(|parent| parent.id)), of_args, grads);
    }
}

#[derive(Debug)]
struct Adapted(Projection);

impl<B: FusedGradients> Backward<B, 3> for Adapted {
    type State = [FloatTensor<B>; 3];

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let of_args = B::adapted_gradients(ops.state, self.0, grads.consume::<B>(&ops.node));
        register::<B, 3>(ops.parents.map(|parent| parent.map(|parent| parent.id)), of_args, grads);
    }
}

fn register<B: Backend, const N: usize>(
    parents: [Option<NodeId>; N],
    gradients: [FloatTensor<B>; N],
    grads: &mut Gradients,
) {
    for (parent, gradient) in parents.into_iter().zip(gradients) {
        if let Some(parent) = parent {
            grads.register::<B>(parent, gradient);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::read;
    use burn::tensor::Device;
    use burn::tensor::activation::{silu, softmax};
    use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
    use evalfw_kernels::Products;

    pub fn leaf(shape: [usize; 2], frequency: f32) -> Tensor<2> {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * frequency).sin()).collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex()).autodiff().require_grad()
    }

    /// The same results and gradients, for a gradient of no special form.
    pub fn assert_alike(leaves: &[Tensor<2>], fused: Tensor<2>, composed: Tensor<2>) {
        let close = |a: Tensor<2>, b: Tensor<2>| {
            for (a, b) in read(a).unwrap().into_iter().zip(read(b).unwrap()) {
                assert!((a - b).abs() < 1e-5 * (1.0 + b.abs()), "{a} {b}");
            }
        };
        close(fused.clone().inner(), composed.clone().inner());
        let gradients = [fused, composed].map(|out| {
            let weight = leaf(out.dims(), 0.77).inner().autodiff();
            (out * weight).sum().backward()
        });
        for leaf in leaves {
            close(leaf.grad(&gradients[0]).unwrap(), leaf.grad(&gradients[1]).unwrap());
        }
    }

    #[test]
    fn swiglu_is_that_of_burn() {
        let (gate, up) = (leaf([7, 19], 0.3), leaf([7, 19], 0.7));
        let composed = silu(gate.clone()) * up.clone();
        assert_alike(&[gate.clone(), up.clone()], swiglu(gate, up), composed);
    }

    #[test]
    fn an_adapted_projection_is_that_of_burn() {
        let (shape @ [out_features, in_features], r) = ([33, 20], 4);
        let values: Vec<f32> = (0..out_features * in_features).map(|i| (i as f32 * 0.13).sin()).collect();
        let weight = Tensor::<2>::from_data(TensorData::new(values.clone(), shape), &Device::flex());
        let bias: Vec<f32> = (0..out_features).map(|i| (i as f32 * 0.7).cos()).collect();
        let data = DenseData::F32(values);
        let matrix = HostMatrix::new(Weight::Dense(DenseTensor { shape, data }), Products::F32);
        let key = MaskKey { seed: 1, step: 2, micro_batch: 0, layer: 3, target: Target::O };
        for mask in [None, Some((0.3, key))] {
            let leaves =
                [leaf([5, in_features], 0.3), leaf([r, in_features], 0.7), leaf([out_features, r], 1.1)];
            let [x, a, b] = leaves.clone();
            let masked = match mask {
                Some((rate, key)) => {
                    let mask = TensorData::new(key.mask(rate, 5 * in_features), [5, in_features]);
                    x.clone() * Tensor::from_data(mask, &Device::flex())
                }
                None => x.clone(),
            };
            let delta = (masked.matmul(a.clone().transpose()) * 0.5).matmul(b.clone().transpose());
            let of_bias =
                Tensor::<2>::from_data(TensorData::new(bias.clone(), [1, out_features]), &Device::flex());
            let composed = x.clone().matmul(weight.clone().transpose()) + of_bias + delta;
            let matrix = matrix.clone();
            let layer = HostLayer { matrix, bias: Some(bias.clone().into()) };
            let projection = Projection { layer, scale: 0.5, mask, target: Target::O, kept: Kept::No };
            assert_alike(&leaves, adapted(x, [a, b], projection), composed);
        }
    }

    #[test]
    fn attention_is_that_of_burn() {
        let (queries, dim) = (70, 8);
        let shape = Shape { examples: 1, queries, keys: queries, heads: 1, kv_heads: 1, dim };
        let [query, key, value] = [0.3, 0.7, 1.1].map(|frequency| leaf([queries, dim], frequency));
        let hidden = Tensor::<2, burn::tensor::Bool>::tril_mask([queries, queries], 0, &query.device());
        let scores = query.clone().matmul(key.clone().transpose()) * (dim as f64).powf(-0.5);
        let composed = softmax(scores.mask_fill(hidden, f32::MIN), 1).matmul(value.clone());
        let leaves = [query, key, value];
        assert_alike(&leaves, attend(leaves.clone(), shape), composed);
    }

    /// In two parts, the last of which sees what the first has left.
    #[test]
    fn attention_to_a_cache_is_that_to_all_positions() {
        let (positions, dim) = (5, 8);
        let shape = Shape { examples: 1, queries: positions, keys: positions, heads: 2, kv_heads: 1, dim };
        let [query, key, value] = [(2 * dim, 0.3), (dim, 0.7), (dim, 1.1)]
            .map(|(width, frequency)| leaf([positions, width], frequency).inner());
        let whole = attend([query.clone(), key.clone(), value.clone()], shape);
        let cache = KeyValueCache::default();
        let parts = [(0, 3), (3, 1), (4, 1)].map(|(first, count)| {
            let part = [&query, &key, &value].map(|x| x.clone().narrow(0, first, count));
            attend_to_cache(part, &cache, Shape { queries: count, ..shape })
        });
        let (whole, parts) = (read(whole).unwrap(), read(Tensor::cat(parts.into(), 0)).unwrap());
        assert!(whole.iter().zip(&parts).all(|(a, b)| (a - b).abs() < 1e-6), "{whole:?} {parts:?}");
    }

    #[test]
    fn layers_of_one_row_stand_side_by_side() {
        let width = 20;
        let layer = |height: usize, bias: Option<Vec<f32>>| {
            let values = (0..height * width).map(|i| (i as f32 * 0.13).sin()).collect();
            let data = DenseData::F32(values);
            let matrix =
                HostMatrix::new(Weight::Dense(DenseTensor { shape: [height, width], data }), Products::F32);
            HostLayer { matrix, bias: bias.map(Into::into) }
        };
        let all = [layer(3, None), layer(7, Some(vec![1.0; 7])), layer(1, None)];
        let x = leaf([1, width], 0.3).inner();
        let together = read(layers(x.clone(), all.to_vec())).unwrap();
        let apart: Vec<f32> =
            all.into_iter().flat_map(|layer| read(layers(x.clone(), vec![layer])).unwrap()).collect();
        assert_eq!(together, apart);
        let plain = read(layers(x, vec![layer(7, None)])).unwrap();
        assert!(plain.iter().zip(&together[3..10]).all(|(a, b)| (a + 1.0 - b).abs() < 1e-5));
    }
}
