//! Hands the weights of a checkpoint to an engine, one at a time, in the form it shall store.

use crate::checkpoint::{Checkpoint, ElementType, TensorReader, widen};
use crate::config::ModelConfig;
use crate::lora::Target;
use crate::nf4::{BLOCK, Nf4Builder, Nf4Piece, Nf4Tensor};
use crate::protocol::{LoadTimes, Quantization};
use crate::{Error, Result};
use bytemuck::Pod;
use half::{bf16, f16};
use rayon::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Elements that a thread reads at a time: few enough that they are still in its cache when they are quantized.
const PIECE: usize = 1024 * BLOCK;
/// Elements that a thread has in full precision at a time: 4 KiB.
const RUN: usize = 16 * BLOCK;

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

/// Frozen projections by layer and place, each row-major `[out_features, in_features]`.
pub type ProjectionWeights = BTreeMap<(usize, Target), Vec<f32>>;

/// A projection's name in a checkpoint.
pub fn projection_name(layer: usize, target: Target) -> String {
    format!("model.layers.{layer}.{}.weight", target.path())
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
        let name = projection_name(layer, target);
        let shape = self.config().projection_shape(target);
        let weight = match self.quantization {
            // The engine quantizes to its own format, one matrix at a time.
            Quantization::None | Quantization::Native => Weight::Dense(self.dense(&name, shape)?),
            Quantization::Nf4 => Weight::Nf4(self.nf4(&name, shape)?),
        };
        let bias = match target.has_bias() {
            true => Some(self.vector(&format!("model.layers.{layer}.{}.bias", target.path()))?),
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
        let reader = self.checkpoint.reader(name)?;
        let data = match reader.element_type() {
            ElementType::F32 => DenseData::F32(read_dense(name, &reader)?),
            ElementType::F16 => DenseData::F16(read_dense(name, &reader)?),
            ElementType::Bf16 => DenseData::Bf16(read_dense(name, &reader)?),
        };
        self.times.read_seconds += start.elapsed().as_secs_f64();
        Ok(DenseTensor { shape, data })
    }

    /// Every thread reads a piece, the next in the file's order, and quantizes it at once.
    fn nf4(&mut self, name: &str, shape: [usize; 2]) -> Result<Nf4Tensor> {
        let start = Instant::now();
        let reader = self.checkpoint.reader(name)?;
        let mut builder = Nf4Builder::new(shape);
        let shares = Shares::default();
        builder.fill(PIECE, |piece| {
            BYTES.with_borrow_mut(|bytes| {
                bytes.resize(piece.rest().len() * reader.element_type().bytes(), 0);
                let start = Instant::now();
                reader.read_at(piece.rest().start, bytes)?;
                let read = start.elapsed();
                let finite = quantize(reader.element_type(), bytes, piece);
                shares.add(read, start.elapsed() - read);
                if finite { Ok(()) } else { Err(not_finite(name, &reader)) }
            })
        })?;
        shares.divide(start.elapsed(), self.times);
        let start = Instant::now();
        let tensor = builder.finish();
        self.quantized_in(start.elapsed());
        Ok(tensor)
    }
}

