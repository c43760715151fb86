//! Writes a checkpoint with the exact shapes of a model and seeded random weights, in the layout of a
//! Hugging Face folder.
//!
//! Speed and memory of training and inference do not depend on the values of the weights, so such a
//! checkpoint measures them as well as the real one does, and needs no download. What does depend on
//! the values (is the text coherent, is the task solved) needs the real weights; a [`Marker`] in the
//! folder tells the two apart.

mod configs;
mod marker;
mod shards;
mod staging;
mod tokenizer;
mod weights;

use super::presets::Preset;
use super::{Error, Result};
pub use marker::Marker;
use shards::{Shard, Tensor};
use staging::Staging;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;
use weights::{Distribution, TensorSource};

/// The text that tokenizers are trained on: the project's own instruction data.
const CORPUS: &str = include_str!("../../../data/train.jsonl");
const CONFIG_FILE: &str = "config.json";
/// Elements drawn before they are written: 16 MiB, the only part of the weights in memory.
const BUFFER_ELEMENTS: u64 = 256 * TensorSource::ALIGNMENT;
/// Room for the files other than the weights, with a margin.
const SMALL_FILES_BYTES: u64 = 16_000_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SynthOptions {
    pub seed: u64,
    /// Bytes of weights per safetensors file.
    pub max_shard_bytes: u64,
}

impl Default for SynthOptions {
    /// Hugging Face's own shard size, 5 GB.
    fn default() -> Self {
        Self { seed: 0, max_shard_bytes: 5_000_000_000 }
    }
}

/// What [`write`] had to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Written,
    /// The folder already held this very checkpoint.
    AlreadyThere,
}

/// Writes the checkpoint to `dir`, which must not exist or be empty. `progress` is told the bytes of
/// weights written so far and in all.
///
/// The files go to a temporary folder beside `dir` that is renamed at the end, so an interrupted run
/// leaves no half checkpoint. The same preset, seed and version of evalfw give the same bytes.
pub fn write(
    preset: &Preset,
    dir: &Path,
    options: &SynthOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Outcome> {
    let vocab_size = preset.config.vocab_size;
    if vocab_size < tokenizer::SMALLEST_VOCABULARY {
        let least = tokenizer::SMALLEST_VOCABULARY;
        let problem = format!("vocab_size is {vocab_size}, but the tokenizer needs {least}");
        return Err(Error::Preset { name: preset.name.clone(), problem });
    }
    let marker = Marker::new(preset, options);
    if marker.describes(dir, preset)? {
        return Ok(Outcome::AlreadyThere);
    }
    let staging = Staging::claim(dir)?;
    if marker.describes(dir, preset)? {
        return Ok(Outcome::AlreadyThere);
    }
    require_empty(dir)?;
    require_space(staging.path(), preset.checkpoint_bytes() + SMALL_FILES_BYTES)?;

    let mut files = BTreeMap::new();
    for (name, text) in text_files(preset, options)? {
        let path = staging.path().join(name);
        fs::write(&path, &text).map_err(Error::io(&path))?;
        files.insert(name.to_owned(), text.len() as u64);
    }
    let total = preset.checkpoint_bytes();
    let mut written = 0;
    let mut buffer = vec![0; 2 * BUFFER_ELEMENTS as usize];
    for shard in shards::plan(&preset.config, options.max_shard_bytes) {
        let path = staging.path().join(&shard.file);
        let source = |tensor: &Tensor| {
            let distribution = Distribution::of(&tensor.name, &tensor.shape, &preset.config);
            TensorSource::new(&preset.name, options.seed, tensor.index, distribution)
        };
        let bytes = write_shard(&path, &shard, source, &mut buffer, &mut |bytes| {
            written += bytes;
            progress(written, total);
        });
        files.insert(shard.file, bytes.map_err(Error::io(&path))?);
    }
    marker.write(staging.path(), files)?;
    staging.commit()?;
    Ok(Outcome::Written)
}

/// Everything but the weights and the marker.
fn text_files(preset: &Preset, options: &SynthOptions) -> Result<Vec<(&'static str, String)>> {
    let config = &preset.config;
    let tokenizer = tokenizer::train(&tokenizer::texts(CORPUS)?, config.vocab_size)?;
    let mut files = vec![
        (CONFIG_FILE, pretty(&configs::model_config(config))),
        ("generation_config.json", pretty(&configs::generation_config(config))),
        ("tokenizer.json", tokenizer),
        (
            "tokenizer_config.json",
            pretty(&tokenizer::tokenizer_config(config.vocab_size, config.max_position_embeddings)),
        ),
    ];
    if let Some(index) = shards::index(&shards::plan(config, options.max_shard_bytes)) {
        files.push(("model.safetensors.index.json", pretty(&index)));
    }
    Ok(files)
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

/// Streams one safetensors file to disk and returns its size.
fn write_shard(
    path: &Path,
    shard: &Shard,
    source: impl Fn(&Tensor) -> TensorSource,
    buffer: &mut [u8],
    on_bytes: &mut dyn FnMut(u64),
) -> std::io::Result<u64> {
    let mut file = File::create_new(path)?;
    let header = shard.header();
    file.write_all(&header)?;
    for tensor in &shard.tensors {
        let source = source(tensor);
        let elements = tensor.bytes() / 2;
        let mut first = 0;
        while first < elements {
            let count = BUFFER_ELEMENTS.min(elements - first);
            let piece = &mut buffer[..2 * count as usize];
            source.fill(first, piece);
            file.write_all(piece)?;
            on_bytes(piece.len() as u64);
            first += count;
        }
    }
    // Otherwise the disk would still be busy with it while the first measurement runs.
    file.sync_all()?;
    Ok(header.len() as u64 + shard.data_bytes())
}

fn require_empty(dir: &Path) -> Result<()> {
    match fs::read_dir(dir) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(Error::Occupied { path: dir.to_owned() }),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(dir)(error)),
    }
}

