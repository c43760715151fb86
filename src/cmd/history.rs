//! `evalfw history`: how a figure went over the runs in a folder.

use crate::accumulate::history::{Filter, Trend, charts, read, trends};
use crate::compare::figure::Metric;
use crate::output::{note, print};
use crate::record::CELLS_FILE;
use crate::render::format::harmless;
use crate::render::report::write_file;
use crate::render::terminal;
use anyhow::{Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Print how a figure went over the runs in a folder, and draw it
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  evalfw history
  evalfw history --metric generated_tokens_per_second --engine candle-cpu
  evalfw history --metric peak_memory_bytes --scenario train --draw history
  evalfw history --json | jq '.[].points | length'

Each machine has rows of its own: figures of different machines are no trend. The change is from the run before, without
a verdict: `evalfw compare` has intervals.")]
pub struct HistoryArgs {
    /// Folder with runs
    #[arg(default_value = "results")]
    folder: PathBuf,
    /// Which figure
    #[arg(long, value_enum, default_value_t = Metric::TrainingTokensPerSecond)]
    metric: Metric,
    /// Only these engines
    #[arg(long, value_delimiter = ',', value_name = "E,…")]
    engine: Vec<String>,
    /// Only these models, by their names in the record
    #[arg(long, value_delimiter = ',', value_name = "M,…")]
    model: Vec<String>,
    /// Only these scenarios: a kind, such as train, or a name, such as train-s512-b1
    #[arg(long, value_delimiter = ',', value_name = "S,…")]
    scenario: Vec<String>,
    /// Also draw what has more than one run, as SVG files in this folder
    #[arg(long, value_name = "DIR")]
    draw: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &HistoryArgs) -> Result<ExitCode> {
    let runs = read(&args.folder, &mut |line| note(line))?;
    if runs.is_empty() {
        let itself = args.folder.join(CELLS_FILE).is_file();
        let hint = if itself {
            "it is a run itself: name the folder it lies in"
        } else {
            "a run's folder has a cells.jsonl"
        };
        bail!("{}: holds no run ({hint})", args.folder.display());
    }
    let filter =
        Filter { engines: args.engine.clone(), models: args.model.clone(), scenarios: args.scenario.clone() };
    let trends = trends(&runs, args.metric, &filter);
    if trends.is_empty() {
        bail!("none of {} runs has {} of what was asked for", runs.len(), args.metric.name());
    }
    match args.json {
        true => print(&(serde_json::to_string_pretty(&trends)? + "\n"))?,
        false => print(&(table(&trends) + "\n"))?,
    }
    if let Some(folder) = &args.draw {
        for chart in charts(&trends)? {
            let path = folder.join(&chart.file);
            write_file(&path, &chart.svg)?;
            note(&format!("drawn: {}", path.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn table(trends: &[Trend]) -> String {
    let metric = trends[0].metric;
    let mut rows: Vec<[String; 8]> = Vec::new();
    for trend in trends {
        let mut before = None;
        for point in &trend.points {
            let change = before.map(|before: f64| format!("{:+.1} %", (point.value / before - 1.0) * 100.0));
            let commit = point.commit.clone().unwrap_or_else(|| "unknown".to_owned());
            rows.push([
                trend.machine.clone(),
                trend.job.clone(),
                point.run.clone(),
                point.at.strftime("%Y-%m-%d %H:%M").to_string(),
                commit,
                point.processes.to_string(),
                metric.shown(point.value),
                change.unwrap_or_default(),
            ]);
            before = Some(point.value);
        }
    }
    let rows = rows.into_iter().map(|row| row.map(|cell| harmless(&cell)));
    terminal::table(&["machine", "job", "run", "UTC", "commit", "n", metric.title(), "change"], 5..8, rows)
}
