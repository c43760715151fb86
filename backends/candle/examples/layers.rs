//! Times some layers of a Qwen2.5-Coder model with random weights: a training step, prefill, decoding.
//! For finding where the time goes; evalfw itself measures.
//!
//!     cargo run --release --workspace --example layers -- [0.5b|7b] [layers] [sequence length]

#[path = "../tests/common/mod.rs"]
mod common;

use candle_core::DType;
use evalfw_engine::StepInput;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{Adapter, LoraConfig, LoraPair};
use evalfw_engine::protocol::{Quantization, TrainingConfig};
use std::time::Instant;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let argument = |index: usize, default: &str| arguments.get(index).cloned().unwrap_or(default.to_owned());
    let layers = argument(2, "4").parse().unwrap();
    let length: usize = argument(3, "256").parse().unwrap();
    let config = config(&argument(1, "0.5b"), layers);

    let dir = tempfile::tempdir().unwrap();
    common::write_model(dir.path(), &config, &weights(&config), DType::BF16);
    for quantization in [Quantization::Nf4, Quantization::None] {
        println!("{quantization:?}, {layers} layers, {length} tokens");
        let start = Instant::now();
        let mut model = common::load(dir.path(), quantization);
        println!("  load       {:8.1} ms", milliseconds(start));

        let prompt = common::tokens(1, 128, config.vocab_size);
        for _ in 0..2 {
            let (start, cpu_start) = (Instant::now(), cpu_milliseconds());
            let mut token = model.prefill(&prompt).unwrap();
            println!(
                "  pp128      {:8.1} ms    cpu {:8.1} ms",
                milliseconds(start),
                cpu_milliseconds() - cpu_start
            );
            let (start, cpu_start) = (Instant::now(), cpu_milliseconds());
            for _ in 0..16 {
                token = model.decode(token).unwrap();
            }
            let cpu = (cpu_milliseconds() - cpu_start) / 16.0;
            println!("  tg16       {:8.1} ms    cpu {cpu:8.1} ms    a token", milliseconds(start) / 16.0);
        }

        model.attach_adapter(&adapter(&config), &TrainingConfig::default()).unwrap();
        let batches = [common::batch(1, &[length], length, config.vocab_size)];
        for step in 0..3 {
            let (start, cpu_start) = (Instant::now(), cpu_milliseconds());
            let input = StepInput { step, dropout_seed: 1, micro_batches: &batches };
            let result = model.train_step(&input).unwrap();
            let cpu = cpu_milliseconds() - cpu_start;
            println!(
                "  train step {:8.1} ms    cpu {cpu:8.1} ms    loss {:.4}",
                milliseconds(start),
                result.loss
            );
        }
    }
}

/// Processor time of all threads so far, which other work on the machine disturbs less; 0 where there is
/// no `/proc`.
fn cpu_milliseconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    10.0 * fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>()
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn config(size: &str, layers: usize) -> ModelConfig {
    let (hidden_size, intermediate_size, heads, kv_heads, head_dim, vocab_size) = match size {
        "0.5b" => (896, 4864, 14, 2, 64, 151_936),
        "7b" => (3584, 18_944, 28, 4, 128, 152_064),
        other => panic!("unknown size {other}"),
    };
    ModelConfig {
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        max_position_embeddings: 32_768,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        tie_word_embeddings: size == "0.5b",
    }
}

/// A pattern long enough that no two rows are alike: speed does not depend on the values.
fn weights(config: &ModelConfig) -> common::Weights {
    let noise: Vec<f32> = common::normal(1, 10_007).into_iter().map(|v| 0.03 * v).collect();
    let values = |name: &str, len: usize| match name.contains("norm") {
        true => vec![1.0; len],
        false => noise.iter().copied().cycle().take(len).collect(),
    };
    let tensors = config.tensors().into_iter();
    tensors
        .map(|(name, shape)| {
            let values = values(&name, shape.iter().product());
            (name, values)
        })
        .collect()
}

fn adapter(config: &ModelConfig) -> Adapter {
    let lora = LoraConfig::default();
    let pair = |place: (usize, _)| {
        let [out_features, in_features] = config.projection_shape(place.1);
        let noise = common::normal(place.0 as u64, lora.r * in_features);
        let pair = LoraPair {
            a: noise.into_iter().map(|v| 0.02 * v).collect(),
            b: vec![0.0; out_features * lora.r],
        };
        (place, pair)
    };
    let places = common::adapter(config, 0.0).tensors.into_keys();
    Adapter { tensors: places.map(pair).collect(), config: lora }
}
