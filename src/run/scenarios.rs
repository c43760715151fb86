//! What each kind of scenario asks of a worker.

use super::cell::Session;
use super::inputs::{ModelInputs, TrainInputs};
use crate::measure::metrics::{LOAD_PHASE, TRAIN_PHASE, TUNE_PHASE, plateau};
use crate::plan::Cell;
use crate::record::{DecodeSample, EvaluationSample, LoadSample, PrefillSample, Probe, Samples, TrainSample};
use crate::scenario::{InferScenario, QualityScenario, Scenario, TrainScenario};
use crate::worker::Failure;
use evalfw_engine::lora::{Adapter, Target};
use evalfw_engine::protocol::{
    AttachAdapter, BatchRef, Decode, Evaluate, Generate, Load, Memory, Prefill, Quantization, SaveAdapter,
    TrainStep, Tune,
};
use std::ops::Range;

pub fn run(session: &mut Session<'_>, cell: &Cell, inputs: &ModelInputs) -> Result<(), Failure> {
    load(session, inputs, cell.scenario.quantization())?;
    match &cell.scenario {
        Scenario::Load(_) => {}
        Scenario::Train(_) | Scenario::Quality(_) => train(session, cell, inputs)?,
        Scenario::Infer(scenario) => infer(session, scenario, cell.seed, inputs)?,
    }
    let memory = session.call("memory", Memory {})?;
    session.samples.device_memory = Some(memory);
    if session.tunes {
        // Of all that was timed as well: what came too late to be measured is in it.
        session.samples.tuning = Some(session.call("tuning figures", Tune::default())?);
    }
    Ok(())
}

fn load(session: &mut Session<'_>, inputs: &ModelInputs, quantization: Quantization) -> Result<(), Failure> {
    session.phase(LOAD_PHASE);
    let loaded = session.call("load", Load { model: inputs.dir.clone(), quantization })?;
    session.samples.load =
        Some(LoadSample { times: loaded.times, page_cache: inputs.page_cache.as_str().to_owned() });
    let parameters = inputs.config.parameters();
    if loaded.parameters != parameters {
        return Err(Failure::Wrong(format!(
            "loaded {} parameters of a model of {parameters}",
            loaded.parameters
        )));
    }
    let head = if inputs.config.tie_word_embeddings { "tied_head" } else { "untied_head" };
    session.passed("load_checkpoint", "a Hugging Face folder was loaded");
    session.passed(head, "the model's head is of this kind");
    if inputs.files > 1 {
        session.passed("sharded_checkpoint", &format!("the weights came from {} files", inputs.files));
    }
    if quantization == Quantization::Nf4 {
        session.passed("load_nf4", "the seven projections of every layer were quantized while loading");
        session.passed("double_quantization", "the scales of the 4-bit blocks are stored in 8 bits");
    }
    if quantization == Quantization::Native && !session.has(Quantization::Nf4) {
        let evidence = "the framework has no NF4; the base was loaded in its own format";
        session.failed("load_nf4", evidence);
        session.failed("double_quantization", evidence);
    }
    Ok(())
}

fn train(session: &mut Session<'_>, cell: &Cell, inputs: &ModelInputs) -> Result<(), Failure> {
    let Some(scenario) = cell.scenario.training() else { return Ok(()) };
    let files = inputs.train(&cell.scenario);
    session.phase("attach");
    let training = scenario.training();
    session.call("attach adapter", AttachAdapter { adapter: files.adapter.clone(), training })?;
    tune(session, || Tune {
        train: Some(BatchRef { file: files.train_file.clone(), lines: files.one_of_each_size() }),
        evaluate: files.validation_batches(),
        generate: None,
    })?;
    let untrained = evaluate(session, files, 0)?;
    match &cell.scenario {
        // There is nothing to train for, and no gradient to check.
        Scenario::Quality(quality) if quality.is_met_by(untrained) => return Ok(()),
        Scenario::Quality(quality) => train_to_target(session, quality, files, cell.seed)?,
        _ => {
            train_steps(session, scenario, files, cell.seed, 0..scenario.total_steps())?;
            // Before any further step, so that all engines are evaluated after the same ones.
            evaluate(session, files, scenario.total_steps() as u64)?;
            train_until_steady(session, scenario, files, cell.seed)?;
        }
    }
    check_gradients(session, scenario)?;
    session.phase("save");
    check_saved_adapter(session, inputs)
}

