//! What the harness hands to engines, made and checked before the first worker starts.

use crate::data::adapter::initial_adapter;
use crate::data::batches::{BatchShape, PreparedBatch, batches, random_batches, random_prompt};
use crate::data::chat::{TokenizedExample, read_tokenizer, tokenize};
use crate::data::dataset::Dataset;
use crate::scenario::{Scenario, TrainScenario};
use anyhow::{Context, Result, bail};
use evalfw_engine::batch::{Batch, write_batches};
use evalfw_engine::checkpoint::Checkpoint;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::protocol::BatchRef;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A model and everything prepared for it.
pub struct ModelInputs {
    pub name: String,
    pub dir: PathBuf,
    pub config: ModelConfig,
    pub checkpoint_bytes: u64,
    /// Number of safetensors files.
    pub files: usize,
    pub page_cache: PageCache,
    train: BTreeMap<String, TrainInputs>,
    /// Holds the files until the run ends.
    _scratch: TempDir,
}

/// Batches and the adapter of one scenario that trains.
pub struct TrainInputs {
    pub train_file: PathBuf,
    /// What is in the lines of `train_file`.
    pub train: Vec<PreparedBatch>,
    pub validation_file: PathBuf,
    /// Lines of `validation_file`.
    pub validation: usize,
    pub adapter: PathBuf,
}

impl TrainInputs {
    /// All validation batches; `None` if there are none.
    pub fn validation_batches(&self) -> Option<BatchRef> {
        let lines: Vec<usize> = (0..self.validation).collect();
        (!lines.is_empty()).then(|| BatchRef { file: self.validation_file.clone(), lines })
    }

    /// Lines of the training file, one for each size that its batches have: their slots, and their positions with a
    /// loss to a power of two.
    pub fn one_of_each_size(&self) -> Vec<usize> {
        let size = |batch: &Batch| (batch.slot_tokens(), batch.trained_tokens().next_power_of_two());
        let mut seen = BTreeSet::new();
        let trains = |(_, prepared): &(usize, &PreparedBatch)| prepared.batch.trained_tokens() > 0;
        let lines = self.train.iter().enumerate().filter(trains);
        lines.filter(|(_, prepared)| seen.insert(size(&prepared.batch))).map(|(line, _)| line).collect()
    }
}

/// Whether the checkpoint's files are known to be in memory when they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageCache {
    Warm,
    Unknown,
}

impl PageCache {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Unknown => "unknown",
        }
    }
}

/// Where tokens come from.
enum Source {
    Data {
        train: Vec<TokenizedExample>,
        valid: Vec<TokenizedExample>,
    },
    /// The folder has no tokenizer: seeded random ids.
    Random,
}

impl ModelInputs {
    /// Checks the checkpoint, the tokenizer and the data, and writes what the scenarios need.
    pub fn prepare(
        name: &str,
        dir: &Path,
        data: &Dataset,
        scenarios: &[&Scenario],
        seed: u64,
    ) -> Result<Self> {
        let dir = std::path::absolute(dir).with_context(|| dir.display().to_string())?;
        let checkpoint = Checkpoint::open(&dir)?;
        let config = checkpoint.config.clone();
        let source = match read_tokenizer(&dir, &config)? {
            None => Source::Random,
            Some(tokenizer) => {
                let all =
                    |examples: &[_]| examples.iter().map(|e| tokenize(&tokenizer, e)).collect::<Result<_>>();
                Source::Data { train: all(&data.train)?, valid: all(&data.valid)? }
            }
        };
        let scratch = tempfile::Builder::new().prefix("evalfw-").tempdir().context("no temporary folder")?;
        let mut inputs = Self {
            name: name.to_owned(),
            dir,
            config,
            checkpoint_bytes: checkpoint.bytes(),
            files: checkpoint.files().len(),
            page_cache: PageCache::Unknown,
            train: BTreeMap::new(),
            _scratch: scratch,
        };
        for scenario in scenarios {
            inputs.check_length(scenario)?;
            if let Some(train) = scenario.training()
                && !inputs.train.contains_key(&scenario.label())
            {
                let folder = inputs._scratch.path().join(scenario.label());
                let prepared = inputs.prepare_train(train, &folder, &source, seed)?;
                inputs.train.insert(scenario.label(), prepared);
            }
        }
        inputs.page_cache = warm_page_cache(&checkpoint);
        Ok(inputs)
    }

    /// What was prepared for this scenario; it was among those given to [`Self::prepare`].
    pub fn train(&self, scenario: &Scenario) -> &TrainInputs {
        &self.train[&scenario.label()]
    }

    pub fn prompt(&self, tokens: usize, seed: u64) -> Vec<u32> {
        random_prompt(self.config.vocab_size, tokens, seed)
    }

    fn check_length(&self, scenario: &Scenario) -> Result<()> {
        let (key, length) = match scenario {
            Scenario::Load(_) => return Ok(()),
            Scenario::Train(s) => ("sequence_length", s.sequence_length),
            Scenario::Quality(s) => ("train.sequence_length", s.train.sequence_length),
            Scenario::Infer(s) => ("prompt_tokens + generate_tokens", s.prompt_tokens + s.generate_tokens),
        };
        let limit = self.config.max_position_embeddings;
        if length > limit {
            let path = self.dir.join("config.json");
            bail!("{key} is {length}, but max_position_embeddings of {} is {limit}", path.display());
        }
        Ok(())
    }

    fn prepare_train(
        &self,
        scenario: &TrainScenario,
        folder: &Path,
        source: &Source,
        seed: u64,
    ) -> Result<TrainInputs> {
        let shape = BatchShape {
            sequence_length: scenario.sequence_length,
            batch_size: scenario.batch_size,
            packing: scenario.packing,
        };
        // Twice the counted steps: as many again may be needed until the times settle.
        let count = (scenario.total_steps() + scenario.steps) * scenario.gradient_accumulation_steps;
        let validation_count = scenario.evaluation_batches;
        let (train, validation) = match source {
            Source::Data { train, valid } => {
                (batches(train, shape, count, seed)?, batches(valid, shape, validation_count, seed)?)
            }
            Source::Random => {
                let random = |count, seed| random_batches(self.config.vocab_size, shape, count, seed);
                (random(count, seed), random(validation_count, seed + 1))
            }
        };
        let adapter = folder.join("adapter");
        initial_adapter(&self.config, scenario.lora(), seed).write(&adapter, &self.name)?;
        let write = |name: &str, prepared: &[PreparedBatch]| {
            let path = folder.join(name);
            let batches: Vec<_> = prepared.iter().map(|p| p.batch.clone()).collect();
            write_batches(&path, &batches).with_context(|| path.display().to_string())?;
            anyhow::Ok(path)
        };
        Ok(TrainInputs {
            train_file: write("train.jsonl", &train)?,
            validation_file: write("valid.jsonl", &validation)?,
            validation: validation.len(),
            train,
            adapter,
        })
    }
}

/// Reads the files once if they fit comfortably, so that every load finds them in the page cache.
fn warm_page_cache(checkpoint: &Checkpoint) -> PageCache {
    let free = sysinfo::System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
    )
    .map_or(0, |s| s.available_memory());
    if checkpoint.bytes() > free / 2 {
        return PageCache::Unknown;
    }
    let read = |path: &Path| std::io::copy(&mut File::open(path)?, &mut std::io::sink());
    match checkpoint.files().into_iter().try_for_each(|path| read(path).map(drop)) {
        Ok(()) => PageCache::Warm,
        Err(_) => PageCache::Unknown,
    }
}
