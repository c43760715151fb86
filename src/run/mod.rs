//! A run: prepares the inputs, executes the cells, writes the record.

pub mod cell;
pub mod inputs;
pub mod limits;
pub mod models;
pub mod prepare;
pub mod progress;
mod scenarios;
pub mod settings;

use crate::adoption::Adoption;
use crate::interrupt;
use crate::measure::host::Environment;
use crate::measure::limits::{HostLimits, Limits};
use crate::measure::metrics;
use crate::plan::Cell;
use crate::probe::Reason;
use crate::record::{
    self, CellError, CellRecord, ModelRecord, Outcome, Probe, REFERENCE_PROBE, RunLog, SCHEMA, Samples,
};
use crate::verify::Verdict;
use anyhow::Result;
use cell::{Execution, Executor};
use evalfw_engine::protocol::{DeviceLimits, EngineInfo};
use progress::Progress;
use std::collections::{BTreeMap, BTreeSet};

/// What is the same for all cells of a run.
pub struct RunContext {
    pub models: Vec<ModelRecord>,
    pub environment: Environment,
    /// What the reference said of each engine. An engine that is wrong is not timed.
    pub verdicts: BTreeMap<String, Verdict>,
    /// `None` if they were not measured.
    pub host_limits: Option<HostLimits>,
    /// By engine, those of its GPU.
    pub device_limits: BTreeMap<String, DeviceLimits>,
    /// By engine.
    pub adoption: BTreeMap<String, Adoption>,
    /// By engine, what a reader of its figures has to know.
    pub caveats: BTreeMap<String, Vec<String>>,
    pub launcher: Option<String>,
    /// How often a cell that was disturbed is repeated.
    pub repeat_disturbed: u32,
}

/// So many cells in a row that stayed disturbed tell that repeating them only takes time.
const NEVER_QUIET: u32 = 3;

/// Runs the cells that are not in `done` one after the other and appends a row as each ends. Returns
/// the rows of this call that count; an interrupt ends it early.
pub fn execute(
    context: &RunContext,
    cells: &[Cell],
    done: &BTreeSet<String>,
    executor: &mut dyn Executor,
    log: &mut RunLog,
    progress: &Progress,
) -> Result<Vec<CellRecord>> {
    let mut records = Vec::new();
    // Cells in a row that no repetition found undisturbed.
    let mut in_vain = 0;
    'cells: for (index, cell) in cells.iter().enumerate() {
        let id = cell.id(&context.models[cell.model].name);
        if done.contains(&id) {
            continue;
        }
        progress.begin(index, cells.len(), &id);
        for attempt in 0.. {
            let record = match context.verdicts.get(&cell.engine) {
                Some(verdict) if !verdict.passed() => context.unverified(cell, verdict),
                _ => CellRecord { attempt, ..context.record(cell, executor.execute(cell, progress)) },
            };
            if interrupt::requested() {
                // A cell that was cut short is no result; `--resume` runs it again.
                break 'cells;
            }
            log.append(&record)?;
            progress.end(&record);
            let disturbed = record.outcome == Outcome::Ok && !record.samples.disturbances.is_empty();
            let again = disturbed && attempt < context.repeat_disturbed && in_vain < NEVER_QUIET;
            if !again {
                in_vain = if disturbed { in_vain + 1 } else { 0 };
                if in_vain == NEVER_QUIET && context.repeat_disturbed > 0 {
                    progress.say("this machine is never quiet: disturbed cells are not repeated any more");
                }
                records.push(record);
                break;
            }
        }
    }
    progress.finish();
    Ok(records)
}

impl RunContext {
    fn record(&self, cell: &Cell, execution: Execution) -> CellRecord {
        let Execution { info, started_at, wall_seconds, mut samples, failure } = execution;
        if let Some(verdict) = self.verdicts.get(&cell.engine) {
            samples.probes.push(Probe {
                name: REFERENCE_PROBE.into(),
                passed: verdict.passed(),
                evidence: verdict.summary(),
            });
            samples.probes.extend(verdict.probes.iter().cloned());
        }
        let outcome = failure.as_ref().map_or(Outcome::Ok, |(outcome, _)| *outcome);
        let counts = outcome == Outcome::Ok;
        // A wrong or half answer voids the speed; its samples stay.
        let valid = |rate: Option<f64>| rate.filter(|_| counts);
        let decoded = metrics::rate(metrics::counted_decodes(&samples));
        CellRecord {
            tokens_per_second: valid(metrics::train_tokens_rate(&samples).or(decoded)),
            examples_per_second: valid(metrics::train_examples_rate(&samples)),
            peak_memory_bytes: metrics::peak_memory(&samples),
            started_at,
            wall_seconds,
            samples,
            ..self.empty(cell, info, outcome, failure.map(|(_, error)| error))
        }
    }

    /// The row of a cell whose engine cannot run here.
    pub fn unavailable(&self, cell: &Cell, reason: &Reason) -> CellRecord {
        let error = CellError {
            during: "hello".into(),
            message: reason.reason.clone(),
            advice: reason.advice.clone(),
            stderr_tail: reason.stderr_tail.clone(),
        };
        self.empty(cell, None, reason.outcome, Some(error))
    }

    /// The row of a cell that was not run, because its engine does not hold against the reference.
    fn unverified(&self, cell: &Cell, verdict: &Verdict) -> CellRecord {
        let error = CellError {
            during: "verify".into(),
            message: verdict.summary(),
            advice: Some(format!("`evalfw verify --engine {}` shows every check", cell.engine)),
            stderr_tail: verdict.failure.as_ref().map_or_else(Vec::new, |f| f.stderr_tail.clone()),
        };
        self.empty(cell, verdict.info.clone(), verdict.outcome, Some(error))
    }

    fn empty(
        &self,
        cell: &Cell,
        info: Option<EngineInfo>,
        outcome: Outcome,
        error: Option<CellError>,
    ) -> CellRecord {
        let model = &self.models[cell.model];
        let of = |get: fn(&EngineInfo) -> String| info.as_ref().map(get);
        CellRecord {
            schema: SCHEMA,
            cell: cell.id(&model.name),
            engine: cell.engine.clone(),
            engine_version: of(|i| i.engine_version.clone()),
            framework: of(|i| i.framework.clone()),
            framework_version: of(|i| i.framework_version.clone()),
            device: info.as_ref().map(|i| i.device.clone()),
            compute_dtype: of(|i| i.compute_dtype.clone()),
            engine_features: info.as_ref().map_or_else(Vec::new, |i| i.features.clone()),
            threads: info.as_ref().map(|i| i.threads),
            scenario: cell.scenario.label(),
            parameters: cell.scenario.clone(),
            model: model.clone(),
            quantization: cell.scenario.quantization(),
            repetition: cell.repetition,
            seed: cell.seed,
            outcome,
            error,
            started_at: record::now(),
            wall_seconds: 0.0,
            peak_memory_bytes: None,
            tokens_per_second: None,
            examples_per_second: None,
            samples: Samples::default(),
            environment: self.environment.clone(),
            limits: self.host_limits.map(|host| {
                let device = self.device_limits.get(&cell.engine).copied();
                Limits { host, device }
            }),
            adoption: self.adoption.get(&cell.engine).cloned(),
            caveats: self.caveats.get(&cell.engine).cloned().unwrap_or_default(),
            launcher: self.launcher.clone(),
            attempt: 0,
            host: None,
        }
    }
}
