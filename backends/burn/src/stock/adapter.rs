//! LoRA as Burn attaches it: the weight of a module becomes `base + scale · A B`, composed at each use.

use super::network::Qwen2;
use crate::guard::read;
use crate::lora::pair_of;
use burn::module::{Lora, LoraAdapter, Module, ModuleMapper, Param, ParamGroup};
use burn::tensor::{Device, Tensor, TensorData};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{Adapter, AdapterTensors, LoraPair, Target};
use evalfw_engine::{Error, Result};
use std::collections::BTreeMap;

/// `base` on `device`, which is one with autodiff, with the given factors in place of Burn's random ones.
pub fn attach(base: &Qwen2, adapter: &Adapter, config: &ModelConfig, device: &Device) -> Result<Qwen2> {
    let projections = base.projections().map(|(_, linear)| linear.weight.id).collect();
    let lora = Lora::new(adapter.config.r, adapter.config.lora_alpha)
        .set_param_group(ParamGroup::from_ids(projections));
    let network = base.clone().to_device(device).apply_lora(lora);
    let factors = Factors { values: given_factors(&network, adapter, config)?, device: device.clone() };
    fill(network, factors)
}

/// The values of a factor in the checkpoint's layout, `[r, in_features]` or `[out_features, r]`.
type Values = (Vec<f32>, [usize; 2]);

fn given_factors(network: &Qwen2, adapter: &Adapter, config: &ModelConfig) -> Result<BTreeMap<u64, Values>> {
    let r = adapter.config.r;
    let mut factors = BTreeMap::new();
    for (layer, target, attached) in attached(network)? {
        let [out_features, in_features] = config.projection_shape(target);
        let LoraPair { a, b } = pair_of(adapter, layer, target, config)?;
        factors.insert(attached.a.id.val(), (a.clone(), [r, in_features]));
        factors.insert(attached.b.id.val(), (b.clone(), [out_features, r]));
    }
    Ok(factors)
}

fn fill(network: Qwen2, mut factors: Factors) -> Result<Qwen2> {
    let network = network.map(&mut factors);
    match factors.values.is_empty() {
        true => Ok(network),
        false => Err(Error::framework("Burn did not visit all factors of the adapter")),
    }
}

/// Puts values in the place of those of parameters.
struct Factors {
    /// By the parameter's number.
    values: BTreeMap<u64, Values>,
    device: Device,
}

impl ModuleMapper for Factors {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((values, shape)) = self.values.remove(&param.id.val()) else { return param };
        param.map(|_| {
            let value = Tensor::<D>::from_data(TensorData::new(values, shape), &self.device);
            // A copy: what the optimizer reads and writes shall be contiguous, as Burn's own factors are.
            Tensor::from_data(value.transpose().into_data(), &self.device).require_grad()
        })
    }
}

/// The adapters of all projections.
pub fn attached(network: &Qwen2) -> Result<Vec<(usize, Target, &LoraAdapter)>> {
    let none = || Error::framework("Burn attached no adapter to a projection");
    network
        .projections()
        .map(|((layer, target), linear)| Ok((layer, target, linear.weight.adapter().ok_or_else(none)?)))
        .collect()
}

/// What `of` gives for each factor, in the layout of the checkpoint.
pub fn download(
    network: &Qwen2,
    of: impl Fn(&Param<Tensor<2>>) -> Result<Tensor<2>>,
) -> Result<AdapterTensors> {
    let mut tensors = AdapterTensors::new();
    for (layer, target, adapter) in attached(network)? {
        let values = |factor| read(of(factor)?.transpose());
        tensors.insert((layer, target), LoraPair { a: values(&adapter.a)?, b: values(&adapter.b)? });
    }
    Ok(tensors)
}
