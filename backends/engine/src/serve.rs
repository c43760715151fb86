//! The worker's loop: any [`Engine`] becomes a process that speaks the protocol.
//!
//! What must be alike for all engines is done here, once: the order of calls, the batches from their
//! file, and the clock, which stops only after the device has been synchronised.

use crate::batch::{Batch, read_batches};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::engine::{Engine, LoadedModel, StepInput, StepResult};
use crate::lora::{Adapter, LoraConfig, write_tensors};
use crate::protocol::*;
use crate::weights::WeightLoader;
use crate::{Error, Result, tensor_file};
use serde::Serialize;
use serde_json::Value;
use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

/// Opens the device. Called once the pipes are set up, so that a failure travels as a reply.
pub type Open<'a> = Box<dyn FnOnce() -> Result<Box<dyn Engine>> + 'a>;

/// Serves standard input and output until `bye` or end of input. Whatever a library prints on
/// standard output goes to standard error, never into the protocol.
pub fn serve_stdio(open: Open<'_>) -> std::io::Result<()> {
    let output = take_stdout()?;
    serve(open, std::io::stdin().lock(), output)
}

/// Serves one connection.
pub fn serve(open: Open<'_>, input: impl BufRead, mut output: impl Write) -> std::io::Result<()> {
    let mut worker = Worker { state: State::New(open), batches: HashMap::new() };
    for line in input.lines() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let (response, last) = match serde_json::from_str::<Request>(&line) {
            Ok(Request { id, call }) => {
                let last = matches!(call, Call::Bye(_));
                (Response::new(id, worker.answer(call)), last)
            }
            Err(error) => (Response::new(request_id(&line), Err(Error::protocol(error))), false),
        };
        serde_json::to_writer(&mut output, &response)?;
        output.write_all(b"\n")?;
        output.flush()?;
        if last {
            break;
        }
    }
    Ok(())
}

/// The id of a request that could not be read otherwise, so that its sender can tell what failed.
fn request_id(line: &str) -> u64 {
    let value: Option<Value> = serde_json::from_str(line).ok();
    value.and_then(|v| v.get("id")?.as_u64()).unwrap_or(0)
}

#[cfg(unix)]
fn take_stdout() -> std::io::Result<std::fs::File> {
    let protocol = rustix::io::dup(rustix::stdio::stdout())?;
    rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
    Ok(protocol.into())
}

#[cfg(not(unix))]
fn take_stdout() -> std::io::Result<std::io::Stdout> {
    Ok(std::io::stdout())
}

struct Worker<'a> {
    state: State<'a>,
    /// Files of batches already read and checked.
    batches: HashMap<PathBuf, Vec<Batch>>,
}

enum State<'a> {
    New(Open<'a>),
    /// The device could not be opened, or a load failed half-way.
    Failed,
    Ready(Box<dyn Engine>),
    Loaded(Session),
}

struct Session {
    model: LoadedModel,
    /// Whether the engine chooses kernels by measuring.
    tunes: bool,
    config: ModelConfig,
    base_model: PathBuf,
    adapter: Option<LoraConfig>,
    /// Tokens in the KV cache, and so the position of the next one.
    position: usize,
}

impl<'a> Worker<'a> {
    fn answer(&mut self, call: Call) -> Result<Value> {
        let answer = self.dispatch(call);
        if let State::Loaded(session) = &self.state {
            // An engine whose allocator knows no peak can look now, off every clock.
            session.model.memory();
        }
        answer
    }

    fn dispatch(&mut self, call: Call) -> Result<Value> {
        match call {
            Call::Hello(call) => reply(self.hello(&call)),
            Call::Limits(_) => reply(self.limits()),
            Call::Load(call) => reply(self.load(&call)),
            Call::AttachAdapter(call) => reply(self.session()?.attach_adapter(&call)),
            Call::TrainStep(call) => {
                let batches = self.batches(&call.batches)?;
                reply(self.session()?.train_step(&call, &batches))
            }
            Call::Tune(call) => reply(self.tune(&call)),
            Call::Gradients(call) => {
                let batches = self.batches(&call.batches)?;
                reply(self.session()?.tuning(|session| session.gradients(&call, &batches)))
            }
            Call::Evaluate(call) => {
                let batches = self.batches(&call.batches)?;
                reply(self.session()?.evaluate(&batches))
            }
            Call::Prefill(call) => reply(self.session()?.prefill(&call)),
            Call::Decode(call) => reply(self.session()?.decode(&call)),
            Call::Logits(call) => reply(self.session()?.tuning(|session| session.logits(&call))),
            Call::DecodedWeights(call) => reply(self.session()?.decoded_weights(&call)),
            Call::Tokenize(_) => {
                Err(Error::unsupported("the harness makes the token ids, with the tokenizers library"))
            }
            Call::SaveAdapter(call) => reply(self.session()?.save_adapter(&call)),
            Call::Memory(_) => reply(Ok(self.session()?.model.memory())),
            Call::Bye(_) => reply(Ok(Done {})),
        }
    }

