//! Optimizer steps.

use crate::on_each_device;
use crate::support::{SmallModel, batch, close, training};
use evalfw_engine::lora::AdapterTensors;
use evalfw_engine::protocol::{Quantization, TrainingConfig};
use evalfw_engine::{Engine, Error, StepInput};

on_each_device!(
    steps_reduce_the_loss,
    adamw_equals_its_definition,
    gradients_do_not_train,
    training_needs_an_adapter,
);

fn steps_reduce_the_loss(engine: &mut dyn Engine) {
    let small = SmallModel::new(true);
    let mut model = small.load(engine, Quantization::Nf4);
    model.attach_adapter(&small.adapter(0.05), &training()).unwrap();
    let batches = [batch(&[8, 8], 1)];
    let before = model.evaluate(&batches).unwrap();
    for step in 0..8 {
        model.train_step(&StepInput { step, dropout_seed: 1, micro_batches: &batches }).unwrap();
    }
    let after = model.evaluate(&batches).unwrap();
    assert!(after.loss_sum < 0.8 * before.loss_sum, "{before:?} {after:?}");
}

/// AdamW as its paper has it, in f64, fed with the engine's own gradients.
fn adamw_equals_its_definition(engine: &mut dyn Engine) {
    let small = SmallModel::new(true);
    let config = TrainingConfig { weight_decay: 0.1, max_grad_norm: Some(0.5), ..training() };
    let mut model = small.load(engine, Quantization::None);
    model.attach_adapter(&small.adapter(0.0), &config).unwrap();
    let batches = [batch(&[7], 1)];

    let mut parameters = flat(&model.adapter().unwrap());
    let mut moments = vec![(0.0, 0.0); parameters.len()];
    for step in 0..3 {
        let input = StepInput { step, dropout_seed: 0, micro_batches: &batches };
        let (result, gradients) = model.gradients(&input).unwrap();
        assert!(result.grad_norm > 0.5, "nothing to clip");
        let clip = 0.5 / (result.grad_norm + 1e-6);
        for ((parameter, gradient), (first, second)) in
            parameters.iter_mut().zip(flat(&gradients)).zip(&mut moments)
        {
            let gradient = gradient * clip;
            *first = config.beta1 * *first + (1.0 - config.beta1) * gradient;
            *second = config.beta2 * *second + (1.0 - config.beta2) * gradient * gradient;
            let first = *first / (1.0 - config.beta1.powi(step as i32 + 1));
            let second = *second / (1.0 - config.beta2.powi(step as i32 + 1));
            *parameter -= config.learning_rate * config.weight_decay * *parameter;
            *parameter -= config.learning_rate * first / (second.sqrt() + config.epsilon);
        }
        let trained = model.train_step(&input).unwrap();
        assert!(close(trained.grad_norm, result.grad_norm, 1e-5, 0.0));
        assert!(close(trained.loss, result.loss, 1e-6, 0.0));

        for (index, (found, expected)) in flat(&model.adapter().unwrap()).iter().zip(&parameters).enumerate()
        {
            // A step moves each parameter by about the learning rate, 0.01.
            assert!((found - expected).abs() < 1e-5, "step {step}, {index}: {found}, expected {expected}");
        }
    }
}

fn flat(tensors: &AdapterTensors) -> Vec<f64> {
    tensors.values().flat_map(|pair| pair.a.iter().chain(&pair.b)).map(|&v| f64::from(v)).collect()
}

fn gradients_do_not_train(engine: &mut dyn Engine) {
    let small = SmallModel::new(true);
    let mut model = small.load(engine, Quantization::None);
    let adapter = small.adapter(0.1);
    model.attach_adapter(&adapter, &training()).unwrap();
    let batches = [batch(&[7], 1)];
    model.gradients(&StepInput { step: 0, dropout_seed: 0, micro_batches: &batches }).unwrap();
    assert_eq!(model.adapter().unwrap(), adapter.tensors);
}

fn training_needs_an_adapter(engine: &mut dyn Engine) {
    let mut model = SmallModel::new(true).load(engine, Quantization::None);
    let batches = [batch(&[7], 1)];
    let failed = model.train_step(&StepInput { step: 0, dropout_seed: 0, micro_batches: &batches });
    assert!(matches!(failed, Err(Error::Protocol { .. })), "{failed:?}");
    assert!(matches!(model.decode(1), Err(Error::Protocol { .. })));
}

/// burn keeps some bytes of each step on wgpu, though not a whole activation (of which the smallest here
/// has 1024 bytes).
#[test]
fn wgpu_frees_the_tensors_of_a_step() {
    let Some(mut engine) = crate::support::wgpu() else { return };
    let small = SmallModel::new(true);
    let mut model = small.load(&mut *engine, Quantization::Nf4);
    model.attach_adapter(&small.adapter(0.1), &training()).unwrap();
    let batches = [batch(&[8], 1)];
    let mut after_step = |step| {
        model.train_step(&StepInput { step, dropout_seed: 1, micro_batches: &batches }).unwrap();
        model.synchronize().unwrap();
        model.memory().in_use_bytes.unwrap()
    };
    let first = after_step(0);
    let later: Vec<_> = (1..9).map(&mut after_step).collect();
    // Burn keeps up to 512 sets of the numbers that kernels are called with; each step brings those of 14 masks.
    assert!(later[7] < first + 8 * (512 + 14 * 64), "{first} bytes after one step, then {later:?}");
}
