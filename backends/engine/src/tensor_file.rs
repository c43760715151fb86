//! Tensors of f32 in safetensors files, as messages refer to them.

use crate::config::ModelConfig;
use crate::lora::Target;
use crate::weights::{ProjectionWeights, projection_name};
use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::path::Path;

/// A name, a shape, and the values, row-major.
pub type NamedTensor<'a> = (String, Vec<usize>, &'a [f32]);

/// Writes the tensors as f32, with the mark that transformers looks for.
pub fn write<'a>(path: &Path, tensors: impl IntoIterator<Item = NamedTensor<'a>>) -> Result<()> {
    let named: Vec<_> = tensors
        .into_iter()
        .map(|(name, shape, values)| {
            (name, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
        })
        .collect();
    let views = named
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|e| Error::file(path, e))?;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| Error::file(path, e))
}

/// The values of one tensor, widened to f32, all of them finite. The error is what is wrong with it.
pub fn read_one(
    file: &SafeTensors<'_>,
    name: &str,
    shape: [usize; 2],
) -> std::result::Result<Vec<f32>, String> {
    let tensor = file.tensor(name).map_err(|_| format!("{name} is missing"))?;
    if tensor.shape() != shape {
        return Err(format!("{name} has shape {:?}, expected {shape:?}", tensor.shape()));
    }
    let values: Vec<f32> = match tensor.dtype() {
        Dtype::F32 => words(tensor.data()).map(f32::from_le_bytes).collect(),
        Dtype::BF16 => words(tensor.data()).map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F16 => words(tensor.data()).map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        other => return Err(format!("{name} has dtype {other:?}, expected F32, BF16 or F16")),
    };
    match values.iter().position(|v| !v.is_finite()) {
        Some(index) => Err(format!("{name} is not finite at element {index}")),
        None => Ok(values),
    }
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.as_chunks::<N>().0.iter().copied()
}

/// Writes projections under the names of the checkpoint.
pub fn write_projections(path: &Path, weights: &ProjectionWeights, config: &ModelConfig) -> Result<()> {
    write(
        path,
        weights.iter().map(|((layer, target), values)| {
            let shape = config.projection_shape(*target).to_vec();
            (projection_name(*layer, *target), shape, values.as_slice())
        }),
    )
}

/// Reads all projections of a model.
pub fn read_projections(path: &Path, config: &ModelConfig) -> Result<ProjectionWeights> {
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::file(path, e))?;
    let mut weights = ProjectionWeights::new();
    for layer in 0..config.num_hidden_layers {
        for target in Target::ALL {
            let read = read_one(&file, &projection_name(layer, target), config.projection_shape(target));
            weights.insert((layer, target), read.map_err(|problem| Error::file(path, problem))?);
        }
    }
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::tests::model;

    #[test]
    fn projections_survive_the_disk_and_none_may_be_missing_or_not_finite() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("projections.safetensors");
        let values = |target| {
            let [rows, columns] = model().projection_shape(target);
            (0..rows * columns).map(|i| i as f32 - 7.5).collect()
        };
        let mut weights: ProjectionWeights = Target::ALL.map(|t| ((0, t), values(t))).into();
        write_projections(&path, &weights, &model()).unwrap();
        assert_eq!(read_projections(&path, &model()).unwrap(), weights);

        weights.get_mut(&(0, Target::Up)).unwrap()[3] = f32::NAN;
        write_projections(&path, &weights, &model()).unwrap();
        let error = read_projections(&path, &model()).unwrap_err().to_string();
        assert!(error.contains("up_proj.weight is not finite at element 3"), "{error}");
        weights.remove(&(0, Target::Up));
        write_projections(&path, &weights, &model()).unwrap();
        let error = read_projections(&path, &model()).unwrap_err().to_string();
        assert!(error.contains("up_proj.weight is missing"), "{error}");
    }
}
