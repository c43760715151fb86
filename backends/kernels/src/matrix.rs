//! Frozen matrices in the host's memory.

use crate::argmax::Screen;
use crate::elementwise::widen_bf16;
use crate::{nf4, product, vector};
use evalfw_engine::nf4::{BLOCK, Nf4Tensor};
use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::sync::OnceLock;

/// `[out_features, in_features]`, or `[vocab_size, hidden_size]`, in the form in which it is stored.
pub struct HostMatrix {
    pub(crate) shape: [usize; 2],
    pub(crate) elements: Elements,
    pub(crate) products: Products,
    /// Made when it is first asked for: who only trains has no use for it.
    screen: OnceLock<Screen>,
}

/// The update `scale · B A` of a matrix, which is never added up.
pub struct LowRank {
    /// `[r, in_features]`
    pub a: HostMatrix,
    /// `[out_features, r]`
    pub b: HostMatrix,
    pub scale: f32,
}

impl LowRank {
    /// From row-major factors, with products of the matrix that they update.
    pub fn new(matrix: &HostMatrix, (a, b): (&[f32], &[f32]), scale: f32) -> Self {
        let [out_features, in_features] = matrix.shape;
        let r = a.len() / in_features;
        let factor = |shape, values: &[f32]| {
            let data = DenseData::F32(values.to_vec());
            HostMatrix::new(Weight::Dense(DenseTensor { shape, data }), matrix.products)
        };
        Self { a: factor([r, in_features], a), b: factor([out_features, r], b), scale }
    }
}

/// The type of the factors of a product. Sums are in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    #[default]
    F32,
    /// Or what rounds by no more and is faster on this CPU: [`Factors`](crate::level::Factors).
    Bf16,
}

pub(crate) enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Nf4(Nf4Tensor),
}

impl HostMatrix {
    pub fn new(weight: Weight, products: Products) -> Self {
        let (shape, elements) = match weight {
            Weight::Nf4(tensor) => (tensor.shape, Elements::Nf4(tensor)),
            Weight::Dense(tensor) => {
                let elements = match tensor.data {
                    DenseData::F32(values) => Elements::F32(values),
                    DenseData::F16(values) => Elements::F16(values),
                    DenseData::Bf16(values) => Elements::Bf16(values),
                };
                (tensor.shape, elements)
            }
        };
        Self { shape, elements, products, screen: OnceLock::new() }
    }

    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// `x · Wᵀ + bias` `[rows, out_features]` for row-major `x` `[rows, in_features]`.
    pub fn product(&self, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        if x.len() != self.shape[1] {
            return product::product(self, x, bias);
        }
        Self::products_of_row(&[(self, bias)], x)
    }

    /// `x · Wᵀ + bias` of several matrices for one row of activations, one after the other.
    pub fn products_of_row(matrices: &[(&Self, Option<&[f32]>)], x: &[f32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(matrices.iter().map(|(matrix, _)| matrix.shape[0]).sum());
        for (matrix, bias) in matrices {
            match bias {
                Some(bias) => out.extend_from_slice(bias),
                None => out.resize(out.len() + matrix.shape[0], 0.0),
            }
        }
        let matrices: Vec<_> = matrices.iter().map(|(matrix, _)| *matrix).collect();
        vector::add_products(&matrices, x, &mut out);
        out
    }

    /// `y · W` `[rows, in_features]` for row-major `y` `[rows, out_features]`.
    pub fn transposed_product(&self, y: &[f32]) -> Vec<f32> {
        product::transposed_product(self, y)
    }

    /// `x · (W + scale · B A)ᵀ + bias`, and `scale · x · Aᵀ` `[rows, r]`.
    pub fn adapted_product(&self, update: &LowRank, x: &[f32], bias: Option<&[f32]>) -> (Vec<f32>, Vec<f32>) {
        product::adapted_product(self, update, x, bias)
    }

    /// `y · (W + scale · B A)`, and `scale · y · B` `[rows, r]`.
    pub fn adapted_transposed_product(&self, update: &LowRank, y: &[f32]) -> (Vec<f32>, Vec<f32>) {
        product::adapted_transposed_product(self, update, y)
    }

    /// `out += W · x` for one row of activations.
    pub fn add_product(&self, x: &[f32], out: &mut [f32]) {
        vector::add_products(&[self], x, out);
    }

    /// The first row whose product with `x` is the largest; `None` if a product is not a number.
    pub fn argmax(&self, x: &[f32]) -> Option<usize> {
        self.screen.get_or_init(|| Screen::new(self)).argmax(self, x)
    }

    /// Looks up rows, widened.
    pub fn rows(&self, ids: &[u32]) -> Vec<f32> {
        let width = self.shape[1];
        let mut out = vec![0.0; ids.len() * width];
        for (out, &id) in out.chunks_mut(width).zip(ids) {
            self.widen(id as usize * width, out);
        }
        out
    }

    /// The elements from `start` in bf16, where they are stored in it or can be decoded to it at once. `scratch` is
    /// memory to work in.
    pub(crate) fn in_bf16<'a>(
        &'a self,
        start: usize,
        len: usize,
        scratch: &'a mut Vec<bf16>,
    ) -> Option<&'a [bf16]> {
        match &self.elements {
            Elements::Bf16(values) => Some(&values[start..start + len]),
            Elements::Nf4(tensor) => {
                scratch.resize(len, bf16::ZERO);
                nf4::narrow(tensor, start, scratch).then_some(scratch)
            }
            Elements::F32(_) | Elements::F16(_) => None,
        }
    }

    /// Begins to fetch elements that are stored in bf16 and will be read soon. They need not be there.
    pub(crate) fn prefetch_stored(&self, start: usize, len: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Elements::Bf16(values) = &self.elements {
            const LINE: usize = 64 / size_of::<bf16>();
            for start in (start..start + len).step_by(LINE) {
                // SAFETY: a prefetch reads nothing that the program sees, wherever it points.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().wrapping_add(start).cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (start, len);
    }

    /// Widens the elements from `start` in the order of their storage.
    pub(crate) fn widen(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match &self.elements {
            Elements::F32(values) => out.copy_from_slice(&values[range]),
            Elements::F16(values) => values[range].convert_to_f32_slice(out),
            Elements::Bf16(values) => widen_bf16(&values[range], out),
            Elements::Nf4(tensor) if start.is_multiple_of(BLOCK) => nf4::widen(tensor, start, out),
            Elements::Nf4(tensor) => {
                // Cut out of the blocks it lies in.
                let from = start / BLOCK * BLOCK;
                let mut blocks = vec![0.0; range.end - from];
                nf4::widen(tensor, from, &mut blocks);
                out.copy_from_slice(&blocks[start - from..]);
            }
        }
    }
}
