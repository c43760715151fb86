//! RMSNorm.

use burn::tensor::{Device, Tensor, TensorData};

#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor<2>,
    epsilon: f64,
}

impl RmsNorm {
    pub fn new(weight: Vec<f32>, epsilon: f64, device: &Device) -> Self {
        let shape = [1, weight.len()];
        Self { weight: Tensor::from_data(TensorData::new(weight, shape), device), epsilon }
    }

    /// `[n, hidden]`, row by row.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let variance = x.clone().square().mean_dim(1);
        x * (variance + self.epsilon).sqrt().recip() * self.weight.clone()
    }
}
