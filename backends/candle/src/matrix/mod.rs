//! Frozen matrices in the form in which they are stored.
//!
//! A matrix stays packed (NF4, or the checkpoint's own type) and is widened to f32 only while it is
//! being multiplied: on the CPU a tile at a time, on a GPU as a whole. Nothing here takes part in
//! autograd; [`crate::linear`] wraps it.

mod device;

pub use device::{DeviceMatrix, Nf4Tables};
pub use evalfw_kernels::HostMatrix;

use crate::values::CpuValues;
use candle_core::{Device, Result, Tensor, bail};
use evalfw_engine::weights::Weight;
use evalfw_kernels::Products;

/// `[out_features, in_features]`, or `[vocab_size, hidden_size]`.
pub enum FrozenMatrix {
    Host(HostMatrix),
    Device(DeviceMatrix),
}

impl FrozenMatrix {
    /// Stores a weight where `device` computes; `products` is for the CPU.
    pub fn new(weight: Weight, device: &Device, products: Products, tables: &Nf4Tables) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Host(HostMatrix::new(weight, products))),
            Device::Cuda(_) | Device::Metal(_) => {
                Ok(Self::Device(DeviceMatrix::new(weight, device, tables)?))
            }
        }
    }

    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Host(matrix) => matrix.shape(),
            Self::Device(matrix) => matrix.shape(),
        }
    }

    /// `x · Wᵀ` for `x` `[rows, in_features]`.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, _) = x.dims2()?;
        let [out_features, in_features] = self.shape();
        match self {
            Self::Host(matrix) => {
                let x = CpuValues::new(x)?;
                check_width(x.slice()?.len(), rows * in_features)?;
                let mut out = vec![0.0; rows * out_features];
                matrix.add_product(x.slice()?, &mut out);
                Tensor::from_vec(out, (rows, out_features), &Device::Cpu)
            }
            Self::Device(matrix) => matrix.product(&x.detach()),
        }
    }

    /// The first row whose product with `x` `[1, in_features]` is the largest.
    pub fn argmax(&self, x: &Tensor) -> Result<u32> {
        match self {
            Self::Host(matrix) => {
                let x = CpuValues::new(x)?;
                check_width(x.slice()?.len(), matrix.shape()[1])?;
                match matrix.argmax(x.slice()?) {
                    Some(row) => Ok(row as u32),
                    None => bail!("a logit is not a number"),
                }
            }
            Self::Device(matrix) => matrix.product(&x.detach())?.flatten_all()?.argmax(0)?.to_scalar(),
        }
    }

    /// `y · W` for `y` `[rows, out_features]`: how a gradient passes through.
    pub fn transposed_product(&self, y: &Tensor) -> Result<Tensor> {
        let (rows, _) = y.dims2()?;
        let [out_features, in_features] = self.shape();
        match self {
            Self::Host(matrix) => {
                let y = CpuValues::new(y)?;
                check_width(y.slice()?.len(), rows * out_features)?;
                let mut out = vec![0.0; rows * in_features];
                matrix.add_transposed_product(y.slice()?, &mut out);
                Tensor::from_vec(out, (rows, in_features), &Device::Cpu)
            }
            Self::Device(matrix) => matrix.transposed_product(&y.detach()),
        }
    }

    /// Looks up rows: `[ids, in_features]` in f32.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        let [rows, cols] = self.shape();
        if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
            bail!("row {id} of a matrix with {rows} rows");
        }
        match self {
            Self::Host(matrix) => Tensor::from_vec(matrix.rows(ids), (ids.len(), cols), &Device::Cpu),
            Self::Device(matrix) => matrix.rows(ids),
        }
    }
}

fn check_width(found: usize, expected: usize) -> Result<()> {
    if found != expected {
        bail!("a factor has {found} elements, the matrix needs {expected}");
    }
    Ok(())
}
