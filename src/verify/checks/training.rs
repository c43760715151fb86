//! Gradients, dropout, training curves.

use super::Bench;
use crate::verify::Scope;
use crate::verify::compare::{Deviation, relative, tensors, whole};
use crate::verify::reference::Curve;
use crate::verify::session::Broken;
use evalfw_engine::lora::{AdapterTensors, Target, read_tensors};
use evalfw_engine::protocol::{Gradients, Quantization, SaveAdapter, TrainStep, TrainingConfig};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Of each curve in the short form. AdamW undoes a scale that all gradients have in common, so that clipping
/// shows only as their norms change: on the golden model from the fifth loss on.
const SHORT_CURVE_STEPS: usize = 8;

impl Bench<'_> {
    pub fn gradients(&mut self) -> Result<(), Broken> {
        let model = self.model;
        let expected = match self.quantization {
            Quantization::Nf4 => &model.gradients_nf4,
            Quantization::None | Quantization::Native => &model.gradients,
        };
        let recomputed = self.gradients_without_reference()?;
        self.report("adapter gradients", tensors(&recomputed, expected), self.tolerances.gradients);
        Ok(())
    }

    /// Their own check: checkpointing changes nothing. Returns those with checkpointing.
    pub fn gradients_without_reference(&mut self) -> Result<AdapterTensors, Broken> {
        let model = self.model;
        let recomputed = self.gradients_of(&model.adapter, &[0], 0, true)?;
        let kept = self.gradients_of(&model.adapter, &[0], 0, false)?;
        let deviation = whole(&kept, &recomputed);
        self.report("gradients with and without checkpointing", deviation, self.tolerances.repetition);
        Ok(recomputed)
    }

    /// Rate and scale of dropout in training, and to each micro-batch, layer and projection its own mask. An
    /// engine may refuse to train with dropout; returns whether it does not.
    pub fn dropout_gradients(&mut self) -> Result<bool, Broken> {
        let model = self.model;
        let adapter = self.adapter_with_dropout()?;
        let Some(first) = model.dropout.steps.first() else { return Ok(true) };
        let seed = model.dropout.settings.dropout_seed;
        let own_masks = self.verdict.info.as_ref().is_some_and(|info| info.own_dropout);
        let recomputed = match self.gradients_of(&adapter, &first.lines, seed, true) {
            Err(broken) if broken.refused => {
                let message = Deviation::new(0.0, broken.error.message.clone());
                self.report("dropout is refused, not left out", message, 0.0);
                return Ok(false);
            }
            gradients => gradients?,
        };
        if own_masks {
            self.own_dropout(&first.lines)?;
        } else {
            let deviation = tensors(&recomputed, &model.gradients_dropout);
            self.report("adapter gradients with dropout", deviation, self.tolerances.gradients);
        }
        let kept = self.gradients_of(&adapter, &first.lines, seed, false)?;
        let deviation = whole(&kept, &recomputed);
        self.report("dropout masks are the same in recomputation", deviation, self.tolerances.repetition);
        // A curve depends on the masks.
        Ok(!own_masks)
    }

    /// Masks of the framework's own, which no reference has. With B at zero an adapter adds nothing, and all that dropout
    /// changes is the input of A: over many masks the gradients of B have those without dropout as their mean, if the rate
    /// and the scale are right.
    fn own_dropout(&mut self, lines: &[usize]) -> Result<(), Broken> {
        let mut adapter = self.adapter(&self.model.adapter)?;
        adapter.tensors.values_mut().flat_map(|pair| &mut pair.b).for_each(|value| *value = 0.0);
        let folder = self.scratch.path().join("zero");
        self.session.harness("dropout", adapter.write(&folder, &self.model.name))?;
        let without = gradients_of_b(&self.gradients_of(&folder, lines, 0, true)?);
        adapter.config.lora_dropout = self.model.dropout.settings.lora_dropout;
        let folder = self.scratch.path().join("zero-with-dropout");
        self.session.harness("dropout", adapter.write(&folder, &self.model.name))?;
        let mut projections = Vec::new();
        let mut distinct = BTreeSet::new();
        for seed in 0..OWN_MASKS {
            let with = gradients_of_b(&self.gradients_of(&folder, lines, seed, true)?);
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let projection = dot(&with, &without) / dot(&without, &without);
            distinct.insert(projection.to_bits());
            projections.push(projection);
        }
        let mean = projections.iter().sum::<f64>() / projections.len() as f64;
        let place = format!("mean over {OWN_MASKS} seeds: {mean:.3} of the gradient without dropout");
        self.report(
            "own dropout keeps the mean",
            Deviation::new((mean - 1.0).abs(), place),
            OWN_DROPOUT_MEAN,
        );
        let same = projections.len() - distinct.len();
        let place = format!("{} different gradients of {OWN_MASKS} seeds", distinct.len());
        self.report("own dropout follows the seed", Deviation::new(same as f64, place), 0.0);
        Ok(())
    }

    /// Off in evaluation, and, where the engine `drops`, anew in each step of training.
    pub fn dropout(&mut self, drops: bool) -> Result<(), Broken> {
        let model = self.model;
        let adapter = self.adapter_with_dropout()?;
        self.attach(&adapter, model.dropout.settings.training())?;
        let expected = &model.losses.of(self.quantization).adapter;
        let name = "losses with dropout, which evaluation leaves out";
        self.batch_losses(name, expected, self.tolerances.losses)?;
        match drops {
            true => self.curve("dropout", &model.dropout, usize::MAX, &adapter),
            false => Ok(()),
        }
    }

    /// `adapter/` with the dropout of the reference's `dropout.json`.
    fn adapter_with_dropout(&self) -> Result<PathBuf, Broken> {
        let mut adapter = self.adapter(&self.model.adapter)?;
        adapter.config.lora_dropout = self.model.dropout.settings.lora_dropout;
        let folder = self.scratch.path().join("dropout");
        self.session.harness("dropout", adapter.write(&folder, &self.model.name))?;
        Ok(folder)
    }

    /// The gradients of step 0.
    pub fn gradients_of(
        &mut self,
        adapter: &Path,
        lines: &[usize],
        dropout_seed: u64,
        gradient_checkpointing: bool,
    ) -> Result<AdapterTensors, Broken> {
        let r = self.adapter(adapter)?.config.r;
        self.attach(adapter, TrainingConfig { gradient_checkpointing, ..TrainingConfig::default() })?;
        let output = self.scratch.path().join("gradients.safetensors");
        let batches = self.lines(lines.to_vec());
        self.session
            .call("gradients", Gradients { step: 0, dropout_seed, batches, output: output.clone() })?;
        self.session.harness("gradients", read_tensors(&output, &self.model.config, r))
    }

    /// Perturbs the entry with the largest gradient of each factor, and looks at the loss.
    pub fn finite_differences(&mut self) -> Result<(), Broken> {
        let Some(tolerance) = self.tolerances.finite_differences else { return Ok(()) };
        let original = self.adapter(&self.model.adapter)?;
        let gradients = self.gradients_of(&self.model.adapter, &[0], 0, true)?;
        let layer = self.model.config.num_hidden_layers - 1;
        let folder = self.scratch.path().join("perturbed");
        let mut all = Vec::new();
        for target in Target::ALL {
            let (Some(gradient), Some(weights)) =
                (gradients.get(&(layer, target)), original.tensors.get(&(layer, target)))
            else {
                all.push(Deviation::new(f64::INFINITY, format!("no gradient of {}", target.module())));
                continue;
            };
            for (factor, gradient, weight) in [('A', &gradient.a, &weights.a), ('B', &gradient.b, &weights.b)]
            {
                let index = largest(gradient);
                let size = 1e-2 * (1.0 + weight[index].abs());
                let mut loss_at = |value: f32| {
                    let mut perturbed = original.clone();
                    if let Some(pair) = perturbed.tensors.get_mut(&(layer, target)) {
                        let values = if factor == 'A' { &mut pair.a } else { &mut pair.b };
                        values[index] = value;
                    }
                    self.session.harness("perturb", perturbed.write(&folder, &self.model.name))?;
                    self.attach(&folder, TrainingConfig::default())?;
                    self.evaluate(0)
                };
                let slope =
                    (loss_at(weight[index] + size)? - loss_at(weight[index] - size)?) / f64::from(2.0 * size);
                let place = format!("lora_{factor} of {}, entry {index}", target.module());
                all.push(Deviation::new(relative(f64::from(gradient[index]), slope), place));
            }
        }
        self.report("finite differences", Deviation::largest(all), tolerance);
        Ok(())
    }

    pub fn curves(&mut self, scope: Scope) -> Result<(), Broken> {
        let model = self.model;
        let steps = match scope {
            Scope::Full => usize::MAX,
            Scope::Short => SHORT_CURVE_STEPS,
        };
        for (name, curve) in &model.curves {
            if curve.settings.quantization() == self.quantization {
                self.curve(name, curve, steps, &model.adapter)?;
                if name == "adamw" && scope == Scope::Full {
                    self.trained()?;
                }
            }
        }
        Ok(())
    }

    /// Trains for at most `steps` of the curve's.
    fn curve(&mut self, name: &str, curve: &Curve, steps: usize, adapter: &Path) -> Result<(), Broken> {
        self.attach(adapter, curve.settings.training())?;
        let mut losses = Vec::new();
        let mut norms = Vec::new();
        for (step, expected) in curve.steps.iter().take(steps).enumerate() {
            let dropout_seed = curve.settings.dropout_seed;
            let batches = self.lines(expected.lines.clone());
            let call = TrainStep { step: step as u64, dropout_seed, batches };
            let got = self.session.call("train step", call)?;
            let place = format!("step {step}: {:.6}, expected {:.6}", got.loss, expected.loss);
            losses.push(Deviation::new(relative(got.loss, expected.loss), place));
            let place = format!("step {step}: {:.6}, expected {:.6}", got.grad_norm, expected.grad_norm);
            norms.push(Deviation::new(relative(got.grad_norm, expected.grad_norm), place));
        }
        let name_of_losses = format!("{} losses of the curve {name}", losses.len());
        self.report(&name_of_losses, Deviation::largest(losses), self.tolerances.curve_losses);
        if let Some(tolerance) = self.tolerances.later_norms {
            let name = format!("gradient norms of the curve {name}");
            self.report(&name, Deviation::largest(norms), tolerance);
        } else {
            // Before any update.
            let name = format!("first gradient norm of the curve {name}");
            self.report(&name, Deviation::largest(norms.into_iter().take(1)), self.tolerances.gradients);
        }
        Ok(())
    }

    /// What the curve `adamw` trained, as it evaluates and as it is saved.
    fn trained(&mut self) -> Result<(), Broken> {
        let expected = &self.model.losses.of(self.quantization).trained_adapter;
        self.batch_losses("losses after training", expected, self.tolerances.curve_losses)?;
        let before = self.evaluate(0)?;
        let output = self.scratch.path().join("saved");
        self.session.call("save adapter", SaveAdapter { output: output.clone() })?;
        self.attach(&output, TrainingConfig::default())?;
        let after = self.evaluate(0)?;
        let deviation = Deviation::new(relative(after, before), "loss of batch 0");
        self.report("the saved adapter reproduces its loss", deviation, self.tolerances.repetition);
        Ok(())
    }
}

/// Seeds that dropout of an engine's own is looked at with.
const OWN_MASKS: u64 = 24;
/// Kept values that are not scaled up would be off by the rate, a quarter; the noise of so many masks is some hundredths.
const OWN_DROPOUT_MEAN: f64 = 0.1;

fn gradients_of_b(gradients: &AdapterTensors) -> Vec<f64> {
    gradients.values().flat_map(|pair| &pair.b).map(|value| f64::from(*value)).collect()
}

/// Index of the largest magnitude.
fn largest(values: &[f32]) -> usize {
    let by_magnitude = |a: &(usize, &f32), b: &(usize, &f32)| a.1.abs().total_cmp(&b.1.abs());
    values.iter().enumerate().max_by(by_magnitude).map_or(0, |(index, _)| index)
}
