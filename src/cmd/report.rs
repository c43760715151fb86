//! `evalfw report`: renders a run's report again, from its record alone.

use crate::decide::criteria::Criteria;
use crate::output::print;
use crate::record::{self, record_folder};
use crate::render::page::{Charts, beside, page};
use crate::render::report::write_file;
use crate::render::{hosts, report, terminal};
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

/// Render a run's decision report again, from its record alone
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  evalfw report results/20261123-101500-default            writes report.md, charts/ and report.html into that folder
  evalfw report results/20261123-101500-default --output - prints the Markdown
  evalfw report RUN --format html --output page.html       writes the page alone
  evalfw report results/20261123-101500-default --json     prints the decision and all figures as JSON
  evalfw report RUN --criteria my-criteria.toml            decides by other weights

The report comes from cells.jsonl alone: the same record gives the same bytes on any machine.
The page holds its charts and loads nothing: it can be sent as one file. Its tables can be sorted.")]
pub struct ReportArgs {
    /// A run's folder, or its cells.jsonl
    pub run: PathBuf,
    /// Where to write, the page beside the Markdown; `-` prints one of them to standard output [default: report.md in
    /// the run's folder]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Write only one of both [default: both; html where --output ends in .html; markdown to standard output]
    #[arg(long, value_enum, conflicts_with = "json")]
    pub format: Option<Format>,
    /// Criteria and weights to use instead of the built-in ones
    #[arg(long, value_name = "FILE")]
    pub criteria: Option<PathBuf>,
    /// Print the decision and all figures as JSON, and write no file
    #[arg(long, conflicts_with = "output")]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Markdown,
    Html,
}

pub fn run(args: &ReportArgs) -> Result<ExitCode> {
    render(args)?;
    Ok(ExitCode::SUCCESS)
}

fn render(args: &ReportArgs) -> Result<()> {
    let criteria = match &args.criteria {
        Some(path) => Criteria::read(path)?,
        None => Criteria::built_in()?,
    };
    let cells = record::read(&args.run)?;
    if hosts::is_merged(&cells) {
        return by_host(args, &criteria);
    }
    if args.json {
        let report = report::render(&args.run, "", &criteria)?;
        return print(&(serde_json::to_string_pretty(&report.findings)? + "\n"));
    }
    let (format, to) = (format(args), destination(args)?);
    match (&to, format) {
        (To::Output, Some(Format::Html)) => print(&report::render(&args.run, "", &criteria)?.page("")?),
        (To::Output, _) => print(&report::render(&args.run, "", &criteria)?.markdown),
        (To::File { path, prefix }, format) => {
            match format {
                Some(Format::Html) => {
                    write_file(path, &report::render(&args.run, prefix, &criteria)?.page(prefix)?)?;
                }
                Some(Format::Markdown) => drop(report::write_markdown(&args.run, path, prefix, &criteria)?),
                None => drop(report::write(&args.run, path, prefix, &criteria)?),
            }
            print(&format!("{}\nReport: {}\n", terminal::summary(&cells), written(path, format)))
        }
    }
}

/// Of a record that was merged: figures of different machines are not ranked against each other.
fn by_host(args: &ReportArgs, criteria: &Criteria) -> Result<()> {
    if args.json {
        let report = hosts::findings(&args.run, criteria)?;
        return print(&(serde_json::to_string_pretty(&report)? + "\n"));
    }
    let format = format(args);
    let text = |prefix: &str| {
        let markdown = hosts::markdown(&args.run, prefix, criteria)?;
        if format == Some(Format::Html) { page(&markdown, &Charts::new()) } else { Ok(markdown) }
    };
    match destination(args)? {
        To::Output => print(&text("")?),
        To::File { path, prefix } => {
            match format {
                Some(_) => write_file(&path, &text(&prefix)?)?,
                None => hosts::write(&args.run, &path, &prefix, criteria)?,
            }
            print(&format!("Report: {}\n", written(&path, format)))
        }
    }
}

/// What to write; nothing is both.
fn format(args: &ReportArgs) -> Option<Format> {
    let is_page = |path: &PathBuf| path.extension().is_some_and(|e| e == "html");
    args.format.or_else(|| args.output.as_ref().is_some_and(is_page).then_some(Format::Html))
}

fn written(path: &Path, format: Option<Format>) -> String {
    match format {
        Some(_) => path.display().to_string(),
        None => format!("{}, {}", path.display(), beside(path).display()),
    }
}

enum To {
    Output,
    /// `prefix` is the way from the report to the record.
    File {
        path: PathBuf,
        prefix: String,
    },
}

fn destination(args: &ReportArgs) -> Result<To> {
    if args.output.as_deref() == Some(Path::new("-")) {
        return Ok(To::Output);
    }
    let folder = record_folder(&args.run);
    let name = if format(args) == Some(Format::Html) { "report.html" } else { "report.md" };
    let path = args.output.clone().unwrap_or_else(|| folder.join(name));
    let prefix = link_prefix(&path, &folder)?;
    Ok(To::File { path, prefix })
}

/// The way from the report's folder to the run's, for links: empty, or ending in `/`.
fn link_prefix(output: &Path, run_folder: &Path) -> Result<String> {
    let absolute = |path: &Path| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let full = path.canonicalize().or_else(|_| std::path::absolute(path));
        full.with_context(|| path.display().to_string())
    };
    let from = absolute(output.parent().unwrap_or(Path::new("")))?;
    let to = absolute(run_folder)?;
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| "..".to_owned());
    let down = to.components().skip(common).filter_map(|c| match c {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        _ => None,
    });
    Ok(up.chain(down).map(|part| part + "/").collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_from_the_report_to_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("results/run");
        std::fs::create_dir_all(&run).unwrap();
        let prefix = |output: &str| link_prefix(&dir.path().join(output), &run).unwrap();
        assert_eq!(prefix("results/run/report.md"), "");
        assert_eq!(prefix("results/REPORT.md"), "run/");
        std::fs::create_dir_all(dir.path().join("docs")).unwrap();
        assert_eq!(prefix("docs/report.md"), "../results/run/");
    }
}
