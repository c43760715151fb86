//! The rules of the protocol, as they can be tried on a worker.

use super::Conformance;
use super::conversation::{Broke, Conversation, Seen, refused};
use crate::verify::reference::{Reference, ReferenceModel};
use crate::verify::tolerance::Tolerances;
use crate::worker::WorkerCommand;
use anyhow::{Context, Result};
use evalfw_engine::Error as EngineError;
use evalfw_engine::lora::{Adapter, read_tensors};
use evalfw_engine::protocol::{
    AttachAdapter, BatchRef, Bye, Decode, DecodedWeights, EngineInfo, Evaluate, Gradients, Hello, Load,
    Logits, MeasureLimits, Memory, Prefill, Quantization, SaveAdapter, Tokenize, TrainStep, TrainingConfig,
    Tune, VERSION,
};
use serde_json::json;
use std::path::PathBuf;
use tempfile::TempDir;

pub struct Rule {
    /// Of backends/PROTOCOL.md.
    pub section: &'static str,
    pub title: &'static str,
    /// Whether it begins with a model that is loaded.
    pub needs_load: bool,
    pub tried: fn(&Subject<'_>, &mut Conformance) -> Seen,
}

/// The section of the rule that others need.
pub const LOAD: &str = "Load";

/// In the order in which an engine is written.
pub const RULES: &[Rule] = &[
    Rule { section: "Hello", title: "`hello` says who answers, on what", needs_load: false, tried: hello },
    Rule {
        section: "Hello",
        title: "another version of the protocol is refused",
        needs_load: false,
        tried: other_version,
    },
    Rule {
        section: "Lines",
        title: "a line that is no request gets an error, and the next call its reply",
        needs_load: false,
        tried: garbage,
    },
    Rule {
        section: "Lines",
        title: "a method that is unknown is an error of the protocol",
        needs_load: false,
        tried: unknown_method,
    },
    Rule {
        section: "Order",
        title: "calls before `hello`, and of a model before `load`, are refused",
        needs_load: false,
        tried: order,
    },
    Rule {
        section: "Errors",
        title: "a folder that holds no model is an error of input that names it",
        needs_load: false,
        tried: no_model,
    },
    Rule {
        section: LOAD,
        title: "`load` tells its parts and the number of parameters",
        needs_load: false,
        tried: load,
    },
    Rule {
        section: "Generating",
        title: "`prefill`, `decode` and `logits` have the shapes that were asked for",
        needs_load: true,
        tried: generating,
    },
    Rule {
        section: "Generating",
        title: "`decode` without a `prefill`, and ids that are too large, are refused",
        needs_load: true,
        tried: bad_tokens,
    },
    Rule { section: "Training", title: "an adapter trains, step by step", needs_load: true, tried: training },
    Rule {
        section: "Training",
        title: "gradients and the trained adapter are written in PEFT's names",
        needs_load: true,
        tried: files,
    },
    Rule {
        section: "Training",
        title: "a line that a file of batches does not have is refused by its name",
        needs_load: true,
        tried: no_line,
    },
    Rule {
        section: "Optional calls",
        title: "a call that the engine does not have is `unsupported`",
        needs_load: true,
        tried: optional,
    },
    Rule {
        section: "The end",
        title: "`bye` is answered, and the process ends with success",
        needs_load: false,
        tried: bye,
    },
    Rule {
        section: "The end",
        title: "the end of input ends the process",
        needs_load: false,
        tried: end_of_input,
    },
];

/// A worker's command, and what it is tried on.
pub struct Subject<'a> {
    command: &'a WorkerCommand,
    model: &'a ReferenceModel,
    /// A folder with a tokenizer.
    tokenizer: PathBuf,
    scratch: TempDir,
}

impl<'a> Subject<'a> {
    pub fn new(command: &'a WorkerCommand, reference: &'a Reference) -> Result<Self> {
        let model = reference.short().context("the reference holds no model")?;
        let scratch = tempfile::tempdir().context("no temporary folder")?;
        let tokenizer =
            reference.tokenizer.as_ref().context("the reference holds no tokenizer")?.folder.clone();
        Ok(Self { command, model, tokenizer, scratch })
    }

    fn start(&self) -> Result<Conversation, Broke> {
        Conversation::start(self.command)
    }

    fn greeted(&self) -> Result<(Conversation, EngineInfo), Broke> {
        let mut worker = self.start()?;
        let info = worker.done(Hello { protocol: VERSION })?;
        Ok((worker, info))
    }

