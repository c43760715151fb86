//! `evalfw score`: does a scorecard that people wrote add up, and does its decision follow?

use crate::output::print;
use crate::scorecard::{Checked, Scale, check, present, read};
use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// Something is wrong or could not be understood.
const EXIT_WRONG: u8 = 1;

/// Check a hand-written scorecard: totals, winners, ranks and the decision
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  evalfw score decision.md
  evalfw score scores.toml --json | jq '.findings[].text'
  evalfw score survey.md --scale 1..5
  evalfw score decision.md --table 40      the table that begins in line 40, where several have weights and scores

Recomputes each total as the sum of weight · score and holds against it what the file states: weights that do not add up,
totals (8.7 is right for 8.70), winners, ranks and the decision, scores off the scale, missing or double entries, ties
called wins. With a missing score the total is an interval. Then, for each criterion, the weight at which the winner
would change while the other weights keep their proportions: D / (D − d), where d is the winner's lead over the other
option in the criterion and D its lead in the weighted mean of all other criteria.

Markdown: a pipe table with a weight column and a column of scores for each option, or the same with rows and columns
exchanged. It may have rows for totals, ranks and the decision, a column of winners, and contributions, as a column
or in brackets: 9 (2.25). `Decision:`, `Recommendation:` or `Winner:` in the text, or a heading of that name, states the
decision. What is not understood is said, and nothing is guessed.

TOML, by the name *.toml:
  winner = \"candle\"                 # optional
  scale = [0, 10]                   # optional
  [weights]                         # percent, or shares of 1
  speed = 60
  memory = 40
  [options.candle]
  scores = { speed = 9, memory = 8 }
  total = 8.6                       # optional, as rank
  [options.burn]
  scores = { speed = 7, memory = 9 }
  rank = 2
  [winners]                         # optional, by criterion
  speed = \"candle\"

Exit codes: 0 nothing wrong, 1 something is wrong or was not understood, 2 bad input.")]
pub struct ScoreArgs {
    /// A Markdown document, or TOML
    file: PathBuf,
    /// The worst and the best score [default: what the file says, else 0..10]
    #[arg(long, value_name = "LOW..HIGH", value_parser = parse_scale)]
    scale: Option<Scale>,
    /// Line of the table to check, if a document has several with weights and scores
    #[arg(long, value_name = "LINE")]
    table: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn parse_scale(text: &str) -> Result<Scale> {
    let (low, high) = text.split_once("..").context("write it as LOW..HIGH, such as 1..5")?;
    let number = |text: &str| text.trim().parse::<f64>().with_context(|| format!("{text:?} is no number"));
    Scale::new(number(low)?, number(high)?)
}

#[derive(Serialize)]
struct Output<'a> {
    file: String,
    #[serde(flatten)]
    checked: &'a Checked,
}

pub fn run(args: &ScoreArgs) -> Result<ExitCode> {
    let card = read(&args.file, args.scale, args.table)?;
    let checked = check(&card);
    let file = args.file.display().to_string();
    match args.json {
        true => print(&(serde_json::to_string_pretty(&Output { file, checked: &checked })? + "\n"))?,
        false => print(&present::text(&checked, &file))?,
    }
    Ok(if checked.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_WRONG) })
}
