//! The numbers of a tensor on the CPU, as a slice.

use candle_core::{CpuStorage, Layout, Result, Storage, StorageRef, Tensor, bail};
use std::ops::Range;

/// Keeps a contiguous f32 tensor on the CPU readable as a slice.
pub struct CpuValues<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> CpuValues<'a> {
    pub fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        Ok(Self { storage, range: contiguous(layout)? })
    }

    pub fn slice(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => Ok(&values[self.range.clone()]),
            other => bail!("expected f32 on the cpu, found {:?} on {:?}", other.dtype(), other.device()),
        }
    }
}

/// The values of an operation's argument.
pub fn stored<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        CpuStorage::F32(values) => Ok(&values[contiguous(layout)?]),
        other => bail!("expected f32, found {:?}", candle_core::backend::BackendStorage::dtype(other)),
    }
}

fn contiguous(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected a contiguous tensor"),
    }
}
