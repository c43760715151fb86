//! The two traits that a framework implements.

use crate::batch::Batch;
use crate::lora::{Adapter, AdapterTensors};
use crate::protocol::{DeviceLimits, DeviceMemory, EngineInfo, TrainingConfig, Tuning};
use crate::weights::{ProjectionWeights, WeightLoader};
use crate::{Error, Result};

/// A framework on an opened device.
///
/// The constructor opens the device and fails with [`Error::Unavailable`](crate::Error::Unavailable)
/// where there is none; from then on `info` is cheap and cannot fail.
pub trait Engine {
    fn info(&self) -> EngineInfo;

    /// Loads the frozen base model. Weights are pulled from `loader` layer by layer, already
    /// quantized as the request asks, so that the full-precision checkpoint never sits in memory.
    fn load(&mut self, loader: WeightLoader<'_>) -> Result<LoadedModel>;

    /// What the device can do at best. A CPU needs no answer.
    fn limits(&mut self) -> Result<DeviceLimits> {
        Ok(DeviceLimits::default())
    }
}

/// A model with its weights on the device.
pub type LoadedModel = Box<dyn Model>;

/// A loaded model. Every method may return before the device has finished; the serve loop calls
/// [`Model::synchronize`] before it stops a clock, so that all engines are timed alike.
pub trait Model {
    /// Attaches a LoRA adapter to the frozen base and prepares AdamW for it.
    fn attach_adapter(&mut self, adapter: &Adapter, training: &TrainingConfig) -> Result<()>;

    /// One optimizer step over the micro-batches of `input`.
    fn train_step(&mut self, input: &StepInput<'_>) -> Result<StepResult>;

    /// The adapter's gradients for one step, without updating anything. For checking an engine.
    fn gradients(&mut self, input: &StepInput<'_>) -> Result<(StepResult, AdapterTensors)>;

    /// The loss without dropout and without gradients.
    fn evaluate(&mut self, batches: &[Batch]) -> Result<Evaluation>;

    /// Starts a new sequence: fills the KV cache with `tokens` and returns the most likely next token.
    fn prefill(&mut self, tokens: &[u32]) -> Result<u32>;

    /// Appends `token` to the sequence and returns the most likely next token.
    fn decode(&mut self, token: u32) -> Result<u32>;

    /// The logits of every position of `tokens`, row-major `[tokens, vocab_size]`, by one full forward
    /// pass without a KV cache. For checking an engine; only called with short inputs.
    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>>;

    /// The projections of the base as they are stored, decoded. For checking an engine's own format; only called
    /// with small models. Fails with [`Error::Unsupported`] where the engine does not tell.
    fn decoded_weights(&mut self) -> Result<ProjectionWeights> {
        Err(Error::unsupported("telling the decoded weights"))
    }

    /// The adapter's current weights.
    fn adapter(&mut self) -> Result<AdapterTensors>;

    /// Lets the engine measure kernels in what follows, or ends that. At first it may not: what is timed has nothing
    /// of it in it. For engines whose [`EngineInfo::tunes`] is set.
    fn tune(&mut self, _measure: bool) {}

    /// What was measured so far.
    fn tuning(&self) -> Tuning {
        Tuning::default()
    }

    /// Waits until the device has finished all work given to it.
    fn synchronize(&mut self) -> Result<()>;

    /// The allocator's own figures. The serve loop asks for them after each call, off every clock.
    fn memory(&self) -> DeviceMemory;
}

/// What one optimizer step trains on. The harness decides all of it.
pub struct StepInput<'a> {
    /// Counts optimizer steps from 0; part of the key of the dropout masks.
    pub step: u64,
    pub dropout_seed: u64,
    /// Gradient accumulation: the gradients of all of them are summed.
    pub micro_batches: &'a [Batch],
}

impl StepInput<'_> {
    /// The divisor of the loss: supervised positions over all micro-batches, as transformers does
    /// with `num_items_in_batch`. Never 0.
    pub fn trained_tokens(&self) -> usize {
        self.micro_batches.iter().map(Batch::trained_tokens).sum::<usize>().max(1)
    }
}

#[derive(Debug, Clone, Copy)]
pub struct StepResult {
    /// Mean negative log-likelihood per supervised position, in nats, before the update.
    pub loss: f64,
    /// L2 norm over all adapter gradients, before clipping.
    pub grad_norm: f64,
}

/// The sum over supervised positions, so that the harness can add up and divide.
#[derive(Debug, Clone, Copy, Default)]
pub struct Evaluation {
    /// Sum of negative log-likelihoods, in nats.
    pub loss_sum: f64,
    pub tokens: usize,
}
