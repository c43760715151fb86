//! The command line.

use crate::cmd::{compare, engines, fit, history, limits, merge, run, score, synth, verify, worker};
use crate::output::note;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

const AFTER_HELP: &str = "\
Examples:
  evalfw run --all                         everything that can run here, on the embedded default
  evalfw run --suite quick --model tiny    does it all work? a minute at most
  evalfw run --engine candle-cpu,burn-flex --model Qwen/Qwen2.5-Coder-1.5B-Instruct
  evalfw report results/20261123-101500-default
  evalfw compare BASE HEAD                 is it faster or slower than before, and is that sure?
  evalfw merge laptop=A server=B --out C   one report, a column for each machine
  evalfw history --metric peak_memory_bytes  how a figure went over the runs in results/
  evalfw score decision.md                 does a hand-written scorecard add up?
  evalfw fit --model 7b --engine candle-cpu-bf16  what fits into 16 GB, by prediction
  evalfw limits                            what this machine can do at best
  evalfw engines                           what can run on this machine, and what is missing

Exit codes: 0 done, 1 a cell failed, a figure got worse or a scorecard is wrong, 2 bad input, 3 inconclusive, 130 interrupted.";

/// Measures fine-tuning frameworks on the hardware at hand and writes the decision report.
#[derive(Parser)]
#[command(version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArgs),
    Report(crate::cmd::report::ReportArgs),
    Compare(compare::CompareArgs),
    Merge(merge::MergeArgs),
    History(history::HistoryArgs),
    Score(score::ScoreArgs),
    Fit(fit::FitArgs),
    Engines(engines::EnginesArgs),
    Limits(limits::LimitsArgs),
    Verify(verify::VerifyArgs),
    Synth(synth::SynthArgs),
    /// Serves one engine on standard input and output. Started by `run`.
    #[command(hide = true)]
    Worker(worker::WorkerArgs),
}

/// Bad input, and whatever else stopped a command before its work was done.
const EXIT_ERROR: u8 = 2;

pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Report(args) => crate::cmd::report::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::History(args) => history::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Fit(args) => fit::run(&args),
        Command::Engines(args) => engines::run(&args),
        Command::Limits(args) => limits::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Synth(args) => synth::run(&args),
        Command::Worker(args) => worker::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            note(&format!("evalfw: {}", message(&error)));
            ExitCode::from(EXIT_ERROR)
        }
    }
}

/// The error and its causes on one line. Some errors tell their cause themselves.
fn message(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
