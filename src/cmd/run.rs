//! `evalfw run`: the main job. Everything that can be wrong with the input is found before the first
//! model is loaded.

use crate::data::dataset::Dataset;
use crate::decide::criteria::Criteria;
use crate::engines::{self, stock_form, tuned};
use crate::interrupt;
use crate::model::{Context as ModelContext, ModelSource, Origin, ResolvedModel};
use crate::output::{note, print};
use crate::plan::{Cell, engines_of, interleaved, quantization_name};
use crate::probe::{Availability, Reason, probe};
use crate::record::{self, CellRecord, ModelRecord, Outcome, RunLog};
use crate::render;
use crate::run::cell::WorkerExecutor;
use crate::run::inputs::ModelInputs;
use crate::run::limits::machine;
use crate::run::progress::Progress;
use crate::run::settings::Settings;
use crate::run::{RunContext, execute};
use crate::scenario::{Library, Scenario, Suite};
use crate::verify::reference::Reference;
use crate::verify::{Scope, Verdict, verify};
use crate::worker::{Launcher, Workers};
use anyhow::{Context, Result, bail};
use clap::Args;
use evalfw_engine::protocol::{Adapters, DeviceKind, Quantization};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const AFTER_HELP: &str = "\
Examples:
  evalfw run --all
  evalfw run --suite quick --model tiny
  evalfw run --engine candle-cpu,burn-flex --scenario train --model Qwen/Qwen2.5-Coder-0.5B-Instruct
  evalfw run --suite default --scenario train --repetitions 6      enough to compare commits with
  evalfw run --launcher 'srun -n1 --exclusive' --suite large       every cell is a job of a cluster
  evalfw run --resume results/20261123-101500-default

With --launcher the paths of this program, of the model and of the temporary folder (TMPDIR) must be the same on the
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
    /// quick, ci, default, full, large, gpu, long, stock, or a file of your own under scenarios/suites
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
    #[arg(long, env = "EVALFW_NO_LIMITS")]
    no_limits: bool,
    /// Start workers through another command, such as `srun -n1`, `ssh host` or `docker run -i image`
    #[arg(long, value_name = "CMD")]
    launcher: Option<String>,
    /// evalfw on the worker's side [default: at the same path as here]
    #[arg(long, value_name = "PATH", requires = "launcher")]
    launcher_program: Option<PathBuf>,
    /// Folder of scenario files [default: ./scenarios if it is there, else the built-in ones]
    #[arg(long, value_name = "DIR")]
    scenarios: Option<PathBuf>,
    /// Print the run's record as JSON on standard output
    #[arg(long)]
    json: bool,
}

