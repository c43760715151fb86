//! Cells as `run` would record them, with figures that are easy to follow.

use evalfw::measure::host::Environment;
use evalfw::measure::memory::{MemoryPoint, PhaseMemory};
use evalfw::record::{
    CellError, CellRecord, DecodeSample, EvaluationSample, LoadSample, ModelRecord, Outcome, PrefillSample,
    Probe, RunLog, SCHEMA, Samples, TrainSample,
};
use evalfw::scenario::{InferScenario, LoadScenario, QualityScenario, Scenario, TrainScenario};
use evalfw_engine::protocol::{DeviceInfo, DeviceKind, LoadTimes, Quantization};
use std::path::Path;

/// An engine with the figures that its cells shall have.
#[derive(Debug, Clone)]
pub struct Engine {
    pub name: &'static str,
    pub software: bool,
    pub peak_gb: f64,
    pub seconds_per_step: f64,
    /// Added to every loss.
    pub loss_offset: f64,
    /// Probes that fail in every cell that exercises them.
    pub failing_probes: Vec<&'static str>,
    pub model: ModelRecord,
}

impl Engine {
    pub fn new(name: &'static str, peak_gb: f64, seconds_per_step: f64) -> Self {
        let model = half_billion();
        Self {
            name,
            software: false,
            peak_gb,
            seconds_per_step,
            loss_offset: 0.0,
            failing_probes: Vec::new(),
            model,
        }
    }

    /// Load, train and infer, each twice.
    pub fn cells(&self) -> Vec<CellRecord> {
        let scenarios = [load(), train(256), infer()];
        scenarios.iter().flat_map(|s| (0..2).map(|repetition| self.cell(s, repetition))).collect()
    }

    pub fn cell(&self, scenario: &Scenario, repetition: u32) -> CellRecord {
        let label = scenario.label();
        let mut cell = CellRecord {
            schema: SCHEMA,
            cell: format!("{}/{}/{label}/nf4/{repetition}", self.name, self.model.name),
            engine: self.name.into(),
            engine_version: Some("0.1.0".into()),
            framework: Some(self.name.split('-').next().unwrap().into()),
            framework_version: Some("1.2.3".into()),
            device: Some(self.device()),
            compute_dtype: Some("f32".into()),
            engine_features: vec!["x86-v4".into()],
            threads: Some(2),
            scenario: label,
            parameters: scenario.clone(),
            model: self.model.clone(),
            quantization: Quantization::Nf4,
            repetition,
            seed: 42,
            outcome: Outcome::Ok,
            error: None,
            started_at: format!("2025-06-01T10:{repetition:02}:00Z"),
            wall_seconds: 30.0,
            peak_memory_bytes: None,
            tokens_per_second: None,
            examples_per_second: None,
            samples: self.samples(scenario, repetition),
            environment: environment(),
            limits: None,
            adoption: None,
            caveats: Vec::new(),
            launcher: None,
            attempt: 0,
            host: None,
        };
        cell.peak_memory_bytes = cell.samples.phases.iter().map(|p| p.peak_bytes).max();
        cell
    }

    fn device(&self) -> DeviceInfo {
        DeviceInfo {
            kind: if self.software { DeviceKind::UnifiedGpu } else { DeviceKind::Cpu },
            name: if self.software { "llvmpipe".into() } else { "Fixture CPU".into() },
            driver: self.software.then(|| "Vulkan 1.4".into()),
            software: self.software,
            memory_bytes: None,
        }
    }

