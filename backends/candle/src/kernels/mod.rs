//! Plain loops and products on slices: what the operations run on a CPU. Nothing here knows a tensor.

pub mod attention;
pub mod lora;
pub mod product;
pub mod softmax;