    fn loaded(&self) -> Result<Conversation, Broke> {
        let (mut worker, _) = self.greeted()?;
        worker.done(Load { model: self.model.model.clone(), quantization: Quantization::None })?;
        Ok(worker)
    }

    fn adapted(&self) -> Result<Conversation, Broke> {
        let mut worker = self.loaded()?;
        let attached = worker.done(AttachAdapter {
            adapter: self.model.adapter.clone(),
            training: TrainingConfig { gradient_checkpointing: false, ..TrainingConfig::default() },
        })?;
        let adapter = Adapter::read(&self.model.adapter, &self.model.config)?;
        equal("trainable_parameters", attached.trainable_parameters, adapter.parameters() as u64)?;
        Ok(worker)
    }

    fn lines(&self, lines: &[usize]) -> BatchRef {
        BatchRef { file: self.model.batches.clone(), lines: lines.to_vec() }
    }

    fn output(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }
}

fn hello(subject: &Subject<'_>, conformance: &mut Conformance) -> Seen {
    let info = match subject.start()?.call(Hello { protocol: VERSION })? {
        Ok(info) => info,
        Err(error @ EngineError::Unavailable { .. }) => {
            conformance.unavailable = Some(error.to_string());
            return Ok("it answers that it cannot run here".to_owned());
        }
        Err(error) => return Err(format!("hello failed: {error}").into()),
    };
    equal("protocol", info.protocol, VERSION)?;
    for (field, value) in [
        ("engine", &info.engine),
        ("engine_version", &info.engine_version),
        ("framework", &info.framework),
        ("framework_version", &info.framework_version),
        ("device.name", &info.device.name),
    ] {
        if value.trim().is_empty() {
            return Err(format!("{field} is empty").into());
        }
    }
    if info.threads == 0 {
        return Err("threads is 0".into());
    }
    if !info.quantizations.contains(&Quantization::None) {
        return Err("quantizations lacks `none`, the form that every engine is verified in".into());
    }
    Tolerances::of(&info.compute_dtype)?;
    let seen = format!("{} {} on {}", info.framework, info.framework_version, info.device.title());
    conformance.engine = Some(info);
    Ok(seen)
}

fn other_version(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    refused(subject.start()?.named("hello", json!({"protocol": VERSION + 1000}))?, "protocol", &[])
}

fn garbage(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let mut worker = subject.start()?;
    let (_, outcome) = worker.line("this is no JSON")?;
    let seen = refused(outcome, "protocol", &[])?;
    worker.done(Hello { protocol: VERSION })?;
    Ok(seen)
}

fn unknown_method(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let (mut worker, _) = subject.greeted()?;
    let seen = refused(worker.named("fly_to_the_moon", json!({}))?, "protocol", &[])?;
    worker.done(Bye {})?;
    Ok(seen)
}

fn order(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let load = json!({"model": subject.model.model, "quantization": "none"});
    refused(subject.start()?.named("load", load)?, "protocol", &[])?;
    let (mut worker, _) = subject.greeted()?;
    refused(worker.named("prefill", json!({"tokens": [1, 2]}))?, "protocol", &[])
}

fn no_model(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let (mut worker, _) = subject.greeted()?;
    let folder = subject.output("no-such-model");
    refused(
        worker.named("load", json!({"model": folder, "quantization": "none"}))?,
        "input",
        &["no-such-model"],
    )
}

fn load(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let (mut worker, info) = subject.greeted()?;
    for quantization in &info.quantizations {
        let loaded = worker.done(Load { model: subject.model.model.clone(), quantization: *quantization })?;
        equal("parameters", loaded.parameters, subject.model.config.parameters())?;
        let times = loaded.times;
        let parts = times.read_seconds + times.quantize_seconds + times.upload_seconds;
        if !(times.total_seconds > 0.0 && (parts - times.total_seconds).abs() <= 0.01 * times.total_seconds) {
            return Err(
                format!("the parts add up to {parts} s, and the total is {} s", times.total_seconds).into()
            );
        }
        worker = subject.greeted()?.0;
    }
    Ok(format!("{} forms", info.quantizations.len()))
}

fn generating(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let mut worker = subject.loaded()?;
    let prompt = subject.model.prompts.last().ok_or("the reference has no prompt")?;
    let prefill = worker.done(Prefill { tokens: prompt.tokens.clone() })?;
    time("prefill", prefill.seconds)?;
    let decode = worker.done(Decode { first: prefill.next, steps: 3 })?;
    equal("tokens of decode", decode.tokens.len(), 3)?;
    equal("seconds of decode", decode.seconds.len(), 3)?;
    decode.seconds.iter().try_for_each(|seconds| time("decode", *seconds))?;
    let output = subject.output("logits.safetensors");
    worker.done(Logits { tokens: prompt.tokens.clone(), output: output.clone() })?;
    let logits =
        crate::verify::reference::read_f32(&output, "logits").map_err(|error| format!("{error:#}"))?;
    equal("values of logits", logits.len(), prompt.tokens.len() * subject.model.config.vocab_size)?;
    Ok(String::new())
}

