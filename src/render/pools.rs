//! The memory of a device as a framework's allocator tells it, beside that of the process.

use super::trace::{CellRef, Lines};
use crate::decide::jobs::Job;
use crate::measure::memory::GpuMemory;
use crate::record::CellRecord;
use evalfw_engine::protocol::DeviceMemory;
use serde::Serialize;

/// Of the repetition that took the most, at the end of its cell.
#[derive(Debug, Clone, Serialize)]
pub struct PoolRow {
    pub engine: String,
    pub job: String,
    pub memory: DeviceMemory,
    /// Peak of the process tree.
    pub host_bytes: Option<u64>,
    /// What the driver says of the GPU that the worker used most.
    pub driver: Option<GpuMemory>,
    pub source: CellRef,
}

/// What the worker made of it, as far as the driver tells.
fn grown(gpu: &GpuMemory) -> u64 {
    gpu.process_peak_bytes.unwrap_or(gpu.device_peak_bytes.saturating_sub(gpu.before_bytes))
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
        driver: cell.samples.gpu_memory.iter().max_by_key(|gpu| grown(gpu)).cloned(),
        source: lines.refer(cell),
    })
}
