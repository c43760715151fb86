//! Packed matrices in host memory, and flex, which decodes them there.

use super::{Decode, Packed, Storage};
use burn::backend::Flex;
use burn::backend::flex::{FlexDevice, FlexTensor};
use burn::backend::tensor::FloatTensor;
use burn::tensor::TensorData;
use evalfw_engine::nf4::Nf4Tensor;
use evalfw_engine::weights::{DenseData, DenseTensor};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// A matrix as the loader gave it. Cloning copies a reference.
#[derive(Debug, Clone)]
pub enum HostMatrix {
    Nf4(Arc<Nf4Tensor>),
    Dense(Arc<DenseTensor>),
}

/// Elements that one thread decodes at a time. A multiple of [`evalfw_engine::nf4::BLOCK`].
const RUN: usize = 16 * 1024;

impl HostMatrix {
    /// Decodes the elements, row-major, from `first` on until `out` is full, on all threads.
    fn decode(&self, first: usize, out: &mut [f32]) {
        out.par_chunks_mut(RUN).enumerate().for_each(|(index, out)| {
            let start = first + index * RUN;
            let range = start..start + out.len();
            match self {
                Self::Nf4(tensor) => tensor.dequantize_range(range, out),
                Self::Dense(tensor) => match &tensor.data {
                    DenseData::F32(values) => out.copy_from_slice(&values[range]),
                    DenseData::F16(values) => values[range].convert_to_f32_slice(out),
                    DenseData::Bf16(values) => values[range].convert_to_f32_slice(out),
                },
            }
        });
    }
}

impl Decode for Flex {
    fn decode(weight: &Packed<Self>, rows: Range<usize>, _device: &FlexDevice) -> FloatTensor<Self> {
        let Storage::Host(matrix) = &weight.storage else {
            unreachable!("flex stores its matrices on the host");
        };
        let mut values = vec![0.0; rows.len() * weight.columns];
        matrix.decode(rows.start * weight.columns, &mut values);
        FlexTensor::from_data(TensorData::new(values, [rows.len(), weight.columns]))
    }
}
