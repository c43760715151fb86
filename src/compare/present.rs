//! A comparison for people: a table for the terminal, Markdown for a pull request.

use super::figure::Metric;
use super::{Comparison, Row, Side, Verdict};
use crate::render::format::{harmless, list, markdown, plain};
use crate::render::terminal;
use crate::stats::Ratio;
use std::fmt::Write as _;

const HEADER: [&str; 7] = ["job", "metric", "base", "head", "change", "interval", "verdict"];
/// Columns of figures.
const FIGURES: std::ops::Range<usize> = 2..6;
/// In every line of a comparison that was only made because it was asked for.
const DIFFERENT: &str = "different machines or work";

pub fn table(comparison: &Comparison) -> String {
    let rows = comparison.rows.iter().map(|row| cells(row, comparison));
    let table = terminal::table(&HEADER, FIGURES, rows);
    let notes: Vec<String> = notes(comparison).into_iter().map(|note| note + "\n").collect();
    format!("{table}\n{}{}\n", notes.concat(), conclusion(comparison))
}

pub fn in_markdown(comparison: &Comparison) -> String {
    let mut text = format!("**evalfw compare: {}**\n\n", conclusion(comparison));
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    text += &line(&HEADER.map(str::to_owned));
    let rules = (0..HEADER.len()).map(|i| if FIGURES.contains(&i) { "--:" } else { "---" }.to_owned());
    text += &line(&rules.collect::<Vec<_>>());
    for row in &comparison.rows {
        let mut cells = cells(row, comparison).map(|cell| markdown(&cell));
        if row.verdict == Verdict::Worse {
            cells[HEADER.len() - 1] = format!("**{}**", cells[HEADER.len() - 1]);
        }
        text += &line(&cells);
    }
    for note in notes(comparison) {
        let _ = write!(text, "\n{}\n", markdown(&note));
    }
    text
}

fn cells(row: &Row, comparison: &Comparison) -> [String; HEADER.len()] {
    let mut verdict = row.verdict.as_str().to_owned();
    if let Some(reason) = &row.reason {
        let _ = write!(verdict, ": {reason}");
    }
    verdict += &mark(comparison);
    [
        row.job.clone(),
        row.metric.map_or("outcome", Metric::title).to_owned(),
        figure(row, &row.base),
        figure(row, &row.head),
        row.ratio.map(|ratio| percent(ratio.ratio)).unwrap_or_default(),
        row.ratio.as_ref().map(interval).unwrap_or_default(),
        verdict,
    ]
    .map(|cell| harmless(&cell))
}

/// What stands in every line where the sides differ in more than time.
pub fn mark(comparison: &Comparison) -> String {
    if comparison.differences.is_empty() { String::new() } else { format!(" ({DIFFERENT})") }
}

/// A side's figure in the unit of its column, or how its cells ended.
pub fn figure(row: &Row, side: &Side) -> String {
    match (row.metric, side.figure) {
        (None, _) => side.outcomes.clone(),
        (Some(_), None) => "-".to_owned(),
        (Some(metric), Some(figure)) => metric.shown(figure),
    }
}

/// `-9.1 % (-11.0 % to -8.2 %)`.
pub fn change(ratio: &Ratio) -> String {
    format!("{} ({})", percent(ratio.ratio), interval(ratio))
}

fn interval(ratio: &Ratio) -> String {
    format!("{} to {}", percent(ratio.low), percent(ratio.high))
}

fn percent(ratio: f64) -> String {
    let percent = (ratio - 1.0) * 100.0;
    // What rounds to nothing has no sign.
    if percent.abs() < 0.05 { "0.0 %".to_owned() } else { format!("{percent:+.1} %") }
}

fn notes(comparison: &Comparison) -> Vec<String> {
    let mut notes = Vec::new();
    for difference in &comparison.differences {
        notes.push(harmless(&format!("Different: {difference}.")));
    }
    if !comparison.new_jobs.is_empty() {
        notes.push(harmless(&format!("Only the head ran {}.", list(&comparison.new_jobs))));
    }
    notes
}

/// How many figures have which verdict, e.g. `worse: 1 worse, 3 same (95 % intervals)`.
fn conclusion(comparison: &Comparison) -> String {
    let count = |verdict: Verdict| comparison.rows.iter().filter(|row| row.verdict == verdict).count();
    let counted = Verdict::ALL.into_iter().filter(|verdict| count(*verdict) > 0);
    let counts: Vec<String> = counted.map(|v| format!("{} {}", count(v), v.as_str())).collect();
    let word = match comparison.verdict {
        Verdict::Worse => "regression",
        Verdict::Inconclusive => "inconclusive",
        Verdict::Better | Verdict::Same => "no regression",
    };
    let different = if comparison.differences.is_empty() { String::new() } else { format!("; {DIFFERENT}") };
    format!("{word} ({}; {} % intervals{different})", counts.join(", "), plain(comparison.confidence * 100.0))
}
