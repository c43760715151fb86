//! `evalfw fit`: what fits into memory, by prediction, and how far predictions are from what was measured.

use crate::fit::search::{largest_batch, longest_sequence};
use crate::fit::{Checked, InferJob, Job, Prediction, TrainJob, check, engines, predict, records};
use crate::model::ModelSource;
use crate::output::print;
use crate::render::format::{gb, harmless};
use crate::render::terminal;
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::protocol;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// Predict peak memory by component, find the longest sequence that fits, or hold predictions against a record
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  evalfw fit --model 7b --engine candle-cpu-bf16 --sequence 2048           what training takes, by component
  evalfw fit --model 7b --engine candle-cpu-bf16                           the longest sequence in 16 GB
  evalfw fit --model 14b --engine burn-wgpu --batch 2 --target-gb 24
  evalfw fit --model 7b --engine burn-flex --sequence 4096 --infer         a prompt of 4096 tokens
  evalfw fit --model ./my-model --engine burn-flex --sequence 1024 --json | jq .prediction.total_bytes
  evalfw fit --check results/20261128-093644-default                       predicted against measured, cell by cell
  evalfw fit --check results/20261128-* results/peers/20261128-* --tolerance 10

GB is 10^9 bytes. On the CPU it is the memory of the worker's process tree, on a GPU that of the GPU. A position without
a loss makes the logits smaller: without --trained-tokens, as many as are held together have one. Checkpoints are taken
to be in 16 bits. A cell is held against the engine as it was when the cell was measured.

Exit codes: 0 done, 1 with --check: a cell is off by more than the tolerance, 2 bad input or no prediction.")]
pub struct FitArgs {
    /// A preset's size, such as 7b, or a Hugging Face folder
    #[arg(long, required_unless_present = "check")]
    model: Option<String>,
    /// An engine with a model of its memory
    #[arg(long, required_unless_present = "check")]
    engine: Option<String>,
    /// Slots of a row; without it, the longest that fits is found
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    sequence: Option<u64>,
    /// Rows of a micro-batch
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    /// Of the adapter
    #[arg(long, default_value_t = 16, value_name = "R", value_parser = clap::value_parser!(u64).range(1..))]
    rank: u64,
    #[arg(long, value_enum, default_value_t = Quantization::Nf4)]
    quantization: Quantization,
    /// Keep the graph of all blocks
    #[arg(long)]
    no_checkpointing: bool,
    /// Memory for activations that checkpointing may keep, as in a scenario
    #[arg(long, default_value_t = 0.4, value_name = "GB")]
    kept_activations_gb: f64,
    /// Train without dropout, which has masks in memory
    #[arg(long)]
    no_dropout: bool,
    /// Positions of a micro-batch with a loss, if fewer than all
    #[arg(long, value_name = "N")]
    trained_tokens: Option<u64>,
    /// Generate instead, after a prompt of --sequence tokens
    #[arg(long, requires = "sequence")]
    infer: bool,
    /// Tokens to generate with --infer
    #[arg(long, default_value_t = 64, value_name = "N")]
    generate: u64,
    /// What it has to fit into
    #[arg(long, default_value_t = 16.0, value_name = "GB")]
    target_gb: f64,
    /// Hold predictions against the cells of these runs, or folders of results/peers
    #[arg(long, num_args = 1.., value_name = "RUN", conflicts_with_all = ["model", "engine", "sequence", "infer"])]
    check: Vec<PathBuf>,
    /// With --check: how far a prediction may be off, in percent
    #[arg(long, default_value_t = 5.0, value_name = "PERCENT")]
    tolerance: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Quantization {
    Nf4,
    None,
}

impl From<Quantization> for protocol::Quantization {
    fn from(quantization: Quantization) -> Self {
        match quantization {
            Quantization::Nf4 => Self::Nf4,
            Quantization::None => Self::None,
        }
    }
}

/// Lengths for the table without --sequence.
const LENGTHS: [u64; 7] = [512, 1024, 2048, 4096, 8192, 16_384, 32_768];

pub fn run(args: &FitArgs) -> Result<ExitCode> {
    at_least_zero("--tolerance", args.tolerance)?;
    at_least_zero("--target-gb", args.target_gb)?;
    at_least_zero("--kept-activations-gb", args.kept_activations_gb)?;
    match (&args.model, &args.engine) {
        (Some(model), Some(engine)) => plan(args, model, engine),
        _ => hold_against_records(args),
    }
}

fn at_least_zero(name: &str, value: f64) -> Result<()> {
    if !(value.is_finite() && value >= 0.0) {
        bail!("{name} is {value} (a number that is not negative)");
    }
    Ok(())
}

/// What a plan is about.
struct Plan<'a> {
    model: &'a str,
    engine: &'a str,
    config: ModelConfig,
    target_bytes: u64,
}

