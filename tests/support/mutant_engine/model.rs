//! A model of candle behind a wrapper that plants the errors. It keeps the adapter and its optimizer
//! itself, and attaches the adapter anew, spoilt or not, whenever it is used.

use crate::adamw::{self, AdamW};
use crate::mutation::{Mutant, Mutation};
use evalfw_engine::batch::{Batch, IGNORE_INDEX};
use evalfw_engine::lora::{Adapter, AdapterTensors, LoraPair, Target};
use evalfw_engine::protocol::{DeviceMemory, TrainingConfig};
use evalfw_engine::weights::ProjectionWeights;
use evalfw_engine::{Error, Evaluation, LoadedModel, Model, Result, StepInput, StepResult};
use half::bf16;

pub struct MutantModel {
    model: LoadedModel,
    mutant: Mutant,
    attached: Option<Attached>,
    /// Where it was loaded in its own format.
    decoded: Option<ProjectionWeights>,
}

struct Attached {
    adapter: Adapter,
    training: TrainingConfig,
    optimizer: AdamW,
}

#[derive(Clone, Copy, PartialEq)]
enum Use {
    Training,
    Evaluation,
}

impl MutantModel {
    pub fn new(model: LoadedModel, mutant: Mutant, decoded: Option<ProjectionWeights>) -> Self {
        Self { model, mutant, attached: None, decoded }
    }

    fn attached(&mut self) -> Result<&mut Attached> {
        self.attached.as_mut().ok_or_else(|| Error::protocol("no adapter is attached"))
    }

    /// Gives the wrapped model the adapter as it is to be used.
    fn attach_for(&mut self, purpose: Use) -> Result<()> {
        let Some(Attached { adapter, training, .. }) = &self.attached else { return Ok(()) };
        let mut adapter = adapter.clone();
        spoil(&mut adapter, self.mutant.mutation, purpose);
        self.model.attach_adapter(&adapter, training)
    }

    fn batches(&self, batches: &[Batch]) -> Vec<Batch> {
        match self.mutant.mutation {
            Mutation::PaddingAttended => batches.iter().map(padded_on_the_left).collect(),
            _ => batches.to_vec(),
        }
    }

    fn step(&mut self, input: &StepInput<'_>) -> Result<(f64, AdapterTensors)> {
        let micro_batches = self.batches(input.micro_batches);
        if self.mutant.mutation != Mutation::MeanOfMicroBatches {
            let input = StepInput { micro_batches: &micro_batches, ..*input };
            return self.model.gradients(&input).map(|(result, gradients)| (result.loss, gradients));
        }
        let mut mean: Option<(f64, AdapterTensors)> = None;
        for batch in micro_batches.chunks(1) {
            let (result, gradients) = self.model.gradients(&StepInput { micro_batches: batch, ..*input })?;
            mean = Some(match mean {
                None => (result.loss, gradients),
                Some((loss, sum)) => (loss + result.loss, added(sum, &gradients)),
            });
        }
        let (loss, mut gradients) = mean.ok_or_else(|| Error::protocol("no micro-batches"))?;
        let count = micro_batches.len() as f64;
        adamw::scale(&mut gradients, 1.0 / count);
        Ok((loss / count, gradients))
    }
}

impl Model for MutantModel {
    fn attach_adapter(&mut self, adapter: &Adapter, training: &TrainingConfig) -> Result<()> {
        let (adapter, training) = (adapter.clone(), training.clone());
        self.attached = Some(Attached { adapter, training, optimizer: AdamW::default() });
        self.attach_for(Use::Evaluation)
    }

    fn train_step(&mut self, input: &StepInput<'_>) -> Result<StepResult> {
        let (result, gradients) = self.gradients(input)?;
        let mutation = self.mutant.mutation;
        let Attached { adapter, training, optimizer } = self.attached()?;
        optimizer.step(mutation, training, &mut adapter.tensors, gradients);
        Ok(result)
    }

    fn gradients(&mut self, input: &StepInput<'_>) -> Result<(StepResult, AdapterTensors)> {
        self.attach_for(Use::Training)?;
        let (mut loss, mut gradients) = self.step(input)?;
        match self.mutant.mutation {
            Mutation::Gradient => gradients.get_mut(&(0, Target::V)).unwrap().a.fill(0.0),
            Mutation::NotFinite => loss = f64::NAN,
            Mutation::LossOverAllPositions => {
                let positions: usize = input.micro_batches.iter().map(predictable).sum();
                let factor = input.trained_tokens() as f64 / positions as f64;
                loss *= factor;
                adamw::scale(&mut gradients, factor);
            }
            _ => {}
        }
        if self.mutant.rounds {
            loss = rounded(loss as f32).into();
            gradients.values_mut().flat_map(|pair| pair.a.iter_mut().chain(&mut pair.b)).for_each(round);
        }
        Ok((StepResult { loss, grad_norm: adamw::norm(&gradients) }, gradients))
    }

