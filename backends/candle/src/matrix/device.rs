//! Frozen matrices as tensors: on a GPU, and for candle's own operations on the CPU.

use super::nf4::{Decoding, Nf4, Nf4Tables};
use candle_core::{DType, Device, Result, Tensor};
use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
use evalfw_kernels::Products;

/// Bytes of a dense matrix that are converted at a time. The head of a 7B model has eight times as many.
const TILE_BYTES: usize = 256 << 20;

#[derive(Clone)]
pub struct DeviceMatrix {
    shape: [usize; 2],
    elements: Elements,
    products: Products,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "there are kernels on CUDA only"))]
    decoding: Decoding,
}

#[derive(Clone)]
enum Elements {
    /// In the checkpoint's type.
    Dense(Tensor),
    Nf4(Nf4),
}

impl DeviceMatrix {
    pub fn new(
        weight: Weight,
        device: &Device,
        tables: &Nf4Tables,
        (decoding, products): (Decoding, Products),
    ) -> Result<Self> {
        let shape = match &weight {
            Weight::Dense(tensor) => tensor.shape,
            Weight::Nf4(tensor) => tensor.shape,
        };
        let elements = match weight {
            Weight::Dense(tensor) => {
                let dense = upload(tensor, device)?;
                // candle multiplies other types on the CPU by widening them for every call.
                let widen = device.is_cpu() && decoding == Decoding::Composed;
                Elements::Dense(if widen { dense.to_dtype(DType::F32)? } else { dense })
            }
            Weight::Nf4(tensor) => Elements::Nf4(Nf4::new(tensor, device, tables, decoding)?),
        };
        Ok(Self { shape, elements, products, decoding })
    }

    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// All elements in f32, `[out_features, in_features]`.
    pub fn decode(&self) -> Result<Tensor> {
        match &self.elements {
            Elements::Dense(tensor) => tensor.to_dtype(DType::F32),
            Elements::Nf4(nf4) => nf4.decode(DType::F32),
        }
    }

    /// `x · Wᵀ`
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(product) = self.matvec(x)? {
            return Ok(product);
        }
        let x = self.factor(x)?;
        let parts: Vec<_> = self.tiles().map(|tile| self.multiply(&x, &tile?)).collect::<Result<_>>()?;
        match &parts[..] {
            [whole] => Ok(whole.clone()),
            parts => Tensor::cat(parts, 1),
        }
    }

    /// `y · W`
    pub fn transposed_product(&self, y: &Tensor) -> Result<Tensor> {
        let y = self.factor(y)?;
        let mut sum: Option<Tensor> = None;
        let mut start = 0;
        for tile in self.tiles() {
            let tile = tile?;
            let rows = tile.dim(0)?;
            let part = self.multiply_back(&y.narrow(1, start, rows)?.contiguous()?, &tile)?;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
            start += rows;
        }
        match sum {
            Some(sum) => Ok(sum),
            None => Tensor::zeros((y.dim(0)?, self.shape[1]), DType::F32, y.device()),
        }
    }

    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        match &self.elements {
            Elements::Dense(tensor) => {
                tensor.index_select(&Tensor::new(ids, tensor.device())?, 0)?.to_dtype(DType::F32)
            }
            Elements::Nf4(nf4) => {
                let whole = nf4.decode(DType::F32)?;
                whole.index_select(&Tensor::new(ids, whole.device())?, 0)
            }
        }
    }

    /// The type of both factors of a product.
    fn dtype(&self) -> DType {
        match self.products {
            Products::F32 => DType::F32,
            Products::Bf16 => DType::BF16,
        }
    }

    fn factor(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.to_dtype(self.dtype())
    }

    /// The matrix in the type of products, some rows after the other if a large one has to be converted.
    fn tiles(&self) -> impl Iterator<Item = Result<Tensor>> + '_ {
        let [height, width] = self.shape;
        let dtype = self.dtype();
        let tile_rows = match &self.elements {
            Elements::Dense(tensor) if tensor.dtype() != dtype => {
                (TILE_BYTES / dtype.size_in_bytes() / width.max(1)).max(1)
            }
            _ => height.max(1),
        };
        (0..height).step_by(tile_rows).map(move |start| match &self.elements {
            Elements::Dense(tensor) => {
                tensor.narrow(0, start, tile_rows.min(height - start))?.to_dtype(dtype)
            }
            Elements::Nf4(nf4) => nf4.decode(dtype),
        })
    }

    /// For one row, without decoding the matrix to memory, where there is a kernel for it.
    fn matvec(&self, x: &Tensor) -> Result<Option<Tensor>> {
        match &self.elements {
            Elements::Nf4(nf4) => nf4.matvec(x),
            #[cfg(feature = "cuda")]
            Elements::Dense(weight)
                if self.decoding == Decoding::Kernel
                    && weight.device().is_cuda()
                    && weight.dtype() == DType::BF16
                    && x.dim(0)? == 1
                    && crate::cuda::has_bf16_matvec(self.shape[1]) =>
            {
                crate::cuda::bf16_matvec(weight, &x.contiguous()?).map(Some)
            }
            Elements::Dense(_) => Ok(None),
        }
    }

    fn multiply(&self, x: &Tensor, tile: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if tile.device().is_cuda() && tile.dtype() == DType::BF16 {
            return crate::cuda::bf16_product(x, tile, crate::cuda::Transposed::Yes);
        }
        widened(x)?.matmul(&widened(tile)?.t()?)
    }

    fn multiply_back(&self, y: &Tensor, tile: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if tile.device().is_cuda() && tile.dtype() == DType::BF16 {
            return crate::cuda::bf16_product(y, tile, crate::cuda::Transposed::No);
        }
        widened(y)?.matmul(&widened(tile)?)
    }
}

