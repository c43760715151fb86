//! candle as an evalfw engine: Qwen2 with a packed frozen base and LoRA, on the CPU, CUDA and Metal.
//!
//! - [`matrix`]: the frozen weights, packed, and their products
//! - [`ops`]: the operations of a block, each with a true backward, over the loops in [`kernels`] and `evalfw-kernels`
//! - [`linear`], [`block`], [`network`]: the model from the inside out
//! - [`loss`], [`training`]: gradients and the optimizer step
//! - [`engine`], [`model`], [`device`]: the contract with evalfw

mod block;
mod device;
mod engine;
mod kernels;
mod linear;
mod loss;
mod matrix;
mod model;
mod network;
mod ops;
mod training;
mod values;

use evalfw_engine::{Engine, Error, Result};
use evalfw_kernels::Products;
use evalfw_kernels::level::has_bf16_products;

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

/// Opens a device to compute in f32. Where it is not compiled in or not there, the error is
/// [`Unavailable`](evalfw_engine::Error::Unavailable) and says what to do.
pub fn open(device: CandleDevice) -> Result<Box<dyn Engine>> {
    Ok(Box::new(engine::CandleEngine::open(device, Products::F32)?))
}

/// Opens the CPU to multiply matrices in bf16, with sums and everything else in f32.
pub fn open_cpu_bf16() -> Result<Box<dyn Engine>> {
    if !has_bf16_products() {
        return Err(Error::Unavailable {
            reason: "this CPU has no instruction for products of bf16 (AVX512_BF16)".to_owned(),
            advice: "use candle-cpu, which computes in f32".to_owned(),
        });
    }
    Ok(Box::new(engine::CandleEngine::open(CandleDevice::Cpu, Products::Bf16)?))
}
