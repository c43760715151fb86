//! Memory of a GPU for the results of kernels.

use burn::tensor::{DType, Shape};
use burn_wgpu::CubeTensor;

/// An f32 tensor of `shape` on the device of `like`, whose values a kernel has yet to write.
pub fn unwritten(like: &CubeTensor, shape: impl Into<Shape>) -> CubeTensor {
    let (client, shape) = (like.client.clone(), shape.into());
    let buffer = client.empty(shape.num_elements() * size_of::<f32>());
    CubeTensor::new_contiguous(client, like.device.clone(), shape, buffer, DType::F32)
}
