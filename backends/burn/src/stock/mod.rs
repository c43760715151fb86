//! The stock form: what a user of Burn gets without writing kernels. Modules of `burn::nn`, Burn's own 4-bit
//! format and LoRA, its autodiff with its gradient checkpointing, its cross-entropy and its AdamW.
//!
//! | module | idea |
//! |---|---|
//! | `network` | Qwen2 of Burn's modules and operations |
//! | `weights` | a checkpoint's weights as parameters, quantized by Burn |
//! | `adapter` | LoRA as Burn attaches it: factors in and out |
//! | `training` | loss, gradients, clipping |
//! | `model` | the contract |
//!
//! What Burn 0.22 has no way for is refused: dropout on the input of an adapter, because Burn adds an adapter to
//! the weight and not to the output, and NF4.

mod adapter;
mod model;
mod network;
mod training;
mod weights;

pub use model::StockModel;
pub use weights::quantizations;
