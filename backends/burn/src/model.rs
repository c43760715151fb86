//! A loaded model, as the contract wants it.

use crate::attention::LayerCache;
use crate::guard::{guard, wait_for};
use crate::lora::{Lora, download};
use crate::network::Network;
use crate::optimizer::{self, AdamW};
use crate::pool::PoolWatch;
use crate::training;
use crate::tune::Tuner;
use evalfw_engine::batch::Batch;
use evalfw_engine::lora::{Adapter, AdapterTensors};
use evalfw_engine::protocol::{DeviceMemory, TrainingConfig, Tuning};
use evalfw_engine::{Error, Evaluation, Model, Result, StepInput, StepResult};
use evalfw_kernels::team;

pub struct BurnModel {
    network: Network,
    adapter: Option<Trained>,
    /// The sequence that is being generated.
    sequence: Sequence,
    pool: PoolWatch,
    tuner: Option<&'static Tuner>,
}

/// An adapter with what its training needs.
struct Trained {
    lora: Lora,
    training: TrainingConfig,
    optimizer: AdamW,
}

#[derive(Default)]
struct Sequence {
    caches: Vec<LayerCache>,
    length: usize,
}

impl BurnModel {
    pub fn new(network: Network, pool: PoolWatch, tuner: Option<&'static Tuner>) -> Self {
        if let Some(tuner) = tuner {
            tuner.begin();
        }
        Self { network, adapter: None, sequence: Sequence::default(), pool, tuner }
    }

    fn lora(&self) -> Option<&Lora> {
        self.adapter.as_ref().map(|adapter| &adapter.lora)
    }

    fn trained(&self) -> Result<&Trained> {
        self.adapter.as_ref().ok_or_else(no_adapter)
    }

    /// Appends tokens to the sequence and returns the most likely next one.
    fn append(&mut self, tokens: &[u32]) -> Result<u32> {
        let Self { network, adapter, sequence, .. } = self;
        let lora = adapter.as_ref().map(|adapter| &adapter.lora);
        let pass = network.pass(1, sequence.length, tokens.len());
        let hidden = network.forward(tokens, &pass, lora, Some(&mut sequence.caches));
        sequence.length += tokens.len();
        let last = hidden.narrow(0, tokens.len() - 1, 1);
        network.head.most_likely(network.norm.forward(last))
    }
}

impl Model for BurnModel {
    fn attach_adapter(&mut self, adapter: &Adapter, training: &TrainingConfig) -> Result<()> {
        guard(|| {
            let lora = Lora::new(adapter, &self.network.config, &self.network.device)?;
            let optimizer = AdamW::new(training.clone(), &lora.factors);
            self.adapter = Some(Trained { lora, training: training.clone(), optimizer });
            Ok(())
        })
    }

    fn train_step(&mut self, input: &StepInput<'_>) -> Result<StepResult> {
        guard(|| {
            let Some(Trained { lora, training, optimizer }) = &mut self.adapter else {
                return Err(no_adapter());
            };
            let (result, mut gradients) = training::gradients(&self.network, lora, training, input)?;
            if let Some(max_norm) = training.max_grad_norm {
                optimizer::clip(&mut gradients, result.grad_norm, max_norm);
            }
            optimizer.step(&mut lora.factors, gradients);
            Ok(result)
        })
    }

    fn gradients(&mut self, input: &StepInput<'_>) -> Result<(StepResult, AdapterTensors)> {
        guard(|| {
            let Trained { lora, training, .. } = self.trained()?;
            let (result, gradients) = training::gradients(&self.network, lora, training, input)?;
            Ok((result, download(&gradients)?))
        })
    }

    fn evaluate(&mut self, batches: &[Batch]) -> Result<Evaluation> {
        guard(|| training::evaluate(&self.network, self.lora(), batches))
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<u32> {
        guard(|| {
            let caches = self.network.blocks.iter().map(|_| LayerCache::default()).collect();
            self.sequence = Sequence { caches, length: 0 };
            self.append(tokens)
        })
    }

    fn decode(&mut self, token: u32) -> Result<u32> {
        if self.sequence.length == 0 {
            return Err(Error::protocol("decode continues a prefill, and there was none"));
        }
        // On the CPU a token is many short loops.
        guard(|| match self.network.on_host() {
            true => team::awake(|| self.append(&[token])),
            false => self.append(&[token]),
        })
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        guard(|| {
            let pass = self.network.pass(1, 0, tokens.len());
            let hidden = self.network.forward(tokens, &pass, self.lora(), None);
            self.network.head.logits(self.network.norm.forward(hidden))
        })
    }

    fn adapter(&mut self) -> Result<AdapterTensors> {
        guard(|| download(&self.trained()?.lora.factors))
    }

    fn tune(&mut self, measure: bool) {
        let Some(tuner) = self.tuner else { return };
        tuner.measure(measure);
        if !measure {
            // What was measured needed memory of its own.
            self.sequence = Sequence::default();
            self.pool.clean_up();
        }
    }

    fn tuning(&self) -> Tuning {
        self.tuner.map(Tuner::figures).unwrap_or_default()
    }

    fn synchronize(&mut self) -> Result<()> {
        wait_for(&self.network.device)
    }

    fn memory(&self) -> DeviceMemory {
        self.pool.memory()
    }
}

pub fn no_adapter() -> Error {
    Error::protocol("no adapter is attached")
}
