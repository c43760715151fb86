//! The embedding table. It stays in host memory in the checkpoint's type: a lookup needs few of its
//! rows, and it is larger than the largest buffer of some adapters.

use crate::packed::HostMatrix;
use burn::tensor::{Device, Tensor, TensorData};

pub struct Embedding {
    /// `[vocab_size, hidden]`
    pub table: HostMatrix,
}

impl Embedding {
    /// The rows of `tokens`, `[tokens, hidden]`.
    pub fn look_up(&self, tokens: &[u32], device: &Device) -> Tensor<2> {
        let shape = [tokens.len(), self.table.shape()[1]];
        Tensor::from_data(TensorData::new(self.table.rows(tokens), shape), device)
    }
}