    fn evaluate(&mut self, batches: &[Batch]) -> Result<Evaluation> {
        self.attach_for(Use::Evaluation)?;
        let batches = self.batches(batches);
        let mut evaluation = self.model.evaluate(&batches)?;
        if self.mutant.mutation == Mutation::LossOverAllPositions {
            evaluation.tokens = batches.iter().map(predictable).sum();
        }
        if self.mutant.rounds {
            evaluation.loss_sum = rounded(evaluation.loss_sum as f32).into();
        }
        Ok(evaluation)
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<u32> {
        self.model.prefill(tokens)
    }

    fn decode(&mut self, token: u32) -> Result<u32> {
        if self.mutant.mutation == Mutation::Cache {
            self.model.decode(token)?;
        }
        self.model.decode(token)
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let mut logits = self.model.logits(tokens)?;
        if self.mutant.rounds {
            logits.iter_mut().for_each(round);
        }
        Ok(logits)
    }

    fn decoded_weights(&mut self) -> Result<ProjectionWeights> {
        match &self.decoded {
            Some(told) => Ok(told.clone()),
            None => self.model.decoded_weights(),
        }
    }

    fn adapter(&mut self) -> Result<AdapterTensors> {
        Ok(self.attached()?.adapter.tensors.clone())
    }

    fn synchronize(&mut self) -> Result<()> {
        self.model.synchronize()
    }

    fn memory(&self) -> DeviceMemory {
        self.model.memory()
    }
}

/// Plants the errors that an adapter can carry.
fn spoil(adapter: &mut Adapter, mutation: Mutation, purpose: Use) {
    let rate = adapter.config.lora_dropout;
    match (mutation, purpose) {
        (Mutation::Scale, _) => adapter.config.lora_alpha *= adapter.config.r as f64,
        (Mutation::SwappedFactors, _) => {
            let r = adapter.config.r;
            let pair = adapter.tensors.get_mut(&(0, Target::O)).unwrap();
            assert_eq!(pair.a.len(), pair.b.len(), "the projection is not square");
            let columns = pair.a.len() / r;
            *pair = LoraPair { a: transposed(&pair.b, columns, r), b: transposed(&pair.a, r, columns) };
        }
        (Mutation::WrongLayer, _) => {
            let [first, second] = [0, 1].map(|layer| adapter.tensors[&(layer, Target::Gate)].clone());
            adapter.tensors.insert((0, Target::Gate), second);
            adapter.tensors.insert((1, Target::Gate), first);
        }
        (Mutation::DropoutInEvaluation, Use::Evaluation) => {
            adapter.tensors.values_mut().for_each(|pair| pair.a.fill(0.0));
        }
        (Mutation::DropoutUnscaled, Use::Training) => adapter.config.lora_alpha *= f64::from(1.0 - rate),
        (Mutation::DropoutRate, Use::Training) => adapter.config.lora_dropout = rate / 2.0,
        (Mutation::DropoutNever, Use::Training) => adapter.config.lora_dropout = 0.0,
        _ => {}
    }
}

fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

fn padded_on_the_left(batch: &Batch) -> Batch {
    let mut batch = batch.clone();
    let slots = batch.sequence_length();
    for (row, &length) in batch.lengths.iter().enumerate() {
        batch.input_ids[row].rotate_right(slots - length);
        let labels = &mut batch.labels[row];
        // Nothing predicted the first token before.
        labels[0] = IGNORE_INDEX;
        labels.rotate_right(slots - length);
    }
    batch
}

/// Positions of a batch that predict a next one, whatever their label.
fn predictable(batch: &Batch) -> usize {
    batch.slot_tokens() - batch.examples()
}

fn added(mut sum: AdapterTensors, gradients: &AdapterTensors) -> AdapterTensors {
    for (place, pair) in &mut sum {
        let other = &gradients[place];
        pair.a.iter_mut().zip(&other.a).for_each(|(a, b)| *a += b);
        pair.b.iter_mut().zip(&other.b).for_each(|(a, b)| *a += b);
    }
    sum
}

fn rounded(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

fn round(value: &mut f32) {
    *value = rounded(*value);
}
