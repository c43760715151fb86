//! What the harness costs: the same cells inside evalfw, with its pipe, its sampler and its watch, and outside, in a bare
//! process that calls the engine. Both take the same batches, adapter and prompt, in turn (A B B A).
//!
//!     cargo bench --bench overhead [-- ENGINE [ROUNDS]]

use anyhow::{Context as _, Result, bail};
use evalfw::data::dataset::Dataset;
use evalfw::engines;
use evalfw::measure::metrics::{counted_decodes, counted_prefills, counted_steps};
use evalfw::model::{Context, ModelSource};
use evalfw::record::{self, CellRecord};
use evalfw::run::inputs::ModelInputs;
use evalfw::scenario::{Library, Scenario, Suite};
use evalfw::stats::{Processes, ratio_of_medians};
use evalfw_engine::StepInput;
use evalfw_engine::batch::read_batches;
use evalfw_engine::checkpoint::Checkpoint;
use evalfw_engine::lora::Adapter;
use evalfw_engine::protocol::LoadTimes;
use evalfw_engine::weights::WeightLoader;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const SUITE: &str = "ci";
const OUTSIDE: &str = "--outside";

/// What a bare process needs to do a cell.
#[derive(Serialize, Deserialize)]
struct Work {
    engine: String,
    model: PathBuf,
    scenario: Scenario,
    seed: u64,
    /// Batches and adapter, where it trains.
    training: Option<(PathBuf, PathBuf)>,
    prompt: Vec<u32>,
}

/// Seconds of each sample that counts.
#[derive(Default, Serialize, Deserialize)]
struct Times {
    steps: Vec<f64>,
    prefills: Vec<f64>,
    decodes: Vec<f64>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let [flag, work] = arguments.as_slice()
        && flag == OUTSIDE
    {
        let times = outside(&serde_json::from_str(work)?)?;
        println!("{}", serde_json::to_string(&times)?);
        return Ok(());
    }
    let engine = arguments.first().map_or("candle-cpu", String::as_str);
    let rounds: usize = arguments.get(1).map_or(Ok(8), |n| n.parse()).context("ROUNDS is a number")?;
    engines::built_in_engine(engine)?;
    compare(engine, rounds)
}

fn compare(engine: &str, rounds: usize) -> Result<()> {
    let suite = Library::built_in().suite(SUITE, Some(&["train".into(), "infer".into()]))?;
    let mut notify = |line: &str| eprintln!("{line}");
    let model = ModelSource::resolve(&suite.model, &mut Context::from_env(&mut notify)?)?;
    let scenarios: Vec<&Scenario> = suite.cells.iter().map(|cell| &cell.scenario).collect();
    let inputs =
        ModelInputs::prepare(&model.name, &model.dir, &Dataset::built_in()?, &scenarios, suite.seed)?;
    let folder = tempfile::tempdir()?;
    let (mut within, mut bare) = (Vec::new(), Vec::new());
    let mut cells = Vec::new();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for is_inside in if round % 2 == 0 { [true, false] } else { [false, true] } {
            if is_inside {
                let run = inside(engine, &folder.path().join(round.to_string()))?;
                within.push(times(&run));
                cells.extend(run);
            } else {
                bare.push(bare_times(engine, &suite, &inputs)?);
            }
        }
    }
    report(&within, &bare, &cells);
    Ok(())
}

fn report(within: &[Times], bare: &[Times], cells: &[CellRecord]) {
    println!(
        "median time inside evalfw over that outside, with the 95 % interval of {} processes each:",
        bare.len()
    );
    for (name, of) in [
        ("training step", (|t| &t.steps) as fn(&Times) -> &Vec<f64>),
        ("prompt", |t| &t.prefills),
        ("generated token", |t| &t.decodes),
    ] {
        let processes = |times: &[Times]| -> Processes { times.iter().map(|t| of(t).clone()).collect() };
        match ratio_of_medians(&processes(bare), &processes(within), 0.95) {
            Some(r) => println!("{name:<16} {:.4} ({:.4} to {:.4})", r.ratio, r.low, r.high),
            None => println!("{name:<16} not measured"),
        }
    }
    let cost = cells.iter().filter_map(|cell| {
        let cost = cell.samples.sampler?;
        Some(cost.cpu_seconds? / cost.wall_seconds)
    });
    let largest = cost.fold(0.0, f64::max);
    println!("the memory sampler took {:.2} % of one core at most", largest * 100.0);
}

