//! `evalfw run`: the main job. Everything that can be wrong with the input is found before the first
//! model is loaded.

use crate::compare::sameness::is_same_machine;
use crate::data::dataset::Dataset;
use crate::decide::criteria::Criteria;
use crate::engines::{EnginesFile, Registry};
use crate::interrupt;
use crate::measure::host::Environment;
use crate::output::{note, print};
use crate::record::{self, CellRecord, ModelRecord, Outcome, RunLog, record_folder};
use crate::render;
use crate::run::cell::WorkerExecutor;
use crate::run::execute;
use crate::run::prepare::{Prepared, prepare};
use crate::run::progress::Progress;
use crate::run::settings::Settings;
use crate::scenario::{Library, Suite};
use crate::worker::{Launcher, Workers};
use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::FalseyValueParser;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const AFTER_HELP: &str = "\
Examples:
  evalfw run --all
  evalfw run --suite quick --model tiny
  evalfw run --engine candle-cpu,burn-flex --scenario train --model Qwen/Qwen2.5-Coder-0.5B-Instruct
  evalfw run --suite default --scenario train --repetitions 6      enough to compare commits with
  evalfw run --launcher 'srun -n1 --unbuffered' --suite large      every cell is a job of a cluster
  evalfw run --resume results/20261123-101500-default

With --launcher every worker is started through it: besides one for each cell, some before the first cell, in which each
engine is probed and held against the reference and the machine is looked at. The paths of this program, of the model and of the temporary folder (TMPDIR) must be the same on the
worker's side; an agent there observes memory and machine. Ctrl-C once ends the cell and the run, twice at once.

Exit codes: 0 all cells ok, 1 a cell failed, 2 bad input, 130 interrupted.";

