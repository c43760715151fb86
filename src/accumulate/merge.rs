//! Joins records into one whose rows tell which machine they are from.

use crate::compare::sameness::is_same_machine;
use crate::measure::host::Environment;
use crate::record::{CellRecord, RunLog};
use anyhow::{Context, Result, bail};
use std::path::Path;

/// A record to join, under a name of one's own where one was given.
pub struct Part {
    pub name: Option<String>,
    pub cells: Vec<CellRecord>,
}

/// All rows, each with its host. Several records of one machine are one column: a cell that is in more than one of them
/// counts as a further process of its job.
pub fn merged(parts: Vec<Part>) -> Result<Vec<CellRecord>> {
    let mut hosts: Vec<(String, Environment)> = Vec::new();
    let mut all: Vec<CellRecord> = Vec::new();
    for part in parts {
        for mut cell in part.cells {
            let host = match (&part.name, &cell.host) {
                (Some(name), _) => name.clone(),
                // It was merged before, and keeps its column.
                (None, Some(host)) => host.clone(),
                (None, None) => named(&mut hosts, &cell.environment),
            };
            if host.trim().is_empty() || host.contains('/') || host.contains(char::is_control) {
                bail!(
                    "the host {host:?} cannot be a column: a name is not empty and has no slash and no control \
                     characters"
                );
            }
            let own = cell.cell.strip_prefix(&format!("{host}/")).unwrap_or(&cell.cell);
            let name = format!("{host}/{own}");
            cell.cell = free_name(&name, &all)?;
            cell.host = Some(host);
            if all.iter().any(|known| known.is_same_process(&cell)) {
                bail!(
                    "{} of {} is there twice: a record, or a copy of it, was named twice",
                    cell.cell,
                    cell.started_at
                );
            }
            all.push(cell);
        }
    }
    Ok(all)
}

/// `name`, or with a number where another record of the machine has that cell too.
fn free_name(name: &str, taken: &[CellRecord]) -> Result<String> {
    let is_free = |candidate: &String| taken.iter().all(|cell| cell.cell != *candidate);
    let numbered = (2..).map(|number| format!("{name}~{number}"));
    std::iter::once(name.to_owned()).chain(numbered).find(is_free).context("no name is left")
}

/// The CPU's name, or the GPU's where there is one; a second machine that would have the same one gets a number.
fn named(hosts: &mut Vec<(String, Environment)>, environment: &Environment) -> String {
    if let Some((name, _)) = hosts.iter().find(|(_, known)| is_same_machine(known, environment)) {
        return name.clone();
    }
    let gpu = environment.gpus.first().and_then(|gpu| gpu.split(',').next());
    let base = gpu.unwrap_or(&environment.cpu).trim().replace('/', "-");
    let base = if base.is_empty() { "host".to_owned() } else { base };
    let candidates = std::iter::once(base.clone()).chain((2..).map(|number| format!("{base} #{number}")));
    let name =
        candidates.into_iter().find(|name| hosts.iter().all(|(known, _)| known != name)).unwrap_or(base);
    hosts.push((name.clone(), environment.clone()));
    name
}

/// Writes the rows into a folder that has no record yet.
pub fn write(folder: &Path, cells: &[CellRecord]) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot be written", folder.display()))?;
    let file = crate::record::record_file(folder);
    if file.exists() {
        bail!("{}: is there already; name another --out", file.display());
    }
    let mut log = RunLog::open(folder)?;
    cells.iter().try_for_each(|cell| log.append(cell))
}
