//! The trainable factors of the adapters.

use crate::dropout::Dropout;
use crate::fused::{self, HostLayer, Projection};
use crate::guard::read;
use crate::kept::Kept;
use crate::product::product;
use burn::tensor::{Device, Tensor, TensorData};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{Adapter, AdapterTensors, LoraConfig, LoraPair, Target};
use evalfw_engine::{Error, Result};

/// Adapted projections of a layer.
pub const PER_LAYER: usize = Target::ALL.len();

/// The factors of one projection, or their gradients, or their moments.
#[derive(Debug, Clone)]
pub struct Factors {
    /// `[r, in_features]`
    pub a: Tensor<2>,
    /// `[out_features, r]`
    pub b: Tensor<2>,
}

impl Factors {
    pub fn zeros_like(&self) -> Self {
        Self { a: self.a.zeros_like(), b: self.b.zeros_like() }
    }
}

/// An adapter on the device. Its tensors are outside autodiff; a step makes leaves of them.
pub struct Lora {
    pub config: LoraConfig,
    /// By layer, then in the order of [`Target::ALL`].
    pub factors: Vec<Factors>,
}

impl Lora {
    pub fn new(adapter: &Adapter, model: &ModelConfig, device: &Device) -> Result<Self> {
        let r = adapter.config.r;
        let mut factors = Vec::with_capacity(model.num_hidden_layers * PER_LAYER);
        let tensor =
            |values: &[f32], shape| Tensor::from_data(TensorData::new(values.to_vec(), shape), device);
        for layer in 0..model.num_hidden_layers {
            for target in Target::ALL {
                let [out_features, in_features] = model.projection_shape(target);
                let pair = pair_of(adapter, layer, target, model)?;
                let (a, b) = (tensor(&pair.a, [r, in_features]), tensor(&pair.b, [out_features, r]));
                factors.push(Factors { a, b });
            }
        }
        Ok(Self { config: adapter.config.clone(), factors })
    }

    /// Leaves for a backward pass through `layer`.
    pub fn leaves(&self, layer: usize) -> Vec<Factors> {
        let leaf = |tensor: &Tensor<2>| tensor.clone().autodiff().require_grad();
        self.factors[layer * PER_LAYER..][..PER_LAYER]
            .iter()
            .map(|factors| Factors { a: leaf(&factors.a), b: leaf(&factors.b) })
            .collect()
    }

    /// The adapters of `layer`, outside autodiff.
    pub fn layer(&self, layer: usize, dropout: Option<Dropout>) -> LoraLayer<'_> {
        self.layer_with(&self.factors[layer * PER_LAYER..][..PER_LAYER], layer, dropout)
    }

    /// The adapters of `layer` with the given leaves in place of the factors.
    pub fn layer_with<'a>(
        &self,
        leaves: &'a [Factors],
        layer: usize,
        dropout: Option<Dropout>,
    ) -> LoraLayer<'a> {
        LoraLayer { factors: leaves, scale: self.config.scale(), layer, dropout, kept: &Kept::No }
    }
}

/// The values of one projection's factors, of which there are as many as the model needs.
pub fn pair_of<'a>(
    adapter: &'a Adapter,
    layer: usize,
    target: Target,
    model: &ModelConfig,
) -> Result<&'a LoraPair> {
    let module = target.module();
    let missing = || Error::input(format_args!("the adapter has nothing for layer {layer}, {module}"));
    let pair = adapter.tensors.get(&(layer, target)).ok_or_else(missing)?;
    let ([out_features, in_features], r) = (model.projection_shape(target), adapter.config.r);
    for (values, shape) in [(&pair.a, [r, in_features]), (&pair.b, [out_features, r])] {
        if values.len() != shape[0] * shape[1] {
            return Err(Error::input(format_args!(
                "adapter of layer {layer}, {module}: {} values where {shape:?} are needed",
                values.len()
            )));
        }
    }
    Ok(pair)
}

/// Reads factors back, whatever they are: weights or gradients.
pub fn download(factors: &[Factors]) -> Result<AdapterTensors> {
    let mut tensors = AdapterTensors::new();
    for (index, factors) in factors.iter().enumerate() {
        let pair = LoraPair { a: read(factors.a.clone())?, b: read(factors.b.clone())? };
        tensors.insert((index / PER_LAYER, Target::ALL[index % PER_LAYER]), pair);
    }
    Ok(tensors)
}

/// The adapters of one layer in one forward pass.
#[derive(Clone, Copy)]
pub struct LoraLayer<'a> {
    factors: &'a [Factors],
    scale: f64,
    layer: usize,
    dropout: Option<Dropout>,
    kept: &'a Kept,
}

impl<'a> LoraLayer<'a> {
    /// The same over a block whose results are `kept`, on the CPU.
    pub fn keeping(self, kept: &'a Kept) -> Self {
        Self { kept, ..self }
    }

    /// `x Wᵀ + bias + scale · (dropout(x) · Aᵀ) · Bᵀ`, which is `[n, out_features]`.
    pub fn project(&self, target: Target, x: Tensor<2>, layer: &HostLayer) -> Tensor<2> {
        let Factors { a, b } = self.factors[target as usize].clone();
        let mask = self.dropout.map(|dropout| dropout.key(self.layer, target));
        let (scale, kept) = (self.scale as f32, self.kept.clone());
        let projection = Projection { layer: layer.clone(), scale, mask, target, kept };
        fused::adapted(x, [a, b], projection)
    }

    /// `scale · (dropout(x) · Aᵀ) · Bᵀ`
    pub fn delta(&self, target: Target, x: Tensor<2>) -> Tensor<2> {
        let Factors { a, b } = self.factors[target as usize].clone();
        let x = match self.dropout {
            Some(dropout) => dropout.apply(x, self.layer, target),
            None => x,
        };
        product(product(x, a.transpose()) * self.scale, b.transpose())
    }
}
