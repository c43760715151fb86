//! candle with a planted error: `mutant_engine MUTATION` is a worker that `verify` must catch.

use evalfw_candle::{CandleDevice, open};
use evalfw_engine::batch::Batch;
use evalfw_engine::checkpoint::Checkpoint;
use evalfw_engine::lora::{Adapter, AdapterTensors, Target};
use evalfw_engine::protocol::{DeviceMemory, EngineInfo, LoadTimes, TrainingConfig};
use evalfw_engine::serve::serve_stdio;
use evalfw_engine::weights::WeightLoader;
use evalfw_engine::{Engine, Error, Evaluation, LoadedModel, Model, Result, StepInput, StepResult};
use safetensors::SafeTensors;
use std::path::Path;

#[derive(Clone, Copy, PartialEq)]
enum Mutation {
    /// No error: shows that the wrapper itself is right.
    None,
    /// Rotary angles of another theta.
    Rope,
    /// No bias on the keys of the last layer.
    Bias,
    /// One adapter matrix gets no gradient.
    Gradient,
    /// The adapter's output is scaled by alpha instead of alpha / r.
    Scale,
    /// Decoding goes on one position too late, with a key twice in the cache.
    Cache,
    /// Dropout in evaluation: the adapter drops everything.
    Evaluation,
    /// A loss that is not a number.
    NotFinite,
}

fn main() -> std::io::Result<()> {
    let mutation = match std::env::args().nth(1).as_deref() {
        Some("none") => Mutation::None,
        Some("rope") => Mutation::Rope,
        Some("bias") => Mutation::Bias,
        Some("gradient") => Mutation::Gradient,
        Some("scale") => Mutation::Scale,
        Some("cache") => Mutation::Cache,
        Some("evaluation") => Mutation::Evaluation,
        Some("not-finite") => Mutation::NotFinite,
        other => panic!("no mutation {other:?}"),
    };
    serve_stdio(Box::new(move || Ok(Box::new(Mutant { engine: open(CandleDevice::Cpu)?, mutation }))))
}

struct Mutant {
    engine: Box<dyn Engine>,
    mutation: Mutation,
}

impl Engine for Mutant {
    fn info(&self) -> EngineInfo {
        self.engine.info()
    }

    fn load(&mut self, loader: WeightLoader<'_>) -> Result<LoadedModel> {
        let model = match self.mutation {
            Mutation::Rope | Mutation::Bias => {
                let altered = tempfile::tempdir().map_err(Error::framework)?;
                alter(&loader.checkpoint().dir, altered.path(), self.mutation);
                let checkpoint = Checkpoint::open(altered.path())?;
                let mut times = LoadTimes::default();
                self.engine.load(WeightLoader::new(&checkpoint, loader.quantization(), &mut times))?
            }
            _ => self.engine.load(loader)?,
        };
        Ok(Box::new(MutantModel { model, mutation: self.mutation, adapter: None }))
    }
}

/// A copy of a model folder with another theta, or without the bias of a k projection.
fn alter(from: &Path, to: &Path, mutation: Mutation) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let name = path.file_name().unwrap();
        if mutation == Mutation::Rope && name == "config.json" {
            let mut config: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            config["rope_parameters"]["rope_theta"] = 10_000.0.into();
            bytes = config.to_string().into_bytes();
        }
        if mutation == Mutation::Bias && name == "model.safetensors" {
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let tensor = file.tensor("model.layers.1.self_attn.k_proj.bias").unwrap();
            let start = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
            let range = start..start + tensor.data().len();
            bytes[range].fill(0);
        }
        std::fs::write(to.join(name), bytes).unwrap();
    }
}

struct MutantModel {
    model: LoadedModel,
    mutation: Mutation,
    adapter: Option<(Adapter, TrainingConfig)>,
}

impl Model for MutantModel {
    fn attach_adapter(&mut self, adapter: &Adapter, training: &TrainingConfig) -> Result<()> {
        let mut adapter = adapter.clone();
        if self.mutation == Mutation::Scale {
            adapter.config.lora_alpha *= adapter.config.r as f64;
        }
        self.model.attach_adapter(&adapter, training)?;
        self.adapter = Some((adapter, training.clone()));
        Ok(())
    }

    fn train_step(&mut self, input: &StepInput<'_>) -> Result<StepResult> {
        self.model.train_step(input)
    }

    fn gradients(&mut self, input: &StepInput<'_>) -> Result<(StepResult, AdapterTensors)> {
        let (mut result, mut gradients) = self.model.gradients(input)?;
        if self.mutation == Mutation::Gradient {
            gradients.get_mut(&(0, Target::V)).unwrap().a.fill(0.0);
        }
        if self.mutation == Mutation::NotFinite {
            result.loss = f64::NAN;
        }
        Ok((result, gradients))
    }

    fn evaluate(&mut self, batches: &[Batch]) -> Result<Evaluation> {
        let (Mutation::Evaluation, Some((adapter, training))) = (self.mutation, &self.adapter) else {
            return self.model.evaluate(batches);
        };
        let mut dropped = adapter.clone();
        dropped.tensors.values_mut().for_each(|pair| pair.a.fill(0.0));
        self.model.attach_adapter(&dropped, training)?;
        let evaluation = self.model.evaluate(batches);
        self.model.attach_adapter(adapter, training)?;
        evaluation
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<u32> {
        self.model.prefill(tokens)
    }

    fn decode(&mut self, token: u32) -> Result<u32> {
        if self.mutation == Mutation::Cache {
            self.model.decode(token)?;
        }
        self.model.decode(token)
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.model.logits(tokens)
    }

    fn adapter(&mut self) -> Result<AdapterTensors> {
        self.model.adapter()
    }

    fn synchronize(&mut self) -> Result<()> {
        self.model.synchronize()
    }

    fn memory(&self) -> DeviceMemory {
        self.model.memory()
    }
}
