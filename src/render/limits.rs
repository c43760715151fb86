//! The machine's limits, as the report lists them.

use super::trace::{CellRef, Lines};
use crate::measure::limits::{Limits, Named};
use crate::record::CellRecord;
use serde::Serialize;

/// One limit of the host, or of the device of one engine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LimitRow {
    pub of: String,
    pub name: &'static str,
    /// Bytes or operations per second.
    pub rate: f64,
    /// `GB/s` or `GFLOP/s`.
    pub unit: &'static str,
    pub source: CellRef,
}

/// Each that was measured once, from the first cell that has it.
pub fn limit_rows(cells: &[CellRecord], lines: &Lines) -> Vec<LimitRow> {
    let mut rows: Vec<LimitRow> = Vec::new();
    for cell in cells {
        let Some(limits) = &cell.limits else { continue };
        for (of, (name, rate, unit)) in of_cell(cell, limits) {
            let is_known = |row: &LimitRow| row.of == of && row.name == name && Some(row.rate) == rate;
            if let Some(rate) = rate.filter(|_| !rows.iter().any(is_known)) {
                rows.push(LimitRow { of, name, rate, unit, source: lines.refer(cell) });
            }
        }
    }
    rows
}

fn of_cell(cell: &CellRecord, limits: &Limits) -> Vec<(String, Named)> {
    let of = |name: String, limits: &[Named]| -> Vec<(String, Named)> {
        limits.iter().map(|limit| (name.clone(), *limit)).collect()
    };
    let mut rows = of(cell.environment.cpu.clone(), &limits.host.named());
    if let (Some(limits), Some(device)) = (&limits.device, &cell.device) {
        let named = [
            ("memory, read and write", limits.memory_bytes_per_second, "GB/s"),
            ("matrix products, f32", limits.f32_flops, "GFLOP/s"),
            ("matrix products, bf16", limits.bf16_flops, "GFLOP/s"),
        ];
        rows.extend(of(format!("{}, by {}", device.name, cell.engine), &named));
    }
    rows
}
