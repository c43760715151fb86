//! candle as an evalfw engine: Qwen2 with a packed frozen base and LoRA, on the CPU, CUDA and Metal.
//!
//! - [`matrix`]: the frozen weights, packed, and their products
//! - [`ops`]: the operations of a block, each with a true backward, over the loops in `evalfw-kernels`
//! - `cuda`: kernels of our own for NVIDIA GPUs
//! - [`linear`], [`block`], [`network`]: the model from the inside out
//! - [`kept`]: what of a block's forward is there for its backward
//! - [`loss`], [`training`], [`optimizer`]: gradients and the optimizer step
//! - [`engine`], [`model`], [`device`], [`self_check`]: the contract with evalfw
//! - [`limits`]: what a GPU can do at best

mod block;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod engine;
mod kept;
mod limits;
mod linear;
mod loss;
mod matrix;
mod model;
mod network;
mod ops;
mod optimizer;
mod self_check;
mod training;
mod values;

use evalfw_engine::{Engine, Error, Result};
use evalfw_kernels::Products;
use evalfw_kernels::level::Factors;

/// Where candle computes. CUDA and Metal need the cargo feature of their name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CandleDevice {
    Cpu,
    Cuda,
    Metal,
}

impl CandleDevice {
    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
        }
    }
}

/// How much of the arithmetic is ours. A variant is an engine of its own name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Kernels of our own, in f32.
    Tuned,
    /// The same with the factors of matrix products in bf16, or on a CPU what [`Factors`] says; sums and everything else
    /// stay in f32.
    TunedBf16,
    /// Nothing but what candle ships: it decodes a matrix, multiplies, and leaves the gradients to its autograd.
    Stock,
}

impl Variant {
    fn suffix(self) -> &'static str {
        match self {
            Self::Tuned => "",
            Self::TunedBf16 => "-bf16",
            Self::Stock => "-stock",
        }
    }

    fn products(self) -> Products {
        match self {
            Self::TunedBf16 => Products::Bf16,
            Self::Tuned | Self::Stock => Products::F32,
        }
    }
}

/// Opens a device. Where it is not compiled in or not there, the error is
/// [`Unavailable`](evalfw_engine::Error::Unavailable) and says what to do.
pub fn open(device: CandleDevice, variant: Variant) -> Result<Box<dyn Engine>> {
    if variant == Variant::TunedBf16 {
        check_bf16(device)?;
    }
    Ok(Box::new(engine::CandleEngine::open(device, variant)?))
}

fn check_bf16(device: CandleDevice) -> Result<()> {
    let found = match device {
        CandleDevice::Cpu => Factors::can_be_rounded(),
        CandleDevice::Metal => Err("products of bf16 with sums in f32 are not there on Metal"),
        CandleDevice::Cuda => Ok(()),
    };
    found.map_err(|reason| {
        let advice = format!("use candle-{}, which computes in f32", device.name());
        Error::Unavailable { reason: reason.to_owned(), advice }
    })
}
