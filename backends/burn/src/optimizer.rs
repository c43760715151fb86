//! AdamW and gradient clipping, operation by operation as PyTorch does them.

use crate::guard::read;
use crate::lora::Factors;
use burn::tensor::Tensor;
use evalfw_engine::Result;
use evalfw_engine::protocol::TrainingConfig;

/// `torch.optim.AdamW` over the factors of an adapter.
pub struct AdamW {
    config: TrainingConfig,
    /// First and second moments.
    moments: Vec<(Factors, Factors)>,
    steps: i32,
}

impl AdamW {
    pub fn new(config: TrainingConfig, parameters: &[Factors]) -> Self {
        let moments = parameters.iter().map(|p| (p.zeros_like(), p.zeros_like())).collect();
        Self { config, moments, steps: 0 }
    }

    pub fn step(&mut self, parameters: &mut [Factors], gradients: Vec<Factors>) {
        self.steps += 1;
        for ((parameter, gradient), (first, second)) in
            parameters.iter_mut().zip(gradients).zip(&mut self.moments)
        {
            update(&self.config, self.steps, &mut parameter.a, gradient.a, [&mut first.a, &mut second.a]);
            update(&self.config, self.steps, &mut parameter.b, gradient.b, [&mut first.b, &mut second.b]);
        }
    }
}

/// Decoupled weight decay, then a step along the bias-corrected moments; epsilon is added to the root
/// of the corrected second moment.
fn update(
    config: &TrainingConfig,
    step: i32,
    parameter: &mut Tensor<2>,
    gradient: Tensor<2>,
    [first, second]: [&mut Tensor<2>; 2],
) {
    let TrainingConfig { learning_rate, beta1, beta2, epsilon, weight_decay, .. } = *config;
    first.inplace(|m| m * beta1 + gradient.clone() * (1.0 - beta1));
    second.inplace(|v| v * beta2 + gradient.square() * (1.0 - beta2));
    let root_of_correction = (1.0 - beta2.powi(step)).sqrt();
    let denominator = second.clone().sqrt() / root_of_correction + epsilon;
    let step_size = learning_rate / (1.0 - beta1.powi(step));
    let change = first.clone() / denominator * step_size;
    parameter.inplace(|p| p * (1.0 - learning_rate * weight_decay) - change);
}

/// L2 norm over all tensors together.
pub fn norm(gradients: &[Factors]) -> Result<f64> {
    let squares = gradients.iter().flat_map(|g| [&g.a, &g.b]).map(|t| t.clone().square().sum()).collect();
    let squares = read(Tensor::cat(squares, 0))?;
    Ok(squares.into_iter().map(f64::from).sum::<f64>().sqrt())
}

/// As `torch.nn.utils.clip_grad_norm_`.
pub fn clip(gradients: &mut [Factors], norm: f64, max_norm: f64) {
    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 {
        for gradient in gradients {
            gradient.a.inplace(|g| g * factor);
            gradient.b.inplace(|g| g * factor);
        }
    }
}
