//! Frozen matrices in host memory, and flex: its products with them are the kernels that all engines on the CPU share.

use super::{Packed, PackedOps, Storage};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::tensor::TensorData;
use evalfw_engine::weights::Weight;
use evalfw_kernels::Products;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// A whole matrix as the loader gave it. Cloning copies a reference.
#[derive(Clone)]
pub struct HostMatrix(Arc<evalfw_kernels::HostMatrix>);

impl HostMatrix {
    pub fn new(weight: Weight, products: Products) -> Self {
        Self(Arc::new(evalfw_kernels::HostMatrix::new(weight, products)))
    }
}

impl Deref for HostMatrix {
    type Target = evalfw_kernels::HostMatrix;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl fmt::Debug for HostMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostMatrix").field(&self.shape()).finish()
    }
}

impl PackedOps for Flex {
    fn packed_matmul(x: FloatTensor<Self>, weight: Packed<Self>) -> FloatTensor<Self> {
        let matrix = matrix(&weight.storage);
        map_rows(&x, matrix.shape()[0], |x| matrix.product(x, None))
    }

    fn packed_matmul_transposed(y: FloatTensor<Self>, weight: Packed<Self>) -> FloatTensor<Self> {
        let matrix = matrix(&weight.storage);
        map_rows(&y, matrix.shape()[1], |y| matrix.transposed_product(y))
    }
}

fn matrix(storage: &Storage<Flex>) -> &HostMatrix {
    match storage {
        Storage::Host(matrix) => matrix,
        Storage::Words { .. } => unreachable!("flex stores its matrices on the host"),
    }
}

/// `of` makes the rows of the result, each `width` wide, out of those of the input.
fn map_rows(input: &FlexTensor, width: usize, of: impl FnOnce(&[f32]) -> Vec<f32>) -> FlexTensor {
    let input = input.to_contiguous();
    let rows = input.layout().shape()[0];
    FlexTensor::from_data(TensorData::new(of(values(&input)), [rows, width]))
}

/// Of a tensor that has been made contiguous.
pub fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("the engine computes in f32, and the tensor is contiguous")
}
