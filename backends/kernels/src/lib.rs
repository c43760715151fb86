//! Products of f32 activations with frozen matrices that stay packed: NF4, or the checkpoint's own type.
//!
//! - [`HostMatrix`]: a matrix in the form in which it is stored, and its products
//! - [`vector`]: one row of activations, as in decoding; bound by reading the matrix once
//! - [`product`]: many rows, as in prefill and training; bound by arithmetic. Each weight is widened once
//!   for each product, into a tile that stays in the cache of the core that uses it
//! - `argmax`: the largest row of a product, as greedy decoding wants it
//! - [`attention`]: causal, with grouped queries, and its gradients
//! - [`elementwise`]: loops with an exponential
//! - [`filled`]: the memory of results
//! - [`level`]: the instruction sets, found at run time
//! - [`lora`]: a frozen matrix with an adapter beside it, and its gradients
//! - [`loss`]: cross-entropy on the head
//! - [`memory`]: what happens to it when it is freed
//! - [`norm`], [`rope`]: the other operations of a block, and their gradients
//! - [`pages`]: memory that is read without waiting for its addresses
//! - [`views`]: products of f32 matrices through the gemm crate
//! - [`team`]: threads that stay awake from one short loop to the next
//!
//! Nothing here knows a framework: engines call it from their own extension points.

mod argmax;
pub mod attention;
mod dot;
pub mod elementwise;
pub mod filled;
pub mod level;
pub mod lora;
pub mod loss;
mod matrix;
pub mod memory;
mod nf4;
pub mod norm;
pub mod pages;
mod product;
pub mod rope;
pub mod team;
#[cfg(target_arch = "x86_64")]
mod transpose;
mod vector;
pub mod views;

pub use dot::{dot, dot_bf16, widen_bf16};
pub use matrix::{HostMatrix, LowRank, Products};
