//! A scorecard that people wrote: weights, scores, totals and a decision. What it states is held against what follows
//! from its own weights and scores.

mod balance;
mod check;
mod columns;
mod document;
mod from_markdown;
mod from_toml;
mod labels;
mod names;
mod number;
pub mod present;

pub use balance::{BreakEven, Turn};
pub use check::{Checked, CheckedOption, Interval, check};

use anyhow::{Context, Result, bail};
use number::Figure;
use serde::Serialize;
use std::path::Path;

/// From 0 to 10, where neither the card nor the caller says otherwise.
const DEFAULT_SCALE: Scale = Scale { low: 0.0, high: 10.0 };

/// The worst and the best score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scale {
    pub low: f64,
    pub high: f64,
}

impl Scale {
    pub fn new(low: f64, high: f64) -> Result<Self> {
        if !(low.is_finite() && high.is_finite() && low < high) {
            bail!("scale: {low} to {high} is no range: the first must be below the second");
        }
        Ok(Self { low, high })
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Scorecard {
    pub scale: Scale,
    /// What the weights should add up to: 100 where they are percent, else 1.
    pub unit: f64,
    /// The sum of the weights, where the card states it.
    weight_sum: Option<Figure>,
    pub criteria: Vec<Criterion>,
    pub options: Vec<Candidate>,
    decisions: Vec<Claim>,
    /// What reading the file brought up.
    findings: Vec<Finding>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Criterion {
    pub name: String,
    line: usize,
    /// As written: percent or a share, see [`Scorecard::unit`].
    pub weight: f64,
    winner: Option<Claim>,
}

/// One of the options that are scored.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    pub name: String,
    line: usize,
    /// In the order of the criteria.
    scores: Vec<Score>,
    totals: Vec<Figure>,
    rank: Option<Figure>,
}

#[derive(Debug, Clone, PartialEq)]
struct Score {
    line: usize,
    value: Option<f64>,
    /// Something stands there that was not understood, and a finding says so.
    unread: bool,
    /// Weight times score, where the card states it.
    contribution: Option<Figure>,
}

/// Who is said to be the best.
#[derive(Debug, Clone, PartialEq)]
struct Claim {
    line: usize,
    winner: Winner,
}

#[derive(Debug, Clone, PartialEq)]
enum Winner {
    /// Places among the options.
    Options(Vec<usize>),
    Tie,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    WeightSum,
    Total,
    Contribution,
    OutOfScale,
    MissingScore,
    Duplicate,
    CriterionWinner,
    Decision,
    Rank,
    TieStatedAsWin,
    Undecided,
    NotUnderstood,
    NotChecked,
}

impl Kind {
    pub fn level(self) -> Level {
        match self {
            Self::WeightSum | Self::Total | Self::Contribution => Level::Slip,
            Self::OutOfScale | Self::MissingScore | Self::Duplicate => Level::Slip,
            Self::CriterionWinner | Self::Decision | Self::Rank | Self::TieStatedAsWin => {
                Level::Contradiction
            }
            Self::Undecided | Self::NotUnderstood => Level::Open,
            Self::NotChecked => Level::Note,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Arithmetic or a gap.
    Slip,
    /// What is concluded does not follow.
    Contradiction,
    /// Cannot be told.
    Open,
    /// Left out on purpose.
    Note,
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Self::Slip => "slip",
            Self::Contradiction => "contradiction",
            Self::Open => "open",
            Self::Note => "note",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// In the file, from 1.
    pub line: usize,
    pub level: Level,
    pub kind: Kind,
    pub text: String,
}

impl Finding {
    fn new(line: usize, kind: Kind, text: impl Into<String>) -> Self {
        Self { line, level: kind.level(), kind, text: text.into() }
    }
}

/// Reads `*.toml` as TOML, anything else as Markdown. `table` is the line of the table to take, where a document has
/// several that could be meant.
pub fn read(path: &Path, scale: Option<Scale>, table: Option<usize>) -> Result<Scorecard> {
    let name = || path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(name)?;
    let is_toml = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("toml"));
    match (is_toml, table) {
        (true, Some(_)) => bail!("--table: {} is TOML, which has no tables to choose from", path.display()),
        (true, None) => parse_toml(&text, scale).with_context(name),
        (false, _) => parse_markdown(&text, scale, table).with_context(name),
    }
}

pub fn parse_toml(text: &str, scale: Option<Scale>) -> Result<Scorecard> {
    from_toml::parse(text, scale)?.validated()
}

pub fn parse_markdown(text: &str, scale: Option<Scale>, table: Option<usize>) -> Result<Scorecard> {
    from_markdown::parse(text, scale, table)?.validated()
}

impl Scorecard {
    /// A weighted mean needs weights: without any, or with one below 0, there is nothing to recompute.
    fn validated(self) -> Result<Self> {
        if self.options.is_empty() {
            bail!("there is no option to score");
        }
        for Criterion { name, line, weight, .. } in &self.criteria {
            if !(weight.is_finite() && *weight >= 0.0) {
                bail!("line {line}: {name}: the weight is {weight}, which is below 0 or no number");
            }
        }
        for option in &self.options {
            if let Some(score) = option.scores.iter().find(|s| s.value.is_some_and(|v| !v.is_finite())) {
                bail!("line {}: {}: a score is no finite number", score.line, option.name);
            }
        }
        if self.weight_total() <= 0.0 {
            bail!("weights: none is above 0");
        }
        Ok(self)
    }

    fn weight_total(&self) -> f64 {
        self.criteria.iter().map(|c| c.weight).sum()
    }
}

/// Weights are percent if one is above 1.
fn unit_of(weights: impl IntoIterator<Item = f64>) -> f64 {
    if weights.into_iter().all(|w| w <= 1.0) { 1.0 } else { 100.0 }
}

/// The claim that a text makes, or that it was not understood.
fn claim(text: &str, line: usize, of: &str, options: &[String]) -> Result<Option<Claim>, Box<Finding>> {
    match names::winner(text, options) {
        names::Read::Nothing => Ok(None),
        names::Read::Winner(winner) => Ok(Some(Claim { line, winner })),
        names::Read::Unclear => {
            let text = format!("{of}: “{}” does not say clearly which option is meant", text.trim());
            Err(Box::new(Finding::new(line, Kind::NotUnderstood, text)))
        }
    }
}
