//! Memory over time: a panel for each engine, with its phases, under the target.

use super::{Area, Chart, Drawn, FONT, GRID, INK, Kind, PALETTE, WIDTH, drawn, style_of, text_width};
use crate::decide::figures::Footprint;
use crate::decide::jobs::{Job, reference_jobs, reference_scenario};
use crate::measure::memory::PhaseMemory;
use crate::render::format::plain;
use anyhow::Result;
use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const HEADER: u32 = 40;
const PANEL: u32 = 128;
const FOOTER: u32 = 44;
const AXIS: u32 = 64;
const BAND: RGBColor = RGBColor(0xf2, 0xf2, 0xf2);
/// Pixels from the left edge of a panel to that of its plot, and from its right edge.
const MARGINS: (u32, u32) = (AXIS + 8, 24);

struct Panel {
    engine: String,
    color: RGBColor,
    points: Vec<(f64, f64)>,
    /// Name, begin and end of each phase.
    phases: Vec<(String, f64, f64)>,
}

/// Of the largest training job of each engine, from the repetition that took the most. `engines` are all of the record.
pub fn memory(jobs: &[Job], model: &str, engines: &[&str], target_bytes: u64) -> Result<Option<Chart>> {
    let target = target_bytes as f64 / 1e9;
    let panel = |job: &Job| {
        let (_, cell) = Footprint::of_job(job)?;
        let points = cell.samples.memory.iter().map(|p| (p.seconds, p.resident_bytes as f64 / 1e9));
        Some(Panel {
            engine: job.engine.to_owned(),
            color: PALETTE[style_of(job.engine, engines) % PALETTE.len()],
            // A logarithm has no place for nothing.
            points: points.filter(|(_, gb)| *gb > 0.0).collect(),
            phases: phases(&cell.samples.phases),
        })
    };
    let panels: Vec<Panel> = reference_jobs(jobs, model).into_iter().filter_map(panel).collect();
    let panels: Vec<Panel> = panels.into_iter().filter(|panel| !panel.points.is_empty()).collect();
    let Some(scenario) = reference_scenario(jobs, model, "train").filter(|_| !panels.is_empty()) else {
        return Ok(None);
    };
    let title = format!("Memory of the process tree in {scenario} on {model}, by phase");
    let height = HEADER + PANEL * panels.len() as u32 + FOOTER;
    drawn(Kind::Memory, model, &title, (WIDTH, height), |root| draw(root, &title, &panels, target)).map(Some)
}

/// One after the other, without gaps; neighbours of one name are one.
fn phases(phases: &[PhaseMemory]) -> Vec<(String, f64, f64)> {
    let mut found: Vec<(String, f64, f64)> = Vec::new();
    let mut begin = 0.0;
    for phase in phases {
        let end = begin + phase.seconds;
        match found.last_mut().filter(|(name, ..)| *name == phase.name) {
            Some((_, _, last)) => *last = end,
            None => found.push((phase.name.clone(), begin, end)),
        }
        begin = end;
    }
    found
}

fn draw<'a>(root: &Area<'a>, title: &str, panels: &[Panel], target: f64) -> Drawn<'a> {
    root.fill(&WHITE)?;
    let (header, body) = root.split_vertically(HEADER);
    header.draw(&Text::new(title.to_owned(), (20, 10), (FONT, 20).into_font().color(&INK)))?;
    let points = || panels.iter().flat_map(|panel| &panel.points);
    let longest = points().fold(1e-3_f64, |longest, (seconds, _)| longest.max(*seconds)) * 1.01;
    let highest = points().fold(target, |highest, (_, gb)| highest.max(*gb));
    // A process begins with some megabytes: what is below an eighth of a GB would take most of the height.
    let range = 0.125..highest * 1.6;
    let mut rest = body;
    for (index, panel) in panels.iter().enumerate() {
        let is_last = index + 1 == panels.len();
        let (area, below) = rest.split_vertically(PANEL + if is_last { FOOTER } else { 0 });
        draw_panel(&area, panel, target, longest, range.clone(), is_last)?;
        rest = below;
    }
    root.present()
}

fn draw_panel<'a>(
    area: &Area<'a>,
    panel: &Panel,
    target: f64,
    longest: f64,
    range: std::ops::Range<f64>,
    is_last: bool,
) -> Drawn<'a> {
    let mut chart = ChartBuilder::on(area)
        .margin_top(4)
        .margin_bottom(8)
        .margin_left(8)
        .margin_right(MARGINS.1)
        .x_label_area_size(if is_last { FOOTER } else { 0 })
        .y_label_area_size(AXIS)
        .build_cartesian_2d(0.0..longest, range.clone().log_scale().base(2.0))?;
    for (index, (_, begin, end)) in panel.phases.iter().enumerate() {
        if index % 2 == 1 {
            let corners = [(*begin, range.start), (end.min(longest), range.end)];
            chart.draw_series([Rectangle::new(corners, BAND.filled())])?;
        }
    }
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style((FONT, 14).into_font().color(&INK))
        .axis_desc_style((FONT, 14).into_font().color(&INK))
        .x_labels(11)
        .y_labels(5)
        .x_label_formatter(&|seconds| plain(*seconds))
        .y_label_formatter(&|gb| plain((gb * 1e3).round() / 1e3))
        .x_desc(if is_last { "seconds since the worker started" } else { "" })
        .y_desc("GB, log scale")
        .draw()?;
    let limit = [(0.0, target), (longest, target)];
    chart.draw_series(DashedLineSeries::new(limit, 8, 5, INK.stroke_width(2)))?;
    let at_limit = (FONT, 13).into_font().color(&INK).pos(Pos::new(HPos::Right, VPos::Bottom));
    let text = Text::new(format!("target: {target} GB"), (-4, -2), at_limit);
    chart.draw_series([EmptyElement::at((longest, target)) + text])?;
    let line = panel.points.iter().map(|(seconds, gb)| (*seconds, gb.max(range.start)));
    chart.draw_series(LineSeries::new(line, panel.color.stroke_width(3)))?;
    let name = (FONT, 16).into_font().color(&INK).pos(Pos::new(HPos::Left, VPos::Top));
    let peak = panel.points.iter().fold(0.0_f64, |peak, (_, gb)| peak.max(*gb));
    let text = Text::new(format!("{}, peak {peak:.2} GB", panel.engine), (6, 4), name);
    chart.draw_series([EmptyElement::at((0.0, range.end)) + text])?;
    let pixels_per_second = f64::from(WIDTH - MARGINS.0 - MARGINS.1) / longest;
    for (name, begin, end) in &panel.phases {
        // Names that are wider than their phases would lie on each other.
        if (end - begin) * pixels_per_second > f64::from(text_width(name)) {
            let style = (FONT, 13).into_font().color(&INK).pos(Pos::new(HPos::Center, VPos::Bottom));
            let middle = ((begin + end.min(longest)) / 2.0, range.start);
            chart.draw_series([EmptyElement::at(middle) + Text::new(name.clone(), (0, -3), style)])?;
        }
    }
    Ok(())
}
