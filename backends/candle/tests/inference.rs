//! Logits and decoding against candle's own Qwen2, against each other, and against merged weights.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::qwen2;
use common::*;
use evalfw_candle::{CandleDevice, Variant};
use evalfw_engine::Error;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::Target;
use evalfw_engine::nf4::Nf4Tensor;
use evalfw_engine::protocol::{DeviceKind, Quantization, TrainingConfig};
use std::path::Path;

fn stock_model(dir: &Path, config: &ModelConfig) -> qwen2::ModelForCausalLM {
    let config = qwen2::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        max_position_embeddings: config.max_position_embeddings,
        sliding_window: config.max_position_embeddings,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: config.tie_word_embeddings,
        rope_theta: config.rope_theta,
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    };
    let files = [dir.join("model.safetensors")];
    // SAFETY: nothing else touches the file while it is mapped.
    let weights = unsafe { VarBuilder::from_mmaped_safetensors(&files, DType::F32, &Device::Cpu).unwrap() };
    qwen2::ModelForCausalLM::new(&config, weights).unwrap()
}

#[test]
fn logits_are_those_of_candle_transformers() {
    let grouped = config(true);
    let one_kv_head =
        ModelConfig { num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16, ..config(false) };
    for (config, dtype) in [
        (&grouped, DType::F32),
        (&one_kv_head, DType::F32),
        (&grouped, DType::BF16),
        (&one_kv_head, DType::F16),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), config, &random_weights(config), dtype);
        let mut model = load(dir.path(), Quantization::None);
        let mut stock = stock_model(dir.path(), config);
        for len in [1, 2, 17, 130] {
            let tokens = tokens(7, len, config.vocab_size);
            stock.clear_kv_cache();
            let input = Tensor::new(&tokens[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let expected = stock.forward(&input, 0).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let logits = model.logits(&tokens).unwrap();
            assert_eq!(logits.len(), len * config.vocab_size);
            let last = &logits[(len - 1) * config.vocab_size..];
            let error = relative_error(last, &expected);
            assert!(error < 1e-4, "{dtype:?}, {len} tokens: {error}");
        }
    }
}

/// The prompt ends shortly before the cache has to grow.
#[test]
fn decoding_with_the_cache_follows_the_full_forward_pass() {
    let config = config(false);
    let mut model = load_weights(&config, &random_weights(&config));
    model.attach_adapter(&adapter(&config, 0.5), &TrainingConfig::default()).unwrap();
    for prompt_len in [1, 250] {
        let mut tokens = tokens(3, prompt_len, config.vocab_size);
        let mut next = model.prefill(&tokens).unwrap();
        for _ in 0..12 {
            let logits = model.logits(&tokens).unwrap();
            assert_eq!(next, argmax(&logits[logits.len() - config.vocab_size..]), "at {}", tokens.len());
            tokens.push(next);
            next = model.decode(next).unwrap();
        }
    }
}

#[test]
fn nf4_computes_with_the_dequantized_weights() {
    let config = config(true);
    let weights = random_weights(&config);
    let mut dequantized = weights.clone();
    for layer in 0..config.num_hidden_layers {
        for target in Target::ALL {
            let name = format!("model.layers.{layer}.{}.weight", target.path());
            let values = Nf4Tensor::quantize(config.projection_shape(target), &weights[&name]).dequantize();
            dequantized.insert(name, values);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &config, &weights, DType::F32);
    let mut packed = load(dir.path(), Quantization::Nf4);
    let mut dense = load_weights(&config, &dequantized);
    let tokens = tokens(5, 40, config.vocab_size);
    let (found, expected) = (packed.logits(&tokens).unwrap(), dense.logits(&tokens).unwrap());
    assert!(relative_error(&found, &expected) < 1e-5);
    let unquantized = load_weights(&config, &weights).logits(&tokens).unwrap();
    assert!(relative_error(&found, &unquantized) > 1e-3, "the weights were not quantized");
    assert_eq!(packed.prefill(&tokens).unwrap(), dense.prefill(&tokens).unwrap());
    assert_eq!(packed.decode(9).unwrap(), dense.decode(9).unwrap());
}

#[test]
fn an_adapter_is_part_of_inference_and_without_dropout() {
    let config = config(false);
    let adapter = adapter(&config, 0.9);
    let mut merged = random_weights(&config);
    for ((layer, target), pair) in &adapter.tensors {
        let [out_features, in_features] = config.projection_shape(*target);
        let weight = merged.get_mut(&format!("model.layers.{layer}.{}.weight", target.path())).unwrap();
        for row in 0..out_features {
            for col in 0..in_features {
                let delta: f32 = (0..4).map(|k| pair.b[row * 4 + k] * pair.a[k * in_features + col]).sum();
                weight[row * in_features + col] += adapter.config.scale() as f32 * delta;
            }
        }
    }
    let tokens = tokens(5, 20, config.vocab_size);
    let expected = load_weights(&config, &merged).logits(&tokens).unwrap();
    let mut model = load_weights(&config, &random_weights(&config));
    let without = model.logits(&tokens).unwrap();
    model.attach_adapter(&adapter, &TrainingConfig::default()).unwrap();
    assert!(relative_error(&model.logits(&tokens).unwrap(), &expected) < 1e-5);
    assert!(relative_error(&without, &expected) > 1e-2);
}

#[test]
fn decode_without_a_prefill_is_refused() {
    let config = config(true);
    let mut model = load_weights(&config, &random_weights(&config));
    assert!(matches!(model.decode(1), Err(Error::Protocol { .. })));
}

#[test]
fn the_cpu_says_who_it_is() {
    let info = evalfw_candle::open(CandleDevice::Cpu, Variant::Tuned).unwrap().info();
    assert_eq!((info.engine.as_str(), info.framework.as_str()), ("candle-cpu", "candle"));
    assert_eq!((info.device.kind, info.device.software), (DeviceKind::Cpu, false));
    assert!(!info.device.name.is_empty() && info.threads > 0);
    assert!(info.framework_version.starts_with("0."), "{}", info.framework_version);
}

#[cfg(not(any(feature = "cuda", feature = "metal")))]
#[test]
fn a_device_that_was_not_compiled_in_says_which_feature_to_build_with() {
    for (device, feature) in [(CandleDevice::Cuda, "`cuda`"), (CandleDevice::Metal, "`metal`")] {
        match evalfw_candle::open(device, Variant::Tuned).map(|_| ()) {
            Err(Error::Unavailable { advice, .. }) => assert!(advice.contains(feature), "{advice}"),
            other => panic!("{other:?}"),
        }
    }
}
