//! The gradients of one optimizer step, and the step.

use crate::kept::{Kept, Results};
use crate::linear::Lora;
use crate::loss::CrossEntropy;
use crate::network::{Dropout, Network, Pass};
use crate::ops::{Form, Tape, with_gradient};
use crate::optimizer::Optimizer;
use crate::values::CpuValues;
use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var, bail};
use evalfw_engine::batch::Batch;
use evalfw_engine::lora::{LoraConfig, Target};
use evalfw_engine::protocol::TrainingConfig;
use evalfw_engine::{StepInput, StepResult};
use evalfw_kernels::dot;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Debug;

/// What training needs beside the network.
pub struct Trainer {
    lora: LoraConfig,
    config: TrainingConfig,
    optimizer: Optimizer,
}

/// The gradients of the adapter, summed over micro-batches.
#[derive(Default)]
pub struct Gradients(BTreeMap<(usize, Target), LoraGradient>);

/// The gradients of both factors of one projection.
pub struct LoraGradient {
    pub a: Tensor,
    pub b: Tensor,
}

impl Trainer {
    pub fn new(network: &Network, lora: LoraConfig, config: TrainingConfig) -> Result<Self> {
        let optimizer = Optimizer::new(network, &config)?;
        Ok(Self { lora, config, optimizer })
    }

    /// The gradients of the mean loss over all micro-batches, before clipping.
    pub fn gradients(&self, network: &Network, input: &StepInput<'_>) -> Result<(StepResult, Gradients)> {
        let mut gradients = Gradients::default();
        let trained_tokens = input.trained_tokens() as f64;
        let kept_bytes = self.config.kept_activation_bytes;
        let mut loss = 0.0;
        for (micro_batch, batch) in input.micro_batches.iter().enumerate() {
            let mut pass = network.pass(batch.examples(), batch.sequence_length(), 0)?;
            pass.training = true;
            pass.dropout = (self.lora.lora_dropout > 0.0).then_some(Dropout {
                rate: self.lora.lora_dropout,
                seed: input.dropout_seed,
                step: input.step,
                micro_batch,
            });
            let step = MicroBatch { network, pass, batch, weight: 1.0 / trained_tokens, kept_bytes };
            loss += match self.config.gradient_checkpointing {
                true => step.checkpointed(&mut gradients)?,
                false => step.whole_graph(&mut gradients)?,
            };
        }
        gradients.complete(network)?;
        let result = StepResult { loss: loss / trained_tokens, grad_norm: gradients.norm()? };
        Ok((result, gradients))
    }

    pub fn step(&mut self, network: &Network, input: &StepInput<'_>) -> Result<StepResult> {
        let (result, mut gradients) = self.gradients(network, input)?;
        if let Some(max_norm) = self.config.max_grad_norm {
            gradients.clip(result.grad_norm, max_norm)?;
        }
        self.optimizer.step(network, gradients)?;
        Ok(result)
    }
}

/// One forward and backward pass.
struct MicroBatch<'a> {
    network: &'a Network,
    pass: Pass<'a>,
    batch: &'a Batch,
    /// Factor of the summed loss.
    weight: f64,
    /// Memory for the results of a block's large operations.
    kept_bytes: u64,
}

impl MicroBatch<'_> {
    /// Keeps the input of each block, and the results of its large operations as far as the memory allows, and
    /// computes the rest of a block again when its gradient is due. Returns the summed loss.
    fn checkpointed(&self, gradients: &mut Gradients) -> Result<f64> {
        let network = self.network;
        let mut inputs = Vec::with_capacity(network.blocks.len());
        let mut x = network.embedding.rows(&self.batch.flat_ids())?;
        // As many of the first blocks as fit.
        let blocks_kept = match network.form {
            Form::Host | Form::Device => {
                self.kept_bytes / Results::bytes(network.products, &network.config, self.pass.rows())
            }
            Form::Stock => 0,
        };
        for (index, block) in (0..).zip(&network.blocks) {
            let kept = Results::new(network.products);
            let pass = self.pass.keeping(if index < blocks_kept { Kept::Keep(&kept) } else { Kept::No });
            let out = block.forward(&x, &pass, None)?;
            inputs.push((x, kept));
            x = out;
            self.free_uploads()?;
        }

        let last = Var::from_tensor(&x)?;
        drop(x);
        let Some((loss, surrogate)) = self.loss(&last)? else { return Ok(0.0) };
        let mut of_output = take(&mut surrogate.backward()?, &last, "the hidden states")?;
        drop(surrogate);
        for (block, (input, kept)) in network.blocks.iter().zip(inputs).rev() {
            let input = Var::from_tensor(&input)?;
            let tape = self.tape();
            let pass = self.pass.traced(tape.as_ref());
            let out = block.forward(&input, &pass.keeping(Kept::Again(&kept)), None)?;
            drop(pass);
            let mut store = self.backward(tape, &out, of_output)?;
            of_output = take(&mut store, &input, "the input of a block")?;
            for projection in &block.projections {
                let Some(lora) = &projection.lora else { continue };
                gradients.add((projection.layer, projection.target), lora, &mut store)?;
            }
            self.free_uploads()?;
        }
        Ok(loss)
    }

    /// Where our own backward has a use for one.
    fn tape(&self) -> Option<Tape> {
        (self.network.form == Form::Host).then(Tape::default)
    }

    /// The gradients of what `x` depends on, from its own.
    fn backward(&self, tape: Option<Tape>, x: &Tensor, gradient: Tensor) -> Result<GradStore> {
        match tape {
            Some(tape) => tape.backward(x, gradient),
            None => with_gradient(self.network.form, x, gradient)?.backward(),
        }
    }

    /// On Metal, candle frees what was uploaded, such as dropout masks, only when the device has caught up.
    fn free_uploads(&self) -> Result<()> {
        let device = &self.network.device;
        if device.is_metal() { device.synchronize() } else { Ok(()) }
    }

    /// Keeps the graph of the whole model. Returns the summed loss.
    fn whole_graph(&self, gradients: &mut Gradients) -> Result<f64> {
        let tape = self.tape();
        let x = self.network.forward(&self.batch.flat_ids(), &self.pass.traced(tape.as_ref()), None)?;
        let last = Var::from_tensor(&x.detach())?;
        let Some((loss, surrogate)) = self.loss(&last)? else { return Ok(0.0) };
        let of_output = take(&mut surrogate.backward()?, &last, "the hidden states")?;
        let mut store = self.backward(tape, &x, of_output)?;
        for projection in self.network.projections() {
            let Some(lora) = &projection.lora else { continue };
            gradients.add((projection.layer, projection.target), lora, &mut store)?;
        }
        Ok(loss)
    }

    /// The summed loss over the supervised positions, and a scalar that stands for it in autograd: its
    /// gradient is the gradient of the weighted loss. `None` where nothing is supervised.
    fn loss(&self, last_hidden: &Tensor) -> Result<Option<(f64, Tensor)>> {
        let (rows, tokens): (Vec<u32>, Vec<u32>) = self.batch.targets().into_iter().unzip();
        if rows.is_empty() {
            return Ok(None);
        }
        let rows = Tensor::new(rows, last_hidden.device())?;
        let hidden = self.network.norm(&last_hidden.index_select(&rows, 0)?)?;
        let cross_entropy = CrossEntropy::new(&self.network.head);
        let (loss, of_hidden) = cross_entropy.sum_and_gradient(&hidden.detach(), &tokens, self.weight)?;
        Ok(Some((loss, with_gradient(self.network.form, &hidden, of_hidden)?)))
    }
}

