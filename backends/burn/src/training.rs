//! The gradients of one optimizer step.
//!
//! With gradient checkpointing, the first pass keeps the input of each block, and on the CPU what else there is memory
//! for; backwards, each block is computed again under autodiff, and burn gives the gradients of its factors and of its
//! input. Without, one graph spans all blocks. In both, the input of the blocks requires a gradient:
//! with trainable factors alone, wgpu can lose the gradients (burn issue 5162).

use crate::attention::Pass;
use crate::dropout::Dropout;
use crate::kept::{Kept, Results};
use crate::lora::{Factors, Lora, PER_LAYER};
use crate::network::Network;
use crate::optimizer;
use burn::tensor::{Gradients, IndexingUpdateOp, Int, Tensor, TensorData};
use evalfw_engine::batch::Batch;
use evalfw_engine::protocol::TrainingConfig;
use evalfw_engine::{Error, Evaluation, Result, StepInput, StepResult};
use std::ops::Range;

/// The gradients of all micro-batches together, before clipping, with the factors' order.
pub fn gradients(
    network: &Network,
    lora: &Lora,
    training: &TrainingConfig,
    input: &StepInput<'_>,
) -> Result<(StepResult, Vec<Factors>)> {
    let divisor = input.trained_tokens();
    let mut sums: Vec<_> = lora.factors.iter().map(Factors::zeros_like).collect();
    let mut loss_sum = 0.0;
    for (index, batch) in input.micro_batches.iter().enumerate() {
        let Some(supervised) = Supervised::of(batch, network) else { continue };
        let micro_batch = MicroBatch {
            network,
            lora,
            pass: network.pass(batch.examples(), 0, batch.sequence_length()),
            dropout: Dropout::new(lora.config.lora_dropout, input, index),
            supervised,
            divisor,
            kept_bytes: training.kept_activation_bytes,
        };
        let x = network.embedding.look_up(&batch.flat_ids(), &network.device);
        loss_sum += match training.gradient_checkpointing {
            true => micro_batch.backward_by_block(x, &mut sums)?,
            false => micro_batch.backward(x, &mut sums)?,
        };
    }
    let grad_norm = optimizer::norm(&sums)?;
    Ok((StepResult { loss: loss_sum / divisor as f64, grad_norm }, sums))
}

/// The loss without dropout and without gradients.
pub fn evaluate(network: &Network, lora: Option<&Lora>, batches: &[Batch]) -> Result<Evaluation> {
    let mut evaluation = Evaluation::default();
    for batch in batches {
        let Some(supervised) = Supervised::of(batch, network) else { continue };
        let pass = network.pass(batch.examples(), 0, batch.sequence_length());
        let hidden = network.forward(&batch.flat_ids(), &pass, lora, None);
        let hidden = network.norm.forward(supervised.select(hidden));
        evaluation.loss_sum += network.head.loss(hidden, &supervised.targets)?;
        evaluation.tokens += supervised.targets.len();
    }
    Ok(evaluation)
}

/// The positions of a batch that have a loss.
struct Supervised {
    /// Rows of the flattened hidden states, without repetition.
    rows: Tensor<1, Int>,
    targets: Vec<u32>,
}

impl Supervised {
    fn of(batch: &Batch, network: &Network) -> Option<Self> {
        let (rows, targets): (Vec<i32>, Vec<u32>) =
            batch.targets().into_iter().map(|(row, target)| (row as i32, target)).unzip();
        let count = rows.len();
        let rows = || Tensor::from_data(TensorData::new(rows, [count]), &network.device);
        (count > 0).then(|| Self { rows: rows(), targets })
    }

    fn select(&self, hidden: Tensor<2>) -> Tensor<2> {
        hidden.select(0, self.rows.clone())
    }

    /// Puts gradients back where [`Self::select`] took the values, with zeros elsewhere.
    fn spread(&self, gradient: Tensor<2>, shape: [usize; 2]) -> Tensor<2> {
        let zeros = Tensor::zeros(shape, &gradient.device());
        zeros.select_assign(0, self.rows.clone(), gradient, IndexingUpdateOp::Add)
    }
}

/// One micro-batch on its way forward and back.
struct MicroBatch<'a> {
    network: &'a Network,
    lora: &'a Lora,
    pass: Pass,
    dropout: Option<Dropout>,
    supervised: Supervised,
    /// What the sum of the losses is divided by.
    divisor: usize,
    /// What checkpointing may keep beside the input of each block.
    kept_bytes: u64,
}

