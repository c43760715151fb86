//! A loaded model of the stock form, as the contract wants it.

use super::network::{LayerCache, Pass, Qwen2, tokens};
use super::{adapter, training, weights};
use crate::guard::{guard, read, wait_for};
use crate::model::no_adapter;
use crate::pool::PoolWatch;
use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::Device;
use evalfw_engine::batch::Batch;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{Adapter, AdapterTensors};
use evalfw_engine::protocol::{DeviceMemory, TrainingConfig};
use evalfw_engine::weights::{ProjectionWeights, WeightLoader};
use evalfw_engine::{Error, Evaluation, Model, Result, StepInput, StepResult};

pub struct StockModel {
    config: ModelConfig,
    /// Without autodiff.
    device: Device,
    base: Qwen2,
    adapter: Option<Trained>,
    /// The sequence that is being generated.
    caches: Vec<LayerCache>,
    length: usize,
    pool: PoolWatch,
}

/// The base with an adapter, on the same device with autodiff.
struct Trained {
    network: Qwen2,
    device: Device,
    dropout: f32,
    training: TrainingConfig,
    optimizer: ModuleOptimizer,
}

impl StockModel {
    pub fn load(mut loader: WeightLoader<'_>, device: &Device) -> Result<Self> {
        let pool = PoolWatch::start(device);
        let base = weights::load(&mut loader, device)?;
        let config = loader.config().clone();
        let device = device.clone();
        Ok(Self { config, device, base, adapter: None, caches: Vec::new(), length: 0, pool })
    }

    /// What evaluates and generates, without autodiff.
    fn network(&self) -> Qwen2 {
        match &self.adapter {
            Some(adapter) => adapter.network.valid(),
            None => self.base.clone(),
        }
    }

    /// Appends tokens to the sequence and returns the most likely next one.
    fn append(&mut self, new: &[u32]) -> Result<u32> {
        let network = self.network();
        let pass = Pass::new(&self.config, self.length, new.len(), &self.device);
        let hidden = network.hidden(tokens(new, 1, &self.device), &pass, Some(&mut self.caches));
        self.length += new.len();
        let logits = network.logits(hidden.narrow(1, new.len() - 1, 1));
        let best: Vec<i64> = logits.argmax(1).try_into_vec_as().map_err(Error::framework)?;
        let best = best.first().copied().and_then(|token| u32::try_from(token).ok());
        best.ok_or_else(|| Error::framework("the model chose no token"))
    }
}

impl Trained {
    fn gradients(
        &self,
        config: &ModelConfig,
        input: &StepInput<'_>,
    ) -> Result<(StepResult, GradientsParams)> {
        if self.dropout > 0.0 {
            return Err(Error::unsupported(format_args!(
                "lora_dropout {} with Burn's own LoRA, which is added to the weight, so that nothing can be dropped \
                 from its input; train with lora_dropout 0",
                self.dropout
            )));
        }
        training::gradients(&self.network, config, &self.device, input)
    }
}

/// Burn's AdamW with what `torch.optim.AdamW` is told.
fn adam_w(training: &TrainingConfig) -> ModuleOptimizer {
    AdamWConfig::new()
        .with_beta_1(training.beta1 as f32)
        .with_beta_2(training.beta2 as f32)
        .with_epsilon(training.epsilon as f32)
        .with_weight_decay(training.weight_decay as f32)
        .init()
}

impl Model for StockModel {
    fn attach_adapter(&mut self, adapter: &Adapter, training: &TrainingConfig) -> Result<()> {
        guard(|| {
            let device = match training.gradient_checkpointing {
                true => self.device.clone().autodiff().gradient_checkpointing(),
                false => self.device.clone().autodiff(),
            };
            self.adapter = Some(Trained {
                network: adapter::attach(&self.base, adapter, &self.config, &device)?,
                device,
                dropout: adapter.config.lora_dropout,
                training: training.clone(),
                optimizer: adam_w(training),
            });
            Ok(())
        })
    }

    fn train_step(&mut self, input: &StepInput<'_>) -> Result<StepResult> {
        guard(|| {
            let trained = self.adapter.as_mut().ok_or_else(no_adapter)?;
            let (result, mut gradients) = trained.gradients(&self.config, input)?;
            if let Some(max_norm) = trained.training.max_grad_norm {
                training::clip(&trained.network, &mut gradients, result.grad_norm, max_norm)?;
            }
            let rate = trained.training.learning_rate;
            trained.network = trained.optimizer.step(rate, trained.network.clone(), gradients);
            Ok(result)
        })
    }

    fn gradients(&mut self, input: &StepInput<'_>) -> Result<(StepResult, AdapterTensors)> {
        guard(|| {
            let trained = self.adapter.as_ref().ok_or_else(no_adapter)?;
            let (result, gradients) = trained.gradients(&self.config, input)?;
            let of = |factor: &_| training::gradient(&gradients, factor);
            Ok((result, adapter::download(&trained.network, of)?))
        })
    }

    fn evaluate(&mut self, batches: &[Batch]) -> Result<Evaluation> {
        guard(|| training::evaluate(&self.network(), &self.config, &self.device, batches))
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<u32> {
        guard(|| {
            self.caches = vec![None; self.config.num_hidden_layers];
            self.length = 0;
            self.append(tokens)
        })
    }

    fn decode(&mut self, token: u32) -> Result<u32> {
        if self.length == 0 {
            return Err(Error::protocol("decode continues a prefill, and there was none"));
        }
        guard(|| self.append(&[token]))
    }

    fn logits(&mut self, prompt: &[u32]) -> Result<Vec<f32>> {
        guard(|| {
            let network = self.network();
            let pass = Pass::new(&self.config, 0, prompt.len(), &self.device);
            read(network.logits(network.hidden(tokens(prompt, 1, &self.device), &pass, None)))
        })
    }

    fn decoded_weights(&mut self) -> Result<ProjectionWeights> {
        guard(|| weights::decoded(&self.base))
    }

    fn adapter(&mut self) -> Result<AdapterTensors> {
        guard(|| {
            let trained = self.adapter.as_ref().ok_or_else(no_adapter)?;
            adapter::download(&trained.network, |factor| Ok(factor.val().inner()))
        })
    }

    fn synchronize(&mut self) -> Result<()> {
        wait_for(&self.device)
    }

    fn memory(&self) -> DeviceMemory {
        self.pool.memory()
    }
}
