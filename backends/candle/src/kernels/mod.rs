//! Plain loops and products on slices: what the operations run on a CPU. Nothing here knows a tensor.

pub mod attention;
pub mod product;
pub mod softmax;

/// Elements that one thread takes at a time in elementwise loops: 64 KiB of f32, which stays in L2.
pub const PIECE: usize = 16 * 1024;