/// Run scenarios on engines, record every sample, write the report
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct RunArgs {
    /// Every engine that can run here (the default)
    #[arg(long, conflicts_with = "engine")]
    all: bool,
    /// Only these engines
    #[arg(long, value_delimiter = ',', value_name = "E,…")]
    engine: Vec<String>,
    /// Only the suite's cells of these scenarios
    #[arg(long, value_delimiter = ',', value_name = "S,…")]
    scenario: Vec<String>,
    /// quick, ci, default, frameworks, full, large, gpu, long, stock, or a file of your own under scenarios/suites
    #[arg(long, default_value = "default")]
    suite: String,
    /// A Hugging Face folder, a hub id, or a size to make with random weights (tiny, 0.5b, … 32b)
    #[arg(long, value_name = "DIR|ORG/NAME|SIZE")]
    model: Option<String>,
    /// Folder for runs and the report
    #[arg(long, default_value = "results", value_name = "DIR")]
    out: PathBuf,
    /// Continue an interrupted run: cells that are ok are kept
    #[arg(long, value_name = "RUN", conflicts_with_all = ["all", "engine", "scenario", "suite", "model", "out", "data", "threads", "scenarios", "repetitions", "launcher", "launcher_program"])]
    resume: Option<PathBuf>,
    /// Folder with train.jsonl and valid.jsonl, in the chat `messages` form
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Threads of CPU engines [default: one per logical core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Processes for each cell, instead of what the suite says; `evalfw compare` wants three and likes six
    #[arg(long, value_name = "N")]
    repetitions: Option<u32>,
    /// How often a cell is repeated that was disturbed, by other processes, heat, swapping and the like [default: 2]
    #[arg(long, value_name = "N", env = "EVALFW_REPEAT_DISTURBED")]
    repeat_disturbed: Option<u32>,
    /// Do not measure what the machine can do at best
    #[arg(long, env = "EVALFW_NO_LIMITS", value_parser = FalseyValueParser::new())]
    no_limits: bool,
    /// Start workers through another command, such as `srun -n1 --unbuffered`, `ssh host` or `docker run -i image`
    #[arg(long, value_name = "CMD")]
    launcher: Option<String>,
    /// evalfw on the worker's side [default: at the same path as here]
    #[arg(long, value_name = "PATH", requires = "launcher")]
    launcher_program: Option<PathBuf>,
    /// Folder of scenario files [default: ./scenarios if it is there, else the built-in ones]
    #[arg(long, value_name = "DIR")]
    scenarios: Option<PathBuf>,
    #[command(flatten)]
    engines_file: EnginesFile,
    /// Print the run's record as JSON on standard output
    #[arg(long)]
    json: bool,
}

pub fn run(args: &RunArgs) -> Result<ExitCode> {
    interrupt::install()?;
    let (settings, resumed) = match &args.resume {
        Some(run) => {
            if !run.exists() {
                bail!("--resume {}: no such folder", run.display());
            }
            let folder = record_folder(run);
            (resumed_settings(args, &folder)?, Some(folder))
        }
        None => (settings(args)?, None),
    };
    let resumed = resumed.as_deref();
    let data = match &settings.data {
        Some(folder) => Dataset::read(folder)?,
        None => Dataset::built_in()?,
    };
    let root = match resumed {
        Some(folder) => folder.parent().unwrap_or(Path::new("")).to_owned(),
        None => args.out.clone(),
    };
    std::fs::create_dir_all(&root).with_context(|| format!("{}: cannot be written", root.display()))?;
    let earlier = resumed.map_or(Ok(Vec::new()), earlier_records)?;

    let progress = Progress::new();
    let Some(prepared) = prepare(&settings, &data, &progress)? else {
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    };
    let Prepared { context, cells, unavailable, inputs } = prepared;
    check_same_models(&earlier, &context.models)?;
    check_same_machine(&earlier, &context.environment)?;
    let folder = match resumed {
        Some(folder) => folder.to_owned(),
        None => new_run_folder(&root, &settings)?,
    };
    // Also of a resumed run: logs are not kept under version control.
    let logs = folder.join("logs");
    std::fs::create_dir_all(&logs).with_context(|| format!("{}: cannot be written", logs.display()))?;
    let mut log = RunLog::open(&folder)?;
    let done: BTreeSet<String> =
        earlier.iter().filter(|r| r.outcome == Outcome::Ok).map(|r| r.cell.clone()).collect();
    for (cell, reason) in &unavailable {
        let row = context.unavailable(cell, reason);
        // What was measured stays, even if the engine cannot run any more.
        let settled =
            |r: &CellRecord| r.cell == row.cell && matches!(r.outcome, Outcome::Ok | Outcome::Unavailable);
        if !earlier.iter().any(settled) {
            log.append(&row)?;
        }
    }
    let mut executor = WorkerExecutor { models: inputs, logs, workers: settings.workers.clone() };
    execute(&context, &cells, &done, &mut executor, &mut log, &progress)?;
    conclude(args, &settings, &root, &folder)
}

/// `run.json` may have been edited by hand.
fn resumed_settings(args: &RunArgs, folder: &Path) -> Result<Settings> {
    let mut settings = Settings::read(folder)?;
    settings.no_limits |= args.no_limits;
    settings.repeat_disturbed = args.repeat_disturbed.unwrap_or(settings.repeat_disturbed);
    check(&settings).with_context(|| folder.join("run.json").display().to_string())?;
    Ok(settings)
}

fn check(settings: &Settings) -> Result<()> {
    if settings.engines.is_empty() {
        bail!("engines is empty");
    }
    let registry = Registry::with(settings.workers.engines_file.as_deref())?;
    settings.engines.iter().try_for_each(|engine| registry.find(engine).map(drop))?;
    check_threads(settings.workers.threads)?;
    settings.suite.check()
}

fn settings(args: &RunArgs) -> Result<Settings> {
    let here = Path::new("scenarios");
    let library = match &args.scenarios {
        Some(folder) => Library::folder(folder)?,
        None if here.join("suites").is_dir() => Library::folder(here)?,
        None => Library::built_in(),
    };
    let only = (!args.scenario.is_empty()).then_some(args.scenario.as_slice());
    let mut suite = library.suite(&args.suite, only)?;
    if let Some(repetitions) = args.repetitions {
        suite.cells.iter_mut().for_each(|cell| cell.repetitions = repetitions);
        suite.check().context("--repetitions")?;
    }
    if let Some(model) = &args.model {
        check_model_is_used(model, &suite)?;
    }
    let registry = args.engines_file.registry()?;
    for name in &args.engine {
        registry.find(name)?;
    }
    check_threads(args.threads)?;
    let launcher = args.launcher.as_deref().map(|text| Launcher::parse(text, args.launcher_program.clone()));
    let launcher = launcher.transpose()?;
    let named = !args.engine.is_empty();
    let mut engines: Vec<String> = match named {
        true => args.engine.clone(),
        false => registry.of_runs().into_iter().map(str::to_owned).collect(),
    };
    let mut seen = BTreeSet::new();
    engines.retain(|e| seen.insert(e.clone()));
    Ok(Settings {
        suite,
        engines,
        engines_named: named,
        model: args.model.as_deref().map(absolute_if_folder).transpose()?,
        data: args.data.clone().map(std::path::absolute).transpose()?,
        workers: Workers { threads: args.threads, launcher, ..registry.workers() },
        no_limits: args.no_limits,
        repeat_disturbed: args.repeat_disturbed.unwrap_or(REPEAT_DISTURBED),
    })
}

/// Scenarios that bring their own model leave the one that was asked for aside: better said than found out.
fn check_model_is_used(model: &str, suite: &Suite) -> Result<()> {
    let owns: BTreeMap<&str, &str> = suite
        .cells
        .iter()
        .filter_map(|cell| Some((cell.scenario.kind(), cell.scenario.own_model()?)))
        .collect();
    for (kind, own) in &owns {
        let reason = format!("the scenario {kind} brings its own model, {own}");
        if suite.cells.iter().all(|cell| cell.scenario.own_model().is_some()) {
            bail!("--model {model} would not be used: {reason}");
        }
        note(&format!("--model {model} is for the other scenarios: {reason}"));
    }
    Ok(())
}

/// A run must be resumable from any folder.
fn absolute_if_folder(model: &str) -> Result<String> {
    if !Path::new(model).exists() {
        return Ok(model.to_owned());
    }
    let path = std::path::absolute(model).with_context(|| model.to_owned())?;
    path.to_str().map(str::to_owned).with_context(|| format!("{}: is not UTF-8", path.display()))
}

/// A machine that is never quiet shall not keep a run from ending.
const REPEAT_DISTURBED: u32 = 2;

/// More threads than this per core only take memory and time to start.
const MAX_THREADS_PER_CORE: usize = 8;

fn check_threads(threads: Option<usize>) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    match threads {
        Some(0) => bail!("--threads 0: at least one thread is needed"),
        Some(n) if n > MAX_THREADS_PER_CORE * cores => {
            bail!("--threads {n}: more than {MAX_THREADS_PER_CORE} for each of the {cores} cores")
        }
        _ => Ok(()),
    }
}

