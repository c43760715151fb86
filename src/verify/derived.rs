//! A reference for a model that has no golden files: what one engine computes of it, which itself holds against them. The
//! golden models are small; this is for kernels at the widths of real ones. What does not depend on widths, such as the
//! optimizer's settings, the golden files show, and it takes as few steps as a software adapter can do.

use super::reference::{
    AdapterLosses, Curve, CurveSettings, CurveStep, GreedyToken, Losses, Prompt, Reference, ReferenceModel,
    read_f32,
};
use super::session::{Broken, Session};
use crate::data::adapter::initial_adapter;
use crate::data::batches::random_prompt;
use crate::worker::WorkerCommand;
use anyhow::{Context, Result, bail};
use evalfw_engine::batch::{Batch, IGNORE_INDEX, write_batches};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{AdapterTensors, LoraConfig, read_tensors};
use evalfw_engine::protocol::{
    AttachAdapter, BatchRef, Evaluate, Gradients, Logits, Quantization, SaveAdapter, TrainStep,
    TrainingConfig,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Slots of a row, and the tokens in the rows of each batch.
const SLOTS: usize = 32;
const BATCHES: [&[usize]; 2] = [&[32, 21], &[13]];
const PROMPTS: [usize; 2] = [1, 17];
const CONTINUATION: usize = 6;
const LORA: LoraConfig = LoraConfig { r: 8, lora_alpha: 16.0, lora_dropout: 0.0 };
/// B is not zero, so that A has gradients, too.
const LARGEST_B: f32 = 0.05;
const DROPOUT: f32 = 0.25;
const SEED: u64 = 1;
const STEPS: usize = 3;

/// What `command`'s engine computes of the model in `folder`.
pub fn derive(command: &WorkerCommand, name: &str, folder: &Path) -> Result<Reference> {
    let config = ModelConfig::read(folder)?;
    let scratch =
        tempfile::Builder::new().prefix("evalfw-derived-").tempdir().context("no temporary folder")?;
    let files = Files::write(scratch.path(), &config).context("the inputs could not be written")?;
    let model = match files.model(command, name, folder, config) {
        Ok(model) => model,
        Err(broken) => bail!("{name} as reference: {}: {}", broken.error.during, broken.error.message),
    };
    Ok(Reference::derived(model, scratch))
}

/// What the engine is asked about.
struct Files {
    batches: PathBuf,
    adapter: PathBuf,
    with_dropout: PathBuf,
    trained: PathBuf,
    /// For what the engine writes.
    output: PathBuf,
}

impl Files {
    fn write(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let file = |name| folder.join(name);
        let files = Self {
            batches: file("batches.jsonl"),
            adapter: file("adapter"),
            with_dropout: file("adapter_with_dropout"),
            trained: file("trained_adapter"),
            output: file("output.safetensors"),
        };
        let batches: Vec<Batch> =
            BATCHES.iter().zip(SEED..).map(|(rows, seed)| batch(rows, seed, config)).collect();
        write_batches(&files.batches, &batches)?;
        let mut adapter = initial_adapter(config, LORA, SEED);
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        for b in adapter.tensors.values_mut().flat_map(|pair| &mut pair.b) {
            *b = random.random_range(-LARGEST_B..LARGEST_B);
        }
        adapter.write(&files.adapter, "derived")?;
        adapter.config.lora_dropout = DROPOUT;
        adapter.write(&files.with_dropout, "derived")?;
        Ok(files)
    }

    fn model(
        &self,
        command: &WorkerCommand,
        name: &str,
        folder: &Path,
        config: ModelConfig,
    ) -> Result<ReferenceModel, Broken> {
        let open = |quantization| {
            let (session, _) = Session::open(command, folder, quantization)?;
            Ok::<_, Broken>(Source { session, files: self, config: &config })
        };
        let mut source = open(Quantization::None)?;
        let prompts = PROMPTS.iter().zip(SEED..);
        let prompts =
            prompts.map(|(tokens, seed)| source.prompt(random_prompt(config.vocab_size, *tokens, seed)));
        let prompts = prompts.collect::<Result<_, _>>()?;
        let base = source.losses()?;
        let gradients = source.gradients(&self.adapter, &[0])?;
        let gradients_dropout = source.gradients(&self.with_dropout, &all_batches(0))?;

        let plain = CurveSettings::usual();
        let adamw = source.curve(plain.clone(), &self.adapter, STEPS, one_batch)?;
        source.session.call("save adapter", SaveAdapter { output: self.trained.clone() })?;
        let dropout = CurveSettings { lora_dropout: DROPOUT, dropout_seed: SEED, ..plain.clone() };
        let dropout = source.curve(dropout, &self.with_dropout, 1, all_batches)?;
        let none = source.adapter_losses(base)?;
        drop(source);

        let mut source = open(Quantization::Nf4)?;
        let base = source.losses()?;
        let nf4 = source.adapter_losses(base)?;
        let gradients_nf4 = source.gradients(&self.adapter, &[0])?;
        let settings = CurveSettings { quantization: Quantization::Nf4, ..plain };
        let curve = source.curve(settings, &self.adapter, STEPS, one_batch)?;
        drop(source);
        Ok(ReferenceModel {
            name: name.to_owned(),
            model: folder.to_owned(),
            batches: self.batches.clone(),
            adapter: self.adapter.clone(),
            trained_adapter: self.trained.clone(),
            prompts,
            losses: Losses { none, nf4 },
            gradients,
            gradients_nf4,
            curves: BTreeMap::from([("adamw".to_owned(), adamw), ("nf4".to_owned(), curve)]),
            dropout,
            gradients_dropout,
            config,
        })
    }
}

/// The lines of a step.
fn one_batch(step: usize) -> Vec<usize> {
    vec![step % BATCHES.len()]
}

fn all_batches(_: usize) -> Vec<usize> {
    (0..BATCHES.len()).collect()
}

/// Rows of random tokens with labels on their second halves.
fn batch(rows: &[usize], seed: u64, config: &ModelConfig) -> Batch {
    let row = |(number, tokens): (usize, &usize)| {
        let ids = random_prompt(config.vocab_size, *tokens, 100 * seed + number as u64);
        let label = |(at, id): (usize, &u32)| if at < tokens / 2 { IGNORE_INDEX } else { i64::from(*id) };
        let labels = ids.iter().enumerate().map(label).collect();
        (ids, labels)
    };
    Batch::right_padded(rows.iter().enumerate().map(row), SLOTS)
}

/// The engine, with the model loaded in one form.
struct Source<'a> {
    session: Session,
    files: &'a Files,
    config: &'a ModelConfig,
}

