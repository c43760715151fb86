//! A transformer block of Qwen2.

use crate::attention::{Heads, LayerCache, Pass, attend};
use crate::device::OpenDevice;
use crate::frozen::FrozenMatrix;
use crate::fused::{self, HostLayer, swiglu};
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
        let norm = |weight| RmsNorm::new(weight, config.rms_norm_eps, device);
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
        let normed = self.input_norm.forward(x.clone());
        let query_key_value = self.project_all([Target::Q, Target::K, Target::V], normed, lora);
        let x = x + self.project(Target::O, attend(&self.heads, pass, query_key_value, cache), lora);

        let normed = self.post_attention_norm.forward(x.clone());
        let [gate, up] = self.project_all([Target::Gate, Target::Up], normed, lora);
        let gated = if pass.is_fused() { swiglu(gate, up) } else { silu(gate) * up };
        x + self.project(Target::Down, gated, lora)
    }

    fn project(&self, target: Target, x: Tensor<2>, lora: Option<LoraLayer<'_>>) -> Tensor<2> {
        match (&self.projections[target as usize], lora) {
            (Projection::Host(layer), Some(lora)) => lora.project(target, x, layer),
            (Projection::Host(layer), None) => fused::layers(x, vec![layer.clone()]),
            (Projection::Device { weight, bias }, lora) => {
                let y = match lora {
                    Some(lora) => weight.matmul(x.clone()) + lora.delta(target, x),
                    None => weight.matmul(x),
                };
                match bias {
                    Some(bias) => y + bias.clone(),
                    None => y,
                }
            }
        }
    }

    /// Several of the same `x`; on the host all of them at once for one row.
    fn project_all<const N: usize>(
        &self,
        targets: [Target; N],
        x: Tensor<2>,
        lora: Option<LoraLayer<'_>>,
    ) -> [Tensor<2>; N] {
        let on_host = |target: Target| self.projections[target as usize].on_host().cloned();
        let is_one_row = lora.is_none() && x.dims()[0] == 1;
        let layers: Option<Vec<_>> = is_one_row.then(|| targets.into_iter().map(on_host).collect()).flatten();
        match layers {
            Some(layers) => {
                let widths: [usize; N] = std::array::from_fn(|i| layers[i].matrix.shape()[0]);
                let together = fused::layers(x, layers);
                let mut start = 0;
                widths.map(|width| {
                    start += width;
                    together.clone().narrow(1, start - width, width)
                })
            }
            None => targets.map(|target| self.project(target, x.clone(), lora)),
        }
    }
}

/// A linear layer of the frozen base.
#[allow(clippy::large_enum_variant, reason = "a model has few of them")]
enum Projection {
    Host(HostLayer),
    Device {
        weight: FrozenMatrix,
        /// `[1, out_features]`
        bias: Option<Tensor<2>>,
    },
}

impl Projection {
    fn new(projection: weights::Projection, device: &OpenDevice) -> Self {
        let weights::Projection { weight, bias } = projection;
        let weight = FrozenMatrix::new(weight, device);
        if let Some(matrix) = weight.host() {
            return Self::Host(HostLayer { matrix: matrix.clone(), bias: bias.map(Into::into) });
        }
        let bias = bias.map(|bias| {
            let shape = [1, bias.len()];
            Tensor::from_data(TensorData::new(bias, shape), &device.device)
        });
        Self::Device { weight, bias }
    }

    fn on_host(&self) -> Option<&HostLayer> {
        match self {
            Self::Host(layer) => Some(layer),
            Self::Device { .. } => None,
        }
    }
}
