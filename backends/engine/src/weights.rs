//! Hands the weights of a checkpoint to an engine, one at a time, in the form it shall store.

use crate::checkpoint::{Checkpoint, ElementType, TensorReader, widen};
use crate::config::ModelConfig;
use crate::lora::Target;
use crate::nf4::{BLOCK, Nf4Builder, Nf4Tensor};
use crate::protocol::{LoadTimes, Quantization};
use crate::{Error, Result};
use half::{bf16, f16};
use rayon::prelude::*;
use std::time::{Duration, Instant};

/// Elements that are in memory in full precision at a time while a tensor is quantized: 16 MiB.
const PIECE: usize = 65_536 * BLOCK;

/// A matrix of the frozen base.
#[derive(Debug, Clone)]
pub enum Weight {
    Dense(DenseTensor),
    Nf4(Nf4Tensor),
}

/// A tensor in the checkpoint's own type.
#[derive(Debug, Clone)]
pub struct DenseTensor {
    /// `[out_features, in_features]`, or `[vocab_size, hidden_size]`.
    pub shape: [usize; 2],
    pub data: DenseData,
}

#[derive(Debug, Clone)]
pub enum DenseData {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl DenseTensor {
    pub fn into_f32(self) -> Vec<f32> {
        match self.data {
            DenseData::F32(values) => values,
            DenseData::F16(values) => values.par_iter().map(|v| v.to_f32()).collect(),
            DenseData::Bf16(values) => values.par_iter().map(|v| v.to_f32()).collect(),
        }
    }
}

/// A linear layer of the frozen base.
#[derive(Debug, Clone)]
pub struct Projection {
    pub weight: Weight,
    pub bias: Option<Vec<f32>>,
}

/// Reads and quantizes on demand, and keeps the time of both apart from what the engine does with the
/// result.
pub struct WeightLoader<'a> {
    checkpoint: &'a Checkpoint,
    quantization: Quantization,
    times: &'a mut LoadTimes,
}

impl<'a> WeightLoader<'a> {
    pub fn new(checkpoint: &'a Checkpoint, quantization: Quantization, times: &'a mut LoadTimes) -> Self {
        Self { checkpoint, quantization, times }
    }

    /// Where the weights come from.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// Adds the time of an engine that quantizes to a format of its own.
    pub fn quantized_in(&mut self, time: Duration) {
        self.times.quantize_seconds += time.as_secs_f64();
    }

    /// The form in which projections are handed out.
    pub fn quantization(&self) -> Quantization {
        self.quantization
    }

