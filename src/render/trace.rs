//! Where each figure comes from: the line of its cell in the record.

use crate::record::{CellRecord, Outcome};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// A cell and its line in the record, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CellRef {
    pub cell: String,
    pub line: usize,
}

/// The lines of all cells.
#[derive(Debug, Clone, Default)]
pub struct Lines {
    by_cell: BTreeMap<String, usize>,
    /// Lines of attempts that were made again.
    pub superseded: usize,
}

#[derive(Deserialize)]
struct CellOnly {
    cell: String,
}

impl Lines {
    /// Finds the cells' lines; of several rows for one cell the last counts, as in
    /// [`crate::record::read`].
    pub fn read(record: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(record).with_context(|| record.display().to_string())?;
        let mut lines = Self::default();
        for (index, line) in text.lines().enumerate() {
            // A last line that was cut short is no cell.
            if let Ok(row) = serde_json::from_str::<CellOnly>(line) {
                let before = lines.by_cell.insert(row.cell, index + 1);
                lines.superseded += usize::from(before.is_some());
            }
        }
        Ok(lines)
    }

    pub fn refer(&self, cell: &CellRecord) -> CellRef {
        CellRef { cell: cell.cell.clone(), line: self.line(&cell.cell) }
    }

    /// The line of a cell by its name; 0 if it is in no line.
    pub fn line(&self, cell: &str) -> usize {
        self.by_cell.get(cell).copied().unwrap_or(0)
    }
}

/// One cell in the appendix.
#[derive(Debug, Clone, Serialize)]
pub struct TraceRow {
    pub source: CellRef,
    pub outcome: Outcome,
    pub started_at: String,
    pub wall_seconds: f64,
    /// What was sampled, in words.
    pub samples: String,
}

/// Every cell, in the order of the file.
pub fn rows(cells: &[CellRecord], lines: &Lines) -> Vec<TraceRow> {
    let mut rows: Vec<TraceRow> = cells
        .iter()
        .map(|cell| TraceRow {
            source: lines.refer(cell),
            outcome: cell.outcome,
            started_at: cell.started_at.clone(),
            wall_seconds: cell.wall_seconds,
            samples: samples(cell),
        })
        .collect();
    rows.sort_by_key(|row| row.source.line);
    rows
}

fn samples(cell: &CellRecord) -> String {
    let s = &cell.samples;
    let warmup = s.train.iter().filter(|t| t.warmup).count();
    let steps = match (s.train.len(), warmup) {
        (0, _) => String::new(),
        (all, 0) => format!("{all} steps"),
        (all, warmup) => format!("{all} steps ({warmup} warm-up)"),
    };
    let count = |n: usize, what: &str| match n {
        0 => String::new(),
        1 => format!("1 {what}"),
        n => format!("{n} {what}s"),
    };
    let parts = [
        count(usize::from(s.load.is_some()), "load"),
        steps,
        count(s.evaluations.len(), "evaluation"),
        count(s.prefill.len(), "prefill"),
        count(s.decode.len(), "decode round"),
        count(s.memory.len(), "memory point"),
        count(s.probes.len(), "probe"),
    ];
    let parts: Vec<String> = parts.into_iter().filter(|p| !p.is_empty()).collect();
    if parts.is_empty() { "none".to_owned() } else { parts.join(", ") }
}
