//! A Hugging Face checkpoint folder: checked as a whole, then read piece by piece.

use crate::config::ModelConfig;
use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

const INDEX_FILE: &str = "model.safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";
/// The format's own limit (safetensors, `MAX_HEADER_SIZE`).
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An opened checkpoint. Opening reads headers only, but for a tied head's copy; tensors are read by
/// position into buffers of the caller. Nothing stays mapped: mapped pages would count as memory of the engine, and a file cut
/// short under a mapping would kill the process instead of giving an error.
#[derive(Debug)]
pub struct Checkpoint {
    pub dir: PathBuf,
    pub config: ModelConfig,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    file: PathBuf,
    /// Where the tensor begins in the file.
    offset: u64,
    dtype: ElementType,
    elements: usize,
}

/// A tensor as a header describes it, of whatever type: a file may hold buffers that no model needs.
struct Found {
    file: PathBuf,
    offset: u64,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// The element types a checkpoint may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    F32,
    F16,
    Bf16,
}

impl ElementType {
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    fn parse(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Elements that are compared at a time.
const PIECE: usize = 1 << 20;

impl Checkpoint {
    /// Opens the folder and checks that every tensor of the configured model is there, whole, with the
    /// right shape and a floating-point type.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::file(dir, "is not a folder"));
        }
        let config = ModelConfig::read(dir)?;
        let mut found = BTreeMap::new();
        for file in shards(dir)? {
            read_header(&file, &mut found)?;
        }
        let mut tensors = BTreeMap::new();
        for (name, shape) in config.tensors() {
            let Some(Found { file, offset, dtype, shape: found_shape }) = found.remove(&name) else {
                return Err(Error::file(
                    dir,
                    format_args!("tensor {name} is in none of the safetensors files"),
                ));
            };
            if found_shape != shape {
                let problem = format!("{name} has shape {found_shape:?}, but config.json implies {shape:?}");
                return Err(Error::file(&file, problem));
            }
            let Some(dtype) = ElementType::parse(dtype) else {
                let problem = format!("{name} has type {dtype:?}, but only F32, F16 and BF16 are read");
                return Err(Error::file(&file, problem));
            };
            tensors.insert(name, Entry { file, offset, dtype, elements: shape.iter().product() });
        }
        let checkpoint = Self { dir: dir.to_owned(), config, tensors };
        if let Some(head) = found.remove(HEAD).filter(|_| checkpoint.config.tie_word_embeddings) {
            checkpoint.check_tied(head)?;
        }
        Ok(checkpoint)
    }

    /// The embedding is used for a tied head. A checkpoint with another head would be computed wrongly,
    /// whichever of the two was meant; some writers store a copy, which says the same.
    fn check_tied(&self, head: Found) -> Result<()> {
        let differs = || {
            let problem = format!("{HEAD} is not {EMBEDDING}, though config.json says tie_word_embeddings");
            Error::file(&head.file, problem)
        };
        let embedding = self.entry(EMBEDDING)?;
        let shape = [self.config.vocab_size, self.config.hidden_size];
        if head.shape != shape || ElementType::parse(head.dtype) != Some(embedding.dtype) {
            return Err(differs());
        }
        let entry = Entry { file: head.file.clone(), offset: head.offset, ..embedding.clone() };
        let mut head = TensorReader::open(HEAD, &entry)?;
        let mut embedding = TensorReader::open(EMBEDDING, embedding)?;
        while head.remaining() > 0 {
            let count = PIECE.min(head.remaining());
            if head.read_bytes(count)? != embedding.read_bytes(count)? {
                return Err(differs());
            }
        }
        Ok(())
    }

    /// Bytes of all tensors of the model in the files.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|t| (t.elements * t.dtype.bytes()) as u64).sum()
    }

    /// The files that hold the model's tensors.
    pub fn files(&self) -> BTreeSet<&Path> {
        self.tensors.values().map(|t| t.file.as_path()).collect()
    }

    pub fn elements(&self, name: &str) -> Result<usize> {
        Ok(self.entry(name)?.elements)
    }

    pub fn element_type(&self, name: &str) -> Result<ElementType> {
        Ok(self.entry(name)?.dtype)
    }

    /// Opens a tensor for reading from its first element on.
    pub fn reader(&self, name: &str) -> Result<TensorReader> {
        TensorReader::open(name, self.entry(name)?)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::file(&self.dir, format_args!("{name} is not part of the model")))
    }
}

/// Reads one tensor: from front to back a piece at a time, or by position from several threads at once.
pub struct TensorReader {
    name: String,
    entry: Entry,
    file: File,
    position: usize,
    bytes: Vec<u8>,
}

