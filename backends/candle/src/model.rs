//! A loaded model: the contract's calls on top of the network.

use crate::block::BlockCache;
use crate::device;
use crate::linear::Lora;
use crate::loss::CrossEntropy;
use crate::network::Network;
use crate::ops::Form;
use crate::training::{Gradients, Trainer};
use candle_core::{Tensor, Var};
use evalfw_engine::batch::Batch;
use evalfw_engine::lora::{Adapter, AdapterTensors, LoraPair};
use evalfw_engine::protocol::{DeviceMemory, TrainingConfig};
use evalfw_engine::{Error, Evaluation, Model, Result, StepInput, StepResult};
use evalfw_kernels::team;

pub struct CandleModel {
    network: Network,
    trainer: Option<Trainer>,
    sequence: Sequence,
}

/// The sequence that decoding continues.
struct Sequence {
    /// One for each block.
    caches: Vec<BlockCache>,
    /// Tokens in the caches.
    position: usize,
}

impl Sequence {
    fn new(blocks: usize) -> Self {
        Self { caches: (0..blocks).map(|_| BlockCache::new()).collect(), position: 0 }
    }
}

impl CandleModel {
    pub fn new(network: Network) -> Self {
        let sequence = Sequence::new(network.blocks.len());
        Self { network, trainer: None, sequence }
    }

    fn continue_sequence(&mut self, tokens: &[u32]) -> candle_core::Result<u32> {
        let network = &self.network;
        let pass = network.pass(1, tokens.len(), self.sequence.position)?;
        let x = network.forward(tokens, &pass, Some(&mut self.sequence.caches))?;
        self.sequence.position += tokens.len();
        let last = network.norm(&x.narrow(0, tokens.len() - 1, 1)?)?;
        network.head.argmax(&last)
    }

    fn all_logits(&self, tokens: &[u32]) -> candle_core::Result<Vec<f32>> {
        let network = &self.network;
        let pass = network.pass(1, tokens.len(), 0)?;
        let hidden = network.norm(&network.forward(tokens, &pass, None)?)?;
        network.head.product(&hidden)?.flatten_all()?.to_vec1()
    }

    fn batch_loss(&self, batch: &Batch) -> candle_core::Result<Evaluation> {
        let (rows, tokens): (Vec<u32>, Vec<u32>) = batch.targets().into_iter().unzip();
        if rows.is_empty() {
            return Ok(Evaluation::default());
        }
        let network = &self.network;
        let pass = network.pass(batch.examples(), batch.sequence_length(), 0)?;
        let x = network.forward(&batch.flat_ids(), &pass, None)?;
        let hidden = network.norm(&x.index_select(&Tensor::new(rows, &network.device)?, 0)?)?;
        let loss_sum = CrossEntropy::new(&network.head).sum(&hidden, &tokens)?;
        Ok(Evaluation { loss_sum, tokens: tokens.len() })
    }

    /// Puts the adapter's factors on the device.
    fn set_adapter(&mut self, adapter: &Adapter) -> candle_core::Result<()> {
        let device = self.network.device.clone();
        let r = adapter.config.r;
        for projection in self.network.projections_mut() {
            let pair = adapter.tensors.get(&(projection.layer, projection.target));
            projection.lora = match pair {
                Some(pair) => Some(Lora {
                    a: Var::from_slice(&pair.a, (r, pair.a.len() / r), &device)?,
                    b: Var::from_slice(&pair.b, (pair.b.len() / r, r), &device)?,
                    scale: adapter.config.scale(),
                }),
                None => None,
            };
        }
        Ok(())
    }

    fn trainer(&self) -> Result<&Trainer> {
        self.trainer.as_ref().ok_or_else(no_adapter)
    }
}

/// Runs on one of rayon's threads what consists of many short parallel loops: from outside, each of them would put its
/// caller to sleep and wake it again. A GPU's stream belongs to the calling thread.
fn among_workers<R: Send>(form: Form, run: impl FnOnce() -> R + Send) -> R {
    match form {
        Form::Host => rayon::scope(|_| run()),
        Form::Device | Form::Stock => run(),
    }
}

fn no_adapter() -> Error {
    Error::protocol("no adapter is attached")
}

fn host_pair(a: &Tensor, b: &Tensor) -> candle_core::Result<LoraPair> {
    Ok(LoraPair { a: a.flatten_all()?.to_vec1()?, b: b.flatten_all()?.to_vec1()? })
}

fn host_gradients(gradients: &Gradients) -> candle_core::Result<AdapterTensors> {
    gradients.iter().map(|(place, gradient)| Ok((*place, host_pair(&gradient.a, &gradient.b)?))).collect()
}

impl Model for CandleModel {
    fn attach_adapter(&mut self, adapter: &Adapter, training: &TrainingConfig) -> Result<()> {
        self.set_adapter(adapter).map_err(Error::framework)?;
        let trainer = Trainer::new(&self.network, adapter.config.clone(), training.clone());
        self.trainer = Some(trainer.map_err(Error::framework)?);
        Ok(())
    }

    fn train_step(&mut self, input: &StepInput<'_>) -> Result<StepResult> {
        let trainer = self.trainer.as_mut().ok_or_else(no_adapter)?;
        let network = &self.network;
        among_workers(network.form, || trainer.step(network, input)).map_err(Error::framework)
    }

    fn gradients(&mut self, input: &StepInput<'_>) -> Result<(StepResult, AdapterTensors)> {
        let (trainer, network) = (self.trainer()?, &self.network);
        let (result, gradients) =
            among_workers(network.form, || trainer.gradients(network, input)).map_err(Error::framework)?;
        Ok((result, host_gradients(&gradients).map_err(Error::framework)?))
    }

    fn evaluate(&mut self, batches: &[Batch]) -> Result<Evaluation> {
        let mut sum = Evaluation::default();
        for batch in batches {
            let part =
                among_workers(self.network.form, || self.batch_loss(batch)).map_err(Error::framework)?;
            sum.loss_sum += part.loss_sum;
            sum.tokens += part.tokens;
        }
        Ok(sum)
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<u32> {
        if tokens.is_empty() {
            return Err(Error::protocol("no tokens"));
        }
        self.sequence = Sequence::new(self.network.blocks.len());
        among_workers(self.network.form, || self.continue_sequence(tokens)).map_err(Error::framework)
    }

    fn decode(&mut self, token: u32) -> Result<u32> {
        if self.sequence.position == 0 {
            return Err(Error::protocol("decode continues a prefill, and there was none"));
        }
        let form = self.network.form;
        let mut decode = || self.continue_sequence(&[token]);
        match form {
            Form::Host => team::awake(decode),
            Form::Device | Form::Stock => decode(),
        }
        .map_err(Error::framework)
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        among_workers(self.network.form, || self.all_logits(tokens)).map_err(Error::framework)
    }

    fn adapter(&mut self) -> Result<AdapterTensors> {
        self.trainer()?;
        let mut tensors = AdapterTensors::new();
        for projection in self.network.projections() {
            let Some(lora) = &projection.lora else { continue };
            let pair = host_pair(&lora.a, &lora.b).map_err(Error::framework)?;
            tensors.insert((projection.layer, projection.target), pair);
        }
        Ok(tensors)
    }

    fn synchronize(&mut self) -> Result<()> {
        self.network.device.synchronize().map_err(Error::framework)
    }

    fn memory(&self) -> DeviceMemory {
        device::memory(&self.network.device)
    }
}