thread_local! {
    /// What a thread has read last. It is kept from piece to piece, for new memory is slow to come by.
    static BYTES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Returns whether all values are finite.
fn quantize(dtype: ElementType, bytes: &[u8], piece: &mut Nf4Piece<'_>) -> bool {
    let mut values = [0.0; RUN];
    let mut finite = true;
    for bytes in bytes.chunks(RUN * dtype.bytes()) {
        let values = &mut values[..bytes.len() / dtype.bytes()];
        widen(dtype, bytes, values);
        finite &= piece.push(values);
    }
    finite
}

/// The time that all threads have spent on either of two things, in nanoseconds.
#[derive(Default)]
struct Shares {
    reading: AtomicU64,
    quantizing: AtomicU64,
}

impl Shares {
    fn add(&self, reading: Duration, quantizing: Duration) {
        self.reading.fetch_add(reading.as_nanos() as u64, Ordering::Relaxed);
        self.quantizing.fetch_add(quantizing.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Divides what has passed on the clock in proportion.
    fn divide(self, passed: Duration, times: &mut LoadTimes) {
        let [reading, quantizing] = [self.reading, self.quantizing].map(|t| t.into_inner() as f64);
        let share = reading / (reading + quantizing).max(1.0);
        times.read_seconds += share * passed.as_secs_f64();
        times.quantize_seconds += (1.0 - share) * passed.as_secs_f64();
    }
}

/// A number as it is stored in a checkpoint.
trait Element: Pod + Send {
    /// What was read, little-endian, as this machine has it.
    fn in_native_order(self) -> Self;
    fn is_finite(self) -> bool;
}

macro_rules! elements {
    ($($type:ty),*) => {$(
        impl Element for $type {
            fn in_native_order(self) -> Self {
                Self::from_le_bytes(bytemuck::cast(self))
            }

            fn is_finite(self) -> bool {
                self.is_finite()
            }
        }
    )*};
}
elements!(f32, f16, bf16);

/// Reads a whole tensor, each piece to where it shall lie, on all threads.
fn read_dense<T: Element>(name: &str, reader: &TensorReader) -> Result<Vec<T>> {
    // Of so much memory the allocator knows that it is zero: it is first touched by the thread that reads.
    let mut values: Vec<T> = bytemuck::zeroed_vec(reader.elements());
    // Bridged, so that the pieces are asked for in the file's order, as a disk likes it.
    values.chunks_mut(PIECE).enumerate().par_bridge().try_for_each(|(i, piece)| {
        reader.read_at(i * PIECE, bytemuck::cast_slice_mut(piece))?;
        let mut finite = true;
        for value in piece {
            *value = value.in_native_order();
            finite &= value.is_finite();
        }
        if finite { Ok(()) } else { Err(not_finite(name, reader)) }
    })?;
    Ok(values)
}

fn not_finite(name: &str, reader: &TensorReader) -> Error {
    Error::file(reader.file(), format_args!("{name} holds a value that is NaN or infinite"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tests::{Folder, small};
    use safetensors::tensor::Dtype;
    use std::fs::OpenOptions;

    const NORM: &str = "model.norm.weight";
    const UP: &str = "model.layers.0.mlp.up_proj.weight";
    /// A tensor and a form in which it is loaded: each way of reading one.
    const WAYS: [(&str, Quantization); 3] =
        [(UP, Quantization::None), (UP, Quantization::Nf4), (NORM, Quantization::Nf4)];

    fn load_error(checkpoint: &Checkpoint, (tensor, quantization): (&str, Quantization)) -> Error {
        let mut times = LoadTimes::default();
        let mut loader = WeightLoader::new(checkpoint, quantization, &mut times);
        match tensor == NORM {
            true => loader.final_norm().unwrap_err(),
            false => loader.projection(0, Target::Up).unwrap_err(),
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_refused_by_file_and_tensor() {
        for (tensor, quantization) in WAYS {
            let folder = Folder::new(&small(false));
            folder.write_shards(|name, values| {
                if name == tensor {
                    values[1] = f32::NAN;
                }
            });
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let message = load_error(&checkpoint, (tensor, quantization)).to_string();
            let shard = folder.shard_of(tensor);
            assert!(message.contains(tensor) && message.contains(&shard), "{message}");
        }
    }

    #[test]
    fn a_file_that_was_cut_short_since_it_was_opened_is_an_error_in_the_input() {
        for (tensor, quantization) in WAYS {
            let folder = Folder::new(&small(false));
            folder.write_shards(|_, _| ());
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let shard = folder.path().join(folder.shard_of(tensor));
            let length = shard.metadata().unwrap().len();
            OpenOptions::new().write(true).open(&shard).unwrap().set_len(length - 1).unwrap();
            let error = load_error(&checkpoint, (tensor, quantization));
            assert!(matches!(error, Error::Input { .. }), "{error:?}");
            let message = error.to_string();
            assert!(message.contains(&format!("{}: {tensor}: ", shard.display())), "{message}");
        }
    }

    #[test]
    fn a_tensor_of_several_pieces_is_loaded_as_a_whole_in_every_type() {
        let mut config = small(false);
        config.intermediate_size = PIECE;
        let shape = config.projection_shape(Target::Up);
        // Exact in each of the types, and no two pieces are alike.
        let value = |i: usize| (i * i / 7 % 256) as f32 - 128.0;
        let expected: Vec<f32> = (0..shape[0] * shape[1]).map(value).collect();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let mut folder = Folder::new(&config);
            folder.dtype = dtype;
            folder.write_shards(|_, values| values.iter_mut().enumerate().for_each(|(i, v)| *v = value(i)));
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let mut times = LoadTimes::default();
            let mut up = |quantization| {
                let mut loader = WeightLoader::new(&checkpoint, quantization, &mut times);
                loader.projection(0, Target::Up).unwrap().weight
            };
            let Weight::Dense(dense) = up(Quantization::None) else { panic!("not dense") };
            assert_eq!(dense.into_f32(), expected);
            let Weight::Nf4(nf4) = up(Quantization::Nf4) else { panic!("not NF4") };
            assert_eq!(nf4, Nf4Tensor::quantize(shape, &expected));
            assert!(times.read_seconds > 0.0 && times.quantize_seconds > 0.0, "{times:?}");
        }
    }

    #[test]
    fn what_passes_while_all_threads_read_and_quantize_is_divided_by_their_time() {
        let mut times = LoadTimes { read_seconds: 1.0, ..LoadTimes::default() };
        let shares = Shares::default();
        shares.add(Duration::from_secs(1), Duration::from_secs(2));
        shares.add(Duration::from_secs(1), Duration::from_secs(4));
        shares.divide(Duration::from_secs(4), &mut times);
        assert_eq!((times.read_seconds, times.quantize_seconds), (2.0, 3.0));
        // Of nothing there are no shares.
        Shares::default().divide(Duration::ZERO, &mut times);
        assert_eq!((times.read_seconds, times.quantize_seconds), (2.0, 3.0));
    }
}
