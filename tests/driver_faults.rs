//! `burn-wgpu` where there is no adapter, a software one, more than one, and where the driver fails in the middle of a
//! step: each is a defined outcome, and nothing else of the run is lost.
#![cfg(target_os = "linux")]

#[path = "support/faulty_driver/mod.rs"]
mod faulty_driver;
mod support;

use assert_cmd::cargo::cargo_bin;
use evalfw::data::adapter::initial_adapter;
use evalfw::data::batches::{BatchShape, random_batches};
use evalfw::record::{CellRecord, Outcome};
use evalfw::worker::{Client, Failure, WorkerCommand};
use evalfw_engine::batch::write_batches;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::LoraConfig;
use evalfw_engine::protocol::{
    AttachAdapter, BatchRef, EngineInfo, Load, Quantization, TrainStep, TrainingConfig,
};
use faulty_driver::FaultyDriver;
use serde_json::Value;
use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use support::Workspace;

/// The name of the GPU that the faulty driver pretends to have.
const GPU: &str = "Pretended GPU";

type Environment = Vec<(OsString, OsString)>;

fn worker(engine: &str, environment: Environment) -> WorkerCommand {
    WorkerCommand {
        program: cargo_bin("evalfw"),
        arguments: vec!["worker".into(), engine.into()],
        environment,
        agent: false,
    }
}

/// Of the stock form, which opens the same device and starts without a self-check.
fn hello(environment: Environment) -> Result<EngineInfo, Failure> {
    Client::start(&worker("burn-wgpu-stock", environment), None, Duration::from_secs(60))?.hello()
}

/// Mesa's software adapter and what pretends to be a GPU, in the order of the arguments.
fn two_adapters(driver: &FaultyDriver, first: &Path, second: &Path, choice: Option<&str>) -> Environment {
    let mut environment = driver.environment(&[first, second]);
    environment.push(("FAULTY_DRIVER_GPU".into(), GPU.into()));
    environment.extend(choice.map(|choice| ("EVALFW_GPU".into(), choice.into())));
    environment
}

/// The row of an engine in `evalfw engines --json`.
fn listed(workspace: &Workspace, engine: &str, environment: Environment) -> Value {
    let output = workspace.evalfw().args(["engines", "--json"]).envs(environment).output().unwrap();
    assert!(output.status.success());
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert!(rows.iter().any(|row| row["engine"] == "candle-cpu" && row["available"] == true));
    rows.into_iter().find(|row| row["engine"] == engine).unwrap()
}

#[test]
fn no_adapter_is_said_with_its_cause_and_the_next_step_by_every_command() {
    let none: Environment =
        ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].map(|v| (v.into(), "/nowhere".into())).into();
    let workspace = Workspace::new();
    let row = listed(&workspace, "burn-wgpu", none.clone());
    assert_eq!(
        (&row["available"], &row["problem"]["outcome"]),
        (&false.into(), &"unavailable".into()),
        "{row}"
    );
    let problem = &row["problem"];
    assert!(problem["reason"].as_str().unwrap().contains("no Vulkan device"), "{row}");
    assert!(problem["advice"].as_str().unwrap().contains("mesa-vulkan-drivers"), "{row}");

    // Not asked for, it is left out; named, it fails the command. `run` is in tests/run.rs.
    let verify = |engines: &str| {
        let mut command = workspace.evalfw();
        command.args(["verify", "--short", "--engine", engines]).envs(none.clone());
        command.output().unwrap()
    };
    let output = verify("burn-wgpu,candle-cpu");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("burn-wgpu: unavailable") && text.contains("no Vulkan device"), "{text}");
    assert!(text.contains("mesa-vulkan-drivers"), "{text}");
    assert!(text.contains("candle-cpu: ok"), "{text}");
}

#[test]
fn a_software_adapter_is_called_one_in_the_list_and_in_the_report() {
    let Some(driver) = FaultyDriver::build() else { return };
    let workspace = Workspace::new();
    let environment = driver.environment(&[driver.real_manifest()]);
    let row = listed(&workspace, "burn-wgpu", environment.clone());
    assert_eq!(row["info"]["device"]["software"], true, "{row}");
    let table = workspace.evalfw().arg("engines").envs(environment.clone()).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("software adapter") && !table.contains("EVALFW_GPU"), "{table}");

    let mut run = workspace.quick("burn-wgpu,candle-cpu");
    run.args(["--scenario", "load"]).envs(environment).assert().success();
    let report = std::fs::read_to_string(workspace.results().join("REPORT.md")).unwrap();
    assert!(report.contains("llvmpipe") && report.contains("software adapter"), "{report}");
}

#[test]
fn of_two_adapters_the_gpu_is_taken_and_the_user_may_choose() {
    let Some(driver) = FaultyDriver::build() else { return };
    let (software, gpu) = (driver.real_manifest(), driver.manifest());
    for (first, second) in [(software, gpu.as_path()), (gpu.as_path(), software)] {
        let info = hello(two_adapters(&driver, first, second, None)).unwrap();
        assert_eq!((&*info.device.name, info.device.software), (GPU, false));
        let adapters = info.adapters.unwrap();
        assert_eq!((adapters.taken, adapters.all.len()), (0, 2));
        assert!(adapters.all[1].software && adapters.all[0] == info.device, "{adapters:?}");

        let info = hello(two_adapters(&driver, first, second, Some("1"))).unwrap();
        assert!(info.device.software && info.device.name.contains("llvmpipe"), "{:?}", info.device);
        assert_eq!(info.adapters.unwrap().taken, 1);
    }
    let Err(wrong) = hello(two_adapters(&driver, software, &gpu, Some("2"))) else {
        panic!("there is no adapter 2")
    };
    assert_eq!(wrong.outcome(), Outcome::Unavailable);
    let text = wrong.to_string();
    assert!(text.contains("EVALFW_GPU") && text.contains(GPU) && text.contains("llvmpipe"), "{text}");
}

