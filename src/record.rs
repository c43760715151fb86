//! The record of a run: one JSON line per cell, appended and flushed as each cell ends.
//!
//! Reports are rendered from this file alone, so that a row holds everything a reader may ask about a
//! figure: every sample, the definition's parameters, who ran where.

use crate::adoption::Adoption;
use crate::measure::host::Environment;
use crate::measure::limits::Limits;
use crate::measure::memory::{CgroupPeak, GpuMemory, MemoryPoint, PhaseMemory, SamplerCost};
use crate::measure::watch::{Observations, Surroundings};
use crate::output::note;
use crate::scenario::Scenario;
use anyhow::{Context, Result, bail};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::protocol::{DeviceInfo, DeviceMemory, LoadTimes, Quantization, Tuning};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// Raised when a field changes its meaning. Of schema 1, memory is the sum of resident sizes, in which pages that
/// processes share count for each of them.
pub const SCHEMA: u32 = 2;

/// Older records than this cannot be read.
const OLDEST_SCHEMA: u32 = 1;

pub const CELLS_FILE: &str = "cells.jsonl";

/// One cell as it was run: one engine, one scenario, one model, one repetition, one process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellRecord {
    pub schema: u32,
    /// Unique within the run: `engine/model/scenario/quantization/repetition`.
    pub cell: String,
    pub engine: String,
    pub engine_version: Option<String>,
    pub framework: Option<String>,
    pub framework_version: Option<String>,
    pub device: Option<DeviceInfo>,
    /// The type of activations, e.g. `f32`.
    pub compute_dtype: Option<String>,
    pub engine_features: Vec<String>,
    pub threads: Option<usize>,
    /// Name with parameters, e.g. `train-s512-b1`.
    pub scenario: String,
    pub parameters: Scenario,
    pub model: ModelRecord,
    pub quantization: Quantization,
    pub repetition: u32,
    pub seed: u64,
    pub outcome: Outcome,
    pub error: Option<CellError>,
    /// RFC 3339, UTC.
    pub started_at: String,
    pub wall_seconds: f64,
    /// Largest memory of the worker's process tree over all phases but that of tuning.
    pub peak_memory_bytes: Option<u64>,
    /// Train: non-padding tokens per second of the median step. Infer: decoded tokens per second.
    pub tokens_per_second: Option<f64>,
    /// Train: source examples per second.
    pub examples_per_second: Option<f64>,
    pub samples: Samples,
    pub environment: Environment,
    /// What the machine can do at best; `None` if that was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// What it took to adopt the framework; `None` if that was not measured of this build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adoption: Option<Adoption>,
    /// What a reader of the figures has to know of the engine on this device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub caveats: Vec<String>,
    /// What the worker was started through, e.g. `srun -n1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub launcher: Option<String>,
    /// Counts from 0; a cell that was disturbed is repeated, and its last row counts.
    #[serde(default)]
    pub attempt: u32,
    /// In a record that was merged: where the row is from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    pub name: String,
    /// Parameters, with a tied head counted once.
    pub parameters: u64,
    /// Bytes of the model's tensors in the checkpoint.
    pub checkpoint_bytes: u64,
    /// Random weights of the exact shapes: speed and memory hold, text quality means nothing.
    pub synthetic: bool,
    /// Where it came from: a preset, a folder's name, a hub id with its commit.
    pub origin: String,
    /// Its shape, from which the work of a step and the bytes of a token follow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ModelConfig>,
}

impl CellRecord {
    /// Whether both rows are of the same process, under whatever name and host a merged record has it.
    pub fn is_same_process(&self, other: &Self) -> bool {
        let unnamed = |cell: &Self| Self { cell: String::new(), host: None, ..cell.clone() };
        self.started_at == other.started_at && unnamed(self) == unnamed(other)
    }
}

