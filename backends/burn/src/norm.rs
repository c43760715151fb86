//! RMSNorm.

use crate::BurnDevice;
use crate::device::OpenDevice;
use crate::fused::RowOp;
use burn::tensor::{Tensor, TensorData};

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a model has few of them")]
pub enum RmsNorm {
    /// By one kernel.
    Fused(RowOp),
    Composed {
        /// `[1, hidden]`
        weight: Tensor<2>,
        epsilon: f64,
    },
}

impl RmsNorm {
    pub fn new(weight: Vec<f32>, epsilon: f64, device: &OpenDevice) -> Self {
        match device.kind {
            BurnDevice::Flex => {
                Self::Fused(RowOp::RmsNorm { weight: weight.into(), epsilon: epsilon as f32 })
            }
            BurnDevice::Wgpu => {
                let shape = [1, weight.len()];
                let weight = Tensor::from_data(TensorData::new(weight, shape), &device.device);
                Self::Composed { weight, epsilon }
            }
        }
    }

    /// `[n, hidden]`, row by row.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Fused(op) => op.clone().apply(x),
            Self::Composed { weight, epsilon } => {
                let variance = x.clone().square().mean_dim(1);
                x * (variance + *epsilon).sqrt().recip() * weight.clone()
            }
        }
    }
}