fn bad_tokens(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let mut worker = subject.loaded()?;
    refused(worker.named("decode", json!({"first": 1, "steps": 1}))?, "protocol", &[])?;
    let too_large = subject.model.config.vocab_size;
    refused(worker.named("prefill", json!({"tokens": [too_large]}))?, "input", &[&too_large.to_string()])
}

fn training(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let mut worker = subject.adapted()?;
    let before = worker.done(Evaluate { batches: subject.lines(&[0]) })?;
    time("evaluate", before.seconds)?;
    for step in 0..2 {
        let batches = subject.lines(&[0, 1]);
        let report = worker.done(TrainStep { step, dropout_seed: 0, batches })?;
        time("train_step", report.seconds)?;
        if !(report.loss.is_finite() && report.grad_norm.is_finite() && report.grad_norm > 0.0) {
            return Err(
                format!("step {step}: loss {}, gradient norm {}", report.loss, report.grad_norm).into()
            );
        }
    }
    let after = worker.done(Evaluate { batches: subject.lines(&[0]) })?;
    match after.loss < before.loss {
        true => Ok(format!("loss {:.4}, after two steps {:.4}", before.loss, after.loss)),
        false => Err(format!("two steps took the loss from {} to {}", before.loss, after.loss).into()),
    }
}

fn files(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let mut worker = subject.adapted()?;
    let config = &subject.model.config;
    let r = Adapter::read(&subject.model.adapter, config)?.config.r;
    let output = subject.output("gradients.safetensors");
    let batches = subject.lines(&[0]);
    worker.done(Gradients { step: 0, dropout_seed: 0, batches, output: output.clone() })?;
    read_tensors(&output, config, r)?;
    let output = subject.output("saved");
    worker.done(SaveAdapter { output: output.clone() })?;
    Adapter::read(&output, config)?;
    Ok(String::new())
}

fn no_line(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let mut worker = subject.loaded()?;
    let call = json!({"batches": {"file": subject.model.batches, "lines": [100_000]}});
    refused(worker.named("evaluate", call)?, "input", &["batches.jsonl"])
}

fn optional(subject: &Subject<'_>, conformance: &mut Conformance) -> Seen {
    let mut worker = subject.greeted()?.0;
    let mut without = Vec::new();
    let mut note = |name, outcome: Result<(), EngineError>| match outcome {
        Ok(()) => Ok(()),
        Err(EngineError::Unsupported { .. }) => {
            without.push(name);
            Ok(())
        }
        Err(error) => Err(Broke::from(format!("{name}: {error}"))),
    };
    note("limits", worker.call(MeasureLimits {})?.map(drop))?;
    let folder = subject.tokenizer.clone();
    note("tokenize", worker.call(Tokenize { folder, text: "def add(a, b):".to_owned() })?.map(drop))?;
    worker = subject.loaded()?;
    note("tune", worker.call(Tune::default())?.map(drop))?;
    let output = subject.output("decoded.safetensors");
    note("decoded_weights", worker.call(DecodedWeights { output })?.map(drop))?;
    note("memory", worker.call(Memory {})?.map(drop))?;
    let seen = match without.is_empty() {
        true => "it has all of them".to_owned(),
        false => format!("without {}", without.join(", ")),
    };
    conformance.without = without;
    Ok(seen)
}

fn bye(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let (mut worker, _) = subject.greeted()?;
    worker.done(Bye {})?;
    worker.ends()
}

fn end_of_input(subject: &Subject<'_>, _: &mut Conformance) -> Seen {
    let (mut worker, _) = subject.greeted()?;
    worker.close();
    worker.ends()
}

fn equal<T: PartialEq + std::fmt::Display>(what: &str, found: T, expected: T) -> Result<(), Broke> {
    match found == expected {
        true => Ok(()),
        false => Err(format!("{what} is {found}, and has to be {expected}").into()),
    }
}

fn time(of: &str, seconds: f64) -> Result<(), Broke> {
    match seconds.is_finite() && seconds >= 0.0 {
        true => Ok(()),
        false => Err(format!("{of} took {seconds} s").into()),
    }
}
