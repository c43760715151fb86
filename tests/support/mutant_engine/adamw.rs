//! AdamW on the host, with places for errors.

use crate::mutation::Mutation;
use evalfw_engine::lora::{AdapterTensors, LoraPair};
use evalfw_engine::protocol::TrainingConfig;
use std::collections::BTreeMap;

/// The moments of each value, by the name of its matrix.
#[derive(Default)]
pub struct AdamW {
    steps: i32,
    moments: BTreeMap<String, Vec<[f64; 2]>>,
}

impl AdamW {
    pub fn step(
        &mut self,
        mutation: Mutation,
        config: &TrainingConfig,
        weights: &mut AdapterTensors,
        mut gradients: AdapterTensors,
    ) {
        self.steps += 1;
        if let Some(limit) = config.max_grad_norm.filter(|_| mutation != Mutation::NoClipping) {
            let factor = (limit / (norm(&gradients) + 1e-6)).min(1.0);
            scale(&mut gradients, factor);
        }
        for (place, pair) in weights {
            let LoraPair { a, b } = gradients.remove(place).unwrap();
            for (factor, weights, gradients) in [('A', &mut pair.a, a), ('B', &mut pair.b, b)] {
                let moments = self.moments.entry(format!("{place:?} {factor}")).or_default();
                moments.resize(weights.len(), [0.0; 2]);
                for ((weight, gradient), moments) in weights.iter_mut().zip(gradients).zip(moments) {
                    *weight =
                        update(self.steps, mutation, config, f64::from(*weight), gradient.into(), moments);
                }
            }
        }
    }
}

fn update(
    step: i32,
    mutation: Mutation,
    config: &TrainingConfig,
    weight: f64,
    mut gradient: f64,
    [first, second]: &mut [f64; 2],
) -> f32 {
    let TrainingConfig { learning_rate, beta1, beta2, epsilon, weight_decay, .. } = *config;
    let mut decayed = weight;
    match mutation {
        Mutation::CoupledWeightDecay => gradient += weight_decay * weight,
        _ => decayed -= learning_rate * weight_decay * weight,
    }
    *first = beta1 * *first + (1.0 - beta1) * gradient;
    *second = beta2 * *second + (1.0 - beta2) * gradient * gradient;
    let corrections = match mutation {
        Mutation::NoBiasCorrection => [1.0, 1.0],
        _ => [1.0 - beta1.powi(step), 1.0 - beta2.powi(step)],
    };
    let root = (*second / corrections[1]).sqrt();
    (decayed - learning_rate * (*first / corrections[0]) / (root + epsilon)) as f32
}

pub fn norm(gradients: &AdapterTensors) -> f64 {
    let values = gradients.values().flat_map(|pair| pair.a.iter().chain(&pair.b));
    values.map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

pub fn scale(gradients: &mut AdapterTensors, factor: f64) {
    for pair in gradients.values_mut() {
        pair.a.iter_mut().chain(&mut pair.b).for_each(|v| *v = (f64::from(*v) * factor) as f32);
    }
}