fn plan(args: &FitArgs, model: &str, engine: &str) -> Result<ExitCode> {
    if !crate::engines::ENGINES.iter().any(|known| known.name == engine) {
        bail!("--engine {}: unknown (there is a model of {})", harmless(engine), engines::names());
    }
    let plan = Plan { model, engine, config: shape_of(model)?, target_bytes: (args.target_gb * 1e9) as u64 };
    let longest = plan.config.max_position_embeddings as u64;
    match args.sequence {
        Some(sequence) if sequence > longest => {
            bail!("--sequence {sequence} is above max_position_embeddings of {model}, which is {longest}")
        }
        Some(sequence) if args.infer => one(args, &plan, &Job::Infer(infer_job(args, sequence, longest)?)),
        Some(sequence) => one(args, &plan, &Job::Train(train_job(args, sequence))),
        None => lengths(args, &plan),
    }
}

fn shape_of(model: &str) -> Result<ModelConfig> {
    match ModelSource::parse(model)? {
        ModelSource::Preset(preset) => Ok(preset.config),
        ModelSource::Folder(folder) => Ok(ModelConfig::read(&folder)?),
        ModelSource::Hub(id) => {
            bail!("--model {id}: not on this disk; give a preset's size or a folder with its config.json")
        }
    }
}

fn train_job(args: &FitArgs, sequence: u64) -> TrainJob {
    TrainJob {
        quantization: args.quantization.into(),
        sequence,
        batch: args.batch,
        rank: args.rank,
        dropout: !args.no_dropout,
        gradient_checkpointing: !args.no_checkpointing,
        kept_activations_bytes: (args.kept_activations_gb * 1e9) as u64,
        trained_tokens: args.trained_tokens,
    }
}

fn infer_job(args: &FitArgs, prompt_tokens: u64, longest: u64) -> Result<InferJob> {
    if prompt_tokens.saturating_add(args.generate) > longest {
        bail!(
            "{prompt_tokens} tokens and {} more are above max_position_embeddings {longest}",
            args.generate
        );
    }
    let quantization = args.quantization.into();
    Ok(InferJob { quantization, prompt_tokens, generated_tokens: args.generate, prompts: 2 })
}

/// One job: what it takes.
#[derive(Serialize)]
struct One<'a> {
    model: &'a str,
    engine: &'a str,
    prediction: &'a Prediction,
    target_bytes: u64,
    fits: bool,
    /// Of training jobs: the largest that fits.
    largest_batch: Option<u64>,
}

fn one(args: &FitArgs, plan: &Plan<'_>, job: &Job) -> Result<ExitCode> {
    let prediction = predict(plan.engine, &plan.config, job)?;
    let largest_batch = match job {
        Job::Train(job) => Some(largest_batch(plan.engine, &plan.config, job, plan.target_bytes)?),
        _ => None,
    };
    let fits = prediction.total_bytes <= plan.target_bytes;
    let Plan { model, engine, target_bytes, .. } = *plan;
    let one = One { model, engine, prediction: &prediction, target_bytes, fits, largest_batch };
    match args.json {
        true => print(&(serde_json::to_string_pretty(&one)? + "\n"))?,
        false => print(&text_of_one(args, &one))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn text_of_one(args: &FitArgs, one: &One<'_>) -> String {
    let prediction = one.prediction;
    let megabytes = |bytes: u64| format!("{:.1}", bytes as f64 / 1e6);
    let share = |bytes: u64| format!("{:.1} %", 100.0 * bytes as f64 / prediction.total_bytes as f64);
    let parts = prediction.components.iter().map(|part| (part.name, part.bytes));
    let rows = parts.chain([("total", prediction.total_bytes)]);
    let rows = rows.map(|(name, bytes)| [name.to_owned(), megabytes(bytes), share(bytes)]);
    let mut text = format!(
        "{} on {}: peak of the {}, in {}\n{}\n",
        harmless(one.model),
        one.engine,
        memory_of(prediction.is_device),
        prediction.at,
        terminal::table(&["component", "MB", "share"], 1..3, rows)
    );
    let total = gb(prediction.total_bytes as f64);
    let verdict = if one.fits { "fits into" } else { "does not fit into" };
    text += &format!("{total} GB {verdict} {} GB\n", args.target_gb);
    if let Some(batch) = one.largest_batch {
        text += &match batch {
            0 => "not even a batch of 1 fits\n".to_owned(),
            batch => format!("the largest batch that fits: {batch}\n"),
        };
    }
    text += &format!("measured constants: {}\n", prediction.calibrated);
    if let Some(caveat) = prediction.caveat {
        text += &format!("{caveat}\n");
    }
    text
}

fn memory_of(is_device: bool) -> &'static str {
    if is_device { "GPU's memory" } else { "process's memory" }
}

/// What fits over all lengths.
#[derive(Serialize)]
struct Lengths<'a> {
    model: &'a str,
    engine: &'a str,
    is_device: bool,
    target_bytes: u64,
    batch: u64,
    /// 0: not even one token fits.
    longest_sequence: u64,
    /// Of the model.
    max_position_embeddings: u64,
    lengths: Vec<Length>,
    #[serde(skip_serializing_if = "Option::is_none")]
    caveat: Option<&'static str>,
}

