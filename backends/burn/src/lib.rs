//! [Burn](https://burn.dev) as an evalfw engine, on two devices: `wgpu` (Vulkan, Metal or DX12) and
//! `flex`, burn's own CPU backend.
//!
//! | module | idea |
//! |---|---|
//! | `device` | opens a device and says what it is |
//! | `packed` | frozen matrices in few bits, decoded for one product at a time: burn's extension mechanism |
//! | `frozen` | a frozen matrix, dense or packed; the rest of the engine knows no difference |
//! | `lora`, `dropout` | the trainable factors, and the masks on their input |
//! | `attention`, `block`, `norm`, `rope`, `network` | Qwen2 |
//! | `embedding`, `head` | both ends of it, with the chunked loss |
//! | `training`, `optimizer` | one step: gradients by block, AdamW |
//! | `model` | the contract, on top of all of these |

mod attention;
mod block;
mod device;
mod dropout;
mod embedding;
mod engine;
mod frozen;
mod guard;
mod head;
mod lora;
mod model;
mod network;
mod norm;
mod optimizer;
mod packed;
mod rope;
mod training;

use evalfw_engine::{Engine, Result};

/// Where burn computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BurnDevice {
    /// A GPU, through Vulkan, Metal or DX12 as the platform has it.
    Wgpu,
    /// The CPU.
    Flex,
}

/// Opens a device. Fails with [`Error::Unavailable`](evalfw_engine::Error::Unavailable) where there is
/// no such device or no driver for it.
pub fn open(device: BurnDevice) -> Result<Box<dyn Engine>> {
    Ok(Box::new(engine::BurnEngine::open(device)?))
}