impl ModelRecord {
    /// Whether both are the same weights, as far as records tell.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let known = |model: &Self| Self { config: None, ..model.clone() };
        known(self) == known(other)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Ok,
    /// The engine said why it could not.
    Failed,
    /// The worker's process died.
    Crashed,
    /// Out of memory, by the framework's word or the kernel's.
    Oom,
    /// A call took longer than its deadline.
    Timeout,
    /// The engine cannot run on this machine or in this build.
    Unavailable,
    /// It ran and gave a wrong answer. Its timings do not count.
    Wrong,
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Crashed => "crashed",
            Self::Oom => "oom",
            Self::Timeout => "timeout",
            Self::Unavailable => "unavailable",
            Self::Wrong => "wrong",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellError {
    /// What the harness was doing, e.g. `train step 3`.
    pub during: String,
    pub message: String,
    /// What to do about it, where that is known.
    pub advice: Option<String>,
    /// The last lines the worker wrote to standard error.
    pub stderr_tail: Vec<String>,
}

/// Everything that was measured, unaggregated.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Samples {
    pub load: Option<LoadSample>,
    pub train: Vec<TrainSample>,
    pub evaluations: Vec<EvaluationSample>,
    pub prefill: Vec<PrefillSample>,
    pub decode: Vec<DecodeSample>,
    pub phases: Vec<PhaseMemory>,
    /// Memory of the process tree over time, thinned to a bounded number of points.
    pub memory: Vec<MemoryPoint>,
    /// What the bytes of `phases` and `memory` are: `tree`, `pss`, `phys_footprint`, `working_set` or `resident`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_measure: Option<String>,
    /// What the NVIDIA driver tells of its GPUs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpu_memory: Vec<GpuMemory>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup_peak: Option<CgroupPeak>,
    /// What observing took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampler: Option<SamplerCost>,
    /// The machine's state meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub surroundings: Option<Surroundings>,
    /// Why the speed is doubtful; empty for a cell that was left alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disturbances: Vec<String>,
    /// Whether the times that count had settled; `None` where they are too few to tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steady: Option<bool>,
    /// The framework's own figures, at the end of the last phase.
    pub device_memory: Option<DeviceMemory>,
    /// What the engine measured to choose its kernels, outside of all other samples; `None` if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning: Option<Tuning>,
    /// What the cell showed the engine to do.
    pub probes: Vec<Probe>,
}

impl Samples {
    /// Takes in what was seen from outside.
    pub fn observe(&mut self, seen: Observations) {
        let Observations { memory, surroundings } = seen;
        self.disturbances = surroundings.disturbances();
        self.surroundings = Some(surroundings);
        self.memory_measure = Some(memory.measure).filter(|measure| !measure.is_empty());
        self.phases = memory.phases;
        self.memory = memory.timeline;
        self.gpu_memory = memory.gpus;
        self.cgroup_peak = memory.cgroup;
        self.sampler = Some(memory.cost);
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadSample {
    #[serde(flatten)]
    pub times: LoadTimes,
    /// Whether the checkpoint was read from the page cache: `warm`, or `unknown`.
    pub page_cache: String,
}

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainSample {
    pub step: u64,
    /// Warm-up steps are kept but do not count.
    pub warmup: bool,
    pub seconds: f64,
    /// Mean nats per supervised position, before the update.
    pub loss: f64,
    pub grad_norm: f64,
    /// Source examples in the step.
    pub examples: usize,
    /// Positions with a loss.
    pub trained_tokens: usize,
    /// Positions that are not padding.
    pub real_tokens: usize,
    /// All positions.
    pub slot_tokens: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationSample {
    /// Optimizer steps before it.
    pub after_steps: u64,
    /// Mean nats per supervised position.
    pub loss: f64,
    pub tokens: usize,
    pub seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PrefillSample {
    pub warmup: bool,
    pub tokens: usize,
    pub seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecodeSample {
    pub warmup: bool,
    /// Time of each token.
    pub seconds: Vec<f64>,
}

/// The probe that says whether the engine held against the reference before it was timed.
pub const REFERENCE_PROBE: &str = "reference_parity";

/// A capability that the cell exercised, with the evidence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// As in `reports/criteria.toml`, or [`REFERENCE_PROBE`].
    pub name: String,
    pub passed: bool,
    pub evidence: String,
}

/// This moment as it stands in the record: RFC 3339, UTC.
pub fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The append-only file of a run.
pub struct RunLog {
    path: PathBuf,
    file: File,
}

impl RunLog {
    /// Opens `cells.jsonl` in `dir` for appending. A line that a crash cut short is cut off; one that is whole but for its
    /// end, as [`read`] takes it, gets that.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CELLS_FILE);
        mend_last_line(&path).with_context(|| path.display().to_string())?;
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("{}: cannot be written", path.display()))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => bail!("{}: another evalfw is writing this run", path.display()),
            // Not every file system has locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        Ok(Self { path, file })
    }

    /// Appends one row and waits until it is on disk.
    pub fn append(&mut self, record: &CellRecord) -> Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        written.with_context(|| format!("{}: cannot be written", self.path.display()))
    }
}

fn mend_last_line(path: &Path) -> std::io::Result<()> {
    let content = match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let whole = content.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
    let rest = &content[whole..];
    if rest.is_empty() {
        return Ok(());
    }
    if is_whole(rest) {
        return OpenOptions::new().append(true).open(path)?.write_all(b"\n");
    }
    OpenOptions::new().write(true).open(path)?.set_len(whole as u64)
}

/// Whether the line ends before its row does.
fn is_cut(line: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(line.trim_end()).is_err_and(|error| error.is_eof())
}

/// Whether a last line without its end is a row all the same: an editor may have left the end out.
fn is_whole(line: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(line).is_ok()
}

/// The file that holds a run's record: `path` itself, or `cells.jsonl` in it.
pub fn record_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(CELLS_FILE) } else { path.to_owned() }
}