fn require_space(dir: &Path, needed: u64) -> Result<()> {
    match staging::free_bytes(dir) {
        Some(free) if free < needed => {
            let [needed_gb, free_gb] = [needed, free].map(|bytes| bytes as f64 / 1e9);
            Err(Error::DiskFull { path: dir.to_owned(), needed_gb, free_gb })
        }
        _ => Ok(()),
    }
}

/// A 64-bit FNV-1a hash: the same on every platform and in every release, unlike the standard library's.
fn fnv1a(bytes: &[u8]) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325;
    bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use evalfw_engine::checkpoint::Checkpoint;
    use evalfw_engine::config::ModelConfig;
    use std::str::FromStr;
    use tokenizers::Tokenizer;

    fn small() -> Preset {
        let config = ModelConfig {
            vocab_size: 300,
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            tie_word_embeddings: false,
            ..Preset::parse("tiny").unwrap().config
        };
        Preset { name: "small".into(), config }
    }

    fn sharded(seed: u64) -> SynthOptions {
        SynthOptions { seed, max_shard_bytes: 20_000 }
    }

    fn make(preset: &Preset, dir: &Path, options: &SynthOptions) -> Result<Outcome> {
        write(preset, dir, options, &mut |_, _| ())
    }

    fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        let read =
            |entry: fs::DirEntry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
        fs::read_dir(dir).unwrap().map(|entry| read(entry.unwrap())).collect()
    }

    #[test]
    fn the_checkpoint_opens_with_the_shapes_and_the_values_asked_for() {
        let root = tempfile::tempdir().unwrap();
        for (dir, options) in [("one", SynthOptions::default()), ("many", sharded(0))] {
            let dir = root.path().join(dir);
            make(&small(), &dir, &options).unwrap();
            let checkpoint = Checkpoint::open(&dir).unwrap();
            assert_eq!(checkpoint.config, small().config);
            assert_eq!(checkpoint.files().len() > 1, options == sharded(0));
            let mut norm = [0.0; 32];
            checkpoint.reader("model.norm.weight").unwrap().read_f32(&mut norm).unwrap();
            assert!(norm.iter().all(|v| (0.7..1.3).contains(v)), "{norm:?}");
            let mut head = vec![0.0; 300 * 32];
            checkpoint.reader("lm_head.weight").unwrap().read_f32(&mut head).unwrap();
            let deviation = (head.iter().map(|v| v * v).sum::<f32>() / head.len() as f32).sqrt();
            assert!((deviation - f32::sqrt(1.0 / 32.0)).abs() < 5e-3, "{deviation}");
        }
    }

    #[test]
    fn sharding_changes_the_files_and_not_the_weights() {
        let root = tempfile::tempdir().unwrap();
        let [one, many] = ["one", "many"].map(|name| root.path().join(name));
        make(&small(), &one, &SynthOptions::default()).unwrap();
        make(&small(), &many, &sharded(0)).unwrap();
        let [one, many] = [one, many].map(|dir| Checkpoint::open(&dir).unwrap());
        for (name, _) in small().config.tensors() {
            let read = |checkpoint: &Checkpoint| {
                let count = checkpoint.elements(&name).unwrap();
                checkpoint.reader(&name).unwrap().read_bytes(count).unwrap().to_vec()
            };
            assert_eq!(read(&one), read(&many), "{name}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_folder_and_another_seed_another() {
        let root = tempfile::tempdir().unwrap();
        let folder = |name: &str, seed| {
            let dir = root.path().join(name);
            make(&small(), &dir, &sharded(seed)).unwrap();
            contents(&dir)
        };
        let first = folder("a", 1);
        assert!(first == folder("b", 1));
        let other = folder("c", 2);
        assert_eq!(first["tokenizer.json"], other["tokenizer.json"]);
        let weights = |name: &&String| name.ends_with(".safetensors");
        assert!(first.keys().filter(weights).all(|name| first[name] != other[name]));
    }

    #[test]
    fn progress_reaches_the_total() {
        let root = tempfile::tempdir().unwrap();
        let mut seen = Vec::new();
        write(&small(), &root.path().join("m"), &sharded(0), &mut |done, total| seen.push((done, total)))
            .unwrap();
        let total = small().checkpoint_bytes();
        assert_eq!(seen.last(), Some(&(total, total)));
        assert!(seen.is_sorted());
    }

    #[test]
    fn a_complete_checkpoint_is_left_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("m");
        assert_eq!(make(&small(), &dir, &sharded(0)).unwrap(), Outcome::Written);
        let before = contents(&dir);
        assert_eq!(make(&small(), &dir, &sharded(0)).unwrap(), Outcome::AlreadyThere);
        assert!(before == contents(&dir));
    }

    #[test]
    fn anything_else_in_the_folder_is_an_error_that_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let occupied = |dir: &Path, preset: &Preset, options: &SynthOptions| {
            let before = contents(dir);
            let error = make(preset, dir, options).unwrap_err();
            assert!(matches!(error, Error::Occupied { .. }), "{error}");
            assert!(before == contents(dir));
            assert!(!root.path().join(".m.partial").exists());
        };
        let dir = root.path().join("m");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("thesis.txt"), "mine").unwrap();
        occupied(&dir, &small(), &sharded(0));
        fs::remove_file(dir.join("thesis.txt")).unwrap();

        make(&small(), &dir, &sharded(0)).unwrap();
        occupied(&dir, &small(), &sharded(1));
        let mut deeper = small();
        deeper.config.num_hidden_layers = 1;
        occupied(&dir, &deeper, &sharded(0));
        let shard = dir.join("model-00001-of-00004.safetensors");
        File::options().write(true).open(&shard).unwrap().set_len(100).unwrap();
        occupied(&dir, &small(), &sharded(0));
    }

    #[test]
    fn too_large_for_the_disk_is_said_before_anything_is_written() {
        let root = tempfile::tempdir().unwrap();
        let mut huge = small();
        huge.config.hidden_size = 1 << 30;
        huge.config.intermediate_size = 1 << 30;
        let error = make(&huge, &root.path().join("m"), &sharded(0)).unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{error}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_vocabulary_without_room_for_the_bytes_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let mut preset = small();
        preset.config.vocab_size = 277;
        let error = make(&preset, &root.path().join("m"), &sharded(0)).unwrap_err().to_string();
        assert!(error.contains("vocab_size is 277"), "{error}");
    }

    #[test]
    fn tiny_is_a_whole_model_with_qwens_token_ids() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("tiny");
        make(&Preset::parse("tiny").unwrap(), &dir, &SynthOptions { seed: 5, ..Default::default() }).unwrap();
        let config = Checkpoint::open(&dir).unwrap().config;
        assert_eq!(config, Preset::parse("tiny").unwrap().config);
        let tokenizer =
            Tokenizer::from_str(&fs::read_to_string(dir.join("tokenizer.json")).unwrap()).unwrap();
        let raw: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
        assert_eq!(raw["eos_token_id"], 151_645);
        assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(151_645));
        let marker = Marker::read(&dir).unwrap().unwrap();
        assert_eq!((marker.name.as_str(), marker.seed), ("tiny", 5));
    }
}
