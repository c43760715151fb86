//! Logits, generation and evaluation.

use crate::on_each_device;
use crate::reference::Reference;
use crate::support::{SmallModel, Tensors, batch, close, training};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::Target;
use evalfw_engine::nf4::Nf4Tensor;
use evalfw_engine::protocol::Quantization;
use evalfw_engine::{Engine, StepInput};

on_each_device!(
    logits_equal_the_reference,
    cached_generation_equals_the_full_forward,
    nf4_equals_a_dense_model_of_the_decoded_weights,
    evaluation_equals_the_reference,
);

const TOKENS: [u32; 9] = [3, 96, 0, 17, 17, 54, 8, 81, 40];

#[track_caller]
fn assert_logits(found: &[f32], expected: &[Vec<f64>]) {
    let expected: Vec<f64> = expected.concat();
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
    for (i, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
        assert!(close(f64::from(found), expected, 1e-4, 0.1 * scale), "{i}: {found}, expected {expected}");
    }
}

fn logits_equal_the_reference(engine: &mut dyn Engine) {
    for tied in [true, false] {
        let small = SmallModel::new(tied);
        let mut model = small.load(engine, Quantization::None);
        let mut reference = Reference { config: &small.config, tensors: &small.tensors, adapter: None };
        let plain = model.logits(&TOKENS).unwrap();
        assert_logits(&plain, &reference.logits(&TOKENS));

        // With an adapter, whose dropout is for training only.
        let adapter = small.adapter(0.5);
        model.attach_adapter(&adapter, &training()).unwrap();
        reference.adapter = Some(&adapter);
        let adapted = model.logits(&TOKENS).unwrap();
        assert_logits(&adapted, &reference.logits(&TOKENS));
        assert_ne!(plain, adapted);
    }
}

fn cached_generation_equals_the_full_forward(engine: &mut dyn Engine) {
    let small = SmallModel::new(true);
    let mut model = small.load(engine, Quantization::None);
    model.attach_adapter(&small.adapter(0.0), &training()).unwrap();
    // Twice: the second prefill must forget the first sequence.
    for prompt in [&TOKENS[..], &TOKENS[2..6]] {
        let mut tokens = prompt.to_vec();
        let mut next = model.prefill(prompt).unwrap();
        for _ in 0..3 {
            let logits = model.logits(&tokens).unwrap();
            let last = &logits[logits.len() - small.config.vocab_size..];
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
            assert_eq!(next as usize, best, "after {tokens:?}");
            tokens.push(next);
            next = model.decode(next).unwrap();
        }
    }
}

fn nf4_equals_a_dense_model_of_the_decoded_weights(engine: &mut dyn Engine) {
    let small = SmallModel::new(false);
    let decoded = SmallModel::write(small.config.clone(), decoded(&small.config, &small.tensors));
    let quantized = small.load(engine, Quantization::Nf4).logits(&TOKENS).unwrap();
    let dense = decoded.load(engine, Quantization::None).logits(&TOKENS).unwrap();
    let exact = small.load(engine, Quantization::None).logits(&TOKENS).unwrap();
    let difference = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(difference(&quantized, &dense) < 1e-4, "{}", difference(&quantized, &dense));
    assert!(difference(&quantized, &exact) > 1e-2, "nothing was quantized");
}

/// The weights as NF4 keeps them.
fn decoded(config: &ModelConfig, tensors: &Tensors) -> Tensors {
    let mut tensors = tensors.clone();
    for layer in 0..config.num_hidden_layers {
        for target in Target::ALL {
            let name = format!("model.layers.{layer}.{}.weight", target.path());
            let weight = tensors.get_mut(&name).unwrap();
            *weight = Nf4Tensor::quantize(config.projection_shape(target), weight).dequantize();
        }
    }
    tensors
}

fn evaluation_equals_the_reference(engine: &mut dyn Engine) {
    let small = SmallModel::new(true);
    let mut adapter = small.adapter(0.5);
    let mut model = small.load(engine, Quantization::None);
    model.attach_adapter(&adapter, &training()).unwrap();
    let batches = [batch(&[7, 10], 1), batch(&[5], 2)];
    let evaluation = model.evaluate(&batches).unwrap();

    adapter.config.lora_dropout = 0.0;
    let reference = Reference { config: &small.config, tensors: &small.tensors, adapter: Some(&adapter) };
    let input = StepInput { step: 0, dropout_seed: 0, micro_batches: &batches };
    let loss = reference.loss(&input);
    assert_eq!(evaluation.tokens, input.trained_tokens());
    assert!(close(evaluation.loss_sum / evaluation.tokens as f64, loss, 1e-5, 0.0), "{evaluation:?} {loss}");
}