/// The folder of a run: `path` itself, or the one that the record lies in.
pub fn record_folder(path: &Path) -> PathBuf {
    if path.is_dir() { path.to_owned() } else { path.parent().map(Path::to_owned).unwrap_or_default() }
}

/// Reads a record: a run folder or its `cells.jsonl`. Of several rows for one cell (a resumed run, a cell that was
/// disturbed) the last counts. A last line that is cut short is the mark of an interrupted run and is left out.
pub fn read(path: &Path) -> Result<Vec<CellRecord>> {
    let file_path = record_file(path);
    let file = File::open(&file_path).with_context(|| {
        format!("{}: no record there (a run folder holds {CELLS_FILE})", file_path.display())
    })?;
    let mut reader = BufReader::new(file);
    let mut records: Vec<CellRecord> = Vec::new();
    let mut line = String::new();
    for number in 1.. {
        line.clear();
        let bytes = reader.read_line(&mut line).with_context(|| file_path.display().to_string())?;
        if bytes == 0 {
            break;
        }
        let place = || format!("{}: line {number}", file_path.display());
        if !line.ends_with('\n') && !is_whole(line.as_bytes()) {
            note(&format!("{} is cut off and left out: the run was interrupted there", place()));
            break;
        }
        if line.trim().is_empty() {
            continue;
        }
        // What is no JSON has no schema to tell of: the whole row then says which field is wrong.
        let schema = serde_json::from_str(&line).map_or(SCHEMA, |only: SchemaOnly| only.schema);
        match schema {
            OLDEST_SCHEMA..=SCHEMA => {}
            newer if newer > SCHEMA => bail!(
                "{}: schema {newer} is of a newer evalfw; this one reads {OLDEST_SCHEMA} to {SCHEMA}",
                place()
            ),
            older => bail!("{}: schema {older} (this evalfw reads {OLDEST_SCHEMA} to {SCHEMA})", place()),
        }
        if is_cut(&line) {
            bail!(
                "{} is no row of a record: it was cut or edited. Without that line the rest can be read, and `evalfw run \
                 --resume` makes the cell again",
                place()
            );
        }
        let mut json = serde_json::Deserializer::from_str(&line);
        // Names the field, which the error of a large row does not.
        let record: CellRecord = serde_path_to_error::deserialize(&mut json).with_context(place)?;
        check_times(&record).with_context(place)?;
        check_facts(&record).with_context(place)?;
        match records.iter_mut().find(|r| r.cell == record.cell) {
            Some(earlier) if !is_same_cell(earlier, &record) => bail!(
                "{}: cell is {:?} as of a row before, which has another engine, scenario, model or repetition",
                place(),
                record.cell
            ),
            Some(earlier) => *earlier = record,
            None => records.push(record),
        }
    }
    if records.is_empty() {
        bail!("{}: holds no finished cell", file_path.display());
    }
    Ok(records)
}

