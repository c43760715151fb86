//! The summary at the end of a run.

use super::format::{gb, significant};
use crate::decide::figures::{Footprint, InferFigures, LoadFigures, TrainFigures};
use crate::decide::jobs::{Job, arrange, is_software_adapter};
use crate::record::{CellRecord, LoadSample};
use comfy_table::{CellAlignment, ContentArrangement, Row, Table, presets};
use std::ops::Range;

const HEADER: [&str; 8] =
    ["engine", "model", "scenario", "outcome", "peak GB", "tokens/s", "examples/s", "load s"];

/// One row for each engine, model and scenario: medians over the repetitions, the peak their largest.
/// Tokens are non-padding ones in training, generated ones in inference. `-`: does not apply, or was
/// not measured.
pub fn summary(cells: &[CellRecord]) -> String {
    let jobs = arrange(cells);
    let rows = jobs.iter().map(|job| row(job, is_software_adapter(cells, job.engine)));
    let mut text = table(&HEADER, 4..HEADER.len(), rows);
    if cells.iter().any(|c| is_software_adapter(cells, &c.engine)) {
        text += "\n* software adapter, not comparable";
    }
    text.push('\n');
    text
}

/// A table whose `figures` are the columns to align at the right. As wide as it needs: a pipe must show the same as a
/// terminal.
pub fn table(
    header: &[&str],
    figures: Range<usize>,
    rows: impl IntoIterator<Item = impl Into<Row>>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_content_arrangement(ContentArrangement::Disabled).force_no_tty();
    table.set_header(header).add_rows(rows);
    for column in figures {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

fn row(job: &Job, software: bool) -> Vec<String> {
    let or_dash = |figure: Option<String>| figure.unwrap_or_else(|| "-".to_owned());
    let train = TrainFigures::of(job);
    let decode = InferFigures::of(job).and_then(|f| f.decode);
    let tokens = train.map(|t| t.real_tokens).or(decode);
    let loads: Vec<&LoadSample> = job.ok().filter_map(|c| c.samples.load.as_ref()).collect();
    let peak = Footprint::of_job(job).and_then(|(footprint, _)| match footprint {
        Footprint::Peak { bytes } => Some(gb(bytes as f64)),
        Footprint::AtLeast { bytes } => Some(format!("≥ {}", gb(bytes as f64))),
        Footprint::Unknown => None,
    });
    let mark = if software { "*" } else { "" };
    vec![
        format!("{}{mark}", single_line(job.engine)),
        single_line(&job.model.name),
        job.label(),
        job.outcomes(),
        or_dash(peak),
        or_dash(tokens.map(|t| significant(t.median))),
        or_dash(train.map(|t| significant(t.examples.median))),
        or_dash(LoadFigures::of(&loads).map(|l| significant(l.total.median))),
    ]
}

/// A name without anything that would move the cursor.
fn single_line(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