#[derive(Serialize)]
struct Length {
    sequence: u64,
    total_bytes: u64,
    fits: bool,
    /// 0: none fits.
    largest_batch: u64,
}

fn lengths(args: &FitArgs, plan: &Plan<'_>) -> Result<ExitCode> {
    let Plan { model, engine, ref config, target_bytes } = *plan;
    let longest_sequence = longest_sequence(engine, config, &train_job(args, 1), target_bytes)?;
    let max_position_embeddings = config.max_position_embeddings as u64;
    let mut lengths = Vec::new();
    let (mut is_device, mut caveat) = (false, None);
    for sequence in LENGTHS.into_iter().filter(|&sequence| sequence <= max_position_embeddings) {
        let job = train_job(args, sequence);
        let largest_batch = largest_batch(engine, config, &job, target_bytes)?;
        let prediction = predict(engine, config, &Job::Train(job))?;
        (is_device, caveat) = (prediction.is_device, prediction.caveat);
        let total_bytes = prediction.total_bytes;
        lengths.push(Length { sequence, total_bytes, fits: total_bytes <= target_bytes, largest_batch });
    }
    let batch = args.batch;
    let all = Lengths {
        model,
        engine,
        is_device,
        target_bytes,
        batch,
        longest_sequence,
        max_position_embeddings,
        lengths,
        caveat,
    };
    match args.json {
        true => print(&(serde_json::to_string_pretty(&all)? + "\n"))?,
        false => print(&text_of_lengths(args, &all))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn text_of_lengths(args: &FitArgs, all: &Lengths<'_>) -> String {
    let (model, engine, target) = (harmless(all.model), all.engine, args.target_gb);
    let mut text = match all.longest_sequence {
        0 => format!("{model} on {engine}: not even one token fits into {target} GB\n"),
        longest => {
            let whole = if longest == all.max_position_embeddings { ", the model's longest" } else { "" };
            format!(
                "{model} on {engine}: the longest sequence in {target} GB is {longest}{whole} (batch {})\n",
                all.batch
            )
        }
    };
    let yes_no = |fits| if fits { "yes" } else { "no" }.to_owned();
    let rows = all.lengths.iter().map(|length| {
        [
            length.sequence.to_string(),
            gb(length.total_bytes as f64),
            yes_no(length.fits),
            length.largest_batch.to_string(),
        ]
    });
    if !all.lengths.is_empty() {
        let header =
            ["sequence", &format!("GB of the {}", memory_of(all.is_device)), "fits", "largest batch"];
        text += &(terminal::table(&header, 0..4, rows) + "\n");
    }
    if let Some(caveat) = all.caveat {
        text += &format!("{caveat}\n");
    }
    text
}

/// All cells, and what to conclude.
#[derive(Serialize)]
struct Report<'a> {
    cells: &'a [Checked],
    tolerance_percent: f64,
    /// The cell that is off the most.
    worst: Option<&'a Checked>,
    /// Cells with both figures.
    compared: usize,
    /// Those of them that are off by more than the tolerance.
    off: usize,
}

fn hold_against_records(args: &FitArgs) -> Result<ExitCode> {
    let mut cells = Vec::new();
    for path in &args.check {
        cells.extend(check(&records::read(path)?));
    }
    let errors = || cells.iter().filter_map(|cell| Some((cell, cell.error?.abs())));
    let off = errors().filter(|(_, error)| 100.0 * error > args.tolerance).count();
    let worst = errors().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(cell, _)| cell);
    let (compared, tolerance_percent) = (errors().count(), args.tolerance);
    let report = Report { cells: &cells, tolerance_percent, worst, compared, off };
    match args.json {
        true => print(&(serde_json::to_string_pretty(&report)? + "\n"))?,
        false => print(&text_of_report(&report))?,
    }
    Ok(if off > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text_of_report(report: &Report<'_>) -> String {
    let megabytes = |bytes: Option<u64>| bytes.map_or("-".to_owned(), |b| format!("{:.0}", b as f64 / 1e6));
    let percent = |error: f64| format!("{:+.1} %", 100.0 * error);
    let rows = report.cells.iter().map(|cell| {
        let is_off = cell.error.is_some_and(|error| 100.0 * error.abs() > report.tolerance_percent);
        [
            harmless(&cell.cell),
            megabytes(cell.predicted),
            megabytes(cell.measured),
            cell.error.map_or("-".to_owned(), percent),
            if is_off { "off" } else { "" }.to_owned(),
            harmless(cell.note.as_deref().unwrap_or_default()),
        ]
    });
    let header = ["cell", "predicted MB", "measured MB", "error", "", "note"];
    let mut text = terminal::table(&header, 1..4, rows) + "\n";
    if let Some((worst, error)) = report.worst.and_then(|worst| Some((worst, worst.error?))) {
        text += &format!("worst: {} with {}\n", harmless(&worst.cell), percent(error));
    }
    text += &format!(
        "{} of {} cells with both figures are off by more than {} %\n",
        report.off, report.compared, report.tolerance_percent
    );
    text
}