#[test]
fn the_list_and_a_run_say_which_adapter_is_taken() {
    let Some(driver) = FaultyDriver::build() else { return };
    let workspace = Workspace::new();
    let environment = |choice| two_adapters(&driver, driver.real_manifest(), &driver.manifest(), choice);
    let table = workspace.evalfw().arg("engines").envs(environment(None)).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains(&format!("EVALFW_GPU=0: {GPU}")) && table.contains("EVALFW_GPU=1: llvmpipe"),
        "{table}"
    );

    let mut run = workspace.quick("burn-wgpu");
    let output = run.args(["--scenario", "load"]).envs(environment(Some("1"))).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && text.contains("burn-wgpu takes adapter 1 of 2, llvmpipe"), "{text}");
    let records = workspace.records();
    assert!(records[0].device.as_ref().unwrap().name.contains("llvmpipe"));
}

/// More than a worker submits before it trains, and less than its training does.
const SUBMISSIONS: usize = 500;

#[test]
fn a_device_that_is_lost_in_a_step_ends_its_cell_and_no_other() {
    let Some(driver) = FaultyDriver::build() else { return };
    let workspace = Workspace::new();
    let gpu = driver.manifest();
    let mut harness = std::process::Command::new(cargo_bin("evalfw"))
        .current_dir(workspace.path("."))
        .envs(driver.environment(&[&gpu]))
        .envs(support::ALONE)
        .args(["run", "--suite", "quick", "--engine", "burn-wgpu,candle-cpu", "--scenarios"])
        .arg(workspace.scenarios_of_steps(200))
        .arg("--model")
        .arg(workspace.model())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(180);
    while !workspace.has_begun("burn-wgpu", "train") {
        assert!(
            Instant::now() < deadline && harness.try_wait().unwrap().is_none(),
            "no worker came to training"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    driver.trigger("lost", SUBMISSIONS);
    assert_eq!(harness.wait().unwrap().code(), Some(1));
    assert!(driver.has_failed());

    let records = workspace.records();
    let of = |engine: &str, kind: &str| -> &CellRecord {
        records.iter().find(|r| r.engine == engine && r.parameters.kind() == kind).unwrap()
    };
    let lost = of("burn-wgpu", "train");
    let error = lost.error.as_ref().unwrap();
    assert_eq!(lost.outcome, Outcome::Failed, "{error:?}");
    assert!(error.during.starts_with("train step"), "{error:?}");
    assert!(error.message.to_lowercase().contains("lost"), "{error:?}");
    assert_eq!((lost.tokens_per_second, lost.examples_per_second), (None, None));
    assert!(lost.samples.train.iter().all(|step| step.loss.is_finite()));
    for (engine, kind) in [
        ("burn-wgpu", "load"),
        ("burn-wgpu", "infer"),
        ("candle-cpu", "load"),
        ("candle-cpu", "train"),
        ("candle-cpu", "infer"),
    ] {
        assert_eq!(of(engine, kind).outcome, Outcome::Ok, "{engine} {kind}: {:?}", of(engine, kind).error);
    }
}

#[test]
fn device_memory_that_runs_out_in_a_step_is_out_of_memory() {
    let Some(driver) = FaultyDriver::build() else { return };
    let workspace = Workspace::new();
    let config = ModelConfig::read(&workspace.model()).unwrap();
    let adapter = workspace.path("adapter");
    let lora = LoraConfig { r: 8, lora_alpha: 16.0, lora_dropout: 0.0 };
    initial_adapter(&config, lora, 1).write(&adapter, "micro").unwrap();
    // The second is so much longer that it cannot do with the memory of the first.
    let file = workspace.path("batches.jsonl");
    let batch = |sequence_length| {
        let shape = BatchShape { sequence_length, batch_size: 1, packing: false };
        random_batches(config.vocab_size, shape, 1, 1).remove(0).batch
    };
    write_batches(&file, &[batch(16), batch(512)]).unwrap();
    let step = |step: u64| TrainStep {
        step,
        dropout_seed: 1,
        batches: BatchRef { file: file.clone(), lines: vec![step as usize] },
    };

    let gpu = driver.manifest();
    let command = worker("burn-wgpu", driver.environment(&[&gpu]));
    let mut client = Client::start(&command, None, Duration::from_secs(120)).unwrap();
    client.hello().unwrap();
    client.call(Load { model: workspace.model(), quantization: Quantization::Nf4 }).unwrap();
    client.call(AttachAdapter { adapter, training: TrainingConfig::default() }).unwrap();
    assert!(client.call(step(0)).unwrap().loss.is_finite());
    driver.trigger("memory", 0);
    let failure = client.call(step(1)).unwrap_err();
    assert!(driver.has_failed());
    assert_eq!(failure.outcome(), Outcome::Oom, "{failure}");
    assert!(failure.to_string().contains("wgpu error: Out of Memory"), "{failure}");
}