    fn hello(&mut self, call: &Hello) -> Result<EngineInfo> {
        if call.protocol != VERSION {
            return Err(Error::protocol(format_args!(
                "the harness speaks version {}, this worker version {VERSION}",
                call.protocol
            )));
        }
        let State::New(open) = std::mem::replace(&mut self.state, State::Failed) else {
            return Err(Error::protocol("hello comes once, first"));
        };
        let engine = open()?;
        let info = engine.info();
        self.state = State::Ready(engine);
        Ok(info)
    }

    fn limits(&mut self) -> Result<DeviceLimits> {
        match &mut self.state {
            State::Ready(engine) => engine.limits(),
            _ => Err(Error::protocol("limits come after hello and before load")),
        }
    }

    fn load(&mut self, call: &Load) -> Result<Loaded> {
        let State::Ready(engine) = &mut self.state else {
            return Err(Error::protocol("load comes once, after hello"));
        };
        let start = Instant::now();
        let mut times = LoadTimes::default();
        let checkpoint = Checkpoint::open(&call.model)?;
        times.read_seconds = start.elapsed().as_secs_f64();
        let loader = WeightLoader::new(&checkpoint, call.quantization, &mut times);
        let tunes = engine.info().tunes;
        let mut model = engine.load(loader)?;
        model.synchronize()?;
        times.total_seconds = start.elapsed().as_secs_f64();
        times.upload_seconds = (times.total_seconds - times.read_seconds - times.quantize_seconds).max(0.0);
        let loaded = Loaded {
            times,
            parameters: checkpoint.config.parameters(),
            checkpoint_bytes: checkpoint.bytes(),
        };
        self.state = State::Loaded(Session {
            model,
            tunes,
            config: checkpoint.config,
            base_model: call.model.clone(),
            adapter: None,
            position: 0,
        });
        Ok(loaded)
    }

    fn tune(&mut self, call: &Tune) -> Result<Tuning> {
        let mut batches = |wanted: &Option<BatchRef>| match wanted {
            Some(wanted) => self.batches(wanted),
            None => Ok(Vec::new()),
        };
        let (train, evaluate) = (batches(&call.train)?, batches(&call.evaluate)?);
        let session = self.session()?;
        let has_work = !train.is_empty() || !evaluate.is_empty() || call.generate.is_some();
        if session.tunes && has_work {
            session.tuning(|session| session.warm_up(&train, &evaluate, call.generate.as_ref()))?;
        }
        Ok(session.model.tuning())
    }

    fn session(&mut self) -> Result<&mut Session> {
        match &mut self.state {
            State::Loaded(session) => Ok(session),
            _ => Err(Error::protocol("no model is loaded")),
        }
    }

    /// The batches a call refers to. They are read and checked outside every clock.
    fn batches(&mut self, wanted: &BatchRef) -> Result<Vec<Batch>> {
        let vocab_size = self.session()?.config.vocab_size;
        if !self.batches.contains_key(&wanted.file) {
            let batches = read_batches(&wanted.file)?;
            for (line, batch) in batches.iter().enumerate() {
                let place = |problem| Error::file(&wanted.file, format_args!("line {}: {problem}", line + 1));
                batch.validate(vocab_size).map_err(place)?;
            }
            self.batches.insert(wanted.file.clone(), batches);
        }
        let all = &self.batches[&wanted.file];
        let pick = |&line: &usize| {
            let missing =
                || Error::file(&wanted.file, format_args!("has {} lines, line {line} asked for", all.len()));
            all.get(line).cloned().ok_or_else(missing)
        };
        let batches: Vec<Batch> = wanted.lines.iter().map(pick).collect::<Result<_>>()?;
        // A row without an answer, or a micro-batch, adds nothing to the sum; of nothing there is no mean.
        if batches.iter().all(|batch| batch.trained_tokens() == 0) {
            let problem = format!("no position of the lines {:?} has a loss", wanted.lines);
            return Err(Error::file(&wanted.file, problem));
        }
        Ok(batches)
    }
}

impl Session {
    fn attach_adapter(&mut self, call: &AttachAdapter) -> Result<AdapterAttached> {
        call.training.check()?;
        let adapter = Adapter::read(&call.adapter, &self.config)?;
        self.model.attach_adapter(&adapter, &call.training)?;
        self.model.synchronize()?;
        self.adapter = Some(adapter.config.clone());
        Ok(AdapterAttached { trainable_parameters: adapter.parameters() as u64 })
    }

    fn train_step(&mut self, call: &TrainStep, batches: &[Batch]) -> Result<StepReport> {
        self.lora()?;
        let input = StepInput { step: call.step, dropout_seed: call.dropout_seed, micro_batches: batches };
        let start = Instant::now();
        let result = self.model.train_step(&input)?;
        self.model.synchronize()?;
        step_report(result, start)
    }

