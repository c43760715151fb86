//! What did not end ok, and why.

use super::trace::{CellRef, Lines};
use crate::decide::jobs::Job;
use crate::record::Outcome;
use serde::Serialize;

/// Cells that did not end ok, for the same reason.
#[derive(Debug, Clone, Serialize)]
pub struct Trouble {
    pub engine: String,
    pub model: String,
    pub outcome: Outcome,
    pub scenarios: Vec<String>,
    pub during: Option<String>,
    pub message: Option<String>,
    pub advice: Option<String>,
    pub stderr_tail: Vec<String>,
    /// Largest memory until it ended.
    pub peak_bytes: Option<u64>,
    pub cells: Vec<CellRef>,
}

pub fn troubles(jobs: &[Job], lines: &Lines) -> Vec<Trouble> {
    let mut all: Vec<Trouble> = Vec::new();
    for cell in jobs.iter().flat_map(|j| &j.cells).filter(|c| c.outcome != Outcome::Ok) {
        let error = cell.error.as_ref();
        let (during, message) = (error.map(|e| e.during.clone()), error.map(|e| e.message.clone()));
        let same = |t: &Trouble| {
            t.engine == cell.engine
                && t.model == cell.model.name
                && t.outcome == cell.outcome
                && t.during == during
                && t.message == message
        };
        let trouble = match all.iter().position(same) {
            Some(index) => &mut all[index],
            None => {
                all.push(Trouble {
                    engine: cell.engine.clone(),
                    model: cell.model.name.clone(),
                    outcome: cell.outcome,
                    scenarios: Vec::new(),
                    during,
                    message,
                    advice: error.and_then(|e| e.advice.clone()),
                    stderr_tail: error.map(|e| e.stderr_tail.clone()).unwrap_or_default(),
                    peak_bytes: None,
                    cells: Vec::new(),
                });
                let last = all.len() - 1;
                &mut all[last]
            }
        };
        trouble.peak_bytes = trouble.peak_bytes.max(cell.peak_memory_bytes);
        trouble.cells.push(lines.refer(cell));
        if !trouble.scenarios.contains(&cell.scenario) {
            trouble.scenarios.push(cell.scenario.clone());
        }
    }
    all
}
