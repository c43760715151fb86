//! `evalfw engines check` and `schema`: for those who write an engine.

use crate::conformance::{Conformance, check};
use crate::engines::{Engine, EnginesFile, Registry};
use crate::interrupt;
use crate::output::{note, print};
use crate::worker::WorkerCommand;
use anyhow::{Context, Result};
use clap::Args;
use comfy_table::{ContentArrangement, Table, presets};
use evalfw_engine::protocol::schema as of_protocol;
use std::process::ExitCode;

/// Try a command of your own against the worker protocol (backends/PROTOCOL.md), rule by rule, then its numbers
#[derive(Args)]
#[command(after_help = "\
Examples:
  evalfw engines check python3 my_engine.py
  evalfw engines check peft
  evalfw engines check --json ./my-engine --fast | jq '.findings[] | select(.held | not)'

Exit codes: 0 every rule holds and the numbers are right, 1 something is missing or wrong, 2 bad input.")]
pub struct CheckArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engines_file: EnginesFile,
    /// Program and arguments, or the name of an engine
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Print the JSON Schema of the worker protocol
#[derive(Args)]
pub struct SchemaArgs {}

pub fn schema() -> Result<ExitCode> {
    print(&(serde_json::to_string_pretty(&of_protocol())? + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

pub fn run(args: &CheckArgs) -> Result<ExitCode> {
    interrupt::install()?;
    let registry = args.engines_file.registry()?;
    let command = command(&registry, &args.command)?;
    let conformance = check(&command, &mut |rule| {
        if !args.json {
            note(&format!("… {rule}"));
        }
    })?;
    match args.json {
        true => print(&(serde_json::to_string_pretty(&conformance)? + "\n"))?,
        false => print(&text(&conformance))?,
    }
    Ok(if conformance.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn command(registry: &Registry, words: &[String]) -> Result<WorkerCommand> {
    if let ([name], Ok(Engine::External(_) | Engine::BuiltIn(_))) = (words, registry.find(&words[0])) {
        return registry.workers().of_engine(name).context("where is this program?");
    }
    let (program, arguments) = words.split_first().context("no command")?;
    Ok(WorkerCommand {
        program: program.into(),
        arguments: arguments.iter().map(Into::into).collect(),
        environment: Vec::new(),
        agent: false,
    })
}

fn text(conformance: &Conformance) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["section of PROTOCOL.md", "rule", "", "seen"]);
    for finding in &conformance.findings {
        let held = if finding.held { "ok" } else { "NO" };
        table.add_row([finding.section, finding.rule, held, &finding.seen]);
    }
    let broken = conformance.findings.iter().filter(|finding| !finding.held).count();
    let conclusion = match (&conformance.numbers, broken) {
        (Some(verdict), _) => verdict.summary(),
        (None, 0) => "the numbers were not looked at".to_owned(),
        (None, broken) => format!("{broken} of the rules tried do not hold; the numbers come after them"),
    };
    format!("{table}\n{conclusion}\n")
}
