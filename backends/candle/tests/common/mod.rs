//! Small random models, adapters and batches.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor};
use evalfw_candle::{CandleDevice, Variant};
use evalfw_engine::LoadedModel;
use evalfw_engine::batch::{Batch, IGNORE_INDEX};
use evalfw_engine::checkpoint::Checkpoint;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{Adapter, LoraConfig, LoraPair, Target};
use evalfw_engine::protocol::{LoadTimes, Quantization};
use evalfw_engine::weights::WeightLoader;
use std::collections::HashMap;
use std::path::Path;

/// The values of a model's tensors by name, row-major.
pub type Weights = HashMap<String, Vec<f32>>;

/// Two layers, grouped queries, and a theta that is no default.
pub fn config(tied: bool) -> ModelConfig {
    ModelConfig {
        vocab_size: 97,
        hidden_size: 32,
        intermediate_size: 80,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 512,
        rms_norm_eps: 1e-5,
        rope_theta: 50_000.0,
        tie_word_embeddings: tied,
    }
}

/// Standard normal values that depend on `seed` alone (SplitMix64, Box-Muller).
pub fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0xD134_2543_DE82_EF95);
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..len)
        .map(|_| ((-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
        .collect()
}

/// Weights large enough for the logits to differ clearly.
pub fn random_weights(config: &ModelConfig) -> Weights {
    let value = |index: usize, name: &str, len: usize| {
        let noise = normal(index as u64 + 1, len).into_iter();
        match name.contains("norm") {
            true => noise.map(|v| 1.0 + 0.2 * v).collect(),
            false => noise.map(|v| 0.2 * v).collect(),
        }
    };
    let tensors = config.tensors().into_iter().enumerate();
    tensors
        .map(|(i, (name, shape))| {
            let values = value(i, &name, shape.iter().product());
            (name, values)
        })
        .collect()
}

/// Writes a Hugging Face folder.
pub fn write_model(dir: &Path, config: &ModelConfig, weights: &Weights, dtype: DType) {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let tensor = Tensor::from_slice(&weights[&name], shape, &Device::Cpu).unwrap();
        (name, tensor.to_dtype(dtype).unwrap())
    };
    let tensors: HashMap<_, _> = config.tensors().into_iter().map(tensor).collect();
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    let text = format!(
        r#"{{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": {}, "hidden_size": {},
        "intermediate_size": {}, "num_hidden_layers": {}, "num_attention_heads": {}, "num_key_value_heads": {},
        "head_dim": {}, "max_position_embeddings": {}, "rms_norm_eps": {}, "rope_theta": {},
        "tie_word_embeddings": {}, "hidden_act": "silu"}}"#,
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.max_position_embeddings,
        config.rms_norm_eps,
        config.rope_theta,
        config.tie_word_embeddings,
    );
    std::fs::write(dir.join("config.json"), text).unwrap();
}

pub fn load(dir: &Path, quantization: Quantization) -> LoadedModel {
    load_into(Variant::Tuned, dir, quantization)
}

pub fn load_into(variant: Variant, dir: &Path, quantization: Quantization) -> LoadedModel {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut times = LoadTimes::default();
    let loader = WeightLoader::new(&checkpoint, quantization, &mut times);
    evalfw_candle::open(CandleDevice::Cpu, variant).unwrap().load(loader).unwrap()
}

/// Writes weights in f32 and loads them unquantized.
pub fn load_weights(config: &ModelConfig, weights: &Weights) -> LoadedModel {
    load_weights_into(Variant::Tuned, config, weights)
}

pub fn load_weights_into(variant: Variant, config: &ModelConfig, weights: &Weights) -> LoadedModel {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), config, weights, DType::F32);
    load_into(variant, dir.path(), Quantization::None)
}

/// An adapter of which neither factor is zero, so that both have gradients.
pub fn adapter(config: &ModelConfig, lora_dropout: f32) -> Adapter {
    let lora = LoraConfig { r: 4, lora_alpha: 8.0, lora_dropout };
    let pair = |layer: usize, target: Target| {
        let [out_features, in_features] = config.projection_shape(target);
        let seed = 1000 + 100 * layer as u64 + 10 * target as u64;
        let scaled = |values: Vec<f32>| values.into_iter().map(|v| 0.1 * v).collect();
        LoraPair { a: scaled(normal(seed, 4 * in_features)), b: scaled(normal(seed + 1, 4 * out_features)) }
    };
    let places = (0..config.num_hidden_layers).flat_map(|l| Target::ALL.map(|t| (l, t)));
    Adapter { config: lora, tensors: places.map(|(l, t)| ((l, t), pair(l, t))).collect() }
}

pub fn tokens(seed: u64, len: usize, vocab_size: usize) -> Vec<u32> {
    normal(seed, len).into_iter().map(|v| (v.abs() * 1e4) as u32 % vocab_size as u32).collect()
}

/// A right-padded batch with examples of these lengths; the first third of each is not supervised.
pub fn batch(seed: u64, lengths: &[usize], slots: usize, vocab_size: usize) -> Batch {
    let row = |(i, &length): (usize, &usize)| {
        let ids = tokens(seed + i as u64, length, vocab_size);
        let mut labels: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        labels[..length / 3].fill(IGNORE_INDEX);
        (ids, labels)
    };
    Batch::right_padded(lengths.iter().enumerate().map(row), slots)
}

/// The largest difference, as a fraction of the largest expected magnitude.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    found.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

pub fn argmax(values: &[f32]) -> u32 {
    let best = values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}
