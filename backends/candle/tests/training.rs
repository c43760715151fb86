//! Gradients against finite differences and against each other; the optimizer against its definition.

mod common;

use common::*;
use evalfw_candle::{CandleDevice, Variant};
use evalfw_engine::batch::Batch;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{Adapter, AdapterTensors, LoraPair};
use evalfw_engine::protocol::TrainingConfig;
use evalfw_engine::{LoadedModel, StepInput};

/// A head dimension that is not hidden_size / heads.
fn wide_heads() -> ModelConfig {
    ModelConfig { head_dim: 12, ..config(true) }
}

fn random_model(config: &ModelConfig) -> LoadedModel {
    load_weights(config, &random_weights(config))
}

fn step(micro_batches: &[Batch]) -> StepInput<'_> {
    StepInput { step: 3, dropout_seed: 42, micro_batches }
}

fn gradients(
    model: &mut LoadedModel,
    adapter: &Adapter,
    checkpointing: bool,
    batches: &[Batch],
) -> (f64, AdapterTensors) {
    let training = TrainingConfig { gradient_checkpointing: checkpointing, ..TrainingConfig::default() };
    model.attach_adapter(adapter, &training).unwrap();
    let (result, gradients) = model.gradients(&step(batches)).unwrap();
    let squares = gradients.values().flat_map(|pair| pair.a.iter().chain(&pair.b));
    let norm = squares.map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
    assert!((result.grad_norm / norm - 1.0).abs() < 1e-5, "{} {norm}", result.grad_norm);
    (result.loss, gradients)
}

fn assert_same(found: &AdapterTensors, expected: &AdapterTensors, tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (place, pair) in expected {
        for (found, expected) in [(&found[place].a, &pair.a), (&found[place].b, &pair.b)] {
            let error = relative_error(found, expected);
            assert!(error < tolerance, "{place:?}: {error}");
        }
    }
}

#[derive(Clone, Copy)]
enum Factor {
    A,
    B,
}

fn factor(pair: &LoraPair, which: Factor) -> &[f32] {
    match which {
        Factor::A => &pair.a,
        Factor::B => &pair.b,
    }
}

/// Every tensor along its own gradient, which takes all its elements in, and some elements alone.
#[test]
fn gradients_are_the_slopes_of_the_loss() {
    let config = wide_heads();
    let mut model = random_model(&config);
    let batches = [batch(1, &[9, 13], 13, config.vocab_size), batch(5, &[6], 6, config.vocab_size)];
    for dropout in [0.0, 0.1] {
        let adapter = adapter(&config, dropout);
        let (_, gradients) = gradients(&mut model, &adapter, true, &batches);
        assert_eq!(gradients.len(), 2 * 7);
        for (&place, pair) in &gradients {
            for which in [Factor::A, Factor::B] {
                let gradient = factor(pair, which);
                let norm = gradient.iter().map(|v| v * v).sum::<f32>().sqrt();
                assert!(norm > 1e-4, "{place:?} has hardly a gradient: {norm}");
                let mut slope = |direction: &[f32], size: f32| {
                    let mut loss_at = |distance: f32| {
                        let mut moved = adapter.clone();
                        let pair = moved.tensors.get_mut(&place).unwrap();
                        let values = match which {
                            Factor::A => &mut pair.a,
                            Factor::B => &mut pair.b,
                        };
                        values.iter_mut().zip(direction).for_each(|(v, d)| *v += distance * d);
                        model.attach_adapter(&moved, &TrainingConfig::default()).unwrap();
                        model.gradients(&step(&batches)).unwrap().0.loss
                    };
                    ((loss_at(size) - loss_at(-size)) / (2.0 * f64::from(size))) as f32
                };
                let direction: Vec<f32> = gradient.iter().map(|v| v / norm).collect();
                let along = slope(&direction, 0.02);
                assert!((along / norm - 1.0).abs() < 0.01, "{place:?}: {along} {norm}");

                for element in [0, gradient.len() / 3, argmax(gradient) as usize] {
                    let mut direction = vec![0.0; gradient.len()];
                    direction[element] = 1.0;
                    let alone = slope(&direction, 0.02);
                    let expected = gradient[element];
                    let error = (alone - expected).abs();
                    assert!(error < 0.02 * expected.abs() + 1e-4, "{place:?}: {alone} {expected}");
                }
            }
        }
    }
}

