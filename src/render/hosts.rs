//! The report of a merged record: a column for each host.

use super::format::link;
use super::page::{self, Charts, page};
use super::prose;
use super::report::{collapse_blank_lines, template_environment, write_file};
use super::stock;
use super::trace::{CellRef, Lines};
use crate::compare::figure::Metric;
use crate::decide::criteria::Criteria;
use crate::decide::decide;
use crate::decide::jobs::{Job, arrange};
use crate::record::{self, CellRecord, Outcome, record_file};
use crate::stats::median_of_processes;
use anyhow::Result;
use minijinja::context;
use minijinja::value::Serde;
use serde::Serialize;
use std::path::Path;

const TEMPLATE_NAME: &str = "hosts.md.j2";
const TEMPLATE: &str = include_str!("../../reports/hosts.md.j2");

#[derive(Debug, Clone, Serialize)]
pub struct HostsReport {
    pub hosts: Vec<Host>,
    pub tables: Vec<Table>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Host {
    pub name: String,
    pub cpu: String,
    pub logical_cores: usize,
    pub memory_bytes: u64,
    pub gpus: Vec<String>,
    pub os: String,
    pub commits: Vec<String>,
    pub cells: usize,
    pub ok_cells: usize,
    /// The decision on this host's cells alone, in words.
    pub decision: Vec<String>,
}

/// One metric of one model.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    pub model: String,
    pub title: &'static str,
    pub rows: Vec<Row>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub engine: String,
    pub job: String,
    /// In the order of the hosts.
    pub figures: Vec<Figure>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// The median over the processes, or why there is none.
    pub text: String,
    pub cells: Vec<CellRef>,
}

/// Whether a record was merged, and is reported by host.
pub fn is_merged(cells: &[CellRecord]) -> bool {
    cells.iter().any(|cell| cell.host.is_some())
}

/// What the record of `run` says, by host.
pub fn findings(run: &Path, criteria: &Criteria) -> Result<HostsReport> {
    let file = record_file(run);
    Ok(of_cells(&record::read(&file)?, &Lines::read(&file)?, criteria))
}

fn of_cells(cells: &[CellRecord], lines: &Lines, criteria: &Criteria) -> HostsReport {
    let mut names: Vec<String> = Vec::new();
    for cell in cells {
        let name = host_of(cell);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let by_host: Vec<Vec<CellRecord>> = names
        .iter()
        .map(|name| cells.iter().filter(|cell| host_of(cell) == *name).cloned().collect())
        .collect();
    let hosts = names.iter().zip(&by_host).map(|(name, own)| host(name, own, criteria)).collect();
    HostsReport { hosts, tables: tables(cells, &by_host, lines) }
}

fn host_of(cell: &CellRecord) -> String {
    cell.host.clone().unwrap_or_else(|| "unknown".to_owned())
}

fn host(name: &str, cells: &[CellRecord], criteria: &Criteria) -> Host {
    let mut commits: Vec<String> = cells.iter().filter_map(|c| c.environment.commit.clone()).collect();
    commits.sort();
    commits.dedup();
    let environment = &cells[0].environment;
    let stock = stock::of_cells(cells);
    Host {
        name: name.to_owned(),
        cpu: environment.cpu.clone(),
        logical_cores: environment.logical_cores,
        memory_bytes: environment.memory_bytes,
        gpus: environment.gpus.clone(),
        os: environment.os.clone(),
        commits,
        cells: cells.len(),
        ok_cells: cells.iter().filter(|cell| cell.outcome == Outcome::Ok).count(),
        decision: prose::summary(&decide(cells, criteria), &stock.iter().collect::<Vec<_>>()),
    }
}

fn tables(cells: &[CellRecord], by_host: &[Vec<CellRecord>], lines: &Lines) -> Vec<Table> {
    let all = arrange(cells);
    let of_hosts: Vec<Vec<Job>> = by_host.iter().map(|cells| arrange(cells)).collect();
    let mut models: Vec<&str> = all.iter().map(|job| job.model.name.as_str()).collect();
    models.dedup();
    let mut tables = Vec::new();
    for model in models {
        for metric in Metric::ALL {
            let wanted = all.iter().filter(|job| {
                job.model.name == model
                    && metric.belongs_to(job.parameters)
                    && job.cells.iter().any(|cell| cell.outcome != Outcome::Unavailable)
            });
            let row = |job: &Job| Row {
                engine: job.engine.to_owned(),
                job: job.label(),
                figures: of_hosts.iter().map(|jobs| figure(metric, job, jobs, lines)).collect(),
            };
            let rows: Vec<Row> = wanted.map(row).collect();
            if !rows.is_empty() {
                tables.push(Table { model: model.to_owned(), title: metric.title(), rows });
            }
        }
    }
    tables
}

/// The figure of the host whose jobs these are.
fn figure(metric: Metric, job: &Job, jobs: &[Job], lines: &Lines) -> Figure {
    let same = |other: &&Job| {
        (other.engine, &other.model.name, other.label()) == (job.engine, &job.model.name, job.label())
    };
    let Some(own) = jobs.iter().find(same) else {
        return Figure { text: "not run".to_owned(), cells: Vec::new() };
    };
    let refs = |cells: &mut dyn Iterator<Item = &CellRecord>| cells.map(|cell| lines.refer(cell)).collect();
    match median_of_processes(&metric.processes(own)).map(|cost| metric.turned(cost)) {
        Some(value) => Figure { text: metric.shown(value), cells: refs(&mut own.ok()) },
        None => Figure { text: own.outcomes(), cells: refs(&mut own.cells.iter().copied()) },
    }
}

/// Renders the report of a merged record. `link_prefix` leads from the report's folder to the record's.
pub fn markdown(run: &Path, link_prefix: &str, criteria: &Criteria) -> Result<String> {
    let file = record_file(run);
    let report = findings(&file, criteria)?;
    let mut environment = template_environment()?;
    environment.add_template(TEMPLATE_NAME, TEMPLATE)?;
    let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let rendered = environment.get_template(TEMPLATE_NAME)?.render(context! {
        r => Serde(&report),
        record => link(&format!("{link_prefix}{name}")),
    })?;
    Ok(collapse_blank_lines(&rendered))
}

/// Writes the report to `output`, and the same as a page beside it.
pub fn write(run: &Path, output: &Path, link_prefix: &str, criteria: &Criteria) -> Result<()> {
    let markdown = markdown(run, link_prefix, criteria)?;
    write_file(output, &markdown)?;
    write_file(&page::beside(output), &page(&markdown, &Charts::new())?)
}
