//! How a figure went over the runs in a folder.

use crate::compare::figure::Metric;
use crate::decide::jobs::{Job, arrange};
use crate::record::{self, CELLS_FILE, CellRecord};
use crate::render::charts::{Chart, trend};
use crate::stats::median_of_processes;
use anyhow::Context;
use jiff::Timestamp;
use serde::{Serialize, Serializer};
use std::path::{Path, PathBuf};

/// One figure of one run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// The run's folder.
    pub run: String,
    /// When the job's first cell started.
    #[serde(serialize_with = "as_text")]
    pub at: Timestamp,
    pub commit: Option<String>,
    pub value: f64,
    pub processes: usize,
}

fn as_text<S: Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(at)
}

/// The same job and metric on the same machine, in the order of time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trend {
    pub machine: String,
    /// `engine/model/scenario`.
    pub job: String,
    pub metric: Metric,
    pub points: Vec<Point>,
}

/// What to show.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub engines: Vec<String>,
    pub models: Vec<String>,
    pub scenarios: Vec<String>,
}

impl Filter {
    fn takes(&self, job: &Job) -> bool {
        let any = |wanted: &[String], found: &str| wanted.is_empty() || wanted.iter().any(|w| w == found);
        any(&self.engines, job.engine)
            && any(&self.models, &job.model.name)
            && (any(&self.scenarios, job.scenario) || any(&self.scenarios, job.parameters.kind()))
    }
}

/// The runs in the folder, by name, which begins with the date. A folder without a record is no run; a record that cannot
/// be read is told to `complain` and left out.
pub fn read(folder: &Path, complain: &mut dyn FnMut(&str)) -> anyhow::Result<Vec<(String, Vec<CellRecord>)>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut runs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    runs.retain(|run| run.join(CELLS_FILE).is_file());
    runs.sort();
    let mut all: Vec<(String, Vec<CellRecord>)> = Vec::new();
    for run in runs {
        match record::read(&run) {
            Ok(cells) => {
                let name = run.file_name().unwrap_or_default().to_string_lossy().into_owned();
                match all.iter().find(|(_, known)| is_copy(known, &cells)) {
                    Some((of, _)) => complain(&format!("{name} is left out: a copy of {of}")),
                    None => all.push((name, cells)),
                }
            }
            Err(error) => complain(&format!("left out: {error:#}")),
        }
    }
    Ok(all)
}

/// Whether a process is in both. A merged record has those of its parts, and takes no part.
fn is_copy(a: &[CellRecord], b: &[CellRecord]) -> bool {
    let own = |cells: &[CellRecord]| cells.iter().find(|cell| cell.host.is_none()).cloned();
    own(b).is_some_and(|first| a.iter().any(|cell| cell.host.is_none() && cell.is_same_process(&first)))
}

pub fn trends(runs: &[(String, Vec<CellRecord>)], metric: Metric, filter: &Filter) -> Vec<Trend> {
    let mut trends: Vec<Trend> = Vec::new();
    for (run, cells) in runs {
        // A merged record repeats what its parts have.
        let own: Vec<CellRecord> = cells.iter().filter(|cell| cell.host.is_none()).cloned().collect();
        let jobs = arrange(&own);
        for job in jobs.iter().filter(|job| metric.belongs_to(job.parameters) && filter.takes(job)) {
            let processes = metric.processes(job);
            let started = job.ok().filter_map(|cell| cell.started_at.parse::<Timestamp>().ok()).min();
            let (Some(cost), Some(at), Some(first)) =
                (median_of_processes(&processes), started, job.ok().next())
            else {
                continue;
            };
            let point = Point {
                run: run.clone(),
                at,
                commit: first.environment.commit.clone(),
                value: metric.turned(cost),
                processes: processes.len(),
            };
            let (machine, mut name) = (machine(first), crate::compare::name(job));
            // Memory was defined otherwise, and is another figure.
            if metric == Metric::PeakMemoryBytes && first.samples.memory_measure.is_none() {
                name += " (resident)";
            }
            match trends.iter_mut().find(|trend| trend.machine == machine && trend.job == name) {
                Some(trend) => trend.points.push(point),
                None => trends.push(Trend { machine, job: name, metric, points: vec![point] }),
            }
        }
    }
    trends.iter_mut().for_each(|trend| trend.points.sort_by_key(|point| point.at));
    trends.sort_by(|a, b| (&a.machine, &a.job).cmp(&(&b.machine, &b.job)));
    trends
}

/// Processors of one name may differ in their instructions, which engines on the CPU tell.
fn machine(cell: &CellRecord) -> String {
    let environment = &cell.environment;
    let device = cell.device.as_ref().map_or(environment.cpu.as_str(), |device| device.name.as_str());
    let instructions = crate::compare::sameness::instructions(cell);
    let instructions = instructions.map(|level| format!(", {level}")).unwrap_or_default();
    format!("{device}{instructions}, {} cores", environment.logical_cores)
}

/// The trends of one machine that have more than one point, as a picture.
pub fn charts(trends: &[Trend]) -> anyhow::Result<Vec<Chart>> {
    let mut charts = Vec::new();
    for trends in trends.chunk_by(|a, b| a.machine == b.machine) {
        let drawn: Vec<&Trend> = trends.iter().filter(|trend| trend.points.len() > 1).collect();
        let mut models: Vec<&str> = drawn.iter().filter_map(|trend| trend.job.split('/').nth(1)).collect();
        models.sort();
        models.dedup();
        for model in models {
            let of_model: Vec<&Trend> =
                drawn.iter().copied().filter(|trend| trend.job.split('/').nth(1) == Some(model)).collect();
            charts.push(trend(&of_model)?);
        }
    }
    Ok(charts)
}