#[test]
fn checkpointing_does_not_change_the_gradients() {
    let config = config(false);
    let mut model = random_model(&config);
    let batches = [batch(1, &[9, 20], 20, config.vocab_size), batch(4, &[7], 11, config.vocab_size)];
    let adapter = adapter(&config, 0.1);
    let (loss, with) = gradients(&mut model, &adapter, true, &batches);
    let (loss_without, without) = gradients(&mut model, &adapter, false, &batches);
    assert!((loss - loss_without).abs() < 1e-6);
    assert_same(&with, &without, 1e-5);
}

/// The long batch pads the short one further: padding must not matter either.
#[test]
fn two_micro_batches_are_one_batch_of_both() {
    let config = config(true);
    let mut model = random_model(&config);
    let adapter = adapter(&config, 0.0);
    let apart = [batch(1, &[7], 8, config.vocab_size), batch(2, &[12], 12, config.vocab_size)];
    let together = [batch(1, &[7, 12], 12, config.vocab_size)];
    assert_eq!(together[0].input_ids[1], apart[1].input_ids[0]);
    let (loss_apart, gradients_apart) = gradients(&mut model, &adapter, true, &apart);
    let (loss_together, gradients_together) = gradients(&mut model, &adapter, true, &together);
    assert!((loss_apart - loss_together).abs() < 1e-5);
    assert_same(&gradients_apart, &gradients_together, 1e-4);

    let evaluation = model.evaluate(&apart).unwrap();
    assert_eq!(evaluation.tokens, step(&apart).trained_tokens());
    assert!((evaluation.loss_sum / evaluation.tokens as f64 - loss_apart).abs() < 1e-5);
}

#[test]
fn dropout_changes_with_the_step_and_not_the_evaluation() {
    let config = config(true);
    let mut model = random_model(&config);
    let batches = [batch(1, &[12], 12, config.vocab_size)];
    model.attach_adapter(&adapter(&config, 0.3), &TrainingConfig::default()).unwrap();
    let mut loss = |step| {
        let input = StepInput { step, dropout_seed: 42, micro_batches: &batches };
        model.gradients(&input).unwrap().0.loss
    };
    assert_eq!(loss(0), loss(0));
    assert_ne!(loss(0), loss(1));
    let with = model.evaluate(&batches).unwrap().loss_sum;
    model.attach_adapter(&adapter(&config, 0.0), &TrainingConfig::default()).unwrap();
    assert_eq!(model.evaluate(&batches).unwrap().loss_sum, with);
}

#[test]
fn a_step_without_a_supervised_position_has_no_gradient() {
    let config = config(true);
    let mut model = random_model(&config);
    let mut nothing = batch(1, &[5], 5, config.vocab_size);
    nothing.labels[0].fill(-100);
    for checkpointing in [true, false] {
        let training = TrainingConfig { gradient_checkpointing: checkpointing, ..TrainingConfig::default() };
        model.attach_adapter(&adapter(&config, 0.1), &training).unwrap();
        let result = model.train_step(&step(std::slice::from_ref(&nothing))).unwrap();
        assert_eq!((result.loss, result.grad_norm), (0.0, 0.0));
    }
}

#[test]
fn kept_activations_change_no_gradient() {
    let config = config(true);
    let mut model = random_model(&config);
    let batches = [batch(1, &[9, 6], 9, config.vocab_size), batch(2, &[9, 4], 9, config.vocab_size)];
    // Nothing, one of the blocks, all of them.
    let widths = 2 * config.num_attention_heads + 2 * config.num_key_value_heads;
    let block = 4 * 18 * (widths * config.head_dim + config.hidden_size + 2 * config.intermediate_size);
    let gradients = [0, block, 100 * block].map(|bytes| {
        let training = TrainingConfig { kept_activation_bytes: bytes as u64, ..TrainingConfig::default() };
        model.attach_adapter(&adapter(&config, 0.1), &training).unwrap();
        model.gradients(&step(&batches)).unwrap()
    });
    let (result, expected) = &gradients[0];
    for (other_result, other) in &gradients {
        assert_eq!((result.loss, result.grad_norm), (other_result.loss, other_result.grad_norm));
        for (place, pair) in expected {
            assert_eq!((&pair.a, &pair.b), (&other[place].a, &other[place].b), "{place:?}");
        }
    }
}

