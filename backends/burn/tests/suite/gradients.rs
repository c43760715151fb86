//! Gradients of the adapter.

use crate::on_each_device;
use crate::reference::Reference;
use crate::support::{Random, SmallModel, batch, close, training};
use evalfw_engine::batch::Batch;
use evalfw_engine::lora::{Adapter, AdapterTensors, LoraPair};
use evalfw_engine::protocol::{Quantization, TrainingConfig};
use evalfw_engine::{Engine, Model, StepInput, StepResult};

on_each_device!(
    every_tensor_matches_finite_differences,
    checkpointing_changes_nothing,
    accumulated_micro_batches_equal_one_batch,
    a_batch_without_a_loss_has_no_gradients,
);

fn gradients(model: &mut dyn Model, batches: &[Batch]) -> (StepResult, AdapterTensors) {
    model.gradients(&StepInput { step: 4, dropout_seed: 9, micro_batches: batches }).unwrap()
}

/// Against central differences of the reference in f64, at some entries of every tensor.
fn every_tensor_matches_finite_differences(engine: &mut dyn Engine) {
    for (tied, dropout) in [(true, 0.0), (false, 0.1)] {
        let small = SmallModel::new(tied);
        let adapter = small.adapter(dropout);
        let mut model = small.load(engine, Quantization::None);
        model.attach_adapter(&adapter, &training()).unwrap();
        let batches = [batch(&[6, 9], 1), batch(&[4], 2)];
        let input = StepInput { step: 4, dropout_seed: 9, micro_batches: &batches };
        let (result, gradients) = model.gradients(&input).unwrap();

        let loss = |adapter: &Adapter| {
            Reference { config: &small.config, tensors: &small.tensors, adapter: Some(adapter) }.loss(&input)
        };
        assert!(close(result.loss, loss(&adapter), 1e-5, 0.0), "{} {}", result.loss, loss(&adapter));
        let square = |v: &f32| f64::from(*v).powi(2);
        let squares = gradients.values().flat_map(|pair| pair.a.iter().chain(&pair.b)).map(square);
        assert!(close(result.grad_norm, squares.sum::<f64>().sqrt(), 1e-5, 0.0));

        let mut random = Random(5);
        assert_eq!(gradients.len(), adapter.tensors.len());
        for (place, pair) in &gradients {
            for factor in [first as Factor, second] {
                let found = factor(&mut pair.clone()).clone();
                let largest = found.iter().fold(0f32, |m, v| m.max(v.abs()));
                assert!(largest > 0.0, "{place:?} has no gradient");
                for _ in 0..3 {
                    let index = random.integer() as usize % found.len();
                    let at = |change: f32| {
                        let mut moved = adapter.clone();
                        let value = &mut factor(moved.tensors.get_mut(place).unwrap())[index];
                        *value += change;
                        (f64::from(*value), loss(&moved))
                    };
                    let ((low, below), (high, above)) = (at(-1e-3), at(1e-3));
                    let expected = (above - below) / (high - low);
                    let found = f64::from(found[index]);
                    assert!(
                        close(found, expected, 1e-3, 0.05 * f64::from(largest)),
                        "{place:?}[{index}]: {found}, expected {expected}"
                    );
                }
            }
        }
    }
}

type Factor = fn(&mut LoraPair) -> &mut Vec<f32>;

fn first(pair: &mut LoraPair) -> &mut Vec<f32> {
    &mut pair.a
}

fn second(pair: &mut LoraPair) -> &mut Vec<f32> {
    &mut pair.b
}

#[track_caller]
fn assert_same(one: &AdapterTensors, other: &AdapterTensors) {
    assert_eq!(one.len(), other.len());
    for (place, pair) in one {
        for (a, b) in [(&pair.a, &other[place].a), (&pair.b, &other[place].b)] {
            let largest = f64::from(b.iter().fold(0f32, |m, v| m.max(v.abs())));
            for (a, b) in a.iter().zip(b) {
                assert!(close(f64::from(*a), f64::from(*b), 1e-4, 0.1 * largest), "{place:?}: {a} {b}");
            }
        }
    }
}

fn checkpointing_changes_nothing(engine: &mut dyn Engine) {
    let small = SmallModel::new(true);
    let batches = [batch(&[6, 9], 1)];
    let [(with, with_gradients), (without, without_gradients)] = [true, false].map(|checkpointing| {
        let mut model = small.load(engine, Quantization::Nf4);
        let training = TrainingConfig { gradient_checkpointing: checkpointing, ..training() };
        model.attach_adapter(&small.adapter(0.1), &training).unwrap();
        gradients(&mut *model, &batches)
    });
    assert!(close(with.loss, without.loss, 1e-6, 0.0));
    assert_same(&with_gradients, &without_gradients);
}

fn accumulated_micro_batches_equal_one_batch(engine: &mut dyn Engine) {
    let small = SmallModel::new(false);
    let mut model = small.load(engine, Quantization::None);
    model.attach_adapter(&small.adapter(0.0), &training()).unwrap();
    let (one, two) = (batch(&[8], 1), batch(&[8], 2));
    let both = Batch {
        input_ids: [one.input_ids.clone(), two.input_ids.clone()].concat(),
        labels: [one.labels.clone(), two.labels.clone()].concat(),
        lengths: vec![8, 8],
    };
    let (accumulated, accumulated_gradients) = gradients(&mut *model, &[one, two]);
    let (together, together_gradients) = gradients(&mut *model, &[both]);
    assert!(close(accumulated.loss, together.loss, 1e-6, 0.0));
    assert_same(&accumulated_gradients, &together_gradients);
}

fn a_batch_without_a_loss_has_no_gradients(engine: &mut dyn Engine) {
    let small = SmallModel::new(true);
    let mut model = small.load(engine, Quantization::None);
    model.attach_adapter(&small.adapter(0.1), &training()).unwrap();
    // A label on the first position alone has nothing before it that could predict it.
    let silent = Batch { input_ids: vec![vec![1, 2]], labels: vec![vec![1, -100]], lengths: vec![2] };
    let (result, found) = gradients(&mut *model, std::slice::from_ref(&silent));
    assert_eq!((result.loss, result.grad_norm), (0.0, 0.0));
    assert!(found.values().all(|pair| pair.a.iter().chain(&pair.b).all(|&v| v == 0.0)));
    assert_eq!(model.evaluate(&[silent]).unwrap().tokens, 0);
}
