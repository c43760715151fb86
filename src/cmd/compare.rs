//! `evalfw compare`: is the head faster or slower than the base, and is that sure?

use crate::compare::sameness::differences;
use crate::compare::thresholds::Thresholds;
use crate::compare::{Comparison, Verdict, bencher, compare, junit, present};
use crate::output::print;
use crate::record::{self, CellRecord};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Nothing is worse, but something could not be decided.
const EXIT_INCONCLUSIVE: u8 = 3;

/// Compare two records, or several of each: what got better or worse, and is that sure?
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  evalfw compare results/BASE results/HEAD
  evalfw compare results/B1,results/B2 results/H1,results/H2    more processes, narrower intervals
  evalfw compare BASE HEAD --format markdown > comment.md       for a pull request
  evalfw compare BASE HEAD --format junit > compare.xml
  evalfw compare BASE HEAD --thresholds my-thresholds.toml

Per job and metric: the ratio of the medians, a bootstrap interval of it, and a verdict. A figure is worse or better only
if the whole interval clears the metric's threshold, and same if the whole interval lies within it. What fewer than three
processes on a side say is inconclusive: give two or three records of each side, measured in turns; six processes settle
most of what three leave open. A cell that failed is a regression if all of the base's ended ok. Losses are not compared.

Exit codes: 0 no regression, 1 a regression, 3 inconclusive, 2 bad input.")]
pub struct CompareArgs {
    /// A run's folder or its cells.jsonl; several with commas between
    base: String,
    /// What is held against the base; several with commas between
    head: String,
    /// When a difference counts, instead of the built-in reports/thresholds.toml
    #[arg(long, value_name = "FILE")]
    thresholds: Option<PathBuf>,
    /// Compare different hardware or scenarios all the same; every line then says so
    #[arg(long)]
    allow_different: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Short for --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Markdown,
    Json,
    /// JUnit XML: a regression is a failure, what is inconclusive is skipped
    Junit,
    /// The head's figures in Bencher's metric format
    Bencher,
}

pub fn run(args: &CompareArgs) -> Result<ExitCode> {
    let thresholds = match &args.thresholds {
        Some(path) => Thresholds::read(path)?,
        None => Thresholds::built_in()?,
    };
    let (base, head) = (read_side("base", &args.base)?, read_side("head", &args.head)?);
    let differences = differences(&base, &head);
    if !differences.is_empty() && !args.allow_different {
        bail!(
            "the records differ in more than time: {} (--allow-different compares them all the same)",
            differences.join("; ")
        );
    }
    let comparison = Comparison { differences, ..compare(&base, &head, &thresholds)? };
    let format = if args.json { Format::Json } else { args.format };
    print(&written(&comparison, format)?)?;
    Ok(match comparison.verdict {
        Verdict::Worse => ExitCode::FAILURE,
        Verdict::Inconclusive => ExitCode::from(EXIT_INCONCLUSIVE),
        Verdict::Better | Verdict::Same => ExitCode::SUCCESS,
    })
}

fn written(comparison: &Comparison, format: Format) -> Result<String> {
    Ok(match format {
        Format::Table => present::table(comparison),
        Format::Markdown => present::in_markdown(comparison),
        Format::Json => serde_json::to_string_pretty(comparison)? + "\n",
        Format::Junit => junit::xml(comparison)?,
        Format::Bencher => serde_json::to_string_pretty(&bencher::of_head(comparison))? + "\n",
    })
}

/// The cells of all records of a side. A record that is given twice would count its samples twice.
fn read_side(side: &str, paths: &str) -> Result<Vec<CellRecord>> {
    let mut cells: Vec<CellRecord> = Vec::new();
    for path in paths.split(',').map(Path::new) {
        let more = record::read(path).with_context(|| format!("the {side}"))?;
        if let Some(twice) = more.iter().find(|cell| cells.contains(cell)) {
            bail!(
                "{}: {} of the {side} is there twice, also in another of its records",
                path.display(),
                twice.cell
            );
        }
        cells.extend(more);
    }
    Ok(cells)
}
