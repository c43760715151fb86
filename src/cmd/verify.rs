//! `evalfw verify`: holds the engines against the independent reference, or, on a model that has none, against each other.

use crate::engines::{self, EnginesFile, Registry};
use crate::model::{Context as ModelContext, ModelSource};
use crate::output::{note, print};
use crate::record::Outcome;
use crate::verify::agreement::across;
use crate::verify::derived::derive;
use crate::verify::reference::Reference;
use crate::verify::{Check, Scope, Verdict, verify};
use crate::worker::Workers;
use anyhow::{Result, bail};
use clap::Args;
use comfy_table::{Table, presets};
use std::path::PathBuf;
use std::process::ExitCode;

const AFTER_HELP: &str = "\
Examples:
  evalfw verify
  evalfw verify --engine candle-cpu,burn-flex
  evalfw verify --model 0.5b-2layers --engine burn-wgpu    real widths, against candle-cpu
  evalfw verify --json | jq '.[] | .checks[] | select(.passed | not)'

The GPU of burn-wgpu passes its self-check anew. The reference was made by transformers, peft and bitsandbytes; tests/reference/README.md says how.
Where more than one engine ran, the last entry compares their NF4 losses with each other.
In JSON a deviation beyond all numbers (NaN, a value that is missing) is null, and `detail` says where.
Exit codes: 0 all hold, 1 an engine is wrong or broke off, 2 bad input.";

/// Check every engine against reference losses, logits and gradients
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct VerifyArgs {
    /// Only these engines [default: all that can run here]
    #[arg(long, value_delimiter = ',', value_name = "E,…")]
    engine: Vec<String>,
    /// One model and the first steps of each training curve, as `run` does before it measures
    #[arg(long)]
    short: bool,
    /// Another reference: a folder with manifest.json and golden/
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// A model without golden files: what `--against` computes of it is the reference, after that engine itself
    /// held against the golden files. The scope is that of --short
    #[arg(long, value_name = "DIR|ORG/NAME|SIZE", conflicts_with_all = ["reference", "short"])]
    model: Option<String>,
    /// The engine that the others are held against on --model
    #[arg(long, default_value = "candle-cpu", value_name = "E", requires = "model")]
    against: String,
    #[command(flatten)]
    engines_file: EnginesFile,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let registry = args.engines_file.registry()?;
    for name in &args.engine {
        registry.find(name)?;
    }
    let workers = registry.workers();
    let named = !args.engine.is_empty();
    let mut names: Vec<&str> = match named {
        true => args.engine.iter().map(String::as_str).collect(),
        false => registry.of_verification(),
    };
    let mut scope = if args.short { Scope::Short } else { Scope::Full };
    let reference = match (&args.model, &args.reference) {
        (Some(model), _) => {
            // Against itself it would always hold.
            names.retain(|name| *name != args.against);
            if names.is_empty() {
                bail!("{} is what the others are held against; name another engine", args.against);
            }
            scope = Scope::Short;
            derived(model, &args.against, &registry, &workers)?
        }
        (None, Some(folder)) => Reference::read(folder)?,
        (None, None) => Reference::built_in()?,
    };
    engines::forget_self_checks(&names)?;
    let mut verdicts = Vec::new();
    for engine in names {
        let verdict = verify(engine, &workers.of_engine(engine)?, &reference, scope);
        if verdict.outcome == Outcome::Unavailable && !named {
            continue;
        }
        if !args.json {
            show(&verdict)?;
        }
        verdicts.push(verdict);
    }
    if verdicts.is_empty() {
        bail!("none of the engines can run here; `evalfw engines` says what is missing");
    }
    if let Some(agreement) = across(&verdicts) {
        if !args.json {
            show(&agreement)?;
        }
        verdicts.push(agreement);
    }
    if args.json {
        print(&(serde_json::to_string_pretty(&verdicts)? + "\n"))?;
    }
    let all = verdicts.iter().all(Verdict::passed);
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the engine `against` computes of a model, if it holds against the golden files itself.
fn derived(model: &str, against: &str, registry: &Registry, workers: &Workers) -> Result<Reference> {
    registry.find(against)?;
    let command = workers.of_engine(against)?;
    let verdict = verify(against, &command, &Reference::built_in()?, Scope::Short);
    let exact = verdict.tolerances.is_some_and(|tolerances| tolerances.compute_dtype == "f32");
    if !(verdict.passed() && exact) {
        bail!("nothing can be held against {against}, which must compute in f32: {}", verdict.summary());
    }
    note(&format!("{against}: {}; it is the reference now", verdict.summary()));
    let model = ModelSource::resolve(model, &mut ModelContext::from_env(&mut note)?)?;
    derive(&command, &model.name, &model.dir)
}

fn show(verdict: &Verdict) -> Result<()> {
    let mut text = format!("{}: {}: {}\n", verdict.engine, verdict.outcome.as_str(), verdict.summary());
    if let Some(tolerances) = &verdict.tolerances {
        text += &format!("Tolerances for {}: {}.\n", tolerances.compute_dtype, tolerances.reason);
    }
    if !verdict.checks.is_empty() {
        text += &format!("{}\n\n", table(&verdict.checks));
    }
    print(&text)
}

fn table(checks: &[Check]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
        "model",
        "check",
        "deviation",
        "tolerance",
        "",
        "where",
    ]);
    for check in checks {
        table.add_row([
            check.model.clone(),
            check.name.clone(),
            format!("{:.1e}", check.deviation),
            format!("{:e}", check.tolerance),
            if check.passed { "ok" } else { "WRONG" }.to_owned(),
            check.detail.clone(),
        ]);
    }
    table
}
