//! The checks of one reference model, with their tolerances.
//!
//! All engines compute in f32 today, where two correct implementations differ by the order of their
//! sums: some 1e-6 of the largest value in models of this size. The tolerances leave room for longer
//! sums and for fused kernels, and are far below what any mistake in the arithmetic makes.

use super::compare::{Deviation, relative, relative_to_largest, tensors, whole};
use super::reference::{Curve, ReferenceModel, read_f32};
use super::session::{Broken, Session};
use super::{Check, Scope};
use crate::worker::WorkerCommand;
use evalfw_engine::lora::{Adapter, AdapterTensors, Target, read_tensors};
use evalfw_engine::protocol::{
    AttachAdapter, BatchRef, Decode, EngineInfo, Evaluate, Gradients, Logits, Prefill, Quantization,
    SaveAdapter, TrainStep, TrainingConfig,
};
use std::path::Path;
use tempfile::TempDir;

const LOGITS: f64 = 1e-4;
const LOSSES: f64 = 1e-3;
const GRADIENTS: f64 = 1e-3;
/// Of all gradients together.
const CHECKPOINTING: f64 = 1e-6;
/// Central differences of an f32 loss are themselves good to about a percent.
const FINITE_DIFFERENCES: f64 = 5e-2;
/// A loss that must not change at all.
const SAME: f64 = 1e-6;
const SEED: u64 = 20_261_123;

pub struct ModelChecks<'a> {
    pub command: &'a WorkerCommand,
    pub model: &'a ReferenceModel,
    pub scope: Scope,
    pub checks: &'a mut Vec<Check>,
    pub info: &'a mut Option<EngineInfo>,
}

/// A session, and a folder for what the engine writes.
struct Bench {
    session: Session,
    scratch: TempDir,
}

