//! `evalfw engines check` and `schema`: for those who write an engine.

use crate::conformance::{Conformance, check};
use crate::engines::{Engine, EnginesFile, Registry};
use crate::interrupt;
use crate::output::{note, print};
use crate::worker::WorkerCommand;
use anyhow::{Context, Result, bail};
use clap::Args;
use comfy_table::{ContentArrangement, Table, presets};
use evalfw_engine::protocol::schema as of_protocol;
use std::path::Path;
use std::process::ExitCode;

/// Try a command of your own against the worker protocol (backends/PROTOCOL.md), rule by rule, then its numbers
#[derive(Args)]
#[command(after_help = "\
Examples:
  evalfw engines check python3 my_engine.py
  evalfw engines check peft
  evalfw engines check --json ./my-engine --fast | jq '.findings[] | select(.held | not)'

Exit codes: 0 every rule holds and the numbers are right, 1 something is missing or wrong, 2 bad input, 130
interrupted.")]
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
    if interrupt::requested() {
        note("interrupted");
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    }
    match args.json {
        true => print(&(serde_json::to_string_pretty(&conformance)? + "\n"))?,
        false => print(&text(&conformance))?,
    }
    Ok(if conformance.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn command(registry: &Registry, words: &[String]) -> Result<WorkerCommand> {
    let (program, arguments) = words.split_first().context("no command")?;
    match registry.find(program) {
        Ok(Engine::External(_) | Engine::BuiltIn(_)) if arguments.is_empty() => {
            return registry.workers().of_engine(program).context("where is this program?");
        }
        Ok(_) => bail!("{program} is an engine by its name, which takes no arguments"),
        Err(_) if !is_program(program) && Path::new(program).components().count() > 1 => {
            bail!("there is no program {program}")
        }
        Err(no_engine) if !is_program(program) => {
            return Err(no_engine.context(format!("{program} is no program on PATH")));
        }
        Err(_) => {}
    }
    Ok(WorkerCommand {
        program: program.into(),
        arguments: arguments.iter().map(Into::into).collect(),
        environment: Vec::new(),
        agent: false,
    })
}

/// Whether there is such a file, on PATH where the word has no folder.
fn is_program(word: &str) -> bool {
    let path = Path::new(word);
    if path.components().count() > 1 {
        return path.exists();
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let names = [word.to_owned(), format!("{word}{}", std::env::consts::EXE_SUFFIX)];
    std::env::split_paths(&folders).any(|folder| names.iter().any(|name| folder.join(name).is_file()))
}

fn text(conformance: &Conformance) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["section of PROTOCOL.md", "rule", "", "seen"]);
    for finding in &conformance.findings {
        let held = match (finding.held, finding.tried) {
            (true, _) => "ok",
            (false, true) => "NO",
            (false, false) => "-",
        };
        table.add_row([finding.section, finding.rule, held, &finding.seen]);
    }
    let count = |tried| conformance.findings.iter().filter(|f| !f.held && f.tried == tried).count();
    let conclusion = match (&conformance.unavailable, &conformance.numbers, count(true)) {
        (Some(why), ..) => format!("it cannot run here, and says so as it has to: {why}"),
        (_, Some(verdict), _) => verdict.summary(),
        (_, None, broken) => {
            let verb = if broken == 1 { "rule does" } else { "rules do" };
            let not_tried = match count(false) {
                0 => String::new(),
                n => format!(", and {n} could not be tried"),
            };
            format!("{broken} {verb} not hold{not_tried}; numbers are compared once all hold")
        }
    };
    format!("{table}\n{conclusion}\n")
}
