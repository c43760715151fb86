//! `evalfw compare`: is the head faster or slower than the base, and is that sure?

use crate::compare::confirm::{self, Side};
use crate::compare::sameness::differences;
use crate::compare::thresholds::Thresholds;
use crate::compare::{Comparison, Verdict, bencher, compare, junit, present};
use crate::interrupt;
use crate::output::{note, print};
use crate::record::{self, CellRecord, record_folder};
use crate::render::format::list;
use crate::render::report::write_file;
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
  evalfw compare BASE HEAD --write junit=compare.xml --write markdown=comment.md
  evalfw compare BASE HEAD --thresholds my-thresholds.toml
  evalfw compare BASE HEAD --confirm --base-evalfw ./evalfw-before --head-evalfw ./evalfw-after

Per job and metric: the ratio of the medians, a bootstrap interval of it, and a verdict. A figure is worse or better only
if the whole interval clears the metric's threshold, and same if the whole interval lies within it. What fewer than three
processes on a side say is inconclusive: give two or three records of each side, measured in turns; six processes settle
most of what three leave open. The threshold is for the cost: a rate that falls by 4.8 % takes 5 % more time.

With --confirm the jobs that are worse or undecided are run again on this machine, base and head in turn. A regression has
to show in the fresh processes alone; what was undecided is decided by all processes together. A cell that failed is a regression if all of the base's ended ok. Losses are not compared.

