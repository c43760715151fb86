//! A checkpoint's weights as parameters of Burn's modules.

use super::network::{Attention, Block, Qwen2};
use crate::guard::read;
use burn::module::{Module, Param, ParamGroup, Quantizer};
use burn::nn::{Embedding, Linear, RmsNorm, SwiGlu};
use burn::tensor::quantization::{Calibration, QuantScheme, QuantValue, ScaleDtype};
use burn::tensor::{Device, Tensor, TensorData};
use evalfw_engine::lora::Target;
use evalfw_engine::protocol::Quantization;
use evalfw_engine::weights::{DenseTensor, ProjectionWeights, Weight, WeightLoader};
use evalfw_engine::{Error, Result};
use std::time::Instant;

/// The forms of the base that Burn has.
pub fn quantizations() -> Vec<Quantization> {
    vec![Quantization::None, Quantization::Native]
}

/// Reads one weight after the other. `device` is without autodiff.
pub fn load(loader: &mut WeightLoader<'_>, device: &Device) -> Result<Qwen2> {
    if !quantizations().contains(&loader.quantization()) {
        return Err(Error::unsupported("Burn has no NF4 of its own; its own 4-bit format is `native`"));
    }
    let layers = loader.config().num_hidden_layers;
    let epsilon = loader.config().rms_norm_eps;
    let embedding = Embedding { weight: frozen(table(loader.embedding()?, device)) };
    let blocks = (0..layers).map(|layer| block(loader, layer, device)).collect::<Result<_>>()?;
    let norm = norm(loader.final_norm()?, epsilon, device);
    let without_bias = |head| Linear { weight: frozen(input_by_output(head, device)), bias: None };
    let head = loader.head()?.map(without_bias);
    Ok(Qwen2 { embedding, blocks, norm, head })
}

fn block(loader: &mut WeightLoader<'_>, layer: usize, device: &Device) -> Result<Block> {
    let epsilon = loader.config().rms_norm_eps;
    let input_norm = norm(loader.input_norm(layer)?, epsilon, device);
    let post_attention_norm = norm(loader.post_attention_norm(layer)?, epsilon, device);
    let mut linear = |target| linear(loader, layer, target, device);
    let attention = Attention {
        query: linear(Target::Q)?,
        key: linear(Target::K)?,
        value: linear(Target::V)?,
        output: linear(Target::O)?,
    };
    let gate_and_up = SwiGlu { linear_inner: linear(Target::Gate)?, linear_outer: linear(Target::Up)? };
    Ok(Block { input_norm, attention, post_attention_norm, gate_and_up, down: linear(Target::Down)? })
}

fn linear(loader: &mut WeightLoader<'_>, layer: usize, target: Target, device: &Device) -> Result<Linear> {
    let projection = loader.projection(layer, target)?;
    let Weight::Dense(weight) = projection.weight else {
        return Err(Error::protocol("the loader gave NF4 for another form"));
    };
    let [out_features, _] = weight.shape;
    let weight = frozen(input_by_output(weight, device));
    let linear = Linear { weight, bias: projection.bias.map(|bias| frozen(vector(bias, device))) };
    match (loader.quantization(), scheme(out_features, device)) {
        (Quantization::Native, Some(scheme)) => {
            let start = Instant::now();
            let linear = quantize(linear, scheme);
            loader.quantized_in(start.elapsed());
            Ok(linear)
        }
        _ => Ok(linear),
    }
}

/// The first half of what `apply_qlora` does, one matrix at a time, so that the checkpoint is never there as a
/// whole in f32; the second half is `apply_lora`, when an adapter comes.
pub fn quantize(linear: Linear, scheme: QuantScheme) -> Linear {
    let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
    linear.quantize_weights_group(&mut quantizer, ParamGroup::from_path("weight"))
}

/// Four bits in blocks along the outputs, which are the contiguous ones in Burn's layout, with a scale in f32
/// each: 5 bits where blocks are of 32. Burn quantizes whole blocks only; a width that none divides stays f32.
pub fn scheme(out_features: usize, device: &Device) -> Option<QuantScheme> {
    let block = [32u8, 16, 8].into_iter().find(|&block| out_features.is_multiple_of(block.into()))?;
    let scheme = device.settings().quantization.scheme;
    Some(scheme.with_value(QuantValue::Q4S).per_block([block], ScaleDtype::F32))
}

/// The projections as Burn decodes them.
pub fn decoded(network: &Qwen2) -> Result<ProjectionWeights> {
    let weights = network.projections().map(|(place, linear)| {
        let weight = linear.weight.val().dequantize().transpose();
        Ok((place, read(weight)?))
    });
    weights.collect()
}

fn norm(weight: Vec<f32>, epsilon: f64, device: &Device) -> RmsNorm {
    RmsNorm { gamma: frozen(vector(weight, device)), epsilon }
}

fn vector(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let shape = [values.len()];
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn table(tensor: DenseTensor, device: &Device) -> Tensor<2> {
    let shape = tensor.shape;
    Tensor::from_data(TensorData::new(tensor.into_f32(), shape), device)
}

/// Burn's layout of a linear layer, `[in_features, out_features]`, contiguous.
fn input_by_output(tensor: DenseTensor, device: &Device) -> Tensor<2> {
    Tensor::from_data(table(tensor, device).transpose().into_data(), device)
}

fn frozen<const D: usize>(value: Tensor<D>) -> Param<Tensor<D>> {
    Param::from_tensor(value).set_require_grad(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::all_for_tests;
    use burn::module::{Lora, QLora};
    use burn::tensor::DType;

    fn example(shape: [usize; 2], device: &Device) -> (Linear, Tensor<2>) {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.61).sin()).collect();
        let weight = Tensor::from_data(TensorData::new(values, shape), device);
        (Linear { weight: frozen(weight.clone()), bias: None }, weight)
    }

    #[test]
    fn a_matrix_is_quantized_in_four_bits_as_by_apply_qlora() {
        for device in all_for_tests() {
            let device = device.device;
            let (linear, dense) = example([48, 64], &device);
            let scheme = scheme(64, &device).unwrap();
            let quantizer = Quantizer::new(Calibration::MinMax, scheme);
            let whole = linear.clone().apply_qlora(QLora::new(Lora::new(4, 8.0), quantizer));
            let halves = quantize(linear, scheme).apply_lora(Lora::new(4, 8.0));
            for linear in [&whole, &halves] {
                assert!(matches!(linear.weight.base().dtype(), DType::QFloat(_)));
                assert!(linear.weight.adapter().is_some());
            }
            let decoded = read(halves.weight.base().dequantize()).unwrap();
            assert_eq!(read(whole.weight.base().dequantize()).unwrap(), decoded);
            // Half a step of the largest magnitude in a block, which is at most 1.
            let dense = read(dense).unwrap();
            assert!(decoded.iter().zip(&dense).all(|(a, b)| (a - b).abs() <= 0.5 / 7.0 + 1e-6));
        }
    }

    #[test]
    fn a_width_that_no_block_divides_stays_as_it_is() {
        let device = Device::flex();
        assert_eq!(
            scheme(96, &device).and_then(|s| s.block_size()),
            scheme(32, &device).and_then(|s| s.block_size())
        );
        assert!(scheme(24, &device).is_some());
        assert!(scheme(36, &device).is_none());
    }
}