fn times(cells: &[CellRecord]) -> Times {
    let mut times = Times::default();
    for samples in cells.iter().map(|cell| &cell.samples) {
        times.steps.extend(counted_steps(samples).map(|step| step.seconds));
        times.prefills.extend(counted_prefills(samples).map(|(_, seconds)| seconds));
        times.decodes.extend(counted_decodes(samples).map(|(tokens, seconds)| seconds / tokens));
    }
    times
}

fn inside(engine: &str, out: &Path) -> Result<Vec<CellRecord>> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_evalfw"));
    command.args([
        "run",
        "--suite",
        SUITE,
        "--engine",
        engine,
        "--scenario",
        "train,infer",
        "--repetitions",
        "1",
    ]);
    command.args(["--no-limits", "--repeat-disturbed", "0", "--out"]).arg(out);
    let output = command.output().context("evalfw could not be started")?;
    if !output.status.success() {
        bail!("evalfw run: {}", String::from_utf8_lossy(&output.stderr));
    }
    let run = std::fs::read_dir(out)?.flatten().map(|e| e.path()).find(|p| p.is_dir());
    record::read(&run.context("evalfw left no run")?)
}

/// All cells of the suite, each in a process of its own, as evalfw does it.
fn bare_times(engine: &str, suite: &Suite, inputs: &ModelInputs) -> Result<Times> {
    let mut all = Times::default();
    for cell in &suite.cells {
        let training = cell.scenario.training().map(|_| {
            let files = inputs.train(&cell.scenario);
            (files.train_file.clone(), files.adapter.clone())
        });
        let prompt = match &cell.scenario {
            Scenario::Infer(scenario) => inputs.prompt(scenario.prompt_tokens, suite.seed),
            _ => Vec::new(),
        };
        let work = Work {
            engine: engine.to_owned(),
            model: inputs.dir.clone(),
            scenario: cell.scenario.clone(),
            seed: suite.seed,
            training,
            prompt,
        };
        let mut command = Command::new(std::env::current_exe()?);
        let output = command.args([OUTSIDE, &serde_json::to_string(&work)?]).output()?;
        if !output.status.success() {
            bail!("outside: {}", String::from_utf8_lossy(&output.stderr));
        }
        let times: Times = serde_json::from_slice(&output.stdout)?;
        all.steps.extend(times.steps);
        all.prefills.extend(times.prefills);
        all.decodes.extend(times.decodes);
    }
    Ok(all)
}

/// The cell as a program of its own would do it.
fn outside(work: &Work) -> Result<Times> {
    let mut engine = (engines::built_in_engine(&work.engine)?.open)()?;
    let checkpoint = Checkpoint::open(&work.model)?;
    let mut load = LoadTimes::default();
    let loader = WeightLoader::new(&checkpoint, work.scenario.quantization(), &mut load);
    let mut model = engine.load(loader)?;
    model.synchronize()?;
    let mut times = Times::default();
    match (&work.scenario, &work.training) {
        (Scenario::Train(scenario), Some((batches, adapter))) => {
            let adapter = Adapter::read(adapter, &checkpoint.config)?;
            model.attach_adapter(&adapter, &scenario.training())?;
            for (step, batch) in read_batches(batches)?.iter().take(scenario.total_steps()).enumerate() {
                let input = StepInput {
                    step: step as u64,
                    dropout_seed: work.seed,
                    micro_batches: std::slice::from_ref(batch),
                };
                let start = Instant::now();
                model.train_step(&input)?;
                model.synchronize()?;
                if step >= scenario.warmup_steps {
                    times.steps.push(start.elapsed().as_secs_f64());
                }
            }
        }
        (Scenario::Infer(scenario), _) => {
            for round in 0..scenario.warmup + scenario.repeats {
                let start = Instant::now();
                let mut token = model.prefill(&work.prompt)?;
                model.synchronize()?;
                let prefill = start.elapsed().as_secs_f64();
                let start = Instant::now();
                for _ in 0..scenario.generate_tokens {
                    token = model.decode(token)?;
                    model.synchronize()?;
                }
                if round >= scenario.warmup {
                    times.prefills.push(prefill);
                    times.decodes.push(start.elapsed().as_secs_f64() / scenario.generate_tokens as f64);
                }
            }
        }
        (other, _) => bail!("{} is not compared", other.label()),
    }
    Ok(times)
}
