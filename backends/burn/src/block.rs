//! A transformer block of Qwen2.

use crate::attention::{Heads, LayerCache, Pass, attend};
use crate::device::OpenDevice;
use crate::frozen::FrozenMatrix;
use crate::fused::swiglu;
use crate::lora::LoraLayer;
use crate::norm::RmsNorm;
use burn::tensor::activation::silu;
use burn::tensor::{Tensor, TensorData};
use evalfw_engine::Result;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::Target;
use evalfw_engine::weights::{self, WeightLoader};

pub struct Block {
    heads: Heads,
    input_norm: RmsNorm,
    post_attention_norm: RmsNorm,
    /// In the order of [`Target::ALL`].
    projections: Vec<Projection>,
}

impl Block {
    pub fn load(loader: &mut WeightLoader<'_>, layer: usize, device: &OpenDevice) -> Result<Self> {
        let norms = [loader.input_norm(layer)?, loader.post_attention_norm(layer)?];
        let config = loader.config();
        Self::new(config, norms, |target| loader.projection(layer, target), device)
    }

    /// Moves one projection after the other to the device.
    pub fn new(
        config: &ModelConfig,
        norms: [Vec<f32>; 2],
        mut projection: impl FnMut(Target) -> Result<weights::Projection>,
        device: &OpenDevice,
    ) -> Result<Self> {
        let norm = |weight| RmsNorm::new(weight, config.rms_norm_eps, &device.device);
        let [input_norm, post_attention_norm] = norms.map(norm);
        Ok(Self {
            heads: Heads::new(config),
            input_norm,
            post_attention_norm,
            projections: Target::ALL
                .iter()
                .map(|&target| Ok(Projection::new(projection(target)?, device)))
                .collect::<Result<_>>()?,
        })
    }

    /// `[n, hidden]`, where n is batch · positions of the pass. Differentiable in `x` and in the leaves
    /// of `lora`.
    pub fn forward(
        &self,
        x: Tensor<2>,
        pass: &Pass,
        lora: Option<LoraLayer<'_>>,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<2> {
        let project = |target: Target, x: Tensor<2>| {
            let Projection { weight, bias } = &self.projections[target as usize];
            let y = match lora {
                Some(lora) => lora.project(target, x, weight),
                None => weight.matmul(x),
            };
            match bias {
                Some(bias) => y + bias.clone(),
                None => y,
            }
        };

        let normed = self.input_norm.forward(x.clone());
        let query_key_value = [Target::Q, Target::K, Target::V].map(|target| project(target, normed.clone()));
        drop(normed);
        let x = x + project(Target::O, attend(&self.heads, pass, query_key_value, cache));

        let normed = self.post_attention_norm.forward(x.clone());
        let gate = project(Target::Gate, normed.clone());
        let up = project(Target::Up, normed);
        let gated = if pass.fused { swiglu(gate, up) } else { silu(gate) * up };
        x + project(Target::Down, gated)
    }
}

/// A linear layer of the frozen base.
struct Projection {
    weight: FrozenMatrix,
    /// `[1, out_features]`
    bias: Option<Tensor<2>>,
}

impl Projection {
    fn new(projection: weights::Projection, device: &OpenDevice) -> Self {
        let bias = projection.bias.map(|bias| {
            let shape = [1, bias.len()];
            Tensor::from_data(TensorData::new(bias, shape), &device.device)
        });
        Self { weight: FrozenMatrix::new(projection.weight, device), bias }
    }
}
