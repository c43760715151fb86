//! A matrix of the frozen base. How it is stored and multiplied is known here and in [`packed`](crate::packed).

use crate::BurnDevice;
use crate::device::OpenDevice;
use crate::packed::{HostMatrix, Packed, PackedOps, Storage};
use burn::backend::Dispatch;
use burn::tensor::{Device, Tensor, TensorData};
use evalfw_engine::nf4::Nf4Tensor;
use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
use std::ops::Range;
use std::sync::Arc;

/// W, `[out_features, in_features]`. Never differentiated: no gradient for it is computed or kept.
#[derive(Debug)]
pub enum FrozenMatrix {
    /// f32, outside autodiff.
    Dense(Tensor<2>),
    Packed(Packed<Dispatch>),
}

impl FrozenMatrix {
    pub fn new(weight: Weight, device: &OpenDevice) -> Self {
        match weight {
            Weight::Nf4(tensor) => Self::nf4(tensor, device),
            Weight::Dense(tensor) => {
                let shape = tensor.shape;
                Self::Dense(dense(tensor.into_f32(), shape, &device.device))
            }
        }
    }

    fn nf4(tensor: Nf4Tensor, device: &OpenDevice) -> Self {
        let [rows, columns] = tensor.shape;
        let storage = match device.kind {
            BurnDevice::Flex => Storage::Host(HostMatrix::Nf4(Arc::new(tensor))),
            BurnDevice::Wgpu => Storage::nf4_words(&tensor, &device.device),
        };
        Self::Packed(Packed { storage, rows: 0..rows, columns })
    }

    /// Some rows of a table that stays as it is in host memory: on flex they are only referred to.
    pub fn rows_of(table: &Arc<DenseTensor>, rows: Range<usize>, device: &OpenDevice) -> Self {
        let columns = table.shape[1];
        let elements = rows.start * columns..rows.end * columns;
        if device.kind == BurnDevice::Flex {
            return Self::Packed(Packed {
                storage: Storage::Host(HostMatrix::Dense(table.clone())),
                rows,
                columns,
            });
        }
        let shape = [rows.len(), columns];
        match &table.data {
            DenseData::Bf16(values) => {
                let storage = Storage::bf16_words(&values[elements], &device.device);
                Self::Packed(Packed { storage, rows: 0..shape[0], columns })
            }
            DenseData::F16(values) => {
                let values = values[elements].iter().map(|v| v.to_f32()).collect();
                Self::Dense(dense(values, shape, &device.device))
            }
            DenseData::F32(values) => Self::Dense(dense(values[elements].to_vec(), shape, &device.device)),
        }
    }

    /// `x [n, in] · Wᵀ`, which is `[n, out]`; differentiable in `x`.
    pub fn matmul(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => x.matmul(weight.clone().transpose()),
            Self::Packed(weight) => {
                Tensor::from_dispatch(Dispatch::packed_matmul(x.into_dispatch(), weight.clone()))
            }
        }
    }

    /// `y [n, out] · W`, which is `[n, in]`; differentiable in `y`.
    pub fn matmul_transposed(&self, y: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => y.matmul(weight.clone()),
            Self::Packed(weight) => {
                Tensor::from_dispatch(Dispatch::packed_matmul_transposed(y.into_dispatch(), weight.clone()))
            }
        }
    }
}

fn dense(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), device)
}
