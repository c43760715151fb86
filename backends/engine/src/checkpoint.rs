//! A Hugging Face checkpoint folder: checked as a whole, then read piece by piece.

use crate::config::ModelConfig;
use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

const INDEX_FILE: &str = "model.safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";
/// The format's own limit (safetensors, `MAX_HEADER_SIZE`).
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An opened checkpoint. Opening reads headers only; tensors are read by position into buffers of the
/// caller. Nothing stays mapped: mapped pages would count as memory of the engine, and a file cut
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
        Ok(Self { dir: dir.to_owned(), config, tensors })
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
        let entry = self.entry(name)?.clone();
        let open = || {
            let mut file = File::open(&entry.file)?;
            file.seek(SeekFrom::Start(entry.offset))?;
            Ok(file)
        };
        let file = open().map_err(|e: std::io::Error| Error::file(&entry.file, e))?;
        Ok(TensorReader {
            name: name.to_owned(),
            remaining: entry.elements,
            position: 0,
            entry,
            file,
            bytes: Vec::new(),
        })
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::file(&self.dir, format_args!("{name} is not part of the model")))
    }
}

/// Reads one tensor from front to back, a piece at a time.
pub struct TensorReader {
    name: String,
    entry: Entry,
    file: File,
    position: usize,
    remaining: usize,
    bytes: Vec<u8>,
}

impl TensorReader {
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    pub fn element_type(&self) -> ElementType {
        self.entry.dtype
    }

    /// Reads the next `count` elements in the file's own type, little-endian.
    pub fn read_bytes(&mut self, count: usize) -> Result<&[u8]> {
        assert!(
            count <= self.remaining,
            "{}: {count} elements asked for, {} left",
            self.name,
            self.remaining
        );
        self.bytes.resize(count * self.entry.dtype.bytes(), 0);
        let read = self.file.read_exact(&mut self.bytes);
        read.map_err(|e| Error::file(&self.entry.file, format_args!("{}: {e}", self.name)))?;
        self.remaining -= count;
        self.position += count;
        Ok(&self.bytes)
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

/// The safetensors files of the folder: those of the index, or the single one.
fn shards(dir: &Path) -> Result<Vec<PathBuf>> {
    let index = dir.join(INDEX_FILE);
    let single = dir.join(SINGLE_FILE);
    if !index.exists() {
        return if single.exists() {
            Ok(vec![single])
        } else {
            Err(Error::file(dir, format_args!("has neither {SINGLE_FILE} nor {INDEX_FILE}")))
        };
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
