//! Who, when and on what: the header of the report.

use super::format::duration;
use crate::record::{CellRecord, ModelRecord, Outcome, REFERENCE_PROBE};
use evalfw_engine::protocol::DeviceKind;
use jiff::Timestamp;
use serde::Serialize;

#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// `2025-11-23 13:04 UTC`, or as the cell says where that is no date.
    pub started: String,
    pub ended: Option<String>,
    /// From the first start to the last end, e.g. `12 min`.
    pub duration: Option<String>,
    pub builds: Vec<Build>,
    pub machines: Vec<Machine>,
    pub engines: Vec<Engine>,
    /// From small to large.
    pub models: Vec<ModelRecord>,
    pub cells: usize,
    pub ok_cells: usize,
    /// Cells of engines that cannot run on the machine.
    pub unavailable_cells: usize,
}

/// A build of evalfw.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Build {
    pub version: String,
    pub commit: Option<String>,
    pub features: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    pub os: String,
    pub kernel: Option<String>,
    pub arch: String,
    pub cpu: String,
    pub physical_cores: Option<usize>,
    pub logical_cores: usize,
    pub memory_bytes: u64,
    pub gpus: Vec<String>,
}

/// An engine as it introduced itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Engine {
    pub name: String,
    pub version: Option<String>,
    pub framework: Option<String>,
    pub framework_version: Option<String>,
    pub device: Option<String>,
    pub software: bool,
    /// Whether it computes on the CPU, by way of a software adapter or plainly.
    pub on_cpu: bool,
    pub driver: Option<String>,
    pub compute_dtype: Option<String>,
    pub features: Vec<String>,
    /// What the check against the reference said.
    pub reference: Option<String>,
    pub threads: Option<usize>,
}

impl Facts {
    /// `models` from small to large.
    pub fn of(cells: &[CellRecord], models: Vec<ModelRecord>) -> Self {
        let mut engines = distinct(cells.iter().filter(|c| c.device.is_some()).map(Engine::of));
        engines.sort_by(|a, b| a.name.cmp(&b.name));
        let count = |outcome| cells.iter().filter(|c| c.outcome == outcome).count();
        Self {
            started: first_start(cells).map_or_else(|| started_as_written(cells), |t| minute(&t)),
            ended: last_end(cells).map(|t| minute(&t)),
            duration: first_start(cells).zip(last_end(cells)).map(|(start, end)| {
                let milliseconds = end.as_millisecond() - start.as_millisecond();
                duration(milliseconds as f64 / 1e3)
            }),
            builds: distinct(cells.iter().map(Build::of)),
            machines: distinct(cells.iter().map(Machine::of)),
            engines,
            models,
            cells: cells.len(),
            ok_cells: count(Outcome::Ok),
            unavailable_cells: count(Outcome::Unavailable),
        }
    }

    pub fn all_on_cpu(&self) -> bool {
        self.engines.iter().all(|e| e.on_cpu)
    }
}

impl Build {
    fn of(cell: &CellRecord) -> Self {
        let e = &cell.environment;
        Self { version: e.evalfw_version.clone(), commit: e.commit.clone(), features: e.features.clone() }
    }
}

impl Machine {
    fn of(cell: &CellRecord) -> Self {
        let e = &cell.environment;
        Self {
            os: e.os.clone(),
            kernel: e.kernel.clone(),
            arch: e.arch.clone(),
            cpu: e.cpu.clone(),
            physical_cores: e.physical_cores,
            logical_cores: e.logical_cores,
            memory_bytes: e.memory_bytes,
            gpus: e.gpus.clone(),
        }
    }
}

impl Engine {
    fn of(cell: &CellRecord) -> Self {
        let device = cell.device.as_ref();
        Self {
            name: cell.engine.clone(),
            version: cell.engine_version.clone(),
            framework: cell.framework.clone(),
            framework_version: cell.framework_version.clone(),
            device: device.map(|d| d.name.clone()),
            software: device.is_some_and(|d| d.software),
            on_cpu: device.is_some_and(|d| d.software || d.kind == DeviceKind::Cpu),
            driver: device.and_then(|d| d.driver.clone()),
            compute_dtype: cell.compute_dtype.clone(),
            features: cell.engine_features.clone(),
            reference: reference(cell),
            threads: cell.threads,
        }
    }
}

fn reference(cell: &CellRecord) -> Option<String> {
    let probe = cell.samples.probes.iter().find(|p| p.name == REFERENCE_PROBE);
    let failed = cell.error.as_ref().filter(|_| cell.outcome == Outcome::Wrong);
    probe.map(|p| p.evidence.clone()).or(failed.map(|e| e.message.clone()))
}

/// Each value once, in order of appearance.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut all = Vec::new();
    for value in values {
        if !all.contains(&value) {
            all.push(value);
        }
    }
    all
}

fn first_start(cells: &[CellRecord]) -> Option<Timestamp> {
    cells.iter().filter_map(|c| c.started_at.parse().ok()).min()
}

fn started_as_written(cells: &[CellRecord]) -> String {
    cells.iter().map(|c| c.started_at.clone()).min().unwrap_or_default()
}

fn minute(time: &Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M UTC").to_string()
}

fn last_end(cells: &[CellRecord]) -> Option<Timestamp> {
    let end = |cell: &CellRecord| {
        let start: Timestamp = cell.started_at.parse().ok()?;
        let milliseconds = (cell.wall_seconds * 1e3) as i64;
        Timestamp::from_millisecond(start.as_millisecond().checked_add(milliseconds)?).ok()
    };
    cells.iter().filter_map(end).max()
}