/// A factor of a product with sums in f32: what was rounded to bf16 stays so.
fn widened(factor: &Tensor) -> Result<Tensor> {
    factor.to_dtype(DType::F32)
}

fn upload(tensor: DenseTensor, device: &Device) -> Result<Tensor> {
    let [rows, cols] = tensor.shape;
    match tensor.data {
        DenseData::F32(values) => Tensor::from_vec(values, (rows, cols), device),
        DenseData::F16(values) => Tensor::from_vec(values, (rows, cols), device),
        DenseData::Bf16(values) => Tensor::from_vec(values, (rows, cols), device),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::HostMatrix;
    use evalfw_engine::nf4::{BLOCK, Nf4Tensor};
    use half::bf16;

    const PLAIN: (Decoding, Products) = (Decoding::Composed, Products::F32);

    /// 255 is among the codes of the values and, as one block is larger, of the scales.
    fn weight(shape: [usize; 2]) -> Vec<f32> {
        let value = |i: usize| if i % 7 < 2 { 1.5 } else { (i as f32 * 0.61).sin() };
        let scale = |i: usize| if i / BLOCK == 1 { 3.0 } else { 1.0 };
        (0..shape[0] * shape[1]).map(|i| scale(i) * value(i)).collect()
    }

    fn nf4(shape: [usize; 2]) -> Nf4Tensor {
        Nf4Tensor::quantize(shape, &weight(shape))
    }

    fn bf16_matrix(shape: [usize; 2]) -> Weight {
        let data = DenseData::Bf16(weight(shape).into_iter().map(bf16::from_f32).collect());
        Weight::Dense(DenseTensor { shape, data })
    }

    #[test]
    fn nf4_decodes_as_on_the_host_also_where_rows_cut_blocks() {
        let tables = Nf4Tables::new(&Device::Cpu).unwrap();
        for shape in [[8, 64], [3, 35], [300, 96]] {
            let tensor = nf4(shape);
            assert!(tensor.codes.contains(&255) && tensor.scales.codes.contains(&255));
            let expected = tensor.dequantize();
            let matrix = DeviceMatrix::new(Weight::Nf4(tensor), &Device::Cpu, &tables, PLAIN).unwrap();
            let decoded = matrix.decode().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(decoded, expected);
        }
    }

    #[test]
    fn host_and_device_form_multiply_alike() {
        let tables = Nf4Tables::new(&Device::Cpu).unwrap();
        for shape in [[70, 64], [65, 35], [300, 96]] {
            for weight in [Weight::Nf4(nf4(shape)), bf16_matrix(shape)] {
                let host = HostMatrix::new(weight.clone(), Products::F32);
                let device = DeviceMatrix::new(weight, &Device::Cpu, &tables, PLAIN).unwrap();
                for rows in [1, 3, 20] {
                    let x: Vec<f32> = (0..rows * shape[1]).map(|i| (i as f32 * 0.37).cos()).collect();
                    let y: Vec<f32> = (0..rows * shape[0]).map(|i| (i as f32 * 0.53).cos()).collect();
                    let product = host.product(&x, None);
                    let transposed = host.transposed_product(&y);
                    let x = Tensor::from_vec(x, (rows, shape[1]), &Device::Cpu).unwrap();
                    let y = Tensor::from_vec(y, (rows, shape[0]), &Device::Cpu).unwrap();
                    assert_close(&product, &device.product(&x).unwrap());
                    assert_close(&transposed, &device.transposed_product(&y).unwrap());
                }
                let ids = [0, 2, shape[0] as u32 - 1];
                let rows = device.rows(&ids).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(host.rows(&ids), rows);
            }
        }
    }

    fn assert_close(host: &[f32], device: &Tensor) {
        let device = device.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(host.len(), device.len());
        for (a, b) in host.iter().zip(&device) {
            assert!((a - b).abs() < 1e-4 * (1.0 + b.abs()), "{a} {b}");
        }
    }
}
