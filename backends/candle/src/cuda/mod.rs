//! What an NVIDIA GPU computes with kernels of our own: NF4 without a detour, products of bf16 with sums in
//! f32, and operations that would otherwise be many small launches.
//!
//! All functions take contiguous tensors on one CUDA device and return new ones; nothing here is traced. candle
//! works on the stream of the calling thread; a worker serves its calls, and touches tensors, on one thread only, so that
//! the order of calls is the order on the device.

mod adamw;
mod launch;
mod memory;
mod product;

pub use adamw::{Moments, adamw};
pub use memory::{keep_pool, memory};
pub use product::{Transposed, bf16_product};

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{DType, Result, Tensor, bail};
use evalfw_engine::dropout::MaskParameters;
use half::bf16;
use launch::{Kernel, Launch, Values, empty, tensor};

/// Values that a thread decodes at a time.
const VALUES: usize = 16;
/// Warps of a block that multiplies a matrix with a vector; each takes a row.
const WARPS: usize = 8;

/// An NF4 matrix and the tables to decode it.
pub struct Nf4<'a> {
    /// u8, two values each, padded to whole blocks.
    pub codes: &'a Tensor,
    /// u8, one for each block.
    pub scale_codes: &'a Tensor,
    /// f32, one for each nested block.
    pub nested: &'a Tensor,
    /// f32 `[16]` and `[256]`.
    pub levels: &'a Tensor,
    pub scales: &'a Tensor,
    pub offset: f32,
}

/// The readable storages of an [`Nf4`].
struct Nf4Values<'a> {
    codes: Values<'a>,
    scale_codes: Values<'a>,
    nested: Values<'a>,
    levels: Values<'a>,
    scales: Values<'a>,
    offset: f32,
}

impl<'a> Nf4<'a> {
    fn values(&self) -> Result<Nf4Values<'a>> {
        Ok(Nf4Values {
            codes: Values::new(self.codes)?,
            scale_codes: Values::new(self.scale_codes)?,
            nested: Values::new(self.nested)?,
            levels: Values::new(self.levels)?,
            scales: Values::new(self.scales)?,
            offset: self.offset,
        })
    }

    /// The matrix `shape` in f32 or bf16.
    pub fn decode(&self, shape: [usize; 2], dtype: DType) -> Result<Tensor> {
        let values = self.values()?;
        let device = values.codes.device();
        let len = shape[0] * shape[1];
        match dtype {
            DType::F32 => {
                let out = empty::<f32>(device, len)?;
                values.launch_decode("nf4_decode_f32", &out, len)?;
                tensor(device, out, &shape)
            }
            DType::BF16 => {
                let out = empty::<bf16>(device, len)?;
                values.launch_decode("nf4_decode_bf16", &out, len)?;
                tensor(device, out, &shape)
            }
            other => bail!("NF4 is decoded to f32 or bf16, not to {other:?}"),
        }
    }

    /// Whether [`matvec`](Self::matvec) can take a matrix of this width: its rows are whole blocks.
    pub fn has_matvec(width: usize) -> bool {
        width.is_multiple_of(evalfw_engine::nf4::BLOCK)
    }

    /// `x Wᵀ` for `x` `[1, width]` in f32.
    pub fn matvec(&self, shape: [usize; 2], x: &Tensor) -> Result<Tensor> {
        let [height, width] = shape;
        let (values, x) = (self.values()?, Values::new(x)?);
        let device = values.codes.device();
        let out = empty::<f32>(device, height)?;
        let kernel = Kernel::new(device, "nf4_matvec")?;
        let launch = values.push(kernel.launch())?.values::<f32>(&x)?.slice(&out);
        launch.word(height as u32).word(width as u32).run(height.div_ceil(WARPS), WARPS * 32)?;
        tensor(device, out, &[1, height])
    }
}

impl Nf4Values<'_> {
    /// The parameters with which all kernels on NF4 begin.
    fn push<'a>(&'a self, launch: Launch<'a>) -> Result<Launch<'a>> {
        let codes = launch.values::<u8>(&self.codes)?.values::<u8>(&self.scale_codes)?;
        let tables = codes.values::<f32>(&self.nested)?.values::<f32>(&self.levels)?;
        Ok(tables.values::<f32>(&self.scales)?.float(self.offset))
    }

    fn launch_decode<T>(&self, name: &str, out: &CudaSlice<T>, len: usize) -> Result<()> {
        let kernel = Kernel::new(self.codes.device(), name)?;
        self.push(kernel.launch())?.slice(out).count(len).run_for(len.div_ceil(VALUES))
    }
}

/// Whether [`bf16_matvec`] can take a matrix of this width.
pub fn has_bf16_matvec(width: usize) -> bool {
    width.is_multiple_of(8)
}

/// `x Wᵀ` for `x` `[1, width]` in f32 and a matrix in bf16.
pub fn bf16_matvec(weight: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (height, width) = weight.dims2()?;
    let (weight, x) = (Values::new(weight)?, Values::new(x)?);
    let device = weight.device();
    let out = empty::<f32>(device, height)?;
    let kernel = Kernel::new(device, "bf16_matvec")?;
    let launch = kernel.launch().values::<bf16>(&weight)?.values::<f32>(&x)?.slice(&out);
    launch.word(height as u32).word(width as u32).run(height.div_ceil(WARPS), WARPS * 32)?;
    tensor(device, out, &[1, height])
}

/// `mask ⊙ x`
pub fn dropout(x: &Tensor, mask: &MaskParameters) -> Result<Tensor> {
    let values = Values::new(x)?;
    let device = values.device();
    let len = x.elem_count();
    let out = empty::<f32>(device, len)?;
    let kernel = Kernel::new(device, "dropout")?;
    let launch = kernel.launch().values::<f32>(&values)?.slice(&out).count(len);
    launch.word(mask.low).word(mask.high).word(mask.threshold).float(mask.kept).run_for(len)?;
    tensor(device, out, x.dims())
}

/// The gradients of `silu(gate) · up` with respect to both.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, grad: &Tensor) -> Result<[Tensor; 2]> {
    let (gate_values, up, grad) = (Values::new(gate)?, Values::new(up)?, Values::new(grad)?);
    let device = gate_values.device();
    let len = gate.elem_count();
    let (of_gate, of_up) = (empty::<f32>(device, len)?, empty::<f32>(device, len)?);
    let kernel = Kernel::new(device, "swiglu_backward")?;
    let launch = kernel.launch().values::<f32>(&gate_values)?.values::<f32>(&up)?.values::<f32>(&grad)?;
    launch.slice(&of_gate).slice(&of_up).count(len).run_for(len)?;
    Ok([tensor(device, of_gate, gate.dims())?, tensor(device, of_up, gate.dims())?])
}

/// The gradient of `x / sqrt(mean(x²) + eps) · weight` with respect to `x` `[rows, width]`.
pub fn rms_norm_backward(x: &Tensor, weight: &Tensor, grad: &Tensor, eps: f64) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let (values, weight, grad) = (Values::new(x)?, Values::new(weight)?, Values::new(grad)?);
    let device = values.device();
    let out = empty::<f32>(device, rows * width)?;
    let kernel = Kernel::new(device, "rms_norm_backward")?;
    let launch = kernel.launch().values::<f32>(&values)?.values::<f32>(&weight)?.values::<f32>(&grad)?;
    launch.slice(&out).word(width as u32).float(eps as f32).run(rows, 256)?;
    tensor(device, out, x.dims())
}