    fn samples(&self, scenario: &Scenario, repetition: u32) -> Samples {
        let load_times = LoadTimes {
            read_seconds: 0.5,
            quantize_seconds: 2.0 + f64::from(repetition),
            upload_seconds: 0.25,
            total_seconds: 2.75 + f64::from(repetition),
        };
        let mut samples = Samples {
            load: Some(LoadSample { times: load_times, page_cache: "warm".into() }),
            phases: self.phases(scenario, repetition),
            memory: self.timeline(),
            probes: self.probes(scenario),
            ..Samples::default()
        };
        match scenario {
            Scenario::Load(_) => {}
            Scenario::Train(s) => {
                samples.train = self.steps(s, repetition);
                samples.evaluations =
                    vec![self.evaluation(0, 12.0), self.evaluation(s.total_steps() as u64, 11.5)];
            }
            Scenario::Quality(s) => {
                samples.train = self.steps(&s.train, repetition);
                let evaluation = |interval: usize| {
                    let after_steps = interval * s.evaluation_interval;
                    self.evaluation(after_steps as u64, 6.0 - interval as f64)
                };
                samples.evaluations = (0..=s.train.steps / s.evaluation_interval).map(evaluation).collect();
            }
            Scenario::Infer(s) => {
                let round = |warmup: bool| PrefillSample { warmup, tokens: s.prompt_tokens, seconds: 0.8 };
                samples.prefill = vec![round(true), round(false), round(false)];
                let decode = |warmup: bool| DecodeSample { warmup, seconds: vec![0.125; s.generate_tokens] };
                samples.decode = vec![decode(true), decode(false), decode(false)];
            }
        }
        samples
    }

    fn steps(&self, scenario: &TrainScenario, repetition: u32) -> Vec<TrainSample> {
        let slots = scenario.sequence_length * scenario.rows_per_step();
        let step = |step: usize| TrainSample {
            step: step as u64,
            warmup: step < scenario.warmup_steps,
            seconds: self.seconds_per_step * (1.0 + 0.02 * (step + repetition as usize) as f64),
            loss: 12.0 - 0.1 * step as f64 + self.loss_offset,
            grad_norm: 1.0,
            examples: 2,
            trained_tokens: slots / 2,
            real_tokens: slots - 16,
            slot_tokens: slots,
        };
        (0..scenario.total_steps()).map(step).collect()
    }

    fn evaluation(&self, after_steps: u64, loss: f64) -> EvaluationSample {
        EvaluationSample { after_steps, loss: loss + self.loss_offset, tokens: 128, seconds: 1.0 }
    }

    fn phases(&self, scenario: &Scenario, repetition: u32) -> Vec<PhaseMemory> {
        let names: &[(&str, f64)] = match scenario {
            Scenario::Load(_) => &[("start", 0.02), ("load", 0.6)],
            Scenario::Train(_) | Scenario::Quality(_) => &[
                ("start", 0.02),
                ("load", 0.6),
                ("attach", 0.62),
                ("evaluate", 0.8),
                ("train", 1.0),
                ("evaluate", 0.9),
            ],
            Scenario::Infer(_) => &[("start", 0.02), ("load", 0.6), ("prefill", 0.7), ("decode", 0.65)],
        };
        let phase = |(name, share): &(&str, f64)| {
            // The second repetition stays a little below the first.
            let peak = self.peak_gb * 1e9 * share * (1.0 - 0.01 * f64::from(repetition));
            PhaseMemory {
                name: name.to_string(),
                seconds: 5.0,
                peak_bytes: peak as u64,
                anonymous_bytes: Some((peak * 0.75) as u64),
                file_bytes: Some(20_000_000),
                high_water_bytes: None,
            }
        };
        names.iter().map(phase).collect()
    }

    fn timeline(&self) -> Vec<MemoryPoint> {
        let point = |i: u32| {
            let share = (f64::from(i) / 10.0).min(1.0) * if i % 4 == 3 { 1.0 } else { 0.9 };
            MemoryPoint {
                seconds: f64::from(i) * self.seconds_per_step / 4.0,
                resident_bytes: (self.peak_gb * 1e9 * share) as u64,
            }
        };
        (0..24).map(point).collect()
    }

    fn probes(&self, scenario: &Scenario) -> Vec<Probe> {
        let names: &[&str] = match scenario {
            Scenario::Load(_) => &["load_checkpoint", "load_nf4", "double_quantization", "tied_head"],
            Scenario::Train(_) | Scenario::Quality(_) => &[
                "load_nf4",
                "train_nf4",
                "lora_all_projections",
                "lora_dropout",
                "gradient_checkpointing",
                "save_peft_adapter",
            ],
            Scenario::Infer(_) => &["load_nf4", "kv_cache_generation"],
        };
        let probe = |name: &&str| Probe {
            name: name.to_string(),
            passed: !self.failing_probes.contains(name),
            evidence: format!("as {} showed", self.name),
        };
        names.iter().map(probe).collect()
    }
}

