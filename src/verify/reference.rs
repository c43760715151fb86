//! The golden files: made by transformers, peft and bitsandbytes (see `tests/reference`), compiled in,
//! and checked against their digests before anything is held against them.

use super::manifest::Manifest;
use super::tokenizer::TokenizerCases;
use super::{Scope, completeness};
use anyhow::{Context, Result, bail};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{AdapterTensors, read_tensors};
use evalfw_engine::protocol::{Quantization, TrainingConfig};
use include_dir::{Dir, include_dir};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

static GOLDEN: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/tests/reference/golden");
const MANIFEST: &str = include_str!("../../tests/reference/manifest.json");
/// The model of the short form: a head of its own, grouped heads, a rope theta of its own, in bf16.
const SHORT_MODEL: &str = "untied-6q3kv";

/// The reference on disk, for workers to load from.
pub struct Reference {
    models: Vec<ReferenceModel>,
    /// `None` where the reference has none.
    pub tokenizer: Option<TokenizerCases>,
    _unpacked: Option<TempDir>,
}

/// One golden model with everything that is known of it.
#[derive(Clone)]
pub struct ReferenceModel {
    pub name: String,
    pub model: PathBuf,
    pub config: ModelConfig,
    pub batches: PathBuf,
    pub adapter: PathBuf,
    pub trained_adapter: PathBuf,
    pub prompts: Vec<Prompt>,
    pub losses: Losses,
    /// Of line 0 with `adapter`.
    pub gradients: AdapterTensors,
    pub gradients_nf4: AdapterTensors,
    pub curves: BTreeMap<String, Curve>,
    /// Some steps with dropout in the adapters.
    pub dropout: Curve,
    /// Of its first step.
    pub gradients_dropout: AdapterTensors,
}

/// What a model computes with other weights for its projections.
pub struct Expectations {
    pub prompts: Vec<Prompt>,
    pub losses: AdapterLosses,
    /// Of line 0 with `adapter`.
    pub gradients: AdapterTensors,
}

#[derive(Clone)]
pub struct Prompt {
    pub tokens: Vec<u32>,
    /// `[tokens, vocab_size]`
    pub logits: Vec<f32>,
    /// The greedy continuation.
    pub continuation: Vec<GreedyToken>,
}

#[derive(Clone)]
pub struct GreedyToken {
    pub token: u32,
    /// From its logit to the next best.
    pub gap: f64,
}

impl GreedyToken {
    /// `token` with the logits of its position.
    pub fn new(token: u32, logits: &[f32]) -> Self {
        let chosen = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let others = logits.iter().enumerate().filter(|(other, _)| *other != token as usize);
        let best_other = others.fold(f32::NEG_INFINITY, |best, (_, logit)| best.max(*logit));
        Self { token, gap: f64::from(chosen) - f64::from(best_other) }
    }

    /// The first of the largest logit.
    pub fn of_largest(logits: &[f32]) -> Self {
        let larger = |best: (u32, f32), at: (u32, &f32)| if *at.1 > best.1 { (at.0, *at.1) } else { best };
        let (token, _) = (0..).zip(logits).fold((0, f32::NEG_INFINITY), larger);
        Self::new(token, logits)
    }
}

/// The mean loss of each batch.
#[derive(Clone, Deserialize)]
pub struct Losses {
    pub none: AdapterLosses,
    pub nf4: AdapterLosses,
}

#[derive(Clone, Deserialize)]
pub struct AdapterLosses {
    pub base: Vec<f64>,
    pub adapter: Vec<f64>,
    pub trained_adapter: Vec<f64>,
}

impl Losses {
    /// A framework's own format is held against what it stands for: the unquantized model.
    pub fn of(&self, quantization: Quantization) -> &AdapterLosses {
        match quantization {
            Quantization::None | Quantization::Native => &self.none,
            Quantization::Nf4 => &self.nf4,
        }
    }
}

#[derive(Clone, Deserialize)]
pub struct Curve {
    pub settings: CurveSettings,
    pub steps: Vec<CurveStep>,
}

#[derive(Clone, Deserialize)]
pub struct CurveSettings {
    pub learning_rate: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
    pub max_grad_norm: Option<f64>,
    pub quantization: Quantization,
    pub lora_dropout: f32,
    pub dropout_seed: u64,
}

#[derive(Clone, Deserialize)]
pub struct CurveStep {
    /// Lines of the batches, one for each micro-batch.
    pub lines: Vec<usize>,
    /// Before the update.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
}

impl CurveSettings {
    /// Those of the golden curves, but for a learning rate that suits wide models.
    pub fn usual() -> Self {
        Self {
            learning_rate: 1e-3,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: None,
            quantization: Quantization::None,
            lora_dropout: 0.0,
            dropout_seed: 0,
        }
    }

    pub fn quantization(&self) -> Quantization {
        self.quantization
    }

    pub fn training(&self) -> TrainingConfig {
        TrainingConfig {
            learning_rate: self.learning_rate,
            beta1: self.betas[0],
            beta2: self.betas[1],
            epsilon: self.eps,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            gradient_checkpointing: true,
            // As in the scenarios that are timed; the gradients of single steps keep nothing.
            kept_activation_bytes: 1 << 30,
        }
    }
}

#[derive(Deserialize)]
struct Greedy {
    tokens: Vec<u32>,
    gaps: Vec<f64>,
}

#[derive(Deserialize)]
struct AdapterShape {
    r: usize,
}

