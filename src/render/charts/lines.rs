//! Lines over time, steps and runs.

use super::{Area, Chart, Drawn, FONT, GRID, INK, Kind, PALETTE, WIDTH, drawn, style_of};
use crate::accumulate::history::{Point, Trend};
use crate::compare::figure::Metric;
use crate::decide::jobs::{Job, reference_jobs, reference_scenario};
use crate::measure::metrics::evaluation_curve;
use crate::render::format::plain;
use crate::scenario::Scenario;
use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const HEIGHT: u32 = 420;
const HEADER: u32 = 64;
const MOST_LABELS: usize = 11;

/// A named line; `style` is its engine's place among all engines, so that an engine looks the same in
/// every chart.
struct Series {
    name: String,
    style: usize,
    points: Vec<(f64, f64)>,
}

impl Series {
    /// The points that get a shape, which tells an engine from its neighbour without colour: a dozen at
    /// most, so that the line stays visible.
    fn marked(&self) -> impl Iterator<Item = (f64, f64)> {
        self.points.iter().copied().step_by(self.points.len().div_ceil(12).max(1))
    }

    fn color(&self) -> RGBColor {
        PALETTE[self.style % PALETTE.len()]
    }
}

struct Plot {
    title: String,
    x_title: &'static str,
    y_title: &'static str,
    x_label: fn(&f64) -> String,
    /// At most so many labels on the x axis.
    x_labels: usize,
    y_label: fn(&f64) -> String,
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
    series: Vec<Series>,
    /// A horizontal line with its name.
    limit: Option<(f64, String)>,
    /// The lines are expected to lie on each other.
    overlapping: bool,
}

impl Plot {
    /// Where lines lie on each other, those drawn first are wider and stay visible.
    fn line_width(&self, index: usize) -> u32 {
        if self.overlapping { 2 + 3 * (self.series.len() - 1 - index) as u32 } else { 3 }
    }
}

/// The training loss of each step of all engines on one axis.
pub fn loss(jobs: &[Job], model: &str, engines: &[&str]) -> Result<Option<Chart>> {
    let series: Vec<Series> = reference_jobs(jobs, model)
        .into_iter()
        .filter_map(|job| {
            let cell = job.ok().find(|c| !c.samples.train.is_empty())?;
            let points = cell.samples.train.iter().map(|s| (s.step as f64, s.loss));
            Some(Series {
                name: job.engine.to_owned(),
                style: style_of(job.engine, engines),
                points: points.filter(|p| p.1.is_finite()).collect(),
            })
        })
        .filter(|s| s.points.len() > 1)
        .collect();
    let Some(scenario) = reference_scenario(jobs, model, "train").filter(|_| !series.is_empty()) else {
        return Ok(None);
    };
    let (low, high) = (-largest(&series, |p| -p.1), largest(&series, |p| p.1));
    let room = ((high - low) * 0.08).max(0.01);
    let (first, last) = (-largest(&series, |p| -p.0), largest(&series, |p| p.0));
    let plot = Plot {
        title: format!("Training loss in {scenario} on {model}"),
        x_title: "step",
        y_title: "nats per trained token",
        x_label: |step| plain(*step),
        // Between two steps there is nothing: ticks lie 1, 2, 5, 10, ... apart if no more than one for
        // each step is asked for.
        x_labels: MOST_LABELS.min((last - first) as usize + 1),
        y_label: |nats| format!("{nats:.2}"),
        x: first..first + (last - first) * 1.01,
        y: low - room..high + room,
        overlapping: true,
        limit: None,
        series,
    };
    draw(&plot, Kind::Loss, model).map(Some)
}

/// The evaluation loss over the seconds of training and evaluation, with the target. `jobs` are those of
/// one time-to-quality scenario.
pub fn quality(jobs: &[&Job], engines: &[&str]) -> Result<Option<Chart>> {
    let Some((job, Scenario::Quality(scenario))) = jobs.first().map(|j| (j, j.parameters)) else {
        return Ok(None);
    };
    let of_job = |job: &&Job| {
        let cell = job.ok().find(|c| c.samples.evaluations.len() > 1)?;
        let points = evaluation_curve(&cell.samples).map(|(time, loss)| (time.seconds, loss));
        Some(Series {
            name: job.engine.to_owned(),
            style: style_of(job.engine, engines),
            points: points.filter(|p| p.1.is_finite()).collect(),
        })
    };
    let series: Vec<Series> = jobs.iter().filter_map(of_job).collect();
    if series.is_empty() {
        return Ok(None);
    }
    let target = scenario.target_loss;
    let (low, high) = ((-largest(&series, |p| -p.1)).min(target), largest(&series, |p| p.1).max(target));
    let room = (high - low) * 0.08;
    let plot = Plot {
        title: format!("Evaluation loss over time in {} on {}", job.scenario, job.model.name),
        x_title: "seconds of training and evaluation",
        y_title: "nats per trained token",
        x_label: |seconds| plain(*seconds),
        x_labels: MOST_LABELS,
        y_label: |nats| format!("{nats:.2}"),
        x: 0.0..(largest(&series, |p| p.0) * 1.01).max(1e-3),
        y: low - room..high + room,
        overlapping: false,
        limit: Some((target, format!("target: {target}"))),
        series,
    };
    let subject = job.scenario.trim_start_matches("quality-");
    draw(&plot, Kind::Quality, subject).map(Some)
}

