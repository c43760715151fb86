//! Dropout on the input of the adapters.

use burn::tensor::{Device, Tensor, TensorData};
use evalfw_engine::StepInput;
use evalfw_engine::dropout::MaskKey;
use evalfw_engine::lora::Target;

/// The masks of one micro-batch. The same key gives the same mask again, so that a block can be
/// computed twice.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    rate: f32,
    seed: u64,
    step: u64,
    micro_batch: usize,
}

impl Dropout {
    /// None where nothing is dropped.
    pub fn new(rate: f32, input: &StepInput<'_>, micro_batch: usize) -> Option<Self> {
        (rate > 0.0).then_some(Self { rate, seed: input.dropout_seed, step: input.step, micro_batch })
    }

    /// Drops elements of the flattened `[n, in]` and scales up the others.
    pub fn apply(&self, x: Tensor<2>, layer: usize, target: Target) -> Tensor<2> {
        let shape = x.dims();
        let mask = self.mask(layer, target, shape, &x.device().inner());
        x * mask
    }

    /// The rate, and the key of the mask of one projection.
    pub fn key(&self, layer: usize, target: Target) -> (f32, MaskKey) {
        let Self { rate, seed, step, micro_batch } = *self;
        (rate, MaskKey { seed, step, micro_batch, layer, target })
    }

    fn mask(&self, layer: usize, target: Target, shape: [usize; 2], device: &Device) -> Tensor<2> {
        let (rate, key) = self.key(layer, target);
        let mask = key.mask(rate, shape[0] * shape[1]);
        Tensor::from_data(TensorData::new(mask, shape), device)
    }
}
