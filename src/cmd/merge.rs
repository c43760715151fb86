//! `evalfw merge`: records of several machines become one, with a column for each.

use crate::accumulate::merge::{Part, merged, write};
use crate::decide::criteria::Criteria;
use crate::output::{note, print};
use crate::record;
use crate::render::hosts;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Join records of several machines into one report with a column for each
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  evalfw merge results/A results/B --out results/all
  evalfw merge laptop=results/A h100=results/B --out results/all      columns with names of your own
  evalfw report results/all                                           renders it again

A machine without a name goes by its GPU or its CPU. Several records of one machine are one column, and their cells count
as further processes. All samples are kept: --out holds one cells.jsonl with the rows of all records.")]
pub struct MergeArgs {
    /// Runs' folders or their cells.jsonl, each with `NAME=` before it if you like
    #[arg(required = true, num_args = 1.., value_name = "[NAME=]RUN")]
    runs: Vec<String>,
    /// Folder for the joined record and its report
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: &MergeArgs) -> Result<ExitCode> {
    if args.runs.len() < 2 {
        bail!("one record is no merge: name two or more");
    }
    let parts = args.runs.iter().map(|text| part(text)).collect::<Result<Vec<_>>>()?;
    let cells = merged(parts)?;
    let measures: BTreeSet<&str> =
        cells.iter().filter_map(|cell| cell.samples.memory_measure.as_deref()).collect();
    if measures.len() > 1 {
        let measures: Vec<&str> = measures.into_iter().collect();
        note(&format!("memory is defined in different ways in these records: {}", measures.join(", ")));
    }
    let criteria = Criteria::built_in()?;
    write(&args.out, &cells)?;
    let report = args.out.join("report.md");
    hosts::write(&args.out, &report, "", &criteria)?;
    print(&format!("{} cells; report: {}\n", cells.len(), report.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// A path that is there is one, whatever it looks like.
fn part(text: &str) -> Result<Part> {
    let (name, path) = match text.split_once('=') {
        Some((name, path)) if !Path::new(text).exists() => (Some(name.to_owned()), path),
        _ => (None, text),
    };
    let cells = record::read(Path::new(path)).with_context(|| text.to_owned())?;
    Ok(Part { name, cells })
}
