//! Errors that are planted into the model folder.

use crate::mutation::{Mutant, Mutation};
use evalfw_engine::Result;
use evalfw_engine::checkpoint::Checkpoint;
use evalfw_engine::lora::Target;
use evalfw_engine::nf4::Nf4Tensor;
use evalfw_engine::weights::{ProjectionWeights, projection_name};
use safetensors::{Dtype, SafeTensors};
use std::ops::Range;
use std::path::Path;

/// Writes a copy of a model folder with the mutant's errors.
pub fn alter(from: &Path, to: &Path, mutant: &Mutant) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let name = path.file_name().unwrap();
        if mutant.mutation == Mutation::Rope && name == "config.json" {
            let mut config: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            config["rope_parameters"]["rope_theta"] = 10_000.0.into();
            bytes = config.to_string().into_bytes();
        }
        if mutant.mutation == Mutation::Bias && name == "model.safetensors" {
            let (range, _) = tensor(&bytes, "model.layers.1.self_attn.k_proj.bias");
            bytes[range].fill(0);
        }
        if mutant.rounds && path.extension().is_some_and(|e| e == "safetensors") {
            round_otherwise(&mut bytes);
        }
        std::fs::write(to.join(name), bytes).unwrap();
    }
}

/// Turns the last bit of every other bf16 value: an error of the size, and at the places, of the rounding
/// of all that is multiplied with them.
fn round_otherwise(bytes: &mut [u8]) {
    let names: Vec<String> =
        SafeTensors::deserialize(bytes).unwrap().names().into_iter().map(str::to_owned).collect();
    for name in names {
        let (range, dtype) = tensor(bytes, &name);
        assert_eq!(dtype, Dtype::BF16, "{name}");
        for low_byte in bytes[range].iter_mut().step_by(4) {
            *low_byte ^= 1;
        }
    }
}

/// What the mutant tells of its own format.
pub fn told_weights(checkpoint: &Checkpoint, mutation: Mutation) -> Result<ProjectionWeights> {
    let mut told = ProjectionWeights::new();
    for layer in 0..checkpoint.config.num_hidden_layers {
        for target in Target::ALL {
            let mut reader = checkpoint.reader(&projection_name(layer, target))?;
            let mut values = vec![0.0; reader.elements()];
            reader.read_f32(&mut values)?;
            let shape = checkpoint.config.projection_shape(target);
            let told_values = match (mutation, layer, target) {
                (Mutation::WeightsUntold, 1, Target::Up) => values,
                (Mutation::WeightsCoarse, ..) => three_levels(&values),
                _ => Nf4Tensor::quantize(shape, &values).dequantize(),
            };
            told.insert((layer, target), told_values);
        }
    }
    Ok(told)
}

fn three_levels(values: &[f32]) -> Vec<f32> {
    let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    values.iter().map(|v| (v / largest).round() * largest).collect()
}

fn tensor(bytes: &[u8], name: &str) -> (Range<usize>, Dtype) {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    let start = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
    (start..start + tensor.data().len(), tensor.dtype())
}
