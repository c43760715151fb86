//! Cells whose speed is doubtful: something disturbed them, or their times never settled.

use super::trace::{CellRef, Lines};
use crate::decide::jobs::Job;
use serde::Serialize;

#[derive(Debug, Clone, Serialize)]
pub struct Doubt {
    pub reasons: Vec<String>,
    /// How often it was run before, disturbed as well.
    pub attempts_before: u32,
    pub source: CellRef,
}

pub fn doubts(jobs: &[Job], lines: &Lines) -> Vec<Doubt> {
    let cells = jobs.iter().flat_map(|job| job.ok());
    let doubt = |cell: &crate::record::CellRecord| {
        let mut reasons = cell.samples.disturbances.clone();
        if cell.samples.steady == Some(false) {
            reasons.push("its times had not settled at the end".to_owned());
        }
        let attempts_before = cell.attempt;
        (!reasons.is_empty()).then(|| Doubt { reasons, attempts_before, source: lines.refer(cell) })
    };
    cells.filter_map(doubt).collect()
}
