//! Frozen matrices in few bits, decoded for one product at a time.
//!
//! This is an extension of burn: two operations with an implementation for each of its backends, and
//! one for autodiff whose backward pass keeps the packed matrix and nothing else. There is no gradient
//! for the matrix. How a backend multiplies is known in its own module only.

mod cube;
mod host;

pub use host::{HostMatrix, values};

use crate::product::ProductOps;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::Slice;
use std::ops::Range;

/// Some rows of a packed matrix `[out_features, in_features]`.
#[derive(Debug, Clone, ExtensionType)]
pub struct Packed<B: Backend> {
    #[extension_type]
    pub storage: Storage<B>,
    pub rows: Range<usize>,
    pub columns: usize,
    /// Rows that are decoded at a time: bounds the memory of a product. A multiple of
    /// [`ROW_ALIGNMENT`].
    pub piece: usize,
}

/// Pieces begin at multiples of this many rows, so that they begin with a whole block of NF4.
pub const ROW_ALIGNMENT: usize = evalfw_engine::nf4::BLOCK;

/// Where the bits are. Cloning copies a reference.
#[derive(Debug, Clone, ExtensionType)]
pub enum Storage<B: Backend> {
    /// In host memory, as the loader gave them: for flex. All rows.
    Host(HostMatrix),
    /// In a buffer of 32-bit words: for wgpu.
    Words { words: IntTensor<B>, format: WordFormat },
}

/// What the words of a device buffer mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WordFormat {
    /// Two values a word, the first in the low half.
    Bf16,
    /// NF4 codes from word 0, 8 a word, and from these words on: the 8-bit scales, 4 a word; the nested
    /// scales as f32; the tables (levels, dynamic map, offset) as f32.
    Nf4 { scales: u32, nested: u32, tables: u32 },
}

/// Products with a packed matrix W.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait PackedOps: Backend {
    /// `x [n, in] · Wᵀ`, which is `[n, out]`.
    fn packed_matmul(x: FloatTensor<Self>, #[extension_type] weight: Packed<Self>) -> FloatTensor<Self>;

    /// `y [n, out] · W`, which is `[n, in]`.
    fn packed_matmul_transposed(
        y: FloatTensor<Self>,
        #[extension_type] weight: Packed<Self>,
    ) -> FloatTensor<Self>;
}

/// What a backend has to bring for the products by decoding.
trait Decode: ProductOps {
    /// The `rows` of the stored matrix as f32, `[rows, columns]`.
    fn decode(weight: &Packed<Self>, rows: Range<usize>) -> FloatTensor<Self>;
}

fn pieces<B: Decode>(weight: &Packed<B>) -> impl Iterator<Item = Range<usize>> + use<B> {
    let Range { start, end } = weight.rows.clone();
    let piece = weight.piece;
    (start..end).step_by(piece).map(move |first| first..end.min(first + piece))
}

fn matmul_by_decoding<B: Decode>(x: FloatTensor<B>, weight: &Packed<B>) -> FloatTensor<B> {
    let mut parts: Vec<_> = pieces(weight)
        .map(|rows| B::product(x.clone(), B::float_transpose(B::decode(weight, rows))))
        .collect();
    match parts.len() {
        1 => parts.remove(0),
        _ => B::float_cat(parts, 1),
    }
}

fn matmul_transposed_by_decoding<B: Decode>(y: FloatTensor<B>, weight: &Packed<B>) -> FloatTensor<B> {
    let count = y.shape()[0];
    let first = weight.rows.start;
    let product = |rows: Range<usize>| {
        let columns = rows.start - first..rows.end - first;
        let y = B::float_slice(y.clone(), &[Slice::from(0..count), Slice::from(columns)]);
        B::product(y, B::decode(weight, rows))
    };
    let sum = pieces(weight).map(product).reduce(B::float_add);
    sum.expect("a matrix has rows")
}

impl<B: PackedOps, C: CheckpointStrategy> PackedOps for Autodiff<B, C> {
    fn packed_matmul(x: FloatTensor<Self>, weight: Packed<Self>) -> FloatTensor<Self> {
        differentiable(Product::Plain, x, weight)
    }

    fn packed_matmul_transposed(y: FloatTensor<Self>, weight: Packed<Self>) -> FloatTensor<Self> {
        differentiable(Product::Transposed, y, weight)
    }
}

/// Each product is the derivative of the other.
#[derive(Debug, Clone, Copy)]
enum Product {
    Plain,
    Transposed,
}

impl Product {
    fn apply<B: PackedOps>(self, input: FloatTensor<B>, weight: Packed<B>) -> FloatTensor<B> {
        match self {
            Self::Plain => B::packed_matmul(input, weight),
            Self::Transposed => B::packed_matmul_transposed(input, weight),
        }
    }

    fn derivative(self) -> Self {
        match self {
            Self::Plain => Self::Transposed,
            Self::Transposed => Self::Plain,
        }
    }
}

impl<B: PackedOps> Backward<B, 1> for Product {
    type State = Packed<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [input] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        if let Some(input) = input {
            grads.register::<B>(input.id, self.derivative().apply::<B>(grad, ops.state));
        }
    }
}

fn differentiable<B: PackedOps, C: CheckpointStrategy>(
    product: Product,
    input: FloatTensor<Autodiff<B, C>>,
    weight: Packed<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let weight = inner::<B, C>(weight);
    match Backward::<B, 1>::prepare::<C>(product, [input.node()]).compute_bound().stateful() {
        OpsKind::Tracked(step) => {
            let output = product.apply::<B>(input.into_primitive(), weight.clone());
            step.finish(weight, output)
        }
        OpsKind::UnTracked(step) => step.finish(product.apply::<B>(input.into_primitive(), weight)),
    }
}

/// Both have the same integer tensors, but the compiler sees two types.
fn inner<B: Backend, C: CheckpointStrategy>(weight: Packed<Autodiff<B, C>>) -> Packed<B> {
    let storage = match weight.storage {
        Storage::Host(matrix) => Storage::Host(matrix),
        Storage::Words { words, format } => Storage::Words { words, format },
    };
    Packed { storage, rows: weight.rows, columns: weight.columns, piece: weight.piece }
}
