//! Horizontal bars: totals made of parts, chances of ranks, shares of a limit.

use super::hatch::{Fill, draw_segment};
use super::{
    Area, Chart, Drawn, GRID, INK, Kind, LEGEND_LINE, WIDTH, drawn, legend_places, text_style, text_width,
};
use crate::render::format::plain;
use anyhow::{Result, bail, ensure};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

const BAR: i32 = 22;
/// Between bars of one group, and between groups.
const GAP: i32 = 3;
const GROUP_GAP: i32 = 14;
const AXIS: i32 = 58;
/// For the figure at the end of a bar.
const END: i32 = 110;
const LONGEST_LABEL: i32 = 300;
const BEST: f64 = 10.0;

/// A bar for each engine with its total from 0 to 10, a segment for each criterion's part of it. What is `unknown`, one
/// number for a bar or none at all, is an outlined segment behind it: up to there the total may rise.
pub fn stacked(
    subject: &str,
    title: &str,
    parts: &[String],
    bars: &[(String, Vec<f64>)],
    unknown: &[f64],
    x_title: &str,
) -> Result<Chart> {
    ensure!(
        unknown.is_empty() || unknown.len() == bars.len(),
        "{title}: an unknown part is needed for each bar"
    );
    let mut groups = Vec::new();
    for (index, (name, values)) in bars.iter().enumerate() {
        ensure!(values.len() == parts.len(), "{title}: {name} has {} parts of {}", values.len(), parts.len());
        let open = unknown.get(index).copied().unwrap_or(0.0);
        let total: f64 = values.iter().sum();
        let mut segments = segments(values);
        segments.push((Fill::Unknown, open));
        let end =
            if open > 0.0 { format!("{total:.2}–{:.2}", total + open) } else { format!("{total:.2}") };
        groups.push(Group { name: name.clone(), bars: vec![Bar { segments, end }] });
    }
    let mut legend = numbered(parts);
    if unknown.iter().any(|u| *u > 0.0) {
        legend.push((Fill::Unknown, "unknown".to_owned()));
    }
    let axis = Axis { title: x_title.to_owned(), end: BEST, step: 2.0, unit: "", limit: None };
    Plot { title: title.to_owned(), legend, groups, axis }.draw(Kind::Stacked, subject)
}

/// A bar for each engine: the chance of each rank, from the first on. `matrix[engine][rank]` is from 0 to 1.
pub fn acceptability(subject: &str, title: &str, engines: &[String], matrix: &[Vec<f64>]) -> Result<Chart> {
    ensure!(matrix.len() == engines.len(), "{title}: {} rows for {} engines", matrix.len(), engines.len());
    let ranks = matrix.first().map_or(0, Vec::len);
    let mut groups = Vec::new();
    for (name, chances) in engines.iter().zip(matrix) {
        ensure!(chances.len() == ranks, "{title}: {name} has {} ranks of {ranks}", chances.len());
        // More than all is a mistake of the caller; a hair more is rounding.
        ensure!(
            chances.iter().sum::<f64>() < 1.0 + 1e-6,
            "{title}: the chances of {name} add up to more than 1"
        );
        let percent: Vec<f64> = chances.iter().map(|c| c * 100.0).collect();
        let first = percent.first().copied().unwrap_or(0.0);
        let end = format!("{first:.0} % first");
        groups.push(Group { name: name.clone(), bars: vec![Bar { segments: segments(&percent), end }] });
    }
    let ranks: Vec<String> = (1..=ranks).map(|rank| format!("rank {rank}")).collect();
    let axis =
        Axis { title: "chance of each rank".to_owned(), end: 100.0, step: 20.0, unit: " %", limit: None };
    Plot { title: title.to_owned(), legend: numbered(&ranks), groups, axis }
        .draw(Kind::Acceptability, subject)
}

/// Speeds as shares of what the machine can do, 1 being all of it. A group holds one value for each of `series`, in
/// their order; `None` was not measured.
pub fn shares(
    subject: &str,
    title: &str,
    series: &[String],
    groups: &[(String, Vec<Option<f64>>)],
) -> Result<Chart> {
    let mut drawn_groups = Vec::new();
    let mut largest = 100.0f64;
    for (name, values) in groups {
        ensure!(
            values.len() == series.len(),
            "{title}: {name} has {} values of {}",
            values.len(),
            series.len()
        );
        let bar = |(index, value): (usize, &Option<f64>)| {
            let percent = value.map(|v| v * 100.0);
            largest = largest.max(percent.filter(|p| p.is_finite()).unwrap_or(0.0));
            let end = percent.map_or("not measured".to_owned(), |p| format!("{p:.0} %"));
            Bar { segments: vec![(Fill::Part(index), percent.unwrap_or(0.0))], end }
        };
        let bars = values.iter().enumerate().map(bar).collect();
        drawn_groups.push(Group { name: name.clone(), bars });
    }
    let axis = Axis {
        title: "percent of the machine's limit".to_owned(),
        end: (largest / 20.0).ceil() * 20.0,
        step: if largest > 300.0 { (largest / 5.0).ceil() } else { 20.0 },
        unit: " %",
        limit: Some((100.0, "limit".to_owned())),
    };
    Plot { title: title.to_owned(), legend: numbered(series), groups: drawn_groups, axis }
        .draw(Kind::Shares, subject)
}

