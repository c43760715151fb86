//! Dropout on the input of the adapters.

use crate::buffer::unwritten;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Cube, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Tensor, TensorData};
use burn_wgpu::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;
use evalfw_engine::StepInput;
use evalfw_engine::dropout::{MaskKey, MaskParameters};
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
        let (rate, key) = self.key(layer, target);
        let like = x.clone().inner().into_dispatch();
        let mask = Tensor::from_dispatch(Dispatch::dropout_mask(like, (rate, key)));
        x * mask
    }

    /// The rate, and the key of the mask of one projection.
    pub fn key(&self, layer: usize, target: Target) -> (f32, MaskKey) {
        let Self { rate, seed, step, micro_batch } = *self;
        (rate, MaskKey { seed, step, micro_batch, layer, target })
    }
}

#[backend_extension(Cube, Flex)]
trait MaskOps: Backend {
    /// A mask with the shape of `like`, by its rate and key.
    fn dropout_mask(like: FloatTensor<Self>, mask: (f32, MaskKey)) -> FloatTensor<Self>;
}

impl MaskOps for Flex {
    fn dropout_mask(like: FloatTensor<Self>, (rate, key): (f32, MaskKey)) -> FloatTensor<Self> {
        let shape = like.shape();
        let mask = key.mask(rate, shape.num_elements());
        FlexTensor::from_data(TensorData::new(mask, shape))
    }
}

/// Where the mask is used: making it on the host and sending it takes as long as the rest of a step.
impl MaskOps for Cube {
    fn dropout_mask(like: CubeTensor, (rate, key): (f32, MaskKey)) -> CubeTensor {
        let MaskParameters { low, high, threshold, kept } = key.parameters(rate);
        let out = unwritten(&like, like.shape());
        let (client, elements) = (out.client.clone(), out.shape().num_elements());
        let cube_dim = CubeDim::new(&client, elements);
        let cube_count = calculate_cube_count_elemwise(&client, elements, cube_dim);
        let target = out.clone().into_buffer_arg();
        write_mask::launch(&client, cube_count, cube_dim, target, low, high, threshold, kept);
        out
    }
}

/// One thread an element; see [`MaskParameters`].
#[cube(launch)]
fn write_mask(out: &mut [f32], low: u32, high: u32, threshold: u32, kept: f32) {
    let index = ABSOLUTE_POS;
    if index < out.len() {
        let hash = mix(mix(spread(index as u32) ^ low) ^ high);
        out[index] = select(hash < threshold, 0.0, kept);
    }
}

/// Wraps around, as all products here.
#[cube]
fn spread(element: u32) -> u32 {
    element * 0x9E37_79B9
}

/// The finalizer of MurmurHash3.
#[cube]
fn mix(value: u32) -> u32 {
    let value = (value ^ (value >> 16)) * 0x85EB_CA6B;
    let value = (value ^ (value >> 13)) * 0xC2B2_AE35;
    value ^ (value >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::all_for_tests;
    use crate::guard::read;

    #[test]
    fn masks_are_those_of_the_key_on_every_device() {
        let input = StepInput { dropout_seed: 0xFEDC_BA98_7654_3210, step: 3, micro_batches: &[] };
        for rate in [0.05, 0.5] {
            let dropout = Dropout::new(rate, &input, 1).unwrap();
            let (rate, key) = dropout.key(5, Target::Up);
            let shape = [37, 129];
            for device in all_for_tests() {
                let ones = Tensor::<2>::ones(shape, &device.device);
                let found = dropout.apply(ones, 5, Target::Up);
                assert_eq!(read(found).unwrap(), key.mask(rate, 37 * 129), "{}", device.info.name);
            }
        }
    }
}
