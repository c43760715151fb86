//! The memory of a device as a framework's allocator tells it, beside that of the process.

use super::trace::{CellRef, Lines};
use crate::decide::jobs::Job;
use crate::record::CellRecord;
use evalfw_engine::protocol::DeviceMemory;
use serde::Serialize;

/// Of the repetition that took the most, at the end of its cell.
#[derive(Debug, Clone, Serialize)]
pub struct PoolRow {
    pub engine: String,
    pub job: String,
    pub memory: DeviceMemory,
    /// Resident peak of the process tree.
    pub host_bytes: Option<u64>,
    pub source: CellRef,
}

/// Of the jobs whose framework tells anything.
pub fn pool_rows(jobs: &[&Job], lines: &Lines) -> Vec<PoolRow> {
    jobs.iter().filter_map(|job| row(job, lines)).collect()
}

fn row(job: &Job, lines: &Lines) -> Option<PoolRow> {
    let told =
        |cell: &CellRecord| cell.samples.device_memory.filter(|memory| *memory != DeviceMemory::default());
    let size = |(cell, memory): &(&CellRecord, DeviceMemory)| {
        // Of equal ones the first.
        (memory.peak_bytes, memory.reserved_bytes, memory.in_use_bytes, std::cmp::Reverse(cell.repetition))
    };
    let (cell, memory) = job.ok().filter_map(|cell| Some((cell, told(cell)?))).max_by_key(size)?;
    Some(PoolRow {
        engine: job.engine.to_owned(),
        job: job.label(),
        memory,
        host_bytes: cell.peak_memory_bytes,
        source: lines.refer(cell),
    })
}
