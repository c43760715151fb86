//! Adapters between evalfw and PEFT, both ways, with the real PEFT: what one trains, the other loads, and
//! finds the same loss. Left out where the reference environment is not installed.

#[path = "support/reference_python.rs"]
mod reference_python;
mod support;

use evalfw::worker::{Client, WorkerCommand};
use evalfw_engine::batch::{Batch, IGNORE_INDEX, write_batches};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{Adapter, LoraConfig, LoraPair, Target};
use evalfw_engine::protocol::*;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reference_python::ReferencePython;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

const ENGINES: [&str; 2] = ["candle-cpu", "burn-flex"];
const QUANTIZATIONS: [(&str, Quantization); 2] = [("none", Quantization::None), ("nf4", Quantization::Nf4)];
const BATCHES: usize = 3;
const STEPS: u64 = 6;
/// Of a loss.
const TOLERANCE: f64 = 1e-5;
/// What an adapter has to change of a loss, so that a forgotten adapter cannot pass.
const EFFECT: f64 = 1e-2;

/// A model and batches, of which the reference in the repository knows nothing.
struct Bench {
    folder: TempDir,
    config: ModelConfig,
}

impl Bench {
    fn new(tied: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        support::micro_model_with(&model, 200_000, tied);
        let config = ModelConfig::read(&model).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let batches: Vec<Batch> = (0..BATCHES).map(|_| batch(&config, &mut rng)).collect();
        write_batches(&folder.path().join("batches.jsonl"), &batches).unwrap();
        Self { folder, config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn lines(&self, lines: Vec<usize>) -> BatchRef {
        BatchRef { file: self.path("batches.jsonl"), lines }
    }

    /// An adapter at its start: A is random, B is zero.
    fn fresh_adapter(&self, folder: &Path) {
        let config = LoraConfig { r: 3, lora_alpha: 7.0, lora_dropout: 0.1 };
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        let mut tensors = evalfw_engine::lora::AdapterTensors::new();
        for layer in 0..self.config.num_hidden_layers {
            for target in Target::ALL {
                let [rows, columns] = self.config.projection_shape(target);
                let a = (0..config.r * columns).map(|_| rng.random_range(-0.2..0.2)).collect();
                tensors.insert((layer, target), LoraPair { a, b: vec![0.0; rows * config.r] });
            }
        }
        Adapter { config, tensors }.write(folder, "micro").unwrap();
    }
}

/// Two rows, right-padded, with labels on the second half of each.
fn batch(config: &ModelConfig, rng: &mut impl Rng) -> Batch {
    let row = |length: usize| {
        let ids: Vec<u32> = (0..length).map(|_| rng.random_range(0..config.vocab_size as u32)).collect();
        let mut labels: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        labels[..length / 2].fill(IGNORE_INDEX);
        (ids, labels)
    };
    Batch::right_padded([19, 14].map(row), 19)
}

/// A worker with the model loaded.
struct Worker<'a> {
    client: Client,
    bench: &'a Bench,
}

impl<'a> Worker<'a> {
    fn start(bench: &'a Bench, engine: &str, quantization: Quantization) -> Self {
        let program = assert_cmd::cargo::cargo_bin("evalfw");
        let arguments = vec!["worker".into(), engine.into()];
        let command = WorkerCommand { program, arguments, environment: Vec::new(), agent: false };
        let mut client = Client::start(&command, None, Duration::from_secs(120)).unwrap();
        client.hello().unwrap();
        client.call(Load { model: bench.path("model"), quantization }).unwrap();
        Self { client, bench }
    }

    fn attach(&mut self, adapter: &Path) {
        let training = TrainingConfig { learning_rate: 2e-2, ..TrainingConfig::default() };
        self.client.call(AttachAdapter { adapter: adapter.to_owned(), training }).unwrap();
    }

    fn train(&mut self) {
        for step in 0..STEPS {
            let batches = self.bench.lines(vec![step as usize % BATCHES]);
            self.client.call(TrainStep { step, dropout_seed: 9, batches }).unwrap();
        }
    }

    fn losses(&mut self) -> Vec<f64> {
        let mut loss = |line| {
            let batches = self.bench.lines(vec![line]);
            self.client.call(Evaluate { batches }).unwrap().loss
        };
        (0..BATCHES).map(&mut loss).collect()
    }
}

#[track_caller]
fn assert_same(ours: &[f64], theirs: &[f64], base: &[f64], what: &str) {
    assert_eq!((ours.len(), theirs.len()), (BATCHES, BATCHES), "{what}");
    for ((ours, theirs), base) in ours.iter().zip(theirs).zip(base) {
        assert!((ours - theirs).abs() <= TOLERANCE * theirs, "{what}: {ours}, PEFT has {theirs}");
        assert!((ours - base).abs() > EFFECT, "{what}: {base} without the adapter, {ours} with it");
    }
}

#[test]
fn peft_reproduces_the_loss_of_what_we_trained() {
    let Some(python) = ReferencePython::find() else { return };
    let bench = Bench::new(false);
    bench.fresh_adapter(&bench.path("fresh"));
    for engine in ENGINES {
        for (name, quantization) in QUANTIZATIONS {
            let mut worker = Worker::start(&bench, engine, quantization);
            let base = worker.losses();
            worker.attach(&bench.path("fresh"));
            worker.train();
            let ours = worker.losses();
            let saved = bench.path(&format!("{engine}-{name}"));
            worker.client.call(SaveAdapter { output: saved.clone() }).unwrap();
            let arguments = [&saved, &bench.path("model"), &bench.path("batches.jsonl"), Path::new(name)];
            let theirs = python.losses("check_adapter.py", &arguments);
            assert_same(&ours, &theirs, &base, &format!("{engine}, {name}"));
        }
    }
}

#[test]
fn we_reproduce_the_loss_of_what_peft_trained() {
    let Some(python) = ReferencePython::find() else { return };
    let bench = Bench::new(true);
    for (name, quantization) in QUANTIZATIONS {
        let trained = bench.path(name);
        let [seed, rank] = ["41", "5"].map(Path::new);
        let [model, batches] = ["model", "batches.jsonl"].map(|name| bench.path(name));
        let arguments = [&model, &batches, seed, rank, &trained, Path::new(name)];
        let theirs = python.losses("train_adapter.py", &arguments);
        for engine in ENGINES {
            let mut worker = Worker::start(&bench, engine, quantization);
            let base = worker.losses();
            worker.attach(&trained);
            assert_same(&worker.losses(), &theirs, &base, &format!("{engine}, {name}"));
        }
    }
}
