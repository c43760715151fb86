//! Points: what was predicted against what was measured.

use super::{
    Area, Chart, Drawn, FONT, GRID, INK, Kind, LEGEND_LINE, PALETTE, WIDTH, drawn, legend_places, text_style,
};
use crate::render::format::plain;
use anyhow::{Result, bail};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

const BODY: u32 = 500;
/// Lines at which a prediction is off by so much.
const OFF: f64 = 0.05;

/// Name, predicted and measured memory in GB (10^9 bytes) of each point. On the diagonal a prediction is right; the
/// lines beside it are 5 % off. Points of one name look alike.
pub fn predicted(subject: &str, title: &str, points: &[(String, f64, f64)]) -> Result<Chart> {
    if points.is_empty() {
        bail!("{title}: there is nothing to draw");
    }
    let usable = |v: f64| v.is_finite() && v >= 0.0;
    if let Some((name, ..)) = points.iter().find(|(_, p, m)| !usable(*p) || !usable(*m)) {
        bail!("{title}: {name} has a figure that is no amount of memory");
    }
    let mut names: Vec<&str> = Vec::new();
    for (name, ..) in points {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let (_, lines) = legend_places(names.iter().copied(), 0);
    let height = 44 + lines * LEGEND_LINE as u32 + BODY;
    drawn(Kind::Predicted, subject, title, (WIDTH, height), |root| draw_on(root, title, points, &names))
}

fn draw_on<'a>(root: &Area<'a>, title: &str, points: &[(String, f64, f64)], names: &[&str]) -> Drawn<'a> {
    root.fill(&WHITE)?;
    let (places, lines) = legend_places(names.iter().copied(), 52);
    let (header, body) = root.split_vertically(44 + lines * LEGEND_LINE as u32);
    header.draw(&Text::new(title.to_owned(), (20, 20), text_style(20, HPos::Left)))?;
    for (style, (name, (x, y))) in names.iter().zip(places).enumerate() {
        draw_marker(&header, (x + 14, y), style)?;
        header.draw(&Text::new((*name).to_owned(), (x + 32, y), text_style(16, HPos::Left)))?;
    }
    let end = points.iter().map(|(_, p, m)| p.max(*m)).fold(1e-3, f64::max) * 1.08;
    let mut chart = ChartBuilder::on(&body)
        .margin(8)
        .margin_right(60)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..end, 0.0..end)?;
    let gb = |value: &f64| plain(*value);
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style((FONT, 15).into_font().color(&INK))
        .axis_desc_style((FONT, 15).into_font().color(&INK))
        .x_label_formatter(&gb)
        .y_label_formatter(&gb)
        .x_desc("predicted GB (10^9 bytes)")
        .y_desc("measured GB (10^9 bytes)")
        .draw()?;
    chart.draw_series(LineSeries::new([(0.0, 0.0), (end, end)], INK.stroke_width(2)))?;
    for (slope, name) in [(1.0 + OFF, "+5 %"), (1.0 - OFF, "−5 %")] {
        // Up to where the line leaves the picture.
        let x = end.min(end / slope);
        let line = [(0.0, 0.0), (x, x * slope)];
        chart.draw_series(DashedLineSeries::new(line, 8, 5, INK.stroke_width(1)))?;
        let horizontal = if slope > 1.0 { HPos::Right } else { HPos::Left };
        let (dx, dy) = if slope > 1.0 { (-14, 10) } else { (4, 4) };
        let text = Text::new(name, (dx, dy), text_style(15, horizontal));
        chart.draw_series([EmptyElement::at((x, x * slope)) + text])?;
    }
    for (name, x, y) in points {
        let style = names.iter().position(|n| n == name).unwrap_or(0);
        draw_marker(root, chart.plotting_area().map_coordinate(&(*x, *y)), style)?;
    }
    root.present()
}

/// A shape and a colour: 21 styles, no two alike.
fn draw_marker<'a>(root: &Area<'a>, at: (i32, i32), style: usize) -> Drawn<'a> {
    let fill = PALETTE[style % PALETTE.len()].filled();
    match style % 3 {
        0 => root.draw(&Circle::new(at, 6, fill)),
        1 => root.draw(&Rectangle::new([(at.0 - 5, at.1 - 5), (at.0 + 5, at.1 + 5)], fill)),
        _ => root.draw(&TriangleMarker::new(at, 7, fill)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(points: &[(&str, f64, f64)]) -> Result<Chart> {
        let points: Vec<_> = points.iter().map(|(name, p, m)| ((*name).to_owned(), *p, *m)).collect();
        predicted("host", "Predicted & measured", &points)
    }

    #[test]
    fn points_have_a_legend_and_the_lines_at_five_percent() {
        let chart = draw(&[("candle", 1.0, 1.1), ("burn", 2.0, 1.9), ("candle", 0.5, 0.5)]).unwrap();
        for text in ["candle", "burn", "+5 %", "−5 %", "predicted GB", "measured GB"] {
            assert!(chart.svg.contains(text), "{text}");
        }
        assert_eq!(chart.svg.matches("<circle").count(), 3, "one in the legend, two points");
        assert!(chart.svg.contains("<title>Predicted &amp; measured</title>"));
        assert_eq!(draw(&[("candle", 1.0, 1.1), ("burn", 2.0, 1.9), ("candle", 0.5, 0.5)]).unwrap(), chart);
    }

    #[test]
    fn a_right_prediction_lies_on_the_diagonal() {
        let svg = draw(&[("a", 1.0, 1.0), ("a", 2.0, 2.0), ("a", 4.0, 4.0)]).unwrap().svg;
        let number = |line: &str, name: &str| -> f64 {
            line.split(&format!(" {name}=\"")).nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
        };
        let circles: Vec<(f64, f64)> = svg
            .lines()
            .filter(|l| l.starts_with("<circle"))
            .skip(1)
            .map(|l| (number(l, "cx"), number(l, "cy")))
            .collect();
        let [(x1, y1), (x2, y2), (x4, y4)] = circles[..] else { panic!("{circles:?}") };
        // Pixels are whole.
        assert!(((x4 - x2) - 2.0 * (x2 - x1)).abs() <= 2.0 && ((y4 - y2) - 2.0 * (y2 - y1)).abs() <= 2.0);
        assert!(x1 < x2 && y1 > y2);
    }

    #[test]
    fn what_is_no_memory_is_an_error_with_its_name() {
        for wrong in [-1.0, f64::NAN] {
            let error = draw(&[("candle", 1.0, wrong)]).unwrap_err().to_string();
            assert!(error.contains("candle"), "{error}");
        }
        assert!(draw(&[]).is_err());
    }
}