pub fn run(args: &RunArgs) -> Result<ExitCode> {
    interrupt::install()?;
    let (settings, resumed) = match &args.resume {
        Some(folder) => (resumed_settings(args, folder)?, Some(folder.as_path())),
        None => (settings(args)?, None),
    };
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
    for engine in &settings.engines {
        engines::find(engine)?;
    }
    settings.no_limits |= args.no_limits;
    settings.repeat_disturbed = args.repeat_disturbed.unwrap_or(settings.repeat_disturbed);
    settings.suite.check().with_context(|| folder.join("run.json").display().to_string())?;
    Ok(settings)
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
        if repetitions == 0 {
            bail!("--repetitions 0: at least one process is needed");
        }
        suite.cells.iter_mut().for_each(|cell| cell.repetitions = repetitions);
    }
    if let Some(model) = &args.model {
        check_model_is_used(model, &suite)?;
    }
    for name in &args.engine {
        engines::find(name)?;
    }
    check_threads(args.threads)?;
    let launcher = args.launcher.as_deref().map(|text| Launcher::parse(text, args.launcher_program.clone()));
    let launcher = launcher.transpose()?;
    let named = !args.engine.is_empty();
    let mut engines: Vec<String> = match named {
        true => args.engine.clone(),
        false => engines::tuned().map(|e| e.name.to_owned()).collect(),
    };
    let mut seen = BTreeSet::new();
    engines.retain(|e| seen.insert(e.clone()));
    Ok(Settings {
        suite,
        engines,
        engines_named: named,
        model: args.model.as_deref().map(absolute_if_folder).transpose()?,
        data: args.data.clone().map(std::path::absolute).transpose()?,
        workers: Workers { threads: args.threads, launcher },
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

struct Prepared {
    context: RunContext,
    cells: Vec<Cell>,
    unavailable: Vec<(Cell, Reason)>,
    /// In the order of `context.models`.
    inputs: Vec<ModelInputs>,
}

/// Probes the engines, finds or makes the models, checks all input, and plans the cells.
/// `None` if the user interrupted.
fn prepare(settings: &Settings, data: &Dataset, progress: &Progress) -> Result<Option<Prepared>> {
    let suite = &settings.suite;
    let mut available = Vec::new();
    let mut missing = Vec::new();
    let mut forms = BTreeMap::new();
    let wanted = engines_of(suite, &settings.engines);
    if wanted.is_empty() {
        let with_one: Vec<_> = tuned().map(|e| e.name).filter(|name| stock_form(name).is_some()).collect();
        bail!(
            "none of the engines that were named has a stock form, which all cells of this suite ask for; name one \
             that has: {}",
            with_one.join(", ")
        );
    }
    for engine in &wanted {
        let availability = probe(engine, &settings.workers);
        if interrupt::requested() {
            return Ok(None);
        }
        match availability {
            Availability::Available(info) => {
                if let Some(Adapters { taken, all }) = info.choice() {
                    let (title, count) = (info.device.title(), all.len());
                    progress.say(&format!(
                        "{engine} takes adapter {taken} of {count}, {title}; EVALFW_GPU chooses another"
                    ));
                }
                forms.insert(engine.clone(), info.quantizations);
                available.push((engine, info.device));
            }
            Availability::Unavailable(reason) => {
                progress.say(&format!("{engine} cannot run here: {}{}", reason.reason, advice(&reason)));
                missing.push((engine.clone(), reason));
            }
        }
    }
    if available.is_empty() {
        bail!("none of the engines can run here; `evalfw engines` says what is missing");
    }

    let mut notify = |line: &str| progress.say(line);
    let mut models = Models::new(settings, data, &mut notify)?;
    let mut engines = Vec::new();
    let mut software_adapters = BTreeSet::new();
    let mut gpus = Vec::new();
    for (engine, device) in available {
        let software = device.software;
        if device.kind != DeviceKind::Cpu && !software {
            gpus.push(engine.as_str());
        }
        let model = if software { models.for_software_adapter()? } else { models.main()? };
        engines.push((engine.clone(), model));
        if software {
            software_adapters.insert(engine.clone());
        }
    }
    let mut own_models = BTreeMap::new();
    for name in suite.cells.iter().filter_map(|c| c.scenario.own_model()) {
        own_models.insert(name.to_owned(), models.get(name)?);
    }
    let mut unavailable = Vec::new();
    for (engine, reason) in missing {
        // The tuned form says already why the device cannot be used.
        if !settings.engines_named && engines::stock_form(&engine) == Some(engine.as_str()) {
            continue;
        }
        // Its rows stand beside those of the engines that ran.
        let model = engines[0].1;
        let once = interleaved(suite, &settings.engines, &[(engine, model)], &own_models)
            .into_iter()
            .filter(|c| c.repetition == 0);
        unavailable.extend(once.map(|cell| (cell, reason.clone())));
    }
    let verdicts = verify_all(&engines, &settings.workers, progress)?;
    let mut cells = interleaved(suite, &settings.engines, &engines, &own_models);
    if !settings.engines_named {
        // It takes a software adapter minutes, and the time would say nothing.
        cells.retain(|c| c.scenario.own_model().is_none() || !software_adapters.contains(&c.engine));
    }
    cells.retain(|cell| {
        let quantization = cell.scenario.quantization();
        let Some(forms) = forms.get(&cell.engine).filter(|forms| !forms.contains(&quantization)) else {
            return true;
        };
        if cell.repetition == 0 {
            unavailable.push((cell.clone(), no_such_form(quantization, forms)));
        }
        false
    });
    let limits = settings.limits(&gpus, progress);
    if interrupt::requested() {
        return Ok(None);
    }
    let context = RunContext {
        models: models.records,
        environment: machine(&engines[0].0, &settings.workers)?,
        verdicts,
        host_limits: limits.host,
        device_limits: limits.devices,
        launcher: settings.workers.launcher.as_ref().map(|launcher| launcher.text.clone()),
        repeat_disturbed: settings.repeat_disturbed,
    };
    Ok(Some(Prepared { context, cells, unavailable, inputs: models.inputs }))
}

fn no_such_form(quantization: Quantization, forms: &[Quantization]) -> Reason {
    let names: Vec<_> = forms.iter().map(|form| format!("`{}`", quantization_name(*form))).collect();
    Reason {
        outcome: Outcome::Unavailable,
        reason: format!("the engine has no quantization `{}`", quantization_name(quantization)),
        advice: Some(format!("the engine has {}", names.join(" and "))),
        stderr_tail: Vec::new(),
    }
}

/// Holds each engine against the reference, in short, before anything of it is timed.
fn verify_all(
    engines: &[(String, usize)],
    workers: &Workers,
    progress: &Progress,
) -> Result<BTreeMap<String, Verdict>> {
    let reference = Reference::built_in()?;
    let mut verdicts = BTreeMap::new();
    for (engine, _) in engines {
        let command = workers.of_engine(engine)?;
        let verdict = verify(engine, &command, &reference, Scope::Short);
        progress.say(&format!("{engine}: {}", verdict.summary()));
        verdicts.insert(engine.clone(), verdict);
    }
    Ok(verdicts)
}

/// The largest checkpoint that a software adapter runs when nobody asked for it by name.
const SOFTWARE_ADAPTER_BYTES: u64 = 64_000_000;

/// The models of a run, each found or made, checked and prepared when it is first needed.
struct Models<'a> {
    settings: &'a Settings,
    data: &'a Dataset,
    source: ModelContext<'a>,
    specs: Vec<String>,
    records: Vec<ModelRecord>,
    inputs: Vec<ModelInputs>,
}

impl<'a> Models<'a> {
    fn new(settings: &'a Settings, data: &'a Dataset, notify: &'a mut dyn FnMut(&str)) -> Result<Self> {
        let source = ModelContext::from_env(notify)?;
        Ok(Self { settings, data, source, specs: Vec::new(), records: Vec::new(), inputs: Vec::new() })
    }

    fn main(&mut self) -> Result<usize> {
        self.get(self.settings.model.as_deref().unwrap_or(&self.settings.suite.model))
    }

    /// The model that was asked for if it is small, or if the engine was asked for too; else the
    /// suite's small one.
    fn for_software_adapter(&mut self) -> Result<usize> {
        if self.settings.model.is_some() {
            let model = self.main()?;
            if self.settings.engines_named || self.inputs[model].checkpoint_bytes <= SOFTWARE_ADAPTER_BYTES {
                return Ok(model);
            }
        }
        self.get(&self.settings.suite.software_adapter_model)
    }

    fn get(&mut self, spec: &str) -> Result<usize> {
        if let Some(index) = self.specs.iter().position(|s| s == spec) {
            return Ok(index);
        }
        let suite = &self.settings.suite;
        let scenarios: Vec<&Scenario> = suite
            .cells
            .iter()
            .map(|c| &c.scenario)
            .filter(|s| s.own_model().is_none_or(|own| own == spec))
            .collect();
        let resolved = ModelSource::resolve(spec, &mut self.source)?;
        let inputs = ModelInputs::prepare(&resolved.name, &resolved.dir, self.data, &scenarios, suite.seed)?;
        self.specs.push(spec.to_owned());
        self.records.push(model_record(&resolved, &inputs));
        self.inputs.push(inputs);
        Ok(self.specs.len() - 1)
    }
}

fn advice(reason: &Reason) -> String {
    match (&reason.advice, reason.stderr_tail.last()) {
        (Some(advice), _) => format!(" ({advice})"),
        (None, Some(words)) => format!(" (its last words: {words})"),
        (None, None) => String::new(),
    }
}

fn model_record(resolved: &ResolvedModel, inputs: &ModelInputs) -> ModelRecord {
    ModelRecord {
        name: resolved.name.clone(),
        parameters: inputs.config.parameters(),
        checkpoint_bytes: inputs.checkpoint_bytes,
        synthetic: resolved.synthetic,
        config: Some(inputs.config.clone()),
        origin: origin(resolved),
    }
}

fn origin(model: &ResolvedModel) -> String {
    match &model.origin {
        Origin::Folder => "local folder".to_owned(),
        Origin::Preset { seed } => format!("evalfw synth, seed {seed}"),
        Origin::Hub { endpoint } => {
            format!("{endpoint}, commit {}", model.revision.as_deref().unwrap_or("unknown"))
        }
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
