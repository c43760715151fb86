//! `evalfw limits`: what this machine can do at best.

use crate::folders::cache_dir;
use crate::measure::limits::HostLimits;
use crate::output::print;
use crate::render::format::significant;
use crate::render::terminal;
use anyhow::{Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Measure what this machine can do at best: memory, matrix products, files
#[derive(Args)]
#[command(after_help = "\
Every run measures this once, and its report sets each speed beside it. Takes some seconds.

Examples:
  evalfw limits
  evalfw limits --json | jq .f32_flops")]
pub struct LimitsArgs {
    /// Where the file for the disk's rate is made [default: evalfw's cache, where models are]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Print JSON, in bytes and operations per second
    #[arg(long)]
    json: bool,
}

pub fn run(args: &LimitsArgs) -> Result<ExitCode> {
    let folder = match &args.folder {
        Some(folder) if folder.is_dir() => folder.clone(),
        Some(folder) => bail!("--folder {}: is not a folder", folder.display()),
        None => cache_dir()?,
    };
    let limits = HostLimits::measure(&folder)?;
    let text = if args.json { serde_json::to_string_pretty(&limits)? } else { table(&limits) };
    print(&(text + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn table(limits: &HostLimits) -> String {
    let rows = limits.named().map(|(name, rate, unit)| {
        let shown = rate.map_or("not here".to_owned(), |rate| format!("{} {unit}", significant(rate / 1e9)));
        [name.to_owned(), shown]
    });
    let threads = format!("{} threads", limits.threads);
    terminal::table(&["limit", &threads], 1..2, rows)
}