/// What is kept is rounded to bf16, as the factors of the products are: 2⁻⁹ of each value.
#[test]
fn activations_kept_in_bf16_change_gradients_by_their_rounding() {
    let config = config(true);
    let batches = [batch(1, &[9, 6], 9, config.vocab_size), batch(2, &[9, 4], 9, config.vocab_size)];
    if let Err(reason) = evalfw_candle::open(CandleDevice::Cpu, Variant::TunedBf16) {
        return eprintln!("left out: {reason}");
    }
    let mut model = load_weights_into(Variant::TunedBf16, &config, &random_weights(&config));
    let [nothing, everything] = [0, 1 << 30].map(|kept_activation_bytes| {
        let training = TrainingConfig { kept_activation_bytes, ..TrainingConfig::default() };
        model.attach_adapter(&adapter(&config, 0.1), &training).unwrap();
        model.gradients(&step(&batches)).unwrap()
    });
    assert_eq!(nothing.0.loss, everything.0.loss);
    assert_same(&everything.1, &nothing.1, 2e-2);
    assert!(nothing.1.iter().any(|(place, pair)| pair.a != everything.1[place].a), "nothing was rounded");
}

#[test]
fn training_reduces_the_loss() {
    let config = config(false);
    let mut model = random_model(&config);
    let batches = [batch(1, &[16, 11], 16, config.vocab_size)];
    let training = TrainingConfig { learning_rate: 1e-2, ..TrainingConfig::default() };
    model.attach_adapter(&adapter(&config, 0.1), &training).unwrap();
    let before = model.evaluate(&batches).unwrap().loss_sum;
    for step in 0..10 {
        model.train_step(&StepInput { step, dropout_seed: 1, micro_batches: &batches }).unwrap();
    }
    let after = model.evaluate(&batches).unwrap().loss_sum;
    assert!(after < 0.7 * before, "{before} {after}");
}

/// AdamW as in the documentation of `torch.optim.AdamW`, and the clipping of `clip_grad_norm_`, in f64.
struct Reference {
    training: TrainingConfig,
    /// (value, first moment, second moment)
    state: Vec<(f64, f64, f64)>,
    steps: i32,
}

impl Reference {
    fn step(&mut self, gradients: &[f32]) {
        self.steps += 1;
        let t = &self.training;
        let norm = gradients.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let clip = t.max_grad_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        for ((value, first, second), &gradient) in self.state.iter_mut().zip(gradients) {
            let gradient = clip * f64::from(gradient);
            *value *= 1.0 - t.learning_rate * t.weight_decay;
            *first = t.beta1 * *first + (1.0 - t.beta1) * gradient;
            *second = t.beta2 * *second + (1.0 - t.beta2) * gradient * gradient;
            let first = *first / (1.0 - t.beta1.powi(self.steps));
            let second = *second / (1.0 - t.beta2.powi(self.steps));
            *value -= t.learning_rate * first / (second.sqrt() + t.epsilon);
        }
    }
}

fn flatten(tensors: &AdapterTensors) -> Vec<f32> {
    tensors.values().flat_map(|pair| pair.a.iter().chain(&pair.b).copied()).collect()
}

#[test]
fn updates_are_those_of_adamw() {
    let config = config(true);
    let mut model = random_model(&config);
    let batches = [batch(1, &[10], 10, config.vocab_size)];
    for max_grad_norm in [None, Some(0.05)] {
        let adapter = adapter(&config, 0.1);
        let training = TrainingConfig {
            learning_rate: 0.01,
            beta1: 0.8,
            beta2: 0.95,
            epsilon: 1e-3,
            weight_decay: 0.5,
            max_grad_norm,
            ..TrainingConfig::default()
        };
        model.attach_adapter(&adapter, &training).unwrap();
        let values = flatten(&adapter.tensors).into_iter();
        let state = values.map(|value| (f64::from(value), 0.0, 0.0)).collect();
        let mut reference = Reference { training, state, steps: 0 };
        for step in 0..4 {
            let input = StepInput { step, dropout_seed: 1, micro_batches: &batches };
            let (result, gradients) = model.gradients(&input).unwrap();
            assert!(result.grad_norm > 0.05, "nothing to clip: {}", result.grad_norm);
            reference.step(&flatten(&gradients));
            model.train_step(&input).unwrap();
            let found = flatten(&model.adapter().unwrap());
            for (found, (expected, _, _)) in found.iter().zip(&reference.state) {
                assert!((f64::from(*found) - expected).abs() < 2e-6, "{found} {expected}");
            }
        }
    }
}
