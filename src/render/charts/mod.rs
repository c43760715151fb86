//! Charts as SVG: legible in print and for colour-blind people, the same bytes on any machine.

mod bars;
mod hatch;
mod lines;
mod memory;
mod points;

pub use bars::{acceptability, shares, stacked};
pub use lines::{loss, quality, trend};
pub use memory::memory;
pub use points::predicted;

use super::format::harmless;
use crate::output::steers_a_terminal;
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const WIDTH: u32 = 860;
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

/// The palette of Okabe and Ito (2008), without yellow, which does not print on white.
const PALETTE: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x00, 0x00, 0x00),
];

/// A picture and its place beside the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chart {
    pub kind: Kind,
    /// The model, or the scenario where that brings its own.
    pub subject: String,
    /// Relative to the run's folder.
    pub file: String,
    pub svg: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Memory,
    Loss,
    Quality,
    Trend,
    Stacked,
    Acceptability,
    Shares,
    Predicted,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Loss => "loss",
            Self::Quality => "quality",
            Self::Trend => "trend",
            Self::Stacked => "stacked",
            Self::Acceptability => "acceptability",
            Self::Shares => "shares",
            Self::Predicted => "predicted",
        }
    }
}

/// An engine's place among all engines, so that it looks the same in every chart.
fn style_of(engine: &str, engines: &[&str]) -> usize {
    engines.iter().position(|e| *e == engine).unwrap_or(0)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

/// The chart that `draw` draws. `subject` becomes a part of the file's name.
fn drawn(
    kind: Kind,
    subject: &str,
    title: &str,
    size: (u32, u32),
    draw: impl for<'a> FnOnce(&Area<'a>) -> Drawn<'a>,
) -> Result<Chart> {
    let file = format!("charts/{}-{}.svg", kind.name(), file_name(subject));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        draw(&root).map_err(|e| anyhow!("{file}: {e}"))?;
    }
    // XML has no control characters, and a name may.
    let mut svg = svg.replace(|c: char| steers_a_terminal(c) || matches!(c, '\u{fffe}' | '\u{ffff}'), " ");
    // For readers that do not see the picture.
    let title = format!("<title>{}</title>\n", xml(&harmless(title)));
    if let Some(end) = svg.find(">\n") {
        svg.insert_str(end + 2, &title);
    }
    Ok(Chart { kind, subject: subject.to_owned(), file, svg })
}

fn text_style(size: u32, horizontal: HPos) -> TextStyle<'static> {
    (FONT, size).into_font().color(&INK).pos(Pos::new(horizontal, VPos::Center))
}

/// Where the entries of a legend begin, in lines that hold as many as fit, and how many lines there are.
fn legend_places<'n>(names: impl Iterator<Item = &'n str>, top: i32) -> (Vec<(i32, i32)>, u32) {
    let (mut x, mut line) = (20, 0);
    let mut places = Vec::new();
    for name in names {
        let width = 52 + text_width(name);
        if x > 20 && x + width > WIDTH as i32 {
            (x, line) = (20, line + 1);
        }
        places.push((x, top + line * LEGEND_LINE));
        x += width;
    }
    (places, line as u32 + 1)
}

const LEGEND_LINE: i32 = 24;

/// Pixels that a text of size 16 takes, roughly: nothing here measures fonts.
fn text_width(text: &str) -> i32 {
    9 * text.chars().count() as i32
}

/// File systems take names of 255 bytes.
const LONGEST_NAME: usize = 120;

/// A name as part of a file name.
fn file_name(subject: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    subject.chars().map(safe).take(LONGEST_NAME).collect()
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