/// A figure over the runs of one machine, all on one model. Never empty.
pub fn trend(trends: &[&Trend]) -> Result<Chart> {
    let metric = trends.first().map_or(Metric::TrainingTokensPerSecond, |trend| trend.metric);
    let days = |point: &Point| point.at.as_second() as f64 / SECONDS_A_DAY;
    let scale = if metric == Metric::PeakMemoryBytes { 1e-9 } else { 1.0 };
    let series: Vec<Series> = trends
        .iter()
        .enumerate()
        .map(|(style, trend)| {
            let mut parts = trend.job.splitn(3, '/');
            let (engine, scenario) = (parts.next().unwrap_or_default(), parts.nth(1).unwrap_or_default());
            let points = trend.points.iter().map(|point| (days(point), point.value * scale)).collect();
            Series { name: format!("{engine} {scenario}"), style, points }
        })
        .collect();
    let (first, last) = (-largest(&series, |p| -p.0), largest(&series, |p| p.0));
    let machine = trends.first().map_or("", |trend| trend.machine.as_str());
    let model = trends.first().and_then(|trend| trend.job.split('/').nth(1)).unwrap_or_default();
    let plot = Plot {
        title: format!("{} on {model}, {machine}", metric.title()),
        x_title: "date (UTC)",
        y_title: metric.title(),
        x_label: |days| {
            let at = jiff::Timestamp::from_second((days * SECONDS_A_DAY) as i64);
            at.map_or(String::new(), |at| at.strftime("%Y-%m-%d").to_string())
        },
        x_labels: 5,
        y_label: |value| plain((value * 1e3).round() / 1e3),
        x: first..last + ((last - first) * 0.01).max(1e-3),
        y: 0.0..largest(&series, |p| p.1) * 1.08,
        overlapping: false,
        limit: None,
        series,
    };
    draw(&plot, Kind::Trend, &format!("{}-{model}-{machine}", metric.name()))
}

const SECONDS_A_DAY: f64 = 86_400.0;

fn largest(series: &[Series], of: fn(&(f64, f64)) -> f64) -> f64 {
    series.iter().flat_map(|s| s.points.iter().map(of)).fold(f64::NEG_INFINITY, f64::max)
}

fn draw(plot: &Plot, kind: Kind, subject: &str) -> Result<Chart> {
    drawn(kind, subject, &plot.title, (WIDTH, HEIGHT), |root| draw_on(root, plot))
}

fn draw_on<'a>(root: &Area<'a>, plot: &Plot) -> Drawn<'a> {
    root.fill(&WHITE)?;
    let (header, body) = root.split_vertically(HEADER);
    header.draw(&Text::new(plot.title.clone(), (20, 10), (FONT, 20).into_font().color(&INK)))?;
    draw_legend(&header, plot)?;

    let mut chart = ChartBuilder::on(&body)
        .margin(8)
        .margin_right(24)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(plot.x.clone(), plot.y.clone())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style((FONT, 15).into_font().color(&INK))
        .axis_desc_style((FONT, 15).into_font().color(&INK))
        .x_labels(plot.x_labels)
        .x_label_formatter(&plot.x_label)
        .y_label_formatter(&plot.y_label)
        .x_desc(plot.x_title)
        .y_desc(plot.y_title)
        .draw()?;
    if let Some((value, name)) = &plot.limit {
        let line = [(plot.x.start, *value), (plot.x.end, *value)];
        chart.draw_series(DashedLineSeries::new(line, 8, 5, INK.stroke_width(2)))?;
        let style = (FONT, 15).into_font().color(&INK).pos(Pos::new(HPos::Right, VPos::Bottom));
        let place = (plot.x.end, *value);
        chart.draw_series([EmptyElement::at(place) + Text::new(name.clone(), (-4, -4), style)])?;
    }
    for (index, series) in plot.series.iter().enumerate() {
        let (color, width) = (series.color(), plot.line_width(index));
        chart.draw_series(LineSeries::new(series.points.iter().copied(), color.stroke_width(width)))?;
        let (size, fill) = (width + 2, color.filled());
        let r = size as i32;
        match series.style % 3 {
            0 => chart.draw_series(series.marked().map(|p| Circle::new(p, size, fill)))?,
            1 => chart.draw_series(
                series.marked().map(|p| EmptyElement::at(p) + Rectangle::new([(-r, -r), (r, r)], fill)),
            )?,
            _ => chart.draw_series(series.marked().map(|p| TriangleMarker::new(p, size + 1, fill)))?,
        };
    }
    root.present()
}

fn draw_legend<'a>(header: &Area<'a>, plot: &Plot) -> Drawn<'a> {
    let mut x = 20;
    for (index, series) in plot.series.iter().enumerate() {
        let (color, width) = (series.color(), plot.line_width(index));
        header.draw(&PathElement::new([(x, 49), (x + 30, 49)], color.stroke_width(width)))?;
        let (at, size, fill) = ((x + 15, 49), width + 2, color.filled());
        let r = size as i32;
        match series.style % 3 {
            0 => header.draw(&Circle::new(at, size, fill))?,
            1 => header.draw(&Rectangle::new([(at.0 - r, at.1 - r), (at.0 + r, at.1 + r)], fill))?,
            _ => header.draw(&TriangleMarker::new(at, size + 1, fill))?,
        }
        let style = (FONT, 16).into_font().color(&INK).pos(Pos::new(HPos::Left, VPos::Center));
        header.draw(&Text::new(series.name.clone(), (x + 38, 49), style))?;
        x += 60 + 9 * series.name.chars().count() as i32;
    }
    Ok(())
}
