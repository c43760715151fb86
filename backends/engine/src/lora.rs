//! LoRA adapters, on disk in the format of Hugging Face PEFT.

use crate::config::ModelConfig;
use crate::{Error, Result, peft_config, tensor_file};
use safetensors::tensor::SafeTensors;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The seven projections of a Qwen2 block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Target {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Target {
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The module's name, as in PEFT's `target_modules`.
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The path of the module below its layer.
    pub fn path(self) -> String {
        let parent = match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        };
        format!("{parent}.{}", self.module())
    }

    /// Qwen2 has biases on q, k and v only.
    pub fn has_bias(self) -> bool {
        matches!(self, Self::Q | Self::K | Self::V)
    }
}

/// The part of PEFT's `LoraConfig` that changes the computation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    pub r: usize,
    pub lora_alpha: f64,
    /// Probability with which an input of an adapter is dropped in training.
    pub lora_dropout: f32,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { r: 16, lora_alpha: 32.0, lora_dropout: 0.1 }
    }
}

impl LoraConfig {
    /// The factor of the adapter's output (Hu et al. 2021): alpha / r.
    pub fn scale(&self) -> f64 {
        self.lora_alpha / self.r as f64
    }
}

/// The two factors of one adapted projection, row-major f32.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoraPair {
    /// `[r, in_features]`
    pub a: Vec<f32>,
    /// `[out_features, r]`
    pub b: Vec<f32>,
}

/// One value for each adapted projection: weights, or their gradients.
pub type AdapterTensors = BTreeMap<(usize, Target), LoraPair>;

/// An adapter for all seven projections of every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    pub config: LoraConfig,
    pub tensors: AdapterTensors,
}

const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const CONFIG_FILE: &str = "adapter_config.json";

impl Adapter {
    /// Reads a PEFT adapter folder and checks it against the model it is for.
    pub fn read(dir: &Path, model: &ModelConfig) -> Result<Self> {
        let config = peft_config::read(&dir.join(CONFIG_FILE), model)?;
        let tensors = read_tensors(&dir.join(WEIGHTS_FILE), model, config.r)?;
        Ok(Self { config, tensors })
    }

    /// Writes a folder that `peft.PeftModel.from_pretrained` loads. `base_model` goes into the config
    /// for the reader's information.
    pub fn write(&self, dir: &Path, base_model: &str) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| Error::file(dir, e))?;
        let path = dir.join(CONFIG_FILE);
        std::fs::write(&path, peft_config::to_json(&self.config, base_model))
            .map_err(|e| Error::file(&path, e))?;
        write_tensors(&dir.join(WEIGHTS_FILE), &self.tensors, self.config.r)
    }

    pub fn parameters(&self) -> usize {
        self.tensors.values().map(|pair| pair.a.len() + pair.b.len()).sum()
    }
}

/// Reads adapter tensors, or gradients of the same names: both factors of all seven projections of every
/// layer of `model`, and nothing else.
pub fn read_tensors(path: &Path, model: &ModelConfig, r: usize) -> Result<AdapterTensors> {
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::file(path, e))?;
    let mut tensors = AdapterTensors::new();
    for layer in 0..model.num_hidden_layers {
        for target in Target::ALL {
            let [out_features, in_features] = model.projection_shape(target);
            let read = |factor: char, shape: [usize; 2]| {
                let name = tensor_name(layer, target, factor);
                tensor_file::read_one(&file, &name, shape).map_err(|problem| Error::file(path, problem))
            };
            let pair = LoraPair { a: read('A', [r, in_features])?, b: read('B', [out_features, r])? };
            tensors.insert((layer, target), pair);
        }
    }
    let expected = tensors.len() * 2;
    if file.len() != expected {
        let problem = format!(
            "holds {} tensors, but LoRA on all seven projections of this model has {expected}",
            file.len()
        );
        return Err(Error::file(path, problem));
    }
    Ok(tensors)
}

/// Writes adapter tensors, or gradients of the same names, as safetensors.
pub fn write_tensors(path: &Path, tensors: &AdapterTensors, r: usize) -> Result<()> {
    tensor_file::write(
        path,
        tensors.iter().flat_map(|((layer, target), pair)| {
            let factors =
                [('A', &pair.a, vec![r, pair.a.len() / r]), ('B', &pair.b, vec![pair.b.len() / r, r])];
            factors.map(|(factor, values, shape)| {
                (tensor_name(*layer, *target, factor), shape, values.as_slice())
            })
        }),
    )
}

fn tensor_name(layer: usize, target: Target, factor: char) -> String {
    format!("base_model.model.model.layers.{layer}.{}.lora_{factor}.weight", target.path())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn model() -> ModelConfig {
        ModelConfig {
            vocab_size: 10,
            hidden_size: 8,
            intermediate_size: 12,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 4,
            max_position_embeddings: 32,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            tie_word_embeddings: true,
        }
    }

    fn adapter() -> Adapter {
        let config = LoraConfig { r: 2, lora_alpha: 4.0, lora_dropout: 0.1 };
        let pair = |target| {
            let [out, input] = model().projection_shape(target);
            LoraPair { a: (0..2 * input).map(|i| i as f32).collect(), b: vec![0.5; out * 2] }
        };
        let tensors = Target::ALL.iter().map(|&t| ((0, t), pair(t))).collect();
        Adapter { config, tensors }
    }

    #[test]
    fn an_adapter_survives_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        adapter().write(dir.path(), "base").unwrap();
        assert_eq!(Adapter::read(dir.path(), &model()).unwrap(), adapter());
    }

    #[test]
    fn an_adapter_for_another_shape_or_method_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        adapter().write(dir.path(), "base").unwrap();
        let wider = ModelConfig { hidden_size: 16, ..model() };
        let error = Adapter::read(dir.path(), &wider).unwrap_err().to_string();
        assert!(error.contains("q_proj.lora_A.weight has shape [2, 8], expected [2, 16]"), "{error}");

        let path = dir.path().join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"use_dora\": false", "\"use_dora\": true")).unwrap();
        let error = Adapter::read(dir.path(), &model()).unwrap_err().to_string();
        assert!(error.contains("adapter_config.json: use_dora"), "{error}");
    }
}