    fn gradients(&mut self, call: &Gradients, batches: &[Batch]) -> Result<StepReport> {
        let r = self.lora()?.r;
        let input = StepInput { step: call.step, dropout_seed: call.dropout_seed, micro_batches: batches };
        let start = Instant::now();
        let (result, gradients) = self.model.gradients(&input)?;
        let report = step_report(result, start)?;
        write_tensors(&call.output, &gradients, r)?;
        Ok(report)
    }

    /// Runs what is not timed, so that an engine may measure in it.
    fn tuning<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if !self.tunes {
            return work(self);
        }
        self.model.tune(true);
        let outcome = work(self);
        self.model.tune(false);
        outcome
    }

    /// The same products as in what is timed, with no update.
    fn warm_up(&mut self, train: &[Batch], evaluate: &[Batch], generate: Option<&Generate>) -> Result<()> {
        for batch in train {
            self.lora()?;
            let input = StepInput { step: 0, dropout_seed: 0, micro_batches: std::slice::from_ref(batch) };
            self.model.gradients(&input)?;
        }
        if !evaluate.is_empty() {
            self.model.evaluate(evaluate)?;
        }
        if let Some(Generate { prompt, steps }) = generate {
            let first = self.prefill(&Prefill { tokens: prompt.clone() })?.next;
            self.decode(&Decode { first, steps: *steps })?;
        }
        self.model.synchronize()
    }

    fn evaluate(&mut self, batches: &[Batch]) -> Result<EvaluationReport> {
        let start = Instant::now();
        let evaluation = self.model.evaluate(batches)?;
        self.model.synchronize()?;
        let seconds = start.elapsed().as_secs_f64();
        let loss = evaluation.loss_sum / evaluation.tokens as f64;
        finite("evaluation loss", loss)?;
        Ok(EvaluationReport { loss, tokens: evaluation.tokens, seconds })
    }

    fn prefill(&mut self, call: &Prefill) -> Result<PrefillReport> {
        self.check_tokens(&call.tokens)?;
        let start = Instant::now();
        let next = self.model.prefill(&call.tokens)?;
        self.model.synchronize()?;
        let seconds = start.elapsed().as_secs_f64();
        self.position = call.tokens.len();
        Ok(PrefillReport { next, seconds })
    }

    fn decode(&mut self, call: &Decode) -> Result<DecodeReport> {
        if self.position == 0 {
            return Err(Error::protocol("decode continues a prefill, and there was none"));
        }
        self.check_tokens(&[call.first])?;
        let mut report = DecodeReport { tokens: Vec::new(), seconds: Vec::new() };
        let mut token = call.first;
        for _ in 0..call.steps {
            let start = Instant::now();
            token = self.model.decode(token)?;
            self.model.synchronize()?;
            report.seconds.push(start.elapsed().as_secs_f64());
            report.tokens.push(token);
            self.position += 1;
        }
        Ok(report)
    }

    fn logits(&mut self, call: &Logits) -> Result<Done> {
        self.check_tokens(&call.tokens)?;
        let logits = self.model.logits(&call.tokens)?;
        let shape = vec![call.tokens.len(), self.config.vocab_size];
        tensor_file::write(&call.output, [("logits".to_owned(), shape, logits.as_slice())])?;
        Ok(Done {})
    }

    fn decoded_weights(&mut self, call: &DecodedWeights) -> Result<Done> {
        let weights = self.model.decoded_weights()?;
        tensor_file::write_projections(&call.output, &weights, &self.config)?;
        Ok(Done {})
    }

    fn save_adapter(&mut self, call: &SaveAdapter) -> Result<Done> {
        let config = self.lora()?.clone();
        let tensors = self.model.adapter()?;
        Adapter { config, tensors }.write(&call.output, &self.base_model.display().to_string())?;
        Ok(Done {})
    }

    fn lora(&self) -> Result<&LoraConfig> {
        self.adapter.as_ref().ok_or_else(|| Error::protocol("no adapter is attached"))
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        match tokens.iter().find(|&&t| t as usize >= vocab_size) {
            _ if tokens.is_empty() => Err(Error::protocol("no tokens")),
            Some(token) => Err(Error::input(format_args!(
                "token id {token} is not below the vocabulary of {vocab_size}"
            ))),
            None => Ok(()),
        }
    }
}

fn reply<T: Serialize>(outcome: Result<T>) -> Result<Value> {
    serde_json::to_value(outcome?).map_err(Error::protocol)
}

fn step_report(result: StepResult, start: Instant) -> Result<StepReport> {
    let seconds = start.elapsed().as_secs_f64();
    finite("loss", result.loss)?;
    finite("gradient norm", result.grad_norm)?;
    Ok(StepReport { loss: result.loss, grad_norm: result.grad_norm, seconds })
}

fn finite(what: &str, value: f64) -> Result<()> {
    match value.is_finite() {
        true => Ok(()),
        false => Err(Error::not_finite(format_args!("{what} is {value}"))),
    }
}