pub fn half_billion() -> ModelRecord {
    ModelRecord {
        name: "qwen2.5-coder-0.5b".into(),
        parameters: 494_032_768,
        checkpoint_bytes: 988_065_536,
        synthetic: true,
        origin: "preset qwen2.5-coder-0.5b, seed 42".into(),
        config: Some(evalfw::model::Preset::parse("0.5b").unwrap().config),
    }
}

pub fn tiny() -> ModelRecord {
    ModelRecord {
        name: "tiny".into(),
        parameters: 1_250_000,
        checkpoint_bytes: 2_500_000,
        synthetic: true,
        origin: "preset tiny, seed 42".into(),
        config: None,
    }
}

pub fn load() -> Scenario {
    Scenario::Load(LoadScenario { quantization: Quantization::Nf4, timeout_seconds: 60 })
}

pub fn train(sequence_length: usize) -> Scenario {
    Scenario::Train(TrainScenario {
        quantization: Quantization::Nf4,
        timeout_seconds: 60,
        sequence_length,
        batch_size: 1,
        gradient_accumulation_steps: 1,
        packing: true,
        warmup_steps: 1,
        steps: 3,
        evaluation_batches: 1,
        learning_rate: 2e-4,
        weight_decay: 0.01,
        max_grad_norm: 0.0,
        gradient_checkpointing: true,
        kept_activations_gb: 0.0,
        lora_r: 16,
        lora_alpha: 32.0,
        lora_dropout: 0.1,
    })
}

/// Ten steps, an evaluation after every second; the loss falls from 6 by 1 each time.
pub fn quality(target_loss: f64) -> Scenario {
    let Scenario::Train(train) = train(64) else { unreachable!() };
    let train = TrainScenario { warmup_steps: 0, steps: 10, evaluation_batches: 1, ..train };
    Scenario::Quality(QualityScenario { model: "learner".into(), target_loss, evaluation_interval: 2, train })
}

pub fn learner() -> ModelRecord {
    ModelRecord { name: "learner".into(), parameters: 1_100_000, ..tiny() }
}

pub fn infer() -> Scenario {
    Scenario::Infer(InferScenario {
        quantization: Quantization::Nf4,
        timeout_seconds: 60,
        prompt_tokens: 128,
        generate_tokens: 16,
        warmup: 1,
        repeats: 2,
    })
}

fn environment() -> Environment {
    Environment {
        os: "Fixture Linux 1.0".into(),
        kernel: Some("6.0".into()),
        arch: "x86_64".into(),
        cpu: "Fixture CPU".into(),
        physical_cores: Some(2),
        logical_cores: 4,
        memory_bytes: 24_000_000_000,
        gpus: Vec::new(),
        evalfw_version: "0.1.0".into(),
        commit: Some("0123456789ab".into()),
        features: vec!["candle".into(), "burn".into()],
    }
}

/// The same cell, ended otherwise and without samples.
pub fn ended(mut cell: CellRecord, outcome: Outcome, message: &str) -> CellRecord {
    cell.outcome = outcome;
    cell.samples = Samples::default();
    cell.peak_memory_bytes = None;
    cell.error = Some(CellError {
        during: "train step 3".into(),
        message: message.into(),
        advice: None,
        stderr_tail: Vec::new(),
    });
    cell
}

/// Every cell of an engine that cannot run on the machine.
pub fn unavailable(name: &'static str, message: &str, advice: &str) -> Vec<CellRecord> {
    let without_figures = |cell| {
        let mut cell = ended(cell, Outcome::Unavailable, message);
        cell.device = None;
        let error = cell.error.as_mut().unwrap();
        error.during = "start".into();
        error.advice = Some(advice.into());
        cell
    };
    Engine::new(name, 1.0, 1.0).cells().into_iter().map(without_figures).collect()
}

/// Writes a record into a folder.
pub fn write(dir: &Path, cells: &[CellRecord]) {
    let mut log = RunLog::open(dir).unwrap();
    for cell in cells {
        log.append(cell).unwrap();
    }
}
