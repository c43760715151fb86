//! Small random models on disk, adapters and batches for them.

use evalfw_burn::{BurnDevice, Preparation, Variant, open};
use evalfw_engine::batch::{Batch, IGNORE_INDEX};
use evalfw_engine::checkpoint::Checkpoint;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{Adapter, LoraConfig, LoraPair, Target};
use evalfw_engine::protocol::{LoadTimes, Quantization, TrainingConfig};
use evalfw_engine::weights::WeightLoader;
use evalfw_engine::{Engine, Error, LoadedModel};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

/// One folder for all of these tests: the self-check takes its time once.
pub fn preparation() -> Preparation {
    Preparation { self_checks: Some(env!("CARGO_TARGET_TMPDIR").into()), ..Preparation::default() }
}

/// The engine on wgpu, or `None` where this machine has no adapter. Any other failure is one.
pub fn wgpu() -> Option<Box<dyn Engine>> {
    match open(BurnDevice::Wgpu, Variant::Tuned, &preparation()) {
        Ok(engine) => Some(engine),
        Err(Error::Unavailable { reason, .. }) => {
            eprintln!("not run: {reason}");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

/// SplitMix64, as numbers in (-1, 1).
pub struct Random(pub u64);

impl Random {
    pub fn integer(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| ((self.integer() >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale).collect()
    }
}

pub type Tensors = BTreeMap<String, Vec<f32>>;

/// A checkpoint on disk and the values in it.
pub struct SmallModel {
    pub dir: TempDir,
    pub config: ModelConfig,
    pub tensors: Tensors,
}

/// Sizes that do not divide each other, so that a mistaken shape is found.
pub fn config(tied: bool) -> ModelConfig {
    ModelConfig {
        vocab_size: 97,
        hidden_size: 32,
        intermediate_size: 44,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: if tied { 8 } else { 12 },
        max_position_embeddings: 128,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        tie_word_embeddings: tied,
    }
}

impl SmallModel {
    pub fn new(tied: bool) -> Self {
        let config = config(tied);
        let mut random = Random(11);
        let value = |(name, shape): (String, Vec<usize>)| {
            let count = shape.iter().product();
            let values = if name.ends_with("norm.weight") {
                random.values(count, 0.3).iter().map(|v| 1.0 + v).collect()
            } else {
                random.values(count, 0.35)
            };
            (name, values)
        };
        let tensors = config.tensors().into_iter().map(value).collect();
        Self::write(config, tensors)
    }

    pub fn write(config: ModelConfig, tensors: Tensors) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_config(dir.path(), &config);
        let bytes: BTreeMap<&String, Vec<u8>> = tensors
            .iter()
            .map(|(name, values)| (name, values.iter().flat_map(|v| v.to_le_bytes()).collect()))
            .collect();
        let views = config.tensors().into_iter().map(|(name, shape)| {
            let view = TensorView::new(Dtype::F32, shape, &bytes[&name]).unwrap();
            (name, view)
        });
        safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
        Self { dir, config, tensors }
    }

    pub fn load(&self, engine: &mut dyn Engine, quantization: Quantization) -> LoadedModel {
        let checkpoint = Checkpoint::open(self.dir.path()).unwrap();
        let mut times = LoadTimes::default();
        engine.load(WeightLoader::new(&checkpoint, quantization, &mut times)).unwrap()
    }

    /// A LoRA adapter in which neither factor is zero.
    pub fn adapter(&self, dropout: f32) -> Adapter {
        let lora = LoraConfig { r: 3, lora_alpha: 6.0, lora_dropout: dropout };
        let mut random = Random(23);
        let mut tensors = BTreeMap::new();
        for layer in 0..self.config.num_hidden_layers {
            for target in Target::ALL {
                let [out, input] = self.config.projection_shape(target);
                let pair =
                    LoraPair { a: random.values(lora.r * input, 0.3), b: random.values(out * lora.r, 0.3) };
                tensors.insert((layer, target), pair);
            }
        }
        Adapter { config: lora, tensors }
    }
}

fn write_config(dir: &Path, config: &ModelConfig) {
    let mut value = serde_json::to_value(config).unwrap();
    value["model_type"] = json!("qwen2");
    std::fs::write(dir.join("config.json"), value.to_string()).unwrap();
}

/// Examples of the given lengths, padded on the right. The first third of each is a prompt, without a
/// loss.
pub fn batch(lengths: &[usize], seed: u64) -> Batch {
    let slots = lengths.iter().copied().max().unwrap();
    let mut random = Random(seed);
    let row = |&length: &usize| {
        let ids: Vec<u32> = (0..length).map(|_| (random.integer() % 97) as u32).collect();
        let mut labels: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        labels[..length / 3].fill(IGNORE_INDEX);
        (ids, labels)
    };
    Batch::right_padded(lengths.iter().map(row), slots)
}

pub fn training() -> TrainingConfig {
    TrainingConfig { learning_rate: 1e-2, ..TrainingConfig::default() }
}

/// Whether two values agree, relative to the larger of the second and `floor`.
pub fn close(value: f64, expected: f64, tolerance: f64, floor: f64) -> bool {
    (value - expected).abs() <= tolerance * expected.abs().max(floor)
}
