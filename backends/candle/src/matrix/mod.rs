//! Frozen matrices in the form in which they are stored.
//!
//! A matrix stays packed (NF4, candle's own format, or the checkpoint's own type) and is widened only while it
//! is being multiplied: on the CPU a tile at a time, on a GPU as a whole. Nothing here takes part in autograd;
//! [`crate::linear`] wraps it.

mod device;
mod native;
mod nf4;

pub use device::DeviceMatrix;
pub use evalfw_kernels::HostMatrix;
pub use native::NativeMatrix;
pub use nf4::{Decoding, Nf4Tables};

use crate::ops::Form;
use crate::values::CpuValues;
use candle_core::{Device, Result, Tensor, bail};
use evalfw_engine::weights::Weight;
use evalfw_kernels::Products;

/// `[out_features, in_features]`, or `[vocab_size, hidden_size]`.
pub enum FrozenMatrix {
    Host(HostMatrix),
    Device(DeviceMatrix),
    Native(NativeMatrix),
}

impl FrozenMatrix {
    /// Stores a weight for operations of this form.
    pub fn new(
        weight: Weight,
        device: &Device,
        tables: &Nf4Tables,
        (form, products): (Form, Products),
    ) -> Result<Self> {
        let decoding = match form {
            Form::Host => return Ok(Self::Host(HostMatrix::new(weight, products))),
            Form::Device => Decoding::Kernel,
            Form::Stock => Decoding::Composed,
        };
        Ok(Self::Device(DeviceMatrix::new(weight, device, tables, (decoding, products))?))
    }

    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Host(matrix) => matrix.shape(),
            Self::Device(matrix) => matrix.shape(),
            Self::Native(matrix) => matrix.shape(),
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
                Tensor::from_vec(matrix.product(x.slice()?, None), (rows, out_features), &Device::Cpu)
            }
            Self::Device(matrix) => matrix.product(&x.detach()),
            Self::Native(matrix) => matrix.product(&x.detach()),
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
            Self::Device(_) | Self::Native(_) => {
                let logits = self.product(x)?.flatten_all()?;
                // GPUs pass over what is not a number in a maximum; a sum shows it.
                if logits.sum_all()?.to_scalar::<f32>()?.is_nan() {
                    bail!("a logit is not a number");
                }
                logits.argmax(0)?.to_scalar()
            }
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
                Tensor::from_vec(matrix.transposed_product(y.slice()?), (rows, in_features), &Device::Cpu)
            }
            Self::Device(matrix) => matrix.transposed_product(&y.detach()),
            Self::Native(matrix) => matrix.transposed_product(&y.detach()),
        }
    }

    /// All elements in f32 on the device, for candle's own matmul.
    pub fn decode(&self) -> Result<Tensor> {
        match self {
            Self::Host(_) => bail!("a matrix of the host is multiplied as it is"),
            Self::Device(matrix) => matrix.decode(),
            Self::Native(matrix) => matrix.decode(),
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
            Self::Native(_) => bail!("rows are looked up in dense and NF4 matrices only"),
        }
    }
}

fn check_width(found: usize, expected: usize) -> Result<()> {
    if found != expected {
        bail!("a factor has {found} elements, the matrix needs {expected}");
    }
    Ok(())
}