/// A gradient that has to be there: candle leaves one out, without an error, where an operation has no
/// backward.
fn take(store: &mut GradStore, var: &Tensor, what: impl Debug) -> Result<Tensor> {
    match store.remove(var) {
        Some(gradient) => Ok(gradient.detach()),
        None => bail!("backward gave no gradient for {what:?}"),
    }
}

impl Gradients {
    /// Zeros where no micro-batch had a loss.
    fn complete(&mut self, network: &Network) -> Result<()> {
        for projection in network.projections() {
            let Some(lora) = &projection.lora else { continue };
            if let Entry::Vacant(missing) = self.0.entry((projection.layer, projection.target)) {
                missing.insert(LoraGradient { a: lora.a.zeros_like()?, b: lora.b.zeros_like()? });
            }
        }
        Ok(())
    }

    pub fn iter(&self) -> impl Iterator<Item = (&(usize, Target), &LoraGradient)> {
        self.0.iter()
    }

    fn add(&mut self, place: (usize, Target), lora: &Lora, store: &mut GradStore) -> Result<()> {
        let (a, b) = (take(store, &lora.a, place)?, take(store, &lora.b, place)?);
        match self.0.entry(place) {
            Entry::Vacant(first) => {
                first.insert(LoraGradient { a, b });
            }
            Entry::Occupied(sum) => {
                let sum = sum.into_mut();
                sum.a = (&sum.a + a)?;
                sum.b = (&sum.b + b)?;
            }
        }
        Ok(())
    }

    /// L2 norm over all of them.
    fn norm(&self) -> Result<f64> {
        let mut on_host = 0.0;
        let mut squares = Vec::with_capacity(2 * self.0.len());
        for gradient in self.0.values() {
            for tensor in [&gradient.a, &gradient.b] {
                if tensor.device().is_cpu() && tensor.is_contiguous() {
                    let values = CpuValues::new(tensor)?;
                    on_host += f64::from(dot(values.slice()?, values.slice()?));
                    continue;
                }
                squares.push(tensor.sqr()?.sum_all()?);
            }
        }
        if squares.is_empty() {
            return Ok(on_host.sqrt());
        }
        // One transfer from the device instead of one for each tensor.
        let squares = Tensor::stack(&squares, 0)?.to_vec1::<f32>()?;
        Ok((on_host + squares.into_iter().map(f64::from).sum::<f64>()).sqrt())
    }

    /// As `torch.nn.utils.clip_grad_norm_`.
    fn clip(&mut self, norm: f64, max_norm: f64) -> Result<()> {
        let factor = max_norm / (norm + 1e-6);
        if factor < 1.0 {
            for gradient in self.0.values_mut() {
                gradient.a = (&gradient.a * factor)?;
                gradient.b = (&gradient.b * factor)?;
            }
        }
        Ok(())
    }

    /// In the form in which candle's optimizers expect them.
    pub fn into_store(mut self, network: &Network) -> Result<GradStore> {
        let mut store = GradStore::default();
        for projection in network.projections() {
            let Some(lora) = &projection.lora else { continue };
            let Some(gradient) = self.0.remove(&(projection.layer, projection.target)) else { continue };
            store.insert(&lora.a, gradient.a);
            store.insert(&lora.b, gradient.b);
        }
        Ok(store)
    }
}