Exit codes: 0 no regression, 1 a regression, 3 inconclusive, 2 bad input, 130 interrupted.")]
pub struct CompareArgs {
    /// A run's folder or its cells.jsonl; several with commas between
    base: String,
    /// What is held against the base; several with commas between
    head: String,
    /// When a difference counts; what it leaves out is as in the built-in reports/thresholds.toml
    #[arg(long, value_name = "FILE")]
    thresholds: Option<PathBuf>,
    /// Compare different hardware or scenarios all the same; every line then says so
    #[arg(long)]
    allow_different: bool,
    /// Run the jobs that are worse or undecided again, and decide again
    #[arg(long)]
    confirm: bool,
    /// Fresh processes of each side
    #[arg(long, value_name = "N", default_value_t = 4, requires = "confirm")]
    rounds: usize,
    /// The build that the base is run again with [default: this one]
    #[arg(long, value_name = "PATH", requires = "confirm")]
    base_evalfw: Option<PathBuf>,
    /// The build that the head is run again with [default: this one]
    #[arg(long, value_name = "PATH", requires = "confirm")]
    head_evalfw: Option<PathBuf>,
    /// Where the fresh records go [default: a folder beside the head's]
    #[arg(long, value_name = "DIR", requires = "confirm")]
    confirm_out: Option<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Write in another format as well, e.g. `--write markdown=comment.md`; may be repeated
    #[arg(long, value_name = "FORMAT=FILE", value_parser = parse_write)]
    write: Vec<(Format, PathBuf)>,
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

fn parse_write(text: &str) -> Result<(Format, PathBuf), String> {
    let (format, path) = text.split_once('=').ok_or("it is FORMAT=FILE, e.g. markdown=comment.md")?;
    Ok((Format::from_str(format, false)?, path.into()))
}

pub fn run(args: &CompareArgs) -> Result<ExitCode> {
    let thresholds = match &args.thresholds {
        Some(path) => Thresholds::read(path)?,
        None => Thresholds::built_in()?,
    };
    let (base, head) = (read_side("base", &args.base)?, read_side("head", &args.head)?);
    let differences = differences(&base, &head);
    refuse_differences(args, &differences)?;
    if let Some(same) = base.iter().find(|cell| head.iter().any(|other| other.is_same_process(cell))) {
        bail!(
            "{} of {} is in base and head: a record compared with itself, or with a copy of it, says nothing",
            same.cell,
            same.started_at
        );
    }
    check_targets(args)?;
    let mut comparison = Comparison { differences, ..compare(&base, &head, &thresholds)? };
    if args.confirm {
        interrupt::install()?;
        let Some(again) = confirmed(args, comparison, [&base, &head], &thresholds)? else {
            return Ok(ExitCode::from(interrupt::EXIT_CODE));
        };
        comparison = again;
    }
    let format = if args.json { Format::Json } else { args.format };
    for (format, path) in &args.write {
        write_file(path, &written(&comparison, *format)?)?;
    }
    print(&written(&comparison, format)?)?;
    let left_out = bencher::without_figures(&comparison);
    if format == Format::Bencher && !left_out.is_empty() {
        note(&format!("without figures, and so not in Bencher's format: {}", left_out.join(", ")));
    }
    Ok(match comparison.verdict {
        Verdict::Worse => ExitCode::FAILURE,
        Verdict::Inconclusive => ExitCode::from(EXIT_INCONCLUSIVE),
        Verdict::Better | Verdict::Same => ExitCode::SUCCESS,
    })
}

/// Unless they were allowed.
fn refuse_differences(args: &CompareArgs, differences: &[String]) -> Result<()> {
    if !differences.is_empty() && !args.allow_different {
        bail!(
            "the records differ in more than time: {} (--allow-different compares them all the same)",
            differences.join("; ")
        );
    }
    Ok(())
}

/// What is written last would replace what was written first.
fn check_targets(args: &CompareArgs) -> Result<()> {
    let paths: Vec<&PathBuf> = args.write.iter().map(|(_, path)| path).collect();
    match paths.iter().enumerate().find(|(i, path)| paths[..*i].contains(path)) {
        Some((_, twice)) => bail!("--write: {} is named twice", twice.display()),
        None => Ok(()),
    }
}

/// Runs again what is suspicious, if anything is. `None` if the user interrupted.
fn confirmed(
    args: &CompareArgs,
    first: Comparison,
    [base, head]: [&[CellRecord]; 2],
    thresholds: &Thresholds,
) -> Result<Option<Comparison>> {
    let jobs = confirm::suspicious(&first);
    if jobs.is_empty() {
        return Ok(Some(first));
    }
    if args.rounds < thresholds.min_processes {
        bail!(
            "--rounds {}: at least {} processes a side decide anything",
            args.rounds,
            thresholds.min_processes
        );
    }
    let this = || std::env::current_exe().context("where is this program?");
    let side = |name, paths: &str, program: &Option<PathBuf>| {
        let record = PathBuf::from(paths.split(',').next().unwrap_or_default());
        anyhow::Ok(Side { name, record, program: program.clone().map_or_else(this, Ok)? })
    };
    let sides = [side("base", &args.base, &args.base_evalfw)?, side("head", &args.head, &args.head_evalfw)?];
    let out = args.confirm_out.clone().unwrap_or_else(|| beside(&sides[1].record));
    sides.iter().try_for_each(confirm::check)?;
    note(&format!(
        "running again, {} times a side: {}",
        args.rounds,
        list(&jobs.iter().cloned().collect::<Vec<_>>())
    ));
    let Some([mut fresh_base, mut fresh_head]) =
        confirm::rerun([&sides[0], &sides[1]], &jobs, args.rounds, &out)?
    else {
        note(&format!("interrupted; what was run again until then is in {}", out.display()));
        return Ok(None);
    };
    for (recorded, fresh) in [(base, &fresh_base), (head, &fresh_head)] {
        refuse_differences(args, &differences(recorded, fresh))?;
    }
    let fresh = compare(&fresh_base, &fresh_head, thresholds)?;
    fresh_base.extend_from_slice(base);
    fresh_head.extend_from_slice(head);
    let all = compare(&fresh_base, &fresh_head, thresholds)?;
    note(&format!("the fresh records are in {}", out.display()));
    Ok(Some(confirm::decided(first, &fresh, &all)))
}

/// A folder of its own, so that reruns are never mistaken for runs.
fn beside(record: &Path) -> PathBuf {
    let folder = record_folder(record);
    let root = folder.parent().unwrap_or(Path::new(""));
    root.join("confirm").join(jiff::Timestamp::now().strftime("%Y%m%d-%H%M%S").to_string())
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
        if let Some(twice) = more.iter().find(|cell| cells.iter().any(|known| known.is_same_process(cell))) {
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
