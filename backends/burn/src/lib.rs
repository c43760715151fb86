//! [Burn](https://burn.dev) as an evalfw engine, on two devices: `wgpu` (Vulkan, Metal or DX12) and
//! `flex`, burn's own CPU backend.
//!
//! | module | idea |
//! |---|---|
//! | `adapter_file` | files in the cache that are about one adapter |
//! | `buffer` | memory of a GPU for results |
//! | `adapters` | which GPU is taken where there are several |
//! | `device` | opens a device and says what it is |
//! | `pool` | what a GPU's memory pools hold, and the most that they held |
//! | `tune` | chooses a GPU's kernels for products by measuring |
//! | `product` | products by these kernels: burn's extension mechanism |
//! | `packed` | frozen matrices in few bits, decoded for one product at a time |
//! | `frozen` | a frozen matrix, dense or packed; the rest of the engine knows no difference |
//! | `fused` | operations of a block by one kernel each, on flex |
//! | `lora`, `dropout` | the trainable factors, and the masks on their input |
//! | `attention`, `block`, `norm`, `rope`, `network` | Qwen2 |
//! | `embedding`, `head` | both ends of it, with the chunked loss |
//! | `kept` | what a block keeps for its backward |
//! | `training`, `optimizer` | one step: gradients by block, AdamW |
//! | `limits` | what a GPU can do at best |
//! | `self_check` | holds a GPU against the CPU before anything relies on it |
//! | `model` | the contract, on top of all of these |
//! | `stock` | the form without kernels of ours, with the same contract |

mod adapter_file;
mod adapters;
mod attention;
mod block;
mod buffer;
mod device;
mod dropout;
mod embedding;
mod engine;
mod frozen;
mod fused;
mod guard;
mod head;
mod kept;
mod limits;
mod lora;
mod model;
mod network;
mod norm;
mod optimizer;
mod packed;
mod pool;
mod product;
mod rope;
mod self_check;
mod stock;
mod training;
mod tune;

pub use tune::{Autotune, When};

use evalfw_engine::{Engine, Error, Result};
use evalfw_kernels::Products;
use evalfw_kernels::level::Factors;
use std::path::PathBuf;

/// Where burn computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BurnDevice {
    /// A GPU, through Vulkan, Metal or DX12 as the platform has it.
    Wgpu,
    /// The CPU.
    Flex,
}

/// How burn computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// With kernels of ours for the frozen matrices.
    Tuned,
    /// The same with the factors of these products in bf16, or what [`Factors`] says; sums and everything else stay in
    /// f32. On the CPU only.
    TunedBf16,
    /// Nothing but what Burn ships: its modules, its 4-bit format, its LoRA, its gradient checkpointing.
    Stock,
}

/// What a GPU does before it is used.
#[derive(Debug, Clone, Default)]
pub struct Preparation {
    pub autotune: Autotune,
    /// The folder in which it is remembered that a GPU has passed the long part of the self-check; without one, each
    /// process checks anew.
    pub self_checks: Option<PathBuf>,
}

/// Opens a device. Fails with [`Error::Unavailable`] where there is no such device, no driver for it, or no
/// instruction for the variant. Of the forms on a GPU, all but the stock one are prepared as `preparation` says; what the
/// first call in a process says holds for all.
pub fn open(device: BurnDevice, variant: Variant, preparation: &Preparation) -> Result<Box<dyn Engine>> {
    let products = match (variant, device) {
        (Variant::Tuned | Variant::Stock, _) => Products::F32,
        (Variant::TunedBf16, BurnDevice::Flex) => {
            Factors::can_be_rounded().map_err(|reason| unavailable(device, reason))?;
            Products::Bf16
        }
        (Variant::TunedBf16, BurnDevice::Wgpu) => {
            return Err(unavailable(device, "WGSL has no bf16"));
        }
    };
    Ok(Box::new(engine::BurnEngine::open(device, variant, products, preparation)?))
}

fn unavailable(device: BurnDevice, reason: &str) -> Error {
    let advice = format!("use burn-{device:?}, which multiplies in f32").to_lowercase();
    Error::Unavailable { reason: reason.into(), advice }
}
