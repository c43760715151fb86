//! The embedding table. It stays in host memory in the checkpoint's type: a lookup needs few of its
//! rows, and it is larger than the largest buffer of some adapters.

use burn::tensor::{Device, Tensor, TensorData};
use evalfw_engine::weights::{DenseData, DenseTensor};
use half::slice::HalfFloatSliceExt;
use std::sync::Arc;

pub struct Embedding {
    pub table: Arc<DenseTensor>,
}

impl Embedding {
    /// The rows of `tokens`, `[tokens, hidden]`.
    pub fn look_up(&self, tokens: &[u32], device: &Device) -> Tensor<2> {
        let hidden = self.table.shape[1];
        let mut rows = vec![0.0; tokens.len() * hidden];
        for (row, &token) in rows.chunks_mut(hidden).zip(tokens) {
            let range = token as usize * hidden..(token as usize + 1) * hidden;
            match &self.table.data {
                DenseData::F32(values) => row.copy_from_slice(&values[range]),
                DenseData::F16(values) => values[range].convert_to_f32_slice(row),
                DenseData::Bf16(values) => values[range].convert_to_f32_slice(row),
            }
        }
        Tensor::from_data(TensorData::new(rows, [tokens.len(), hidden]), device)
    }
}