fn segments(values: &[f64]) -> Vec<(Fill, f64)> {
    values.iter().enumerate().map(|(index, value)| (Fill::Part(index), *value)).collect()
}

fn numbered(names: &[String]) -> Vec<(Fill, String)> {
    names.iter().enumerate().map(|(index, name)| (Fill::Part(index), name.clone())).collect()
}

struct Bar {
    segments: Vec<(Fill, f64)>,
    end: String,
}

struct Group {
    name: String,
    bars: Vec<Bar>,
}

struct Axis {
    title: String,
    /// It begins at 0.
    end: f64,
    step: f64,
    unit: &'static str,
    /// A line across all bars, with its name.
    limit: Option<(f64, String)>,
}

struct Plot {
    title: String,
    legend: Vec<(Fill, String)>,
    groups: Vec<Group>,
    axis: Axis,
}

/// Where things are, in pixels.
struct Layout {
    left: i32,
    right: i32,
    top: i32,
    bottom: i32,
    end: f64,
}

impl Layout {
    fn x(&self, value: f64) -> i32 {
        self.left + ((self.right - self.left) as f64 * (value / self.end).clamp(0.0, 1.0)).round() as i32
    }
}

impl Plot {
    fn draw(&self, kind: Kind, subject: &str) -> Result<Chart> {
        if self.groups.is_empty() {
            bail!("{}: there is nothing to draw", self.title);
        }
        for group in &self.groups {
            let values = || group.bars.iter().flat_map(|bar| bar.segments.iter().map(|s| s.1));
            if let Some(wrong) = values().find(|v| !(v.is_finite() && *v >= 0.0)) {
                bail!("{}: {} has a part of {wrong}, which no bar can show", self.title, group.name);
            }
        }
        let (places, lines) = legend_places(self.legend.iter().map(|(_, name)| name.as_str()), 52);
        let top = 44 + lines as i32 * LEGEND_LINE + GROUP_GAP;
        let bottom = top + self.groups.iter().map(height).sum::<i32>();
        let labels = self.groups.iter().map(|g| text_width(&g.name)).max().unwrap_or(0);
        let left = 32 + labels.clamp(40, LONGEST_LABEL);
        let layout = Layout { left, right: WIDTH as i32 - END, top, bottom, end: self.axis.end };
        let size = (WIDTH, (bottom + AXIS) as u32);
        drawn(kind, subject, &self.title, size, |root| self.draw_on(root, &layout, &places))
    }

    fn draw_on<'a>(&self, root: &Area<'a>, layout: &Layout, places: &[(i32, i32)]) -> Drawn<'a> {
        root.fill(&WHITE)?;
        root.draw(&Text::new(self.title.clone(), (20, 20), text_style(20, HPos::Left)))?;
        for ((fill, name), (x, y)) in self.legend.iter().zip(places) {
            draw_segment(root, *fill, (*x, y - 8), (x + 28, y + 8))?;
            root.draw(&Text::new(name.clone(), (x + 36, *y), text_style(16, HPos::Left)))?;
        }
        self.draw_axis(root, layout)?;
        let mut y = layout.top;
        for group in &self.groups {
            let middle = y + (height(group) - GROUP_GAP) / 2;
            let at = (layout.left - 10, middle);
            root.draw(&Text::new(group.name.clone(), at, text_style(16, HPos::Right)))?;
            for (index, bar) in group.bars.iter().enumerate() {
                draw_bar(root, bar, layout, y + index as i32 * (BAR + GAP))?;
            }
            y += height(group);
        }
        self.draw_limit(root, layout)?;
        root.present()
    }

    fn draw_axis<'a>(&self, root: &Area<'a>, layout: &Layout) -> Drawn<'a> {
        let Axis { title, end, step, unit, .. } = &self.axis;
        for tick in 0..=(end / step + 1e-9) as usize {
            let value = tick as f64 * step;
            let x = layout.x(value);
            root.draw(&PathElement::new([(x, layout.top - 6), (x, layout.bottom)], GRID))?;
            let text = format!("{}{unit}", plain(value));
            root.draw(&Text::new(text, (x, layout.bottom + 12), text_style(15, HPos::Center)))?;
        }
        root.draw(&PathElement::new([(layout.left, layout.bottom), (layout.right, layout.bottom)], INK))?;
        let middle = ((layout.left + layout.right) / 2, layout.bottom + 38);
        root.draw(&Text::new(title.clone(), middle, text_style(15, HPos::Center)))
    }

    fn draw_limit<'a>(&self, root: &Area<'a>, layout: &Layout) -> Drawn<'a> {
        let Some((value, name)) = &self.axis.limit else { return Ok(()) };
        let x = layout.x(*value);
        let mut y = layout.top - 6;
        while y < layout.bottom {
            root.draw(&PathElement::new([(x, y), (x, (y + 8).min(layout.bottom))], INK.stroke_width(2)))?;
            y += 13;
        }
        root.draw(&Text::new(name.clone(), (x, layout.top - 14), text_style(15, HPos::Center)))
    }
}

