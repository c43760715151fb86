//! The checks of one reference model.

mod forward;
mod native;
mod training;

pub use forward::{FULL_CONTEXT, LOGITS, TRAINED_ADAPTER};

use super::compare::{Deviation, relative};
use super::reference::ReferenceModel;
use super::session::{Broken, Session};
use super::tokenizer::TokenizerCases;
use super::tolerance::Tolerances;
use super::{Check, Scope, Verdict};
use crate::worker::WorkerCommand;
use evalfw_engine::lora::Adapter;
use evalfw_engine::protocol::{AttachAdapter, BatchRef, Evaluate, Quantization, TrainingConfig};
use std::collections::VecDeque;
use std::path::Path;
use tempfile::TempDir;

/// All checks of `model` that belong to `scope`, in the forms of the base that the engine has; and, in the first session,
/// those of the tokenizer, if it is given.
pub fn run(
    command: &WorkerCommand,
    model: &ReferenceModel,
    scope: Scope,
    tokenizer: Option<&TokenizerCases>,
    verdict: &mut Verdict,
) -> Result<(), Broken> {
    // The first is had by all, and its session says which others there are.
    let mut forms = VecDeque::from([Quantization::None]);
    while let Some(quantization) = forms.pop_front() {
        let (mut session, info) = Session::open(command, &model.model, quantization)?;
        let tolerances = session.harness("hello", Tolerances::of(&info.compute_dtype))?;
        if quantization == Quantization::None {
            let others = [Quantization::Nf4, Quantization::Native];
            forms.extend(others.into_iter().filter(|form| info.quantizations.contains(form)));
            if let Some(tokenizer) = tokenizer {
                tokenizer.check(&mut session, verdict)?;
            }
        }
        verdict.info = Some(info);
        verdict.tolerances = Some(tolerances);
        let scratch = session.harness("scratch", tempfile::tempdir())?;
        Bench { command, session, scratch, model, quantization, tolerances, verdict }.checks(scope)?;
    }
    Ok(())
}

/// The logits of `model` alone, unquantized.
pub fn run_forward(
    command: &WorkerCommand,
    model: &ReferenceModel,
    verdict: &mut Verdict,
) -> Result<(), Broken> {
    let quantization = Quantization::None;
    let (session, info) = Session::open(command, &model.model, quantization)?;
    let tolerances = session.harness("hello", Tolerances::of(&info.compute_dtype))?;
    let scratch = session.harness("scratch", tempfile::tempdir())?;
    Bench { command, session, scratch, model, quantization, tolerances, verdict }.logits(tolerances.logits)
}

/// A session with the model loaded in one form, and a folder for what the engine writes.
struct Bench<'a> {
    command: &'a WorkerCommand,
    session: Session,
    scratch: TempDir,
    model: &'a ReferenceModel,
    quantization: Quantization,
    tolerances: Tolerances,
    verdict: &'a mut Verdict,
}

impl Bench<'_> {
    fn checks(mut self, scope: Scope) -> Result<(), Broken> {
        if self.quantization == Quantization::Native {
            return self.native_checks();
        }
        let exact = self.quantization == Quantization::None;
        if exact {
            self.logits(self.tolerances.logits)?;
            self.decoding()?;
            self.full_context()?;
        }
        self.losses([self.tolerances.losses; 3])?;
        self.gradients()?;
        let drops = exact && self.dropout_gradients()?;
        if exact && scope == Scope::Full {
            self.finite_differences()?;
            self.dropout(drops)?;
        }
        self.curves(scope)
    }

    fn report(&mut self, name: &str, deviation: Deviation, tolerance: f64) {
        let name = self.label(name);
        self.verdict.checks.push(Check::new(&self.model.name, name, deviation, tolerance));
    }

    fn label(&self, name: &str) -> String {
        match self.quantization {
            Quantization::None => name.to_owned(),
            Quantization::Nf4 => format!("NF4: {name}"),
            Quantization::Native => format!("native: {name}"),
        }
    }

    /// Evaluation losses of all batches from those of the reference.
    fn batch_losses(&mut self, name: &str, expected: &[f64], tolerance: f64) -> Result<(), Broken> {
        let mut all = Vec::new();
        let mut losses = Vec::new();
        for (line, expected) in expected.iter().enumerate() {
            let got = self.evaluate(line)?;
            let place = format!("batch {line}: {got:.6}, expected {expected:.6}");
            all.push(Deviation::new(relative(got, *expected), place));
            losses.push(got);
        }
        if self.quantization == Quantization::Nf4 {
            self.verdict.nf4_losses.insert((self.model.name.clone(), name.to_owned()), losses);
        }
        self.report(name, Deviation::largest(all), tolerance);
        Ok(())
    }

    fn evaluate(&mut self, line: usize) -> Result<f64, Broken> {
        let batches = self.lines(vec![line]);
        Ok(self.session.call("evaluate", Evaluate { batches })?.loss)
    }

    fn attach(&mut self, adapter: &Path, training: TrainingConfig) -> Result<(), Broken> {
        let call = AttachAdapter { adapter: adapter.to_owned(), training };
        self.session.call("attach adapter", call).map(drop)
    }

    fn adapter(&self, folder: &Path) -> Result<Adapter, Broken> {
        self.session.harness("read adapter", Adapter::read(folder, &self.model.config))
    }

    fn lines(&self, lines: Vec<usize>) -> BatchRef {
        BatchRef { file: self.model.batches.clone(), lines }
    }
}
