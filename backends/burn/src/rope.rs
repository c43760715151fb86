//! Rotary positions in the half-split form.

use crate::fused::{RowOp, Tables};
use burn::tensor::{Device, Tensor, TensorData};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::rope::tables;
use std::sync::Arc;

/// The tables of the positions of one forward pass.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// `[1, positions, 1, head_dim / 2]`, as `sin`.
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl Rotation {
    /// For the positions `start..start + count`.
    pub fn new(config: &ModelConfig, start: usize, count: usize, device: &Device) -> Self {
        let (cos, sin) = tables(config.rope_theta, config.head_dim, start, count);
        let shape = [1, count, 1, config.head_dim / 2];
        let tensor = |values| Tensor::from_data(TensorData::new(values, shape), device);
        Self { cos: tensor(cos), sin: tensor(sin) }
    }

    /// Rotates `[batch, positions, heads, head_dim]`.
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let first = x.clone().narrow(3, 0, half);
        let second = x.narrow(3, half, half);
        let rotated_first = first.clone() * cos.clone() - second.clone() * sin.clone();
        let rotated_second = second * cos + first * sin;
        Tensor::cat(vec![rotated_first, rotated_second], 3)
    }
}

/// The same by one kernel, on flex: it rotates `[batch · positions, heads · head_dim]`.
pub fn fused_rotation(config: &ModelConfig, start: usize, count: usize) -> RowOp {
    let (cos, sin) = tables(config.rope_theta, config.head_dim, start, count);
    RowOp::Rotation(Arc::new(Tables { cos, sin, dim: config.head_dim }))
}
