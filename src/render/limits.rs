//! The machine's limits, as the report lists them.

use super::trace::{CellRef, Lines};
use crate::measure::limits::Limits;
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
        for (of, name, rate, unit) in of_cell(cell, limits) {
            let is_known = |row: &LimitRow| row.of == of && row.name == name && Some(row.rate) == rate;
            if let Some(rate) = rate.filter(|_| !rows.iter().any(is_known)) {
                rows.push(LimitRow { of, name, rate, unit, source: lines.refer(cell) });
            }
        }
    }
    rows
}

fn of_cell(cell: &CellRecord, limits: &Limits) -> Vec<(String, &'static str, Option<f64>, &'static str)> {
    let host = &limits.host;
    let name = cell.environment.cpu.clone();
    let mut rows = vec![
        (name.clone(), "memory, read", host.memory_bytes_per_second, "GB/s"),
        (name.clone(), "matrix products, f32", host.f32_flops, "GFLOP/s"),
        (name.clone(), "matrix products, bf16", host.bf16_flops, "GFLOP/s"),
        (name.clone(), "file in the page cache, read", host.page_cache_bytes_per_second, "GB/s"),
        (name, "file on the disk, read", host.disk_bytes_per_second, "GB/s"),
    ];
    if let (Some(limits), Some(device)) = (&limits.device, &cell.device) {
        let name = format!("{}, by {}", device.name, cell.engine);
        rows.extend([
            (name.clone(), "memory, read and write", limits.memory_bytes_per_second, "GB/s"),
            (name.clone(), "matrix products, f32", limits.f32_flops, "GFLOP/s"),
            (name, "matrix products, bf16", limits.bf16_flops, "GFLOP/s"),
        ]);
    }
    rows
}
