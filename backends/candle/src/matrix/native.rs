//! candle's own 4-bit format: blocks of GGML, multiplied by its `QMatMul`.

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Result, Tensor};
use evalfw_engine::weights::DenseTensor;
use rayon::prelude::*;
use std::borrow::Cow;
use std::sync::Arc;

/// Elements that one thread quantizes at a time, about.
const PIECE: usize = 1 << 18;

/// Q4_K, or Q8_0 where the width is no multiple of Q4_K's blocks. A width that not even Q8_0 can hold stays f32.
pub struct NativeMatrix {
    shape: [usize; 2],
    weight: QMatMul,
}

impl NativeMatrix {
    pub fn new(tensor: DenseTensor, device: &Device) -> Result<Self> {
        let shape = tensor.shape;
        let values = tensor.into_f32();
        let weight = match format(shape[1]) {
            Some(dtype) => QMatMul::QTensor(Arc::new(quantize(&values, shape, dtype, device)?)),
            None => QMatMul::Tensor(Tensor::from_vec(values, (shape[0], shape[1]), device)?),
        };
        Ok(Self { shape, weight })
    }

    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// All elements in f32.
    pub fn decode(&self) -> Result<Tensor> {
        match &self.weight {
            QMatMul::QTensor(tensor) if tensor.device().is_metal() => {
                // candle dequantizes for Metal on the CPU, but looks rows up on the GPU.
                tensor.embedding(&Tensor::arange(0, self.shape[0] as u32, &tensor.device())?)
            }
            QMatMul::QTensor(tensor) => tensor.dequantize(&tensor.device()),
            QMatMul::Tensor(tensor) | QMatMul::TensorF16(tensor) => Ok(tensor.clone()),
        }
    }

    /// `x Wᵀ`. On the CPU candle quantizes `x` as well.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        // On Metal, a view with an offset would be read from its beginning.
        let x = if x.device().is_metal() { x.force_contiguous()? } else { x.contiguous()? };
        self.weight.forward(&x)
    }

    /// `y W`
    pub fn transposed_product(&self, y: &Tensor) -> Result<Tensor> {
        y.matmul(&self.decode()?)
    }
}

fn format(width: usize) -> Option<GgmlDType> {
    [GgmlDType::Q4K, GgmlDType::Q8_0].into_iter().find(|dtype| width.is_multiple_of(dtype.block_size()))
}

/// candle quantizes a tensor on one thread; rows are independent, so that pieces of them go to all.
fn quantize(values: &[f32], shape: [usize; 2], dtype: GgmlDType, device: &Device) -> Result<QTensor> {
    let rows = (PIECE / shape[1]).max(1);
    let pieces: Vec<Vec<u8>> = values
        .par_chunks(rows * shape[1])
        .map(|piece| {
            let piece = Tensor::from_slice(piece, (piece.len() / shape[1], shape[1]), &Device::Cpu)?;
            Ok(QTensor::quantize(&piece, dtype)?.data()?.into_owned())
        })
        .collect::<Result<_>>()?;
    let storage = QStorage::from_data(Cow::Owned(pieces.concat()), device, dtype)?;
    QTensor::new(storage, (shape[0], shape[1]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use evalfw_engine::weights::DenseData;

    fn values(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.61).sin()).collect()
    }

    #[test]
    fn pieces_are_quantized_as_the_whole_and_multiply() {
        // Q4_K in several pieces, Q8_0, and neither.
        for (shape, format_error) in [([2100, 256], 0.1), ([70, 96], 0.01), ([5, 35], 1e-6)] {
            let data = DenseData::F32(values(shape[0] * shape[1]));
            let matrix = NativeMatrix::new(DenseTensor { shape, data }, &Device::Cpu).unwrap();
            let dense =
                Tensor::from_vec(values(shape[0] * shape[1]), (shape[0], shape[1]), &Device::Cpu).unwrap();
            if let Some(dtype) = format(shape[1]) {
                let whole = QTensor::quantize(&dense, dtype).unwrap().dequantize(&Device::Cpu).unwrap();
                assert_eq!(distance(&matrix.decode().unwrap(), &whole), 0.0);
            }
            assert!(distance(&matrix.decode().unwrap(), &dense) <= format_error);
            let decoded = matrix.decode().unwrap();
            let x = Tensor::from_vec(values(3 * shape[1]), (3, shape[1]), &Device::Cpu).unwrap();
            let product = matrix.product(&x).unwrap();
            // candle quantizes the activations to 8 bits.
            assert!(distance(&product, &x.matmul(&decoded.t().unwrap()).unwrap()) < 0.02);
            let y = Tensor::from_vec(values(3 * shape[0]), (3, shape[0]), &Device::Cpu).unwrap();
            let transposed = matrix.transposed_product(&y).unwrap();
            assert_eq!(distance(&transposed, &y.matmul(&decoded).unwrap()), 0.0);
        }
    }

    /// L2, relative.
    fn distance(a: &Tensor, b: &Tensor) -> f32 {
        let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        norm(&(a - b).unwrap()) / norm(b)
    }
}
