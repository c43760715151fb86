//! What comes before the first cell: engines are probed and held against the reference, models and inputs made and
//! checked, the machine's limits measured, and the cells planned.

use super::RunContext;
use super::inputs::ModelInputs;
use super::limits::machine;
use super::models::Models;
use super::progress::Progress;
use super::settings::Settings;
use crate::adoption::Adoption;
use crate::data::dataset::Dataset;
use crate::engines::{self, Engine, Registry, stock_form, tuned};
use crate::interrupt;
use crate::plan::{Cell, engines_of, interleaved, quantization_name};
use crate::probe::{Availability, Reason, probe};
use crate::record::Outcome;
use crate::verify::reference::Reference;
use crate::verify::{Scope, Verdict, verify};
use crate::worker::Workers;
use anyhow::{Result, bail};
use evalfw_engine::protocol::{Adapters, DeviceKind, EngineInfo, Quantization};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc;
use std::time::Duration;

pub struct Prepared {
    pub context: RunContext,
    pub cells: Vec<Cell>,
    /// Cells of engines that cannot run here, once each.
    pub unavailable: Vec<(Cell, Reason)>,
    /// In the order of `context.models`.
    pub inputs: Vec<ModelInputs>,
}

/// Probes the engines, finds or makes the models, checks all input, and plans the cells.
/// `None` if the user interrupted.
pub fn prepare(settings: &Settings, data: &Dataset, progress: &Progress) -> Result<Option<Prepared>> {
    let suite = &settings.suite;
    let wanted = engines_of(suite, &settings.engines);
    if wanted.is_empty() {
        let with_one: Vec<_> = tuned().map(|e| e.name).filter(|name| stock_form(name).is_some()).collect();
        bail!(
            "none of the engines that were named has a stock form, which all cells of this suite ask for; name one \
             that has: {}",
            with_one.join(", ")
        );
    }
    let Some(Probed { available, missing }) = probe_all(&wanted, &settings.workers, progress) else {
        return Ok(None);
    };
    if available.is_empty() {
        match &settings.workers.launcher {
            Some(launcher) => {
                bail!("no engine could be started through --launcher; try it by hand: {}", launcher.trial())
            }
            None => bail!("none of the engines can run here; `evalfw engines` says what is missing"),
        }
    }

    let mut notify = |line: &str| progress.say(line);
    let mut models = Models::new(settings, data, &mut notify)?;
    let mut engines = Vec::new();
    let mut software_adapters = BTreeSet::new();
    for (engine, info) in &available {
        let model = match info.device.software {
            true => models.for_software_adapter()?,
            false => models.main()?,
        };
        engines.push((engine.clone(), model));
        if info.device.software {
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
    let info_of = |engine: &str| available.iter().find(|(name, _)| name == engine).map(|(_, info)| info);
    for cell in &mut cells {
        let is_stock = stock_form(&cell.engine) == Some(cell.engine.as_str());
        if let Some(info) = info_of(&cell.engine).filter(|_| !is_stock)
            && let Some(form) = in_place_of_nf4(cell.scenario.quantization(), &info.quantizations)
        {
            cell.scenario = cell.scenario.quantized(form);
        }
    }
    cells.retain(|cell| {
        let quantization = cell.scenario.quantization();
        let Some(info) = info_of(&cell.engine).filter(|info| !info.quantizations.contains(&quantization))
        else {
            return true;
        };
        if cell.repetition == 0 {
            unavailable.push((cell.clone(), no_such_form(quantization, &info.quantizations)));
        }
        false
    });
    let on_gpu = |info: &EngineInfo| info.device.kind != DeviceKind::Cpu && !info.device.software;
    let gpus = available.iter().filter(|(_, info)| on_gpu(info)).map(|(engine, _)| engine.as_str());
    let limits = settings.limits(gpus, progress);
    if interrupt::requested() {
        return Ok(None);
    }
    let context = RunContext {
        models: models.records,
        environment: machine(&engines[0].0, &settings.workers)?,
        verdicts,
        host_limits: limits.host,
        device_limits: limits.devices,
        adoption: adoption(&engines)?,
        caveats: caveats(&available, &settings.workers)?,
        launcher: settings.workers.launcher.as_ref().map(|launcher| launcher.text.clone()),
        repeat_disturbed: settings.repeat_disturbed,
    };
    Ok(Some(Prepared { context, cells, unavailable, inputs: models.inputs }))
}

/// What the engines said of themselves.
struct Probed {
    available: Vec<(String, EngineInfo)>,
    missing: Vec<(String, Reason)>,
}

/// `None` if the user interrupted.
fn probe_all(wanted: &[String], workers: &Workers, progress: &Progress) -> Option<Probed> {
    let mut probed = Probed { available: Vec::new(), missing: Vec::new() };
    for engine in wanted {
        let availability = saying_what_is_waited_for(workers, progress, || probe(engine, workers));
        if interrupt::requested() {
            return None;
        }
        match availability {
            Availability::Available(info) => {
                if let Some(Adapters { taken, all }) = info.choice() {
                    let (title, count) = (info.device.title(), all.len());
                    progress.say(&format!(
                        "{engine} takes adapter {taken} of {count}, {title}; EVALFW_GPU chooses another"
                    ));
                }
                probed.available.push((engine.clone(), *info));
            }
            Availability::Unavailable(reason) => {
                progress.say(&format!("{engine} cannot run here: {}{}", reason.reason, advice(&reason)));
                probed.missing.push((engine.clone(), reason));
            }
        }
    }
    Some(probed)
}

/// A scheduler may let a worker wait long for its turn, in which nothing else is to be seen.
fn saying_what_is_waited_for<T>(workers: &Workers, progress: &Progress, work: impl FnOnce() -> T) -> T {
    let Some(launcher) = &workers.launcher else { return work() };
    std::thread::scope(|scope| {
        let (ended, end) = mpsc::channel::<()>();
        scope.spawn(move || {
            if end.recv_timeout(SILENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                progress.say(&format!("waiting for `{}` to start the worker", launcher.text));
            }
        });
        let done = work();
        drop(ended);
        done
    })
}

/// After so long a person wonders.
const SILENCE: Duration = Duration::from_secs(5);

/// What is declared of the engines on the devices that they took, and what they say themselves.
fn caveats(available: &[(String, EngineInfo)], workers: &Workers) -> Result<BTreeMap<String, Vec<String>>> {
    let registry = Registry::with(workers.engines_file.as_deref())?;
    let mut of_engines = BTreeMap::new();
    for (name, info) in available {
        let mut all = match registry.find(name)? {
            Engine::External(external) => external.handicaps(info.device.kind),
            Engine::BuiltIn(_) => Vec::new(),
        };
        if info.own_dropout {
            all.push("its dropout masks are its framework's own".to_owned());
        }
        if !info.quantizations.contains(&Quantization::Nf4) {
            all.push("it has no NF4: its base is in its framework's own format".to_owned());
        }
        of_engines.insert(name.clone(), all);
    }
    Ok(of_engines)
}

fn adoption(engines: &[(String, usize)]) -> Result<BTreeMap<String, Adoption>> {
    let mut of_engines = BTreeMap::new();
    for (engine, _) in engines {
        if let Some(facts) = Adoption::of_engine(engine)? {
            of_engines.insert(engine.clone(), facts);
        }
    }
    Ok(of_engines)
}

/// A framework without NF4 does the job in its own format, as its users do.
fn in_place_of_nf4(asked_for: Quantization, forms: &[Quantization]) -> Option<Quantization> {
    let lacks_it = asked_for == Quantization::Nf4 && !forms.contains(&Quantization::Nf4);
    (lacks_it && forms.contains(&Quantization::Native)).then_some(Quantization::Native)
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

fn advice(reason: &Reason) -> String {
    match (&reason.advice, reason.stderr_tail.last()) {
        (Some(advice), _) => format!(" ({advice})"),
        (None, Some(words)) => format!(" (its last words: {words})"),
        (None, None) => String::new(),
    }
}