impl MicroBatch<'_> {
    /// Keeps the graph of all blocks. Adds the gradients to `sums` and returns the sum of the losses.
    fn backward(&self, x: Tensor<2>, sums: &mut [Factors]) -> Result<f64> {
        let segment = self.segment(0..self.network.blocks.len(), x, &Kept::No);
        let (loss, gradient) = self.loss(segment.output.clone().inner())?;
        segment.backward(gradient, sums)?;
        Ok(loss)
    }

    /// The same, but keeps the input of each block and what else there is memory for, and computes the rest again
    /// backwards.
    fn backward_by_block(&self, mut x: Tensor<2>, sums: &mut [Factors]) -> Result<f64> {
        let mut inputs = Vec::with_capacity(self.network.blocks.len());
        for (layer, block) in self.network.blocks.iter().enumerate() {
            let results = Results::new(self.network.products());
            let kept = if layer < self.blocks_kept() { Kept::Keep(results.clone()) } else { Kept::No };
            inputs.push((x.clone(), results));
            let lora = self.lora.layer(layer, self.dropout).keeping(&kept);
            x = block.forward(x, &self.pass, Some(lora), None);
        }
        let (loss, mut gradient) = self.loss(x)?;
        for (layer, (input, results)) in inputs.into_iter().enumerate().rev() {
            let segment = self.segment(layer..layer + 1, input, &Kept::Again(results));
            gradient = segment.backward(gradient, sums)?;
        }
        Ok(loss)
    }

    /// Blocks of which the results fit into the memory for them.
    fn blocks_kept(&self) -> usize {
        let rows = self.pass.batch * self.pass.positions;
        let bytes = Results::bytes(self.network.products(), &self.network.config, rows);
        match self.network.on_host() {
            true => (self.kept_bytes / bytes.max(1)) as usize,
            false => 0,
        }
    }

    /// Computes `layers` under autodiff.
    fn segment(&self, layers: Range<usize>, x: Tensor<2>, kept: &Kept) -> Segment {
        let input = leaf(x);
        let mut output = input.clone();
        let mut leaves = Vec::with_capacity(layers.len());
        for layer in layers.clone() {
            let factors = self.lora.leaves(layer);
            let lora = self.lora.layer_with(&factors, layer, self.dropout).keeping(kept);
            output = self.network.blocks[layer].forward(output, &self.pass, Some(lora), None);
            leaves.extend(factors);
        }
        Segment { first_layer: layers.start, input, leaves, output }
    }

    /// From the output of the last block: the sum of the losses, and the gradient of the sum over the divisor.
    fn loss(&self, hidden: Tensor<2>) -> Result<(f64, Tensor<2>)> {
        let shape = hidden.dims();
        let selected = leaf(self.supervised.select(hidden));
        let normed = self.network.norm.forward(selected.clone());
        let (loss, gradient) = self.network.head.loss_and_gradient(
            normed.clone().inner(),
            &self.supervised.targets,
            self.divisor,
        )?;
        let mut gradients = (normed * gradient).sum().backward();
        Ok((loss, self.supervised.spread(gradient_of(&selected, &mut gradients)?, shape)))
    }
}

/// Blocks whose graph is kept until their backward pass.
struct Segment {
    first_layer: usize,
    input: Tensor<2>,
    leaves: Vec<Factors>,
    output: Tensor<2>,
}

impl Segment {
    /// Takes the gradient of the output, adds those of the factors to `sums`, and returns that of the
    /// input.
    fn backward(self, gradient: Tensor<2>, sums: &mut [Factors]) -> Result<Tensor<2>> {
        let Self { first_layer, input, leaves, output } = self;
        let mut gradients = (output * gradient).sum().backward();
        for (sum, leaves) in sums[first_layer * PER_LAYER..].iter_mut().zip(leaves) {
            let Factors { a, b } = leaves;
            let (a, b) = (gradient_of(&a, &mut gradients)?, gradient_of(&b, &mut gradients)?);
            sum.a.inplace(|sum| sum + a);
            sum.b.inplace(|sum| sum + b);
        }
        gradient_of(&input, &mut gradients)
    }
}

pub fn leaf(tensor: Tensor<2>) -> Tensor<2> {
    tensor.autodiff().require_grad()
}

pub fn gradient_of(leaf: &Tensor<2>, gradients: &mut Gradients) -> Result<Tensor<2>> {
    let missing = || Error::framework("the backward pass left no gradient for a tensor that requires one");
    leaf.grad_remove(gradients).ok_or_else(missing)
}