impl Reference {
    /// The golden files that are compiled in, unpacked into a temporary folder.
    pub fn built_in() -> Result<Self> {
        let folder =
            tempfile::Builder::new().prefix("evalfw-reference-").tempdir().context("no temporary folder")?;
        GOLDEN.extract(folder.path()).context("the reference could not be unpacked")?;
        let mut reference = Self::read_golden(folder.path(), MANIFEST)?;
        reference._unpacked = Some(folder);
        Ok(reference)
    }

    /// A folder of the same form: `manifest.json` and `golden/`.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("manifest.json");
        let manifest = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Self::read_golden(&folder.join("golden"), &manifest)
    }

    fn read_golden(golden: &Path, manifest: &str) -> Result<Self> {
        let manifest = Manifest::checked(manifest, golden)?;
        let mut models = Vec::new();
        for name in manifest.models() {
            let folder = golden.join(name);
            let model = ReferenceModel::read(name, &folder)?;
            completeness::check(&model).with_context(|| folder.display().to_string())?;
            models.push(model);
        }
        if models.is_empty() {
            bail!("{}: no reference model", golden.display());
        }
        Ok(Self { models, tokenizer: TokenizerCases::read(&golden.join("tokenizer"))?, _unpacked: None })
    }

    /// One model, whose files are in a temporary folder.
    pub fn derived(model: ReferenceModel, folder: TempDir) -> Self {
        Self { models: vec![model], tokenizer: None, _unpacked: Some(folder) }
    }

    pub fn all(&self) -> impl Iterator<Item = &ReferenceModel> {
        self.models.iter()
    }

    /// Keeps one model only.
    pub fn only(mut self, name: &str) -> Self {
        self.models.retain(|m| m.name == name);
        self
    }

    /// Those of which the short form looks at the logits alone: their weights are in several files.
    pub fn only_forward(&self, scope: Scope) -> Vec<&ReferenceModel> {
        let checked: Vec<&str> = self.models(scope).iter().map(|model| model.name.as_str()).collect();
        let is_new = |model: &&ReferenceModel| !checked.contains(&model.name.as_str()) && model.is_sharded();
        self.models.iter().filter(is_new).collect()
    }

    pub fn models(&self, scope: Scope) -> Vec<&ReferenceModel> {
        match scope {
            Scope::Full => self.models.iter().collect(),
            Scope::Short => self.short().into_iter().collect(),
        }
    }

    /// The model of the short form.
    pub fn short(&self) -> Option<&ReferenceModel> {
        self.models.iter().find(|m| m.name == SHORT_MODEL).or(self.models.first())
    }
}

impl ReferenceModel {
    /// The same with other expectations of its unquantized form.
    pub fn expecting(&self, Expectations { prompts, losses, gradients }: Expectations) -> Self {
        let losses = Losses { none: losses, nf4: self.losses.nf4.clone() };
        Self { prompts, losses, gradients, ..self.clone() }
    }

    /// Whether its weights are in several files.
    pub fn is_sharded(&self) -> bool {
        self.model.join("model.safetensors.index.json").is_file()
    }

    /// Lines of `batches`.
    pub fn batch_count(&self) -> usize {
        self.losses.none.base.len()
    }

    fn read(name: &str, folder: &Path) -> Result<Self> {
        let model = folder.join("model");
        let config = ModelConfig::read(&model)?;
        let adapter = folder.join("adapter");
        let AdapterShape { r } = json(&adapter.join("adapter_config.json"))?;
        let gradients = |name: &str| read_tensors(&folder.join(name), &config, r);
        Ok(Self {
            name: name.to_owned(),
            prompts: prompts(folder)?,
            batches: folder.join("batches.jsonl"),
            losses: json(&folder.join("losses.json"))?,
            gradients: gradients("gradients.safetensors")?,
            gradients_nf4: gradients("gradients_nf4.safetensors")?,
            curves: json(&folder.join("curves.json"))?,
            dropout: json(&folder.join("dropout.json"))?,
            gradients_dropout: gradients("gradients_dropout.safetensors")?,
            trained_adapter: folder.join("trained_adapter"),
            adapter,
            model,
            config,
        })
    }
}

fn prompts(folder: &Path) -> Result<Vec<Prompt>> {
    let prompts: Vec<Vec<u32>> = json(&folder.join("prompts.json"))?;
    let path = folder.join("greedy.json");
    let greedy: Vec<Greedy> = json(&path)?;
    if greedy.len() != prompts.len() || greedy.iter().any(|g| g.gaps.len() != g.tokens.len()) {
        bail!("{}: not one continuation for each prompt, or not one gap for each token", path.display());
    }
    let logits = folder.join("logits.safetensors");
    let prompt = |(number, (tokens, greedy)): (usize, (Vec<u32>, Greedy))| {
        let logits = read_f32(&logits, &format!("prompt_{number}"))?;
        let continuation = greedy.tokens.into_iter().zip(greedy.gaps);
        let continuation = continuation.map(|(token, gap)| GreedyToken { token, gap }).collect();
        Ok(Prompt { tokens, logits, continuation })
    };
    prompts.into_iter().zip(greedy).enumerate().map(prompt).collect()
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

/// A tensor of f32 values.
pub fn read_f32(path: &Path, name: &str) -> Result<Vec<f32>> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| path.display().to_string())?;
    let tensor = file.tensor(name).with_context(|| format!("{}: {name}", path.display()))?;
    if tensor.dtype() != safetensors::Dtype::F32 {
        bail!("{}: {name} has dtype {:?}, expected F32", path.display(), tensor.dtype());
    }
    Ok(tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}