impl TensorReader {
    fn open(name: &str, entry: &Entry) -> Result<Self> {
        let file = File::open(&entry.file).map_err(|e| Error::file(&entry.file, e))?;
        Ok(Self { name: name.to_owned(), entry: entry.clone(), file, position: 0, bytes: Vec::new() })
    }

    pub fn elements(&self) -> usize {
        self.entry.elements
    }

    /// Elements that [`Self::read_bytes`] and [`Self::read_f32`] have not come to.
    pub fn remaining(&self) -> usize {
        self.entry.elements - self.position
    }

    pub fn element_type(&self) -> ElementType {
        self.entry.dtype
    }

    /// Where the tensor is read from.
    pub fn file(&self) -> &Path {
        &self.entry.file
    }

    /// Reads the next `count` elements in the file's own type, little-endian.
    pub fn read_bytes(&mut self, count: usize) -> Result<&[u8]> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.resize(count * self.entry.dtype.bytes(), 0);
        let read = self.read_at(self.position, &mut bytes);
        self.bytes = bytes;
        read?;
        self.position += count;
        Ok(&self.bytes)
    }

    /// Fills `out` with the elements from number `start` on in the file's own type, little-endian. Leaves the
    /// place of [`Self::read_bytes`] as it is.
    pub fn read_at(&self, start: usize, out: &mut [u8]) -> Result<()> {
        let width = self.entry.dtype.bytes();
        let count = out.len() / width;
        let left = self.entry.elements.saturating_sub(start);
        assert!(count <= left, "{}: {count} elements asked for, {left} left", self.name);
        let read = self.read_exact_at(self.entry.offset + (start * width) as u64, out);
        read.map_err(|e| Error::file(&self.entry.file, format_args!("{}: {e}", self.name)))
    }

    #[cfg(unix)]
    fn read_exact_at(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, out, offset)
    }

    #[cfg(windows)]
    fn read_exact_at(&self, mut offset: u64, mut out: &mut [u8]) -> std::io::Result<()> {
        while !out.is_empty() {
            let read = std::os::windows::fs::FileExt::seek_read(&self.file, out, offset)?;
            if read == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            out = &mut out[read..];
            offset += read as u64;
        }
        Ok(())
    }

    /// Reads the next elements as f32 until `out` is full. A value that is not finite is an error.
    pub fn read_f32(&mut self, out: &mut [f32]) -> Result<()> {
        let dtype = self.entry.dtype;
        widen(dtype, self.read_bytes(out.len())?, out);
        match out.iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(index) => {
                let element = self.position - out.len() + index;
                let problem = format!("{} is {} at element {element}", self.name, out[index]);
                Err(Error::file(&self.entry.file, problem))
            }
        }
    }
}