/// The rows that a resumed run has already.
fn earlier_records(folder: &Path) -> Result<Vec<CellRecord>> {
    let size = std::fs::metadata(folder.join(record::CELLS_FILE)).map_or(0, |m| m.len());
    // The run was interrupted before its first cell ended.
    if size == 0 { Ok(Vec::new()) } else { record::read(folder) }
}

/// Figures of two machines in one run would be taken for those of one.
fn check_same_machine(earlier: &[CellRecord], here: &Environment) -> Result<()> {
    match earlier.iter().find(|record| !is_same_machine(&record.environment, here)) {
        Some(record) => bail!(
            "this run began on another machine ({}, {:.1} GB); start a new one here, and join them by `evalfw merge`",
            record.environment.cpu,
            record.environment.memory_bytes as f64 / 1e9
        ),
        None => Ok(()),
    }
}

/// A run compares engines on one model: other weights under the same name would be another run.
fn check_same_models(earlier: &[CellRecord], models: &[ModelRecord]) -> Result<()> {
    let changed =
        earlier.iter().find(|r| models.iter().any(|m| m.name == r.model.name && !m.is_same_as(&r.model)));
    match changed {
        Some(record) => bail!(
            "the model {} is not the one that this run began with ({}, {} bytes); start a new run",
            record.model.name,
            record.model.origin,
            record.model.checkpoint_bytes
        ),
        None => Ok(()),
    }
}

fn new_run_folder(root: &Path, settings: &Settings) -> Result<PathBuf> {
    let stamp = jiff::Timestamp::now().strftime("%Y%m%d-%H%M%S");
    let mut folder = root.join(format!("{stamp}-{}", settings.suite.name));
    let mut number = 1;
    // Two runs may start within one second.
    while let Err(error) = std::fs::create_dir(&folder) {
        if error.kind() != std::io::ErrorKind::AlreadyExists {
            return Err(error).with_context(|| format!("{}: cannot be written", folder.display()));
        }
        number += 1;
        folder = root.join(format!("{stamp}-{}-{number}", settings.suite.name));
    }
    settings.write(&folder)?;
    Ok(folder)
}

/// The run's own report, and the one at the root of all runs that people open first.
fn write_reports(root: &Path, folder: &Path) -> Result<PathBuf> {
    let criteria = Criteria::built_in()?;
    render::report::write(folder, &folder.join("report.md"), "", &criteria)?;
    let latest = root.join("REPORT.md");
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    render::report::write(folder, &latest, &format!("{name}/"), &criteria)?;
    Ok(latest)
}

/// Prints the summary, renders the reports and decides the exit code.
fn conclude(args: &RunArgs, settings: &Settings, root: &Path, folder: &Path) -> Result<ExitCode> {
    if interrupt::requested() {
        note(&format!("interrupted; continue with: evalfw run --resume '{}'", folder.display()));
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    }
    let records = record::read(folder)?;
    // First what was measured: if the disk is full the report may fail.
    match args.json {
        true => print(&(serde_json::to_string_pretty(&records)? + "\n"))?,
        false => print(&(render::terminal::summary(&records) + "\n"))?,
    }
    let report = write_reports(root, folder).with_context(|| {
        format!("the record is whole, but not the report; later: evalfw report '{}'", folder.display())
    })?;
    if !args.json {
        print(&format!("report: {}\n", report.display()))?;
    }
    let failed = |r: &&CellRecord| match r.outcome {
        Outcome::Ok => false,
        Outcome::Unavailable => settings.engines_named,
        _ => true,
    };
    let failures: Vec<_> = records.iter().filter(failed).collect();
    for record in &failures {
        let message = record.error.as_ref().map_or("", |e| e.message.as_str());
        note(&format!("{}: {}: {message}", record.cell, record.outcome.as_str()));
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