    pub fn config(&self) -> &'a ModelConfig {
        &self.checkpoint.config
    }

    pub fn embedding(&mut self) -> Result<DenseTensor> {
        let config = self.config();
        self.dense("model.embed_tokens.weight", [config.vocab_size, config.hidden_size])
    }

    /// The output head, or `None` where it is the embedding.
    pub fn head(&mut self) -> Result<Option<DenseTensor>> {
        let config = self.config();
        if config.tie_word_embeddings {
            return Ok(None);
        }
        self.dense("lm_head.weight", [config.vocab_size, config.hidden_size]).map(Some)
    }

    pub fn final_norm(&mut self) -> Result<Vec<f32>> {
        self.vector("model.norm.weight")
    }

    pub fn input_norm(&mut self, layer: usize) -> Result<Vec<f32>> {
        self.vector(&format!("model.layers.{layer}.input_layernorm.weight"))
    }

    pub fn post_attention_norm(&mut self, layer: usize) -> Result<Vec<f32>> {
        self.vector(&format!("model.layers.{layer}.post_attention_layernorm.weight"))
    }

    pub fn projection(&mut self, layer: usize, target: Target) -> Result<Projection> {
        let prefix = format!("model.layers.{layer}.{}", target.path());
        let name = format!("{prefix}.weight");
        let shape = self.config().projection_shape(target);
        let weight = match self.quantization {
            // The engine quantizes to its own format, one matrix at a time.
            Quantization::None | Quantization::Native => Weight::Dense(self.dense(&name, shape)?),
            Quantization::Nf4 => Weight::Nf4(self.nf4(&name, shape)?),
        };
        let bias = match target.has_bias() {
            true => Some(self.vector(&format!("{prefix}.bias"))?),
            false => None,
        };
        Ok(Projection { weight, bias })
    }

    fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        let start = Instant::now();
        let mut reader = self.checkpoint.reader(name)?;
        let mut values = vec![0.0; reader.remaining()];
        reader.read_f32(&mut values)?;
        self.times.read_seconds += start.elapsed().as_secs_f64();
        Ok(values)
    }

    fn dense(&mut self, name: &str, shape: [usize; 2]) -> Result<DenseTensor> {
        let start = Instant::now();
        let mut reader = self.checkpoint.reader(name)?;
        let data = match reader.element_type() {
            ElementType::F32 => {
                DenseData::F32(collect(name, &mut reader, f32::from_le_bytes, f32::is_finite)?)
            }
            ElementType::F16 => {
                DenseData::F16(collect(name, &mut reader, f16::from_le_bytes, f16::is_finite)?)
            }
            ElementType::Bf16 => {
                DenseData::Bf16(collect(name, &mut reader, bf16::from_le_bytes, bf16::is_finite)?)
            }
        };
        self.times.read_seconds += start.elapsed().as_secs_f64();
        Ok(DenseTensor { shape, data })
    }

    fn nf4(&mut self, name: &str, shape: [usize; 2]) -> Result<Nf4Tensor> {
        let mut reader = self.checkpoint.reader(name)?;
        let dtype = reader.element_type();
        let mut builder = Nf4Builder::new(shape);
        let mut piece = vec![0.0; PIECE.min(reader.remaining())];
        while reader.remaining() > 0 {
            let values = &mut piece[..PIECE.min(reader.remaining())];
            let start = Instant::now();
            let bytes = reader.read_bytes(values.len())?;
            self.times.read_seconds += start.elapsed().as_secs_f64();

            let start = Instant::now();
            let width = dtype.bytes();
            values
                .par_chunks_mut(1024 * BLOCK)
                .zip(bytes.par_chunks(1024 * BLOCK * width))
                .for_each(|(values, bytes)| widen(dtype, bytes, values));
            if values.par_iter().any(|v| !v.is_finite()) {
                return Err(not_finite(name, &reader));
            }
            builder.push(values);
            self.times.quantize_seconds += start.elapsed().as_secs_f64();
        }
        let start = Instant::now();
        let tensor = builder.finish();
        self.times.quantize_seconds += start.elapsed().as_secs_f64();
        Ok(tensor)
    }
}

fn collect<T, const N: usize>(
    name: &str,
    reader: &mut TensorReader,
    parse: fn([u8; N]) -> T,
    finite: fn(T) -> bool,
) -> Result<Vec<T>>
where
    T: Copy + Send + Sync,
{
    let mut values = Vec::with_capacity(reader.remaining());
    while reader.remaining() > 0 {
        let bytes = reader.read_bytes(PIECE.min(reader.remaining()))?;
        values.par_extend(bytes.as_chunks::<N>().0.par_iter().map(|b| parse(*b)));
    }
    if values.par_iter().any(|v| !finite(*v)) {
        return Err(not_finite(name, reader));
    }
    Ok(values)
}

fn not_finite(name: &str, reader: &TensorReader) -> Error {
    Error::file(reader.file(), format_args!("{name} holds a value that is NaN or infinite"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tests::{Folder, small};

    #[test]
    fn a_value_that_is_not_finite_is_refused_by_file_and_tensor() {
        let norm = "model.norm.weight";
        let projection = "model.layers.0.mlp.up_proj.weight";
        for (tensor, quantization) in
            [(projection, Quantization::None), (projection, Quantization::Nf4), (norm, Quantization::Nf4)]
        {
            let folder = Folder::new(&small(false));
            folder.write_shards(|name, values| {
                if name == tensor {
                    values[1] = f32::NAN;
                }
            });
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let mut times = LoadTimes::default();
            let mut loader = WeightLoader::new(&checkpoint, quantization, &mut times);
            let error = match tensor == norm {
                true => loader.final_norm().unwrap_err(),
                false => loader.projection(0, Target::Up).unwrap_err(),
            };
            let message = error.to_string();
            let shard = folder.shard_of(tensor);
            assert!(message.contains(tensor) && message.contains(&shard), "{message}");
        }
    }
}