impl Source<'_> {
    /// The logits of a prompt, and its greedy continuation by full forward passes.
    fn prompt(&mut self, tokens: Vec<u32>) -> Result<Prompt, Broken> {
        let logits = self.logits(&tokens)?;
        let (mut all, mut last) = (tokens.clone(), logits.clone());
        let mut continuation = Vec::new();
        for _ in 0..CONTINUATION {
            let token = GreedyToken::of_largest(&last[last.len() - self.config.vocab_size..]);
            all.push(token.token);
            continuation.push(token);
            last = self.logits(&all)?;
        }
        Ok(Prompt { tokens, logits, continuation })
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Broken> {
        let output = self.files.output.clone();
        self.session.call("logits", Logits { tokens: tokens.to_vec(), output: output.clone() })?;
        self.session.harness("logits", read_f32(&output, "logits"))
    }

    /// Of each batch.
    fn losses(&mut self) -> Result<Vec<f64>, Broken> {
        let evaluate = |line| {
            let batches = self.lines(vec![line]);
            Ok(self.session.call("evaluate", Evaluate { batches })?.loss)
        };
        (0..BATCHES.len()).map(evaluate).collect()
    }

    /// With both adapters, beside those without.
    fn adapter_losses(&mut self, base: Vec<f64>) -> Result<AdapterLosses, Broken> {
        self.attach(&self.files.adapter, TrainingConfig::default())?;
        let adapter = self.losses()?;
        self.attach(&self.files.trained, TrainingConfig::default())?;
        Ok(AdapterLosses { base, adapter, trained_adapter: self.losses()? })
    }

    fn gradients(&mut self, adapter: &Path, lines: &[usize]) -> Result<AdapterTensors, Broken> {
        self.attach(adapter, TrainingConfig::default())?;
        let output = self.files.output.clone();
        let batches = self.lines(lines.to_vec());
        self.session
            .call("gradients", Gradients { step: 0, dropout_seed: SEED, batches, output: output.clone() })?;
        self.session.harness("gradients", read_tensors(&output, self.config, LORA.r))
    }

    fn curve(
        &mut self,
        settings: CurveSettings,
        adapter: &Path,
        steps: usize,
        lines: impl Fn(usize) -> Vec<usize>,
    ) -> Result<Curve, Broken> {
        self.attach(adapter, settings.training())?;
        let step = |step| {
            let (lines, dropout_seed) = (lines(step), settings.dropout_seed);
            let batches = self.lines(lines.clone());
            let call = TrainStep { step: step as u64, dropout_seed, batches };
            let report = self.session.call("train step", call)?;
            Ok(CurveStep { lines, loss: report.loss, grad_norm: report.grad_norm })
        };
        let steps = (0..steps).map(step).collect::<Result<_, Broken>>()?;
        Ok(Curve { settings, steps })
    }

    fn attach(&mut self, adapter: &Path, training: TrainingConfig) -> Result<(), Broken> {
        let call = AttachAdapter { adapter: adapter.to_owned(), training };
        self.session.call("attach adapter", call).map(drop)
    }

    fn lines(&self, lines: Vec<usize>) -> BatchRef {
        BatchRef { file: self.files.batches.clone(), lines }
    }
}