/// Goes on, up to twice the steps, while the last ones are no plateau. Those that count are the last ones.
fn train_until_steady(
    session: &mut Session<'_>,
    scenario: &TrainScenario,
    files: &TrainInputs,
    seed: u64,
) -> Result<(), Failure> {
    let counted = scenario.steps;
    let steady = |samples: &Samples| plateau(samples.train.iter().map(|sample| sample.seconds), counted);
    until_steady(session, counted, steady, |session, further| {
        let step = scenario.total_steps() + further;
        train_steps(session, scenario, files, seed, step..step + 1)
    })?;
    let warmup = session.samples.train.len() - counted;
    for (index, sample) in session.samples.train.iter_mut().enumerate() {
        sample.warmup = index < warmup;
    }
    Ok(())
}

/// Does `more`, at most so many times, while the times are not `steady`.
fn until_steady(
    session: &mut Session<'_>,
    most: usize,
    steady: impl Fn(&Samples) -> Option<bool>,
    mut more: impl FnMut(&mut Session<'_>, usize) -> Result<(), Failure>,
) -> Result<(), Failure> {
    session.samples.steady = steady(&session.samples);
    for further in 0..most {
        if session.samples.steady != Some(false) {
            break;
        }
        more(session, further)?;
        session.samples.steady = steady(&session.samples);
    }
    Ok(())
}

/// Lets an engine that tunes measure its kernels on `work`, before any of it is timed.
fn tune(session: &mut Session<'_>, work: impl FnOnce() -> Tune) -> Result<(), Failure> {
    if session.tunes {
        session.phase(TUNE_PHASE);
        let figures = session.call("tune", work())?;
        session.samples.tuning = Some(figures);
    }
    Ok(())
}

/// Trains until the evaluation loss is at the target, or the limit of steps is. Not to get there is a
/// result, too.
fn train_to_target(
    session: &mut Session<'_>,
    quality: &QualityScenario,
    files: &TrainInputs,
    seed: u64,
) -> Result<(), Failure> {
    let limit = quality.train.steps;
    for first in (0..limit).step_by(quality.evaluation_interval) {
        let end = limit.min(first + quality.evaluation_interval);
        train_steps(session, &quality.train, files, seed, first..end)?;
        if quality.is_met_by(evaluate(session, files, end as u64)?) {
            break;
        }
    }
    Ok(())
}

fn train_steps(
    session: &mut Session<'_>,
    scenario: &TrainScenario,
    files: &TrainInputs,
    seed: u64,
    steps: Range<usize>,
) -> Result<(), Failure> {
    session.phase(TRAIN_PHASE);
    let rows = scenario.gradient_accumulation_steps;
    for step in steps {
        let lines: Vec<usize> = (step * rows..(step + 1) * rows).collect();
        let batches = &files.train[lines[0]..=lines[rows - 1]];
        let sum = |of: fn(&evalfw_engine::batch::Batch) -> usize| batches.iter().map(|b| of(&b.batch)).sum();
        let call = TrainStep {
            step: step as u64,
            dropout_seed: seed,
            batches: BatchRef { file: files.train_file.clone(), lines },
        };
        let during = format!("train step {} of {}", step + 1, scenario.total_steps());
        let report = session.call(during, call)?;
        session.samples.train.push(TrainSample {
            step: step as u64,
            warmup: step < scenario.warmup_steps,
            seconds: report.seconds,
            loss: report.loss,
            grad_norm: report.grad_norm,
            examples: batches.iter().map(|b| b.examples).sum(),
            trained_tokens: sum(|b| b.trained_tokens()),
            real_tokens: sum(|b| b.real_tokens()),
            slot_tokens: sum(|b| b.slot_tokens()),
        });
    }
    Ok(())
}

/// The loss on the validation batches; `None` if there are none.
fn evaluate(
    session: &mut Session<'_>,
    files: &TrainInputs,
    after_steps: u64,
) -> Result<Option<f64>, Failure> {
    let Some(batches) = files.validation_batches() else { return Ok(None) };
    session.phase("evaluate");
    let report = session.call("evaluate", Evaluate { batches })?;
    session.samples.evaluations.push(EvaluationSample {
        after_steps,
        loss: report.loss,
        tokens: report.tokens,
        seconds: report.seconds,
    });
    Ok(Some(report.loss))
}

fn check_gradients(session: &mut Session<'_>, scenario: &TrainScenario) -> Result<(), Failure> {
    let steps = &session.samples.train;
    if let Some(dead) = steps.iter().find(|s| s.grad_norm <= 0.0) {
        return Err(Failure::Wrong(format!("the adapter's gradient is zero at step {}", dead.step)));
    }
    let evidence = format!("{} steps with finite losses and gradients", steps.len());
    if scenario.quantization == Quantization::Nf4 {
        session.passed("train_nf4", &evidence);
    }
    if scenario.quantization == Quantization::Native && !session.has(Quantization::Nf4) {
        session.passed("train_nf4", &format!("{evidence}, through the framework's own quantized format"));
    }
    if scenario.lora_dropout > 0.0 {
        session.passed("lora_dropout", &format!("trained with lora_dropout {}", scenario.lora_dropout));
    }
    if scenario.gradient_checkpointing {
        session.passed("gradient_checkpointing", &evidence);
    }
    Ok(())
}

/// Reads back what was trained: a projection whose B is still zero never got a gradient.
fn check_saved_adapter(session: &mut Session<'_>, inputs: &ModelInputs) -> Result<(), Failure> {
    let folder = tempfile::tempdir().map_err(|e| Failure::Harness(format!("no temporary folder: {e}")))?;
    session.call("save adapter", SaveAdapter { output: folder.path().to_owned() })?;
    let adapter = Adapter::read(folder.path(), &inputs.config).map_err(|e| Failure::Wrong(e.to_string()))?;
    session.passed(
        "save_peft_adapter",
        "adapter_model.safetensors and adapter_config.json were written and read back",
    );
    let untrained = adapter.tensors.iter().find(|(_, pair)| pair.b.iter().all(|&b| b == 0.0));
    if let Some(((layer, target), _)) = untrained {
        return Err(Failure::Wrong(format!("no gradient reached {} of layer {layer}", target.module())));
    }
    let adapted =
        format!("{} projections of {} layers moved", Target::ALL.len(), inputs.config.num_hidden_layers);
    session.passed("lora_all_projections", &adapted);
    Ok(())
}

fn infer(
    session: &mut Session<'_>,
    scenario: &InferScenario,
    seed: u64,
    inputs: &ModelInputs,
) -> Result<(), Failure> {
    let prompt = inputs.prompt(scenario.prompt_tokens, seed);
    tune(session, || Tune {
        generate: Some(Generate { prompt: prompt.clone(), steps: scenario.generate_tokens }),
        ..Tune::default()
    })?;
    let rounds = scenario.warmup + scenario.repeats;
    for round in 0..rounds {
        infer_round(session, scenario, &prompt, round)?;
    }
    let steady = |samples: &Samples| {
        let prefill = plateau(samples.prefill.iter().map(|sample| sample.seconds), scenario.repeats)?;
        let decode = samples.decode.iter().map(|sample| sample.seconds.iter().sum());
        Some(prefill && plateau(decode, scenario.repeats)?)
    };
    until_steady(session, scenario.repeats, steady, |session, further| {
        infer_round(session, scenario, &prompt, rounds + further)
    })?;
    let warmup = session.samples.prefill.len() - scenario.repeats;
    for (index, (prefill, decode)) in
        session.samples.prefill.iter_mut().zip(&mut session.samples.decode).enumerate()
    {
        (prefill.warmup, decode.warmup) = (index < warmup, index < warmup);
    }
    session.passed(
        "kv_cache_generation",
        &format!("{} tokens decoded after the prompt", scenario.generate_tokens),
    );
    Ok(())
}

fn infer_round(
    session: &mut Session<'_>,
    scenario: &InferScenario,
    prompt: &[u32],
    round: usize,
) -> Result<(), Failure> {
    let warmup = round < scenario.warmup;
    let of = format!("round {} of {}", round + 1, scenario.warmup + scenario.repeats);
    session.phase("prefill");
    let prefill = session.call(format!("prefill, {of}"), Prefill { tokens: prompt.to_vec() })?;
    let tokens = prompt.len();
    session.samples.prefill.push(PrefillSample { warmup, tokens, seconds: prefill.seconds });
    session.phase("decode");
    let steps = scenario.generate_tokens;
    let decode = session.call(format!("decode, {of}"), Decode { first: prefill.next, steps })?;
    if decode.seconds.len() != steps || decode.tokens.len() != steps {
        let got = decode.tokens.len();
        return Err(Failure::Wrong(format!("{got} tokens decoded, {steps} asked for")));
    }
    session.samples.decode.push(DecodeSample { warmup, seconds: decode.seconds });
    Ok(())
}

impl Session<'_> {
    fn passed(&mut self, name: &str, evidence: &str) {
        self.samples.probes.push(Probe { name: name.into(), passed: true, evidence: evidence.into() });
    }

    fn failed(&mut self, name: &str, evidence: &str) {
        self.samples.probes.push(Probe { name: name.into(), passed: false, evidence: evidence.into() });
    }

    /// Whether the engine can load the base in this form.
    fn has(&self, form: Quantization) -> bool {
        self.quantizations.contains(&form)
    }
}
