//! `evalfw synth`: a checkpoint of the exact shapes, with seeded random weights.

use crate::model::presets::Preset;
use crate::model::synth::{self, Outcome, SynthOptions};
use crate::output::print;
use anyhow::{Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::process::ExitCode;

/// Write a checkpoint in the Hugging Face layout: exact shapes, seeded random weights, a tokenizer
#[derive(Args)]
#[command(after_help = after_help())]
pub struct SynthArgs {
    /// Size of the model, e.g. `0.5b` or `qwen2.5-coder-0.5b`
    size: String,
    /// Folder to write; it must not exist or be empty
    dir: PathBuf,
    /// Other seeds give other weights
    #[arg(long, default_value_t = SynthOptions::default().seed)]
    seed: u64,
    /// GB (10^9 bytes) of weights in each safetensors file
    #[arg(long, default_value_t = 5.0)]
    max_shard_gb: f64,
}

fn after_help() -> String {
    format!(
        "Sizes:\n{}\n\nExamples:\n  evalfw synth tiny models/tiny\n  evalfw synth 7b models/7b --seed 7",
        Preset::table()
    )
}

pub fn run(args: &SynthArgs) -> Result<ExitCode> {
    let preset = Preset::parse(&args.size)?;
    if !(args.max_shard_gb.is_finite() && args.max_shard_gb > 0.0) {
        bail!("--max-shard-gb {} is not above 0", args.max_shard_gb);
    }
    let options = SynthOptions { seed: args.seed, max_shard_bytes: (args.max_shard_gb * 1e9) as u64 };
    let bar = ProgressBar::new(preset.checkpoint_bytes());
    if let Ok(style) =
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
    {
        bar.set_style(style);
    }
    bar.set_message(preset.name.clone());
    let outcome = synth::write(&preset, &args.dir, &options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let dir = args.dir.display();
    print(&match outcome {
        Outcome::Written => format!("wrote {} to {dir}\n", preset.name),
        Outcome::AlreadyThere => format!("{dir} already holds {} of this seed\n", preset.name),
    })?;
    Ok(ExitCode::SUCCESS)
}