fn height(group: &Group) -> i32 {
    group.bars.len() as i32 * (BAR + GAP) + GROUP_GAP
}

fn draw_bar<'a>(root: &Area<'a>, bar: &Bar, layout: &Layout, y: i32) -> Drawn<'a> {
    let mut from = 0.0;
    for (fill, value) in &bar.segments {
        // Both ends come from sums, so that rounding leaves no gaps between segments.
        let (left, right) = (layout.x(from), layout.x(from + value));
        from += value;
        if right > left {
            draw_segment(root, *fill, (left, y), (right, y + BAR))?;
        }
    }
    let at = (layout.x(from) + 8, y + BAR / 2);
    root.draw(&Text::new(bar.end.clone(), at, text_style(15, HPos::Left)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    fn totals() -> Result<Chart> {
        let bars = [("candle".to_owned(), vec![2.0, 3.5]), ("burn <x>".to_owned(), vec![1.0, 2.25])];
        stacked("0.5b", "Totals & parts", &names(&["memory", "speed"]), &bars, &[0.0, 2.0], "points")
    }

    #[test]
    fn totals_show_their_parts_and_what_is_unknown() {
        let chart = totals().unwrap();
        for text in ["candle", "burn &lt;x&gt;", "memory", "speed", "unknown", "5.50", "3.25–5.25", "points"]
        {
            assert!(chart.svg.contains(text), "{text}");
        }
        assert!(chart.svg.contains("<title>Totals &amp; parts</title>"));
        assert_eq!(chart.file, "charts/stacked-0.5b.svg");
        assert_eq!(totals().unwrap(), chart);
    }

    #[test]
    fn a_segment_is_as_wide_as_its_part() {
        let width = |value: f64| {
            let bars = [("a".to_owned(), vec![value])];
            let svg = stacked("s", "t", &names(&["p"]), &bars, &[], "x").unwrap().svg;
            let outline =
                svg.lines().rfind(|l| l.starts_with("<rect") && l.contains("height=\"22\"")).unwrap();
            outline.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse::<i32>().unwrap()
        };
        assert_eq!(width(8.0), 2 * width(4.0));
        assert_eq!(width(10.0), WIDTH as i32 - END - 72);
    }

    #[test]
    fn chances_of_ranks_are_segments() {
        let draw =
            || acceptability("m", "Ranks", &names(&["a1", "b2"]), &[vec![0.75, 0.25], vec![0.25, 0.75]]);
        let svg = draw().unwrap().svg;
        for text in ["rank 1", "rank 2", "75 % first", "25 % first", "a1", "b2", "100 %"] {
            assert!(svg.contains(text), "{text}");
        }
        assert_eq!(draw().unwrap().svg, svg);
        let error =
            acceptability("m", "Ranks", &names(&["a1"]), &[vec![0.75, 0.35]]).unwrap_err().to_string();
        assert!(error.contains("a1 add up to more than 1"), "{error}");
    }

    #[test]
    fn shares_have_the_line_of_the_limit_and_say_what_was_not_measured() {
        let groups = [
            ("train".to_owned(), vec![Some(0.31), None]),
            ("decode".to_owned(), vec![Some(1.15), Some(0.5)]),
        ];
        let draw = || shares("m", "Of the limit", &names(&["candle", "burn"]), &groups);
        let svg = draw().unwrap().svg;
        for text in ["31 %", "not measured", "115 %", "50 %", "limit", "120 %", "train", "decode", "burn"] {
            assert!(svg.contains(text), "{text}");
        }
        assert_eq!(draw().unwrap().svg, svg);
    }

    #[test]
    fn what_no_bar_can_show_is_an_error_with_its_name() {
        for wrong in [-1.0, f64::NAN, f64::INFINITY] {
            let bars = [("candle".to_owned(), vec![wrong])];
            let error = stacked("s", "t", &names(&["p"]), &bars, &[], "x").unwrap_err().to_string();
            assert!(error.contains("t: candle"), "{error}");
        }
        assert!(stacked("s", "t", &[], &[], &[], "x").is_err());
        assert!(shares("s", "t", &names(&["a"]), &[("g".to_owned(), vec![])]).is_err());
    }
}
