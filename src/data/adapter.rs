//! The LoRA initialisation that every engine gets.

use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{Adapter, LoraConfig, LoraPair, Target};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// PEFT's default: A from `kaiming_uniform(a = sqrt(5))`, which is uniform within ±1/sqrt(in_features),
/// and B zero.
pub fn initial_adapter(model: &ModelConfig, config: LoraConfig, seed: u64) -> Adapter {
    let mut tensors = std::collections::BTreeMap::new();
    for layer in 0..model.num_hidden_layers {
        for target in Target::ALL {
            let [out_features, in_features] = model.projection_shape(target);
            let bound = 1.0 / (in_features as f32).sqrt();
            // A stream of its own for each matrix: adding a layer changes none of the others.
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(((layer as u64) << 8) | target as u64);
            let a = (0..config.r * in_features).map(|_| random.random_range(-bound..bound)).collect();
            tensors.insert((layer, target), LoraPair { a, b: vec![0.0; out_features * config.r] });
        }
    }
    Adapter { config, tensors }
}
