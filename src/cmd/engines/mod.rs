//! `evalfw engines`: what can run here, and what is missing; installs engines and checks those of your own.

mod check;
mod install;
mod list;

use crate::engines::EnginesFile;
use anyhow::Result;
use clap::{Args, Subcommand};
use std::process::ExitCode;

const AFTER_HELP: &str = "\
Examples:
  evalfw engines                                    what can run here, and what is missing
  evalfw engines --json | jq '.[] | select(.available)'
  evalfw engines install peft                       transformers + peft + bitsandbytes, in an environment of its own
  evalfw engines remove peft
  evalfw engines check python3 my_engine.py         does it speak the protocol?
  evalfw run --engines-file my/engines.toml --engine my-engine";

/// List every engine and device, whether it can run here, and what to install if not
#[derive(Args)]
#[command(after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
pub struct EnginesArgs {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    engines_file: EnginesFile,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    Install(install::InstallArgs),
    Remove(install::RemoveArgs),
    Check(check::CheckArgs),
    Schema(check::SchemaArgs),
}

pub fn run(args: &EnginesArgs) -> Result<ExitCode> {
    match &args.command {
        None => list::run(&args.engines_file.registry()?, args.json),
        Some(Command::Install(args)) => install::install(args),
        Some(Command::Remove(args)) => install::remove(args),
        Some(Command::Check(args)) => check::run(args),
        Some(Command::Schema(_)) => check::schema(),
    }
}