/// Refuses times that no clock gives, before they become speeds.
fn check_times(record: &CellRecord) -> Result<()> {
    let samples = &record.samples;
    if let Some(LoadSample { times, .. }) = &samples.load {
        let named = [
            ("read_seconds", times.read_seconds),
            ("quantize_seconds", times.quantize_seconds),
            ("upload_seconds", times.upload_seconds),
            ("total_seconds", times.total_seconds),
        ];
        for (name, seconds) in named {
            if !(seconds.is_finite() && seconds >= 0.0) {
                bail!("samples.load.{name} is {seconds} (a time is finite and not negative)");
            }
        }
    }
    if record.outcome != Outcome::Ok {
        return Ok(());
    }
    let positive = |seconds: f64, field: &dyn Fn() -> String| {
        if !(seconds.is_finite() && seconds > 0.0) {
            bail!("{} is {seconds} (the time of a sample is finite and above 0)", field());
        }
        Ok(())
    };
    for (i, sample) in samples.train.iter().enumerate() {
        positive(sample.seconds, &|| format!("samples.train[{i}].seconds"))?;
    }
    for (i, sample) in samples.prefill.iter().enumerate() {
        positive(sample.seconds, &|| format!("samples.prefill[{i}].seconds"))?;
    }
    for (i, sample) in samples.decode.iter().enumerate() {
        for (token, &seconds) in sample.seconds.iter().enumerate() {
            positive(seconds, &|| format!("samples.decode[{i}].seconds[{token}]"))?;
        }
    }
    Ok(())
}

/// No machine has so much: such a figure was never measured.
const MOST_BYTES: u64 = 1 << 50;

/// Refuses what no run writes, before it is shown as measured.
fn check_facts(record: &CellRecord) -> Result<()> {
    if record.started_at.parse::<jiff::Timestamp>().is_err() {
        bail!("started_at is {:?} (a time as in 2026-01-31T12:00:00Z)", record.started_at);
    }
    if !(record.wall_seconds.is_finite() && record.wall_seconds >= 0.0) {
        bail!("wall_seconds is {} (a time is finite and not negative)", record.wall_seconds);
    }
    let phases = record.samples.phases.iter().map(|phase| phase.peak_bytes);
    if record.outcome == Outcome::Ok && record.peak_memory_bytes == Some(0) {
        bail!("peak_memory_bytes is 0 (no process has none)");
    }
    if let Some(bytes) = record.peak_memory_bytes.into_iter().chain(phases).find(|&bytes| bytes > MOST_BYTES)
    {
        bail!("peak_memory_bytes, or a peak of samples.phases, is {bytes} (more than any machine has)");
    }
    match (record.outcome, &record.error) {
        (Outcome::Ok, Some(error)) => bail!("outcome is ok beside the error {:?}", error.message),
        _ => Ok(()),
    }
}

/// Whether the later row may stand for the earlier one.
fn is_same_cell(earlier: &CellRecord, later: &CellRecord) -> bool {
    let of = |cell: &CellRecord| {
        let (engine, scenario, model) = (cell.engine.clone(), cell.scenario.clone(), cell.model.name.clone());
        (engine, scenario, model, cell.quantization, cell.repetition)
    };
    of(earlier) == of(later)
}

#[derive(Deserialize)]
struct SchemaOnly {
    schema: u32,
}
