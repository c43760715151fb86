//! What a block's forward keeps for its backward, so that it need not be computed again.

use crate::values::CpuValues;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::Target;
use evalfw_kernels::Products;
use evalfw_kernels::elementwise::{narrowed, widened};
use evalfw_kernels::filled::zeros;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What becomes of the results of a block's large operations.
#[derive(Clone, Copy)]
pub enum Kept<'a> {
    /// They are computed and used.
    No,
    /// They are computed, and kept for when the block is computed again.
    Keep(&'a Results),
    /// The block is computed again for its backward: what was kept is used, and what nothing but the
    /// block's own result needs is left out.
    Again(&'a Results),
}

/// A large operation of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Projection(Target),
    Attention,
}

/// A result that need not be computed.
pub enum Known {
    /// In f32, or in bf16.
    Result(Tensor),
    /// Only the gradients are wanted.
    NotNeeded,
}

/// The kept results of one block, in the type in which its products read them.
pub struct Results {
    products: Products,
    tensors: RefCell<BTreeMap<Part, Tensor>>,
    inner: RefCell<BTreeMap<Target, Inner>>,
}

/// What lies between the factors of an adapter, `[rows, r]`: the forward leaves it for the backward. So narrow
/// that it is kept in f32, and not counted.
#[derive(Clone, Default)]
pub struct Inner(Arc<Mutex<Option<Vec<f32>>>>);

impl Inner {
    pub fn put(&self, values: Vec<f32>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(values);
    }

    pub fn take(&self) -> Option<Vec<f32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Part {
    /// Whether a block's backward needs the result: that of the last projection is only added to the
    /// residual.
    fn is_needed_again(self) -> bool {
        self != Self::Projection(Target::Down)
    }

    /// Elements of the result for one position.
    fn width(self, config: &ModelConfig) -> usize {
        match self {
            Self::Projection(target) => config.projection_shape(target)[0],
            Self::Attention => config.num_attention_heads * config.head_dim,
        }
    }
}

impl Kept<'_> {
    /// Keeps the result of a part, if results are kept and the backward needs it.
    pub fn keep(self, part: Part, result: &Tensor) -> Result<()> {
        match self {
            Self::Keep(results) if part.is_needed_again() => results.insert(part, result),
            _ => Ok(()),
        }
    }

    /// Where the forward of a projection puts what its backward takes.
    pub fn inner(self, target: Target) -> Inner {
        match self {
            Self::Keep(results) | Self::Again(results) => {
                results.inner.borrow_mut().entry(target).or_default().clone()
            }
            Self::No => Inner::default(),
        }
    }

    /// What need not be computed of a part. A result is given out once.
    pub fn known(self, part: Part) -> Option<Known> {
        match self {
            Self::Again(results) if part.is_needed_again() => {
                results.tensors.borrow_mut().remove(&part).map(Known::Result)
            }
            Self::Again(_) => Some(Known::NotNeeded),
            Self::No | Self::Keep(_) => None,
        }
    }
}

impl Results {
    pub fn new(products: Products) -> Self {
        Self { products, tensors: RefCell::default(), inner: RefCell::default() }
    }

    /// Bytes that the results of a block take for `rows` positions.
    pub fn bytes(products: Products, config: &ModelConfig, rows: usize) -> u64 {
        let projections = Target::ALL.map(Part::Projection);
        let parts = projections.iter().chain(&[Part::Attention]).filter(|part| part.is_needed_again());
        let width: usize = parts.map(|part| part.width(config)).sum();
        (rows * width * dtype(products).size_in_bytes()) as u64
    }

    fn insert(&self, part: Part, result: &Tensor) -> Result<()> {
        let kept = match (self.products, result.device()) {
            (Products::F32, _) => result.detach(),
            (Products::Bf16, Device::Cpu) => narrow(result)?,
            (Products::Bf16, _) => result.detach().to_dtype(DType::BF16)?,
        };
        self.tensors.borrow_mut().insert(part, kept);
        Ok(())
    }
}

impl Known {
    /// The result in f32 where it was computed; anything of this shape where it is not needed.
    pub fn on_device(&self, shape: &Shape, device: &Device) -> Result<Tensor> {
        match self {
            Self::Result(result) => result.to_dtype(DType::F32),
            Self::NotNeeded => Tensor::zeros(shape, DType::F32, device),
        }
    }

    /// The same on the CPU, for `elements` elements.
    pub fn on_host(&self, elements: usize) -> Result<CpuStorage> {
        let Self::Result(result) = self else { return Ok(CpuStorage::F32(zeros(elements))) };
        let (storage, layout) = result.storage_and_layout();
        let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            bail!("a kept result is not contiguous on the cpu");
        };
        match storage {
            CpuStorage::F32(values) => Ok(CpuStorage::F32(values[start..end].to_vec())),
            CpuStorage::BF16(values) => Ok(CpuStorage::F32(widened(&values[start..end]))),
            other => bail!("a kept result in {:?}", other.dtype()),
        }
    }
}

fn dtype(products: Products) -> DType {
    match products {
        Products::F32 => DType::F32,
        Products::Bf16 => DType::BF16,
    }
}

/// candle's own conversion runs on one thread.
fn narrow(result: &Tensor) -> Result<Tensor> {
    let contiguous = result.contiguous()?;
    let values = CpuValues::new(&contiguous)?;
    Tensor::from_vec(narrowed(values.slice()?), result.shape(), &Device::Cpu)
}
