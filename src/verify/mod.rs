//! Holds engines against the independent reference: a framework that computes the wrong thing quickly
//! must not win.

pub mod agreement;
mod checks;
mod compare;
mod completeness;
pub mod derived;
mod manifest;
pub mod reference;
mod session;
pub mod tokenizer;
pub mod tolerance;

use crate::record::{CellError, Outcome, Probe};
use crate::worker::WorkerCommand;
use checks::{FULL_CONTEXT, LOGITS, TRAINED_ADAPTER};
use compare::Deviation;
use evalfw_engine::protocol::EngineInfo;
use reference::{Reference, ReferenceModel};
use serde::Serialize;
use std::collections::BTreeMap;
use tokenizer::TOKENIZER;
use tolerance::Tolerances;

/// How much is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Every model and every check.
    Full,
    /// What `run` does before an engine's timings count: one model, and the first
    /// steps of each curve.
    Short,
}

/// One quantity against its tolerance.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// The reference model.
    pub model: String,
    pub name: String,
    /// The largest deviation that was seen.
    pub deviation: f64,
    pub tolerance: f64,
    pub passed: bool,
    /// Where the deviation is, or what was compared.
    pub detail: String,
}

impl Check {
    fn new(model: &str, name: String, deviation: Deviation, tolerance: f64) -> Self {
        Self {
            model: model.to_owned(),
            name,
            passed: deviation.value <= tolerance,
            deviation: deviation.value,
            tolerance,
            detail: deviation.place,
        }
    }
}

/// An engine's checks, and what ended them early.
#[derive(Debug, Serialize)]
pub struct Verdict {
    pub engine: String,
    pub info: Option<EngineInfo>,
    /// As the engine's `compute_dtype` asks for.
    pub tolerances: Option<Tolerances>,
    pub checks: Vec<Check>,
    /// `ok`, `wrong`, or how the worker failed before all checks were done.
    pub outcome: Outcome,
    pub failure: Option<CellError>,
    /// What the checks show the engine to be able to do, as in the criteria.
    #[serde(skip)]
    pub probes: Vec<Probe>,
    /// Reference model and check → the engine's NF4 evaluation losses, to compare with other engines.
    #[serde(skip)]
    pub nf4_losses: BTreeMap<(String, String), Vec<f64>>,
}

impl Verdict {
    fn new(engine: &str) -> Self {
        Self {
            engine: engine.to_owned(),
            info: None,
            tolerances: None,
            checks: Vec::new(),
            outcome: Outcome::Ok,
            failure: None,
            probes: Vec::new(),
            nf4_losses: BTreeMap::new(),
        }
    }

    pub fn passed(&self) -> bool {
        self.outcome == Outcome::Ok
    }

    pub fn failed_checks(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|c| !c.passed)
    }

    /// One line for the record and the report.
    pub fn summary(&self) -> String {
        let failed: Vec<String> = self
            .failed_checks()
            .map(|c| {
                format!(
                    "{} on {}: {:.2e}, tolerance {:e} ({})",
                    c.name, c.model, c.deviation, c.tolerance, c.detail
                )
            })
            .collect();
        match (&self.failure, failed.is_empty()) {
            (Some(CellError { during, message, advice, .. }), _) => {
                let advice = advice.as_ref().map_or_else(String::new, |advice| format!("; {advice}"));
                format!("verification broke off during {during}: {message}{advice}")
            }
            (None, false) => format!("wrong against the reference: {}", failed.join("; ")),
            (None, true) => format!("{} checks against the reference hold", self.checks.len()),
        }
    }
}

/// What the reference models, and some of the checks, show an engine to be able to do.
fn probes(reference: &Reference, checks: &[Check]) -> Vec<Probe> {
    let shown_by = |name: &str, of: &dyn Fn(&Check) -> bool| -> Option<Probe> {
        let mut shown = checks.iter().filter(|check| of(check));
        let first = shown.next()?;
        let passed = first.passed && shown.all(|check| check.passed);
        let evidence = format!("{} of {}: {}", first.name, first.model, first.detail);
        Some(Probe { name: name.to_owned(), passed, evidence })
    };
    let of_models = |name: &str, is: &dyn Fn(&ReferenceModel) -> bool| {
        let models: Vec<&str> = reference.all().filter(|m| is(m)).map(|m| m.name.as_str()).collect();
        shown_by(name, &|check| models.contains(&check.model.as_str()) && check.name == LOGITS)
    };
    [
        of_models("tied_head", &|model| model.config.tie_word_embeddings),
        of_models("untied_head", &|model| !model.config.tie_word_embeddings),
        of_models("sharded_checkpoint", &ReferenceModel::is_sharded),
        shown_by("load_peft_adapter", &|check| check.name.ends_with(TRAINED_ADAPTER)),
        shown_by("full_context", &|check| check.name == FULL_CONTEXT),
        shown_by("tokenizer", &|check| check.name == TOKENIZER),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Runs the checks on one engine. What goes wrong is part of the verdict.
pub fn verify(engine: &str, command: &WorkerCommand, reference: &Reference, scope: Scope) -> Verdict {
    let mut verdict = Verdict::new(engine);
    for (index, model) in reference.models(scope).into_iter().enumerate() {
        // Texts have nothing to do with the model: once is enough.
        let tokenizer = reference.tokenizer.as_ref().filter(|_| index == 0);
        if let Err(broken) = checks::run(command, model, scope, tokenizer, &mut verdict) {
            verdict.outcome = broken.outcome;
            verdict.failure = Some(broken.error);
            return verdict;
        }
    }
    // In software that takes long to compile, and for an engine that is in no ranking.
    let is_software = verdict.info.as_ref().is_some_and(|info| info.device.software);
    for model in reference.only_forward(scope).into_iter().filter(|_| !is_software) {
        if let Err(broken) = checks::run_forward(command, model, &mut verdict) {
            verdict.outcome = broken.outcome;
            verdict.failure = Some(broken.error);
            return verdict;
        }
    }
    verdict.probes = probes(reference, &verdict.checks);
    if verdict.checks.is_empty() || verdict.failed_checks().next().is_some() {
        verdict.outcome = Outcome::Wrong;
    }
    verdict
}