/// Converts little-endian elements to f32, which holds each of the types exactly.
pub fn widen(dtype: ElementType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        ElementType::F32 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        ElementType::F16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        ElementType::Bf16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The safetensors files of the folder: the single one, or those of the index. Where there are both,
/// transformers takes the single one.
fn shards(dir: &Path) -> Result<Vec<PathBuf>> {
    let index = dir.join(INDEX_FILE);
    let single = dir.join(SINGLE_FILE);
    if single.exists() {
        return Ok(vec![single]);
    }
    if !index.exists() {
        return Err(Error::file(dir, format_args!("has neither {SINGLE_FILE} nor {INDEX_FILE}")));
    }
    let text = std::fs::read_to_string(&index).map_err(|e| Error::file(&index, e))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| Error::file(&index, e))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    for name in &names {
        // An index is data from elsewhere: it may only name its neighbours.
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(Error::file(
                &index,
                format_args!("weight_map names {name}, which is not a plain file name"),
            ));
        }
        if !dir.join(name).exists() {
            return Err(Error::file(&dir.join(name), "shard is missing, though the index names it"));
        }
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// Adds the tensors of one safetensors file to `found`.
fn read_header(path: &Path, found: &mut BTreeMap<String, Found>) -> Result<()> {
    let fail = |problem: String| Error::file(path, problem);
    let mut file = File::open(path).map_err(|e| fail(e.to_string()))?;
    let length = file.metadata().map_err(|e| fail(e.to_string()))?.len();
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(|_| fail(format!("is truncated: {length} bytes hold no header")))?;
    let header_length = u64::from_le_bytes(prefix);
    let data_start = header_length.saturating_add(8);
    if data_start > length || header_length > MAX_HEADER_BYTES {
        return Err(fail(format!(
            "is truncated or not safetensors: a header of {header_length} bytes in a file of {length}"
        )));
    }
    let mut header = vec![0; header_length as usize];
    file.read_exact(&mut header).map_err(|e| fail(e.to_string()))?;
    // Not `SafeTensors::read_metadata`: that wants the tensors' bytes in the same buffer.
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|e| fail(format!("bad safetensors header: {e}")))?;
    let expected = data_start + metadata.data_len() as u64;
    if expected != length {
        let state = if length < expected { "is truncated" } else { "has bytes after its tensors" };
        return Err(fail(format!("{state}: {length} bytes, its header promises {expected}")));
    }
    for (name, info) in metadata.tensors() {
        let tensor = Found {
            file: path.to_owned(),
            offset: data_start + info.data_offsets.0 as u64,
            dtype: info.dtype,
            shape: info.shape.clone(),
        };
        found.insert(name, tensor);
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use safetensors::tensor::TensorView;
    use serde_json::json;
    use tempfile::TempDir;

    pub fn small(tied: bool) -> ModelConfig {
        ModelConfig {
            vocab_size: 6,
            hidden_size: 4,
            intermediate_size: 8,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 2,
            max_position_embeddings: 32,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            tie_word_embeddings: tied,
        }
    }

    type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

    /// A checkpoint on disk.
    pub struct Folder {
        folder: TempDir,
        tensors: Tensors,
        /// What the tensors are stored in.
        pub dtype: Dtype,
    }

    impl Folder {
        pub fn new(config: &ModelConfig) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut json = serde_json::to_value(config).unwrap();
            json["model_type"] = "qwen2".into();
            std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
            let values = |shape: &[usize]| (0..shape.iter().product()).map(|i| i as f32).collect();
            let tensors = config.tensors().into_iter();
            let tensors = tensors.map(|(name, shape)| (name, shape.clone(), values(&shape))).collect();
            Self { folder, tensors, dtype: Dtype::F32 }
        }

        pub fn path(&self) -> &Path {
            self.folder.path()
        }

        /// The file that `write_shards` puts a tensor into: each its own.
        pub fn shard_of(&self, tensor: &str) -> String {
            format!("{tensor}.safetensors")
        }

        pub fn write_shards(&self, alter: impl Fn(&str, &mut [f32])) {
            let mut weight_map = serde_json::Map::new();
            for (name, shape, values) in &self.tensors {
                let mut values = values.clone();
                alter(name, &mut values);
                let shard = self.shard_of(name);
                write(&self.path().join(&shard), self.dtype, &[(name.clone(), shape.clone(), values)]);
                weight_map.insert(name.clone(), shard.into());
            }
            let index = json!({ "weight_map": weight_map });
            std::fs::write(self.path().join(INDEX_FILE), index.to_string()).unwrap();
        }

        fn write_single(&self, more: Tensors) {
            let tensors: Tensors = self.tensors.iter().cloned().chain(more).collect();
            write(&self.path().join(SINGLE_FILE), self.dtype, &tensors);
        }
    }

    fn write(path: &Path, dtype: Dtype, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
        let encode = |v: &f32| match dtype {
            Dtype::BF16 => bf16::from_f32(*v).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(*v).to_le_bytes().to_vec(),
            _ => v.to_le_bytes().to_vec(),
        };
        let bytes: Vec<Vec<u8>> =
            tensors.iter().map(|(_, _, values)| values.iter().flat_map(encode).collect()).collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            (name.clone(), TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, path).unwrap();
    }

    #[test]
    fn of_a_single_file_and_an_index_the_single_file_is_read_as_by_transformers() {
        let folder = Folder::new(&small(false));
        folder.write_shards(|_, _| ());
        folder.write_single(Vec::new());
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let single = folder.path().join(SINGLE_FILE);
        assert_eq!(checkpoint.files(), [single.as_path()].into());
        std::fs::remove_file(single).unwrap();
        let shards = small(false).tensors().len();
        assert_eq!(Checkpoint::open(folder.path()).unwrap().files().len(), shards);
    }

    #[test]
    fn a_tied_checkpoint_may_hold_a_copy_of_the_embedding_as_its_head_but_no_other_head() {
        let folder = Folder::new(&small(true));
        let copy: Vec<f32> = (0..24).map(|i| i as f32).collect();
        folder.write_single(vec![(HEAD.into(), vec![6, 4], copy.clone())]);
        Checkpoint::open(folder.path()).unwrap();

        let mut other = copy.clone();
        other[23] += 1.0;
        for (shape, values) in [(vec![6, 4], other), (vec![4, 6], copy)] {
            folder.write_single(vec![(HEAD.into(), shape, values)]);
            let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
            assert!(error.contains("model.safetensors: lm_head.weight is not"), "{error}");
        }
    }
}