impl ModelChecks<'_> {
    pub fn all(&mut self) -> Result<(), Broken> {
        let mut exact = self.open(Quantization::None)?;
        self.logits(&mut exact)?;
        self.decoding(&mut exact)?;
        self.losses(&mut exact, Quantization::None)?;
        self.gradients(&mut exact, Quantization::None)?;
        if self.scope == Scope::Full {
            self.finite_differences(&mut exact)?;
            self.dropout(&mut exact)?;
            self.curves(&mut exact, Quantization::None)?;
        }
        drop(exact);
        let mut nf4 = self.open(Quantization::Nf4)?;
        self.losses(&mut nf4, Quantization::Nf4)?;
        self.gradients(&mut nf4, Quantization::Nf4)?;
        if self.scope == Scope::Full {
            self.curves(&mut nf4, Quantization::Nf4)?;
        }
        Ok(())
    }

    fn open(&mut self, quantization: Quantization) -> Result<Bench, Broken> {
        let (session, info) = Session::open(self.command, &self.model.model, quantization)?;
        *self.info = Some(info);
        let scratch = session.harness("scratch", tempfile::tempdir())?;
        Ok(Bench { session, scratch })
    }

    fn report(&mut self, name: impl Into<String>, deviation: Deviation, tolerance: f64) {
        self.checks.push(Check {
            model: self.model.name.clone(),
            name: name.into(),
            deviation: deviation.value,
            tolerance,
            passed: deviation.value <= tolerance,
            detail: deviation.place,
        });
    }

    fn logits(&mut self, bench: &mut Bench) -> Result<(), Broken> {
        let output = bench.scratch.path().join("logits.safetensors");
        let mut all = Vec::new();
        for prompt in &self.model.prompts {
            let call = Logits { tokens: prompt.tokens.clone(), output: output.clone() };
            bench.session.call("logits", call)?;
            let got = bench.session.harness("logits", read_f32(&output, "logits"))?;
            let place = format!("prompt of {} tokens", prompt.tokens.len());
            all.push(Deviation::new(relative_to_largest(&got, &prompt.logits), place));
        }
        self.report("logits", Deviation::largest(all), LOGITS);
        Ok(())
    }

    fn decoding(&mut self, bench: &mut Bench) -> Result<(), Broken> {
        let mut all = Vec::new();
        for prompt in &self.model.prompts {
            let prefill = bench.session.call("prefill", Prefill { tokens: prompt.tokens.clone() })?;
            let mut got = vec![prefill.next];
            let steps = prompt.continuation.len() - 1;
            got.extend(bench.session.call("decode", Decode { first: prefill.next, steps })?.tokens);
            let agreed = got.iter().zip(&prompt.continuation).take_while(|(a, b)| a == b).count();
            let missed = (prompt.continuation.len() - agreed) as f64;
            let place = format!("after a prompt of {} tokens, {agreed} agree", prompt.tokens.len());
            all.push(Deviation::new(missed, place));
        }
        self.report("greedy tokens through the KV cache", Deviation::largest(all), 0.0);
        Ok(())
    }

    fn losses(&mut self, bench: &mut Bench, quantization: Quantization) -> Result<(), Broken> {
        for (which, adapter) in [
            ("base", None),
            ("adapter", Some(&self.model.adapter)),
            ("trained_adapter", Some(&self.model.trained_adapter)),
        ] {
            if let Some(adapter) = adapter {
                self.attach(bench, adapter, TrainingConfig::default())?;
            }
            let Some(expected) = self.expected_losses(quantization, which) else { continue };
            let deviation = self.batch_losses(bench, expected)?;
            let name = match which {
                "base" => "losses without adapter".to_owned(),
                "adapter" => "losses with adapter".to_owned(),
                _ => "losses with an adapter trained by PEFT".to_owned(),
            };
            self.report(label(&name, quantization), deviation, LOSSES);
        }
        Ok(())
    }

    fn expected_losses(&self, quantization: Quantization, which: &str) -> Option<&Vec<f64>> {
        self.model.losses.get(crate::plan::quantization_name(quantization))?.get(which)
    }

    fn batch_losses(&self, bench: &mut Bench, expected: &[f64]) -> Result<Deviation, Broken> {
        let mut all = Vec::new();
        for (line, expected) in expected.iter().enumerate().take(self.model.lines) {
            let got = self.evaluate(bench, line)?;
            all.push(Deviation::new(
                relative(got, *expected),
                format!("batch {line}: {got:.6}, expected {expected:.6}"),
            ));
        }
        Ok(Deviation::largest(all))
    }

    fn evaluate(&self, bench: &mut Bench, line: usize) -> Result<f64, Broken> {
        Ok(bench.session.call("evaluate", Evaluate { batches: self.lines(vec![line]) })?.loss)
    }

    fn gradients(&mut self, bench: &mut Bench, quantization: Quantization) -> Result<(), Broken> {
        let expected = match quantization {
            Quantization::None => &self.model.gradients,
            Quantization::Nf4 => &self.model.gradients_nf4,
        };
        let recomputed = self.step_gradients(bench, &self.model.adapter, true, 0)?;
        self.report(label("adapter gradients", quantization), tensors(&recomputed, expected), GRADIENTS);
        let kept = self.step_gradients(bench, &self.model.adapter, false, 0)?;
        let name = label("gradients with and without checkpointing", quantization);
        self.report(name, whole(&kept, &recomputed), CHECKPOINTING);
        Ok(())
    }

    /// The gradients of batch 0.
    fn step_gradients(
        &self,
        bench: &mut Bench,
        adapter: &Path,
        gradient_checkpointing: bool,
        step: u64,
    ) -> Result<AdapterTensors, Broken> {
        let r = self.adapter(bench, adapter)?.config.r;
        self.attach(bench, adapter, TrainingConfig { gradient_checkpointing, ..TrainingConfig::default() })?;
        let output = bench.scratch.path().join("gradients.safetensors");
        let call =
            Gradients { step, dropout_seed: SEED, batches: self.lines(vec![0]), output: output.clone() };
        bench.session.call("gradients", call)?;
        bench.session.harness("gradients", read_tensors(&output, &self.model.config, r))
    }

    /// Perturbs the entry with the largest gradient of each factor, and looks at the loss.
    fn finite_differences(&mut self, bench: &mut Bench) -> Result<(), Broken> {
        let original = self.adapter(bench, &self.model.adapter)?;
        let gradients = self.step_gradients(bench, &self.model.adapter, true, 0)?;
        let layer = self.model.config.num_hidden_layers - 1;
        let folder = bench.scratch.path().join("perturbed");
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
                    bench.session.harness("perturb", perturbed.write(&folder, &self.model.name))?;
                    self.attach(bench, &folder, TrainingConfig::default())?;
                    self.evaluate(bench, 0)
                };
                let slope =
                    (loss_at(weight[index] + size)? - loss_at(weight[index] - size)?) / f64::from(2.0 * size);
                let place = format!("lora_{factor} of {}, entry {index}", target.module());
                all.push(Deviation::new(relative(f64::from(gradient[index]), slope), place));
            }
        }
        self.report("finite differences", Deviation::largest(all), FINITE_DIFFERENCES);
        Ok(())
    }

    /// Dropout: off in evaluation; in training decided by seed and step alone, and equally by all engines.
    fn dropout(&mut self, bench: &mut Bench) -> Result<(), Broken> {
        let mut adapter = self.adapter(bench, &self.model.adapter)?;
        adapter.config.lora_dropout = 0.1;
        let folder = bench.scratch.path().join("dropout");
        bench.session.harness("dropout", adapter.write(&folder, &self.model.name))?;
        self.attach(bench, &folder, TrainingConfig::default())?;
        if let Some(expected) = self.expected_losses(Quantization::None, "adapter") {
            let deviation = self.batch_losses(bench, expected)?;
            self.report("losses with dropout, which evaluation leaves out", deviation, LOSSES);
        }
        let first = self.step_gradients(bench, &folder, true, 0)?;
        let again = self.step_gradients(bench, &folder, false, 0)?;
        self.report("dropout masks are the same in recomputation", whole(&again, &first), CHECKPOINTING);
        let other = self.step_gradients(bench, &folder, true, 1)?;
        let changed = tensors(&other, &first).value;
        let unchanged = if changed > 1e-3 { 0.0 } else { 1.0 };
        let place = format!("gradients of two steps differ by {changed:.1e}");
        self.report("dropout masks change with the step", Deviation::new(unchanged, place), 0.0);
        Ok(())
    }

    fn curves(&mut self, bench: &mut Bench, quantization: Quantization) -> Result<(), Broken> {
        let model = self.model;
        for (name, curve) in model.curves.iter().filter(|(_, c)| c.settings.quantization() == quantization) {
            let deviation = self.curve(bench, curve)?;
            self.report(format!("{} losses of the curve {name}", curve.steps.len()), deviation, LOSSES);
            if name == "adamw" {
                self.trained(bench)?;
            }
        }
        Ok(())
    }

    fn curve(&self, bench: &mut Bench, curve: &Curve) -> Result<Deviation, Broken> {
        self.attach(bench, &self.model.adapter, curve.settings.training())?;
        let mut all = Vec::new();
        for (step, expected) in curve.steps.iter().enumerate() {
            let batches = self.lines(expected.lines.clone());
            let call = TrainStep { step: step as u64, dropout_seed: SEED, batches };
            let got = bench.session.call("train step", call)?;
            all.push(Deviation::new(relative(got.loss, expected.loss), format!("loss of step {step}")));
            all.push(Deviation::new(
                relative(got.grad_norm, expected.grad_norm),
                format!("gradient norm of step {step}"),
            ));
        }
        Ok(Deviation::largest(all))
    }

    /// What the curve `adamw` trained, as it evaluates and as it is saved.
    fn trained(&mut self, bench: &mut Bench) -> Result<(), Broken> {
        if let Some(expected) = self.expected_losses(Quantization::None, "trained_adapter") {
            let deviation = self.batch_losses(bench, expected)?;
            self.report("losses after training", deviation, LOSSES);
        }
        let before = self.evaluate(bench, 0)?;
        let output = bench.scratch.path().join("saved");
        bench.session.call("save adapter", SaveAdapter { output: output.clone() })?;
        self.attach(bench, &output, TrainingConfig::default())?;
        let after = self.evaluate(bench, 0)?;
        let deviation = Deviation::new(relative(after, before), "loss of batch 0");
        self.report("the saved adapter reproduces its loss", deviation, SAME);
        Ok(())
    }

    fn attach(&self, bench: &mut Bench, adapter: &Path, training: TrainingConfig) -> Result<(), Broken> {
        let call = AttachAdapter { adapter: adapter.to_owned(), training };
        bench.session.call("attach adapter", call).map(drop)
    }

    fn adapter(&self, bench: &Bench, folder: &Path) -> Result<Adapter, Broken> {
        bench.session.harness("read adapter", Adapter::read(folder, &self.model.config))
    }

    fn lines(&self, lines: Vec<usize>) -> BatchRef {
        BatchRef { file: self.model.batches.clone(), lines }
    }
}

fn label(name: &str, quantization: Quantization) -> String {
    match quantization {
        Quantization::None => name.to_owned(),
        Quantization::Nf4 => format!("NF4: {name}"),
    }
}

/// Index of the largest magnitude.
fn largest(values: &[f32]) -> usize {
    let by_magnitude = |a: &(usize, &f32), b: &(usize, &f32)| a.1.abs().total_cmp(&b.1.abs());
    values.iter().enumerate().max_by(by_magnitude).map_or(0, |(index, _)| index)
}
