//! Frozen matrices on a GPU, decoded with candle's own operations. Slower than a fused kernel, and the
//! place where one will stand.

use candle_core::{DType, Device, Result, Tensor};
use evalfw_engine::nf4::{BLOCK, DYNAMIC_MAP, LEVELS, NESTED_BLOCK, Nf4Tensor};
use evalfw_engine::weights::{DenseData, DenseTensor, Weight};

/// Elements of a dense matrix that are widened to f32 at a time: 256 MiB. The head of a 7B model has
/// eight times as many.
const TILE: usize = 1 << 26;

#[derive(Clone)]
pub struct DeviceMatrix {
    shape: [usize; 2],
    elements: Elements,
}

#[derive(Clone)]
enum Elements {
    /// In the checkpoint's type.
    Dense(Tensor),
    Nf4(Nf4),
}

/// An NF4 matrix as tensors, in the 4.127 bits a weight of its host form. Both kinds of codes are
/// padded to whole blocks.
#[derive(Clone)]
struct Nf4 {
    tables: Nf4Tables,
    /// u8, two values each.
    codes: Tensor,
    /// u8, one for each block.
    scale_codes: Tensor,
    /// f32 `[nested blocks, 1]`
    nested: Tensor,
    offset: f64,
}

/// The tables all NF4 matrices of a device share.
#[derive(Clone)]
pub struct Nf4Tables {
    /// `[256, 2]`: both levels of a byte.
    pairs: Tensor,
    /// `[256]`: the values of the 8-bit scales.
    scales: Tensor,
}

impl Nf4Tables {
    pub fn new(device: &Device) -> Result<Self> {
        let pairs: Vec<f32> = (0..256).flat_map(|byte| [LEVELS[byte >> 4], LEVELS[byte & 15]]).collect();
        Ok(Self {
            pairs: Tensor::from_vec(pairs, (256, 2), device)?,
            scales: Tensor::new(&DYNAMIC_MAP[..], device)?,
        })
    }
}

impl DeviceMatrix {
    pub fn new(weight: Weight, device: &Device, tables: &Nf4Tables) -> Result<Self> {
        match weight {
            Weight::Dense(tensor) => {
                Ok(Self { shape: tensor.shape, elements: Elements::Dense(upload(tensor, device)?) })
            }
            Weight::Nf4(tensor) => {
                Ok(Self { shape: tensor.shape, elements: Elements::Nf4(Nf4::new(tensor, device, tables)?) })
            }
        }
    }

    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// All elements in f32, `[out_features, in_features]`.
    pub fn decode(&self) -> Result<Tensor> {
        match &self.elements {
            Elements::Dense(tensor) => tensor.to_dtype(DType::F32),
            Elements::Nf4(nf4) => nf4.decode(self.shape),
        }
    }

    /// `x · Wᵀ`
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        let parts: Vec<_> = self.tiles().map(|tile| x.matmul(&tile?.t()?)).collect::<Result<_>>()?;
        match &parts[..] {
            [whole] => Ok(whole.clone()),
            parts => Tensor::cat(parts, 1),
        }
    }

    /// `y · W`
    pub fn transposed_product(&self, y: &Tensor) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        let mut start = 0;
        for tile in self.tiles() {
            let tile = tile?;
            let rows = tile.dim(0)?;
            let part = y.narrow(1, start, rows)?.contiguous()?.matmul(&tile)?;
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
                let whole = nf4.decode(self.shape)?;
                whole.index_select(&Tensor::new(ids, whole.device())?, 0)
            }
        }
    }

    /// The matrix in f32, some rows after the other if it is a large one.
    fn tiles(&self) -> impl Iterator<Item = Result<Tensor>> + '_ {
        let [height, width] = self.shape;
        let tile_rows = match &self.elements {
            Elements::Dense(_) => (TILE / width).max(1),
            Elements::Nf4(_) => height,
        };
        (0..height).step_by(tile_rows).map(move |start| match &self.elements {
            Elements::Dense(tensor) => {
                tensor.narrow(0, start, tile_rows.min(height - start))?.to_dtype(DType::F32)
            }
            Elements::Nf4(nf4) => nf4.decode(self.shape),
        })
    }
}

impl Nf4 {
    fn new(tensor: Nf4Tensor, device: &Device, tables: &Nf4Tables) -> Result<Self> {
        let blocks = tensor.scales.codes.len();
        let nested_blocks = tensor.scales.absmax.len();
        let mut codes = tensor.codes;
        codes.resize(blocks * BLOCK / 2, 0);
        let mut scale_codes = tensor.scales.codes;
        scale_codes.resize(nested_blocks * NESTED_BLOCK, 0);
        Ok(Self {
            tables: tables.clone(),
            codes: Tensor::from_vec(codes, blocks * BLOCK / 2, device)?,
            scale_codes: Tensor::from_vec(scale_codes, nested_blocks * NESTED_BLOCK, device)?,
            nested: Tensor::from_vec(tensor.scales.absmax, (nested_blocks, 1), device)?,
            offset: f64::from(tensor.scales.offset),
        })
    }

    fn decode(&self, shape: [usize; 2]) -> Result<Tensor> {
        let blocks = self.codes.elem_count() / (BLOCK / 2);
        let nested_blocks = self.nested.dim(0)?;
        let absmax = look_up(&self.tables.scales, &self.scale_codes)?
            .reshape((nested_blocks, NESTED_BLOCK))?
            .broadcast_mul(&self.nested)?
            .affine(1.0, self.offset)?
            .flatten_all()?
            .narrow(0, 0, blocks)?
            .reshape((blocks, 1))?;
        look_up(&self.tables.pairs, &self.codes)?
            .reshape((blocks, BLOCK))?
            .broadcast_mul(&absmax)?
            .flatten_all()?
            .narrow(0, 0, shape[0] * shape[1])?
            .reshape((shape[0], shape[1]))
    }
}

/// Selects rows by u8 codes. candle takes the largest value of an index type for "no row" and fills in
/// zeros without a word, so that code 255 needs a wider type.
fn look_up(table: &Tensor, codes: &Tensor) -> Result<Tensor> {
    table.index_select(&codes.to_dtype(DType::U32)?, 0)
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
    use evalfw_kernels::Products;
    use half::bf16;

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
            let matrix = DeviceMatrix::new(Weight::Nf4(tensor), &Device::Cpu, &tables).unwrap();
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
                let device = DeviceMatrix::new(weight, &Device::Cpu, &tables).unwrap();
                for rows in [1, 3, 20] {
                    let x: Vec<f32> = (0..rows * shape[1]).map(|i| (i as f32 * 0.37).cos()).collect();
                    let y: Vec<f32> = (0..rows * shape[0]).map(|i| (i as f32 * 0.53).cos()).collect();
                    let mut product = vec![0.0; rows * shape[0]];
                    host.add_product(&x, &mut product);
                    let mut transposed = vec![0.0; rows * shape[1]];
                    host.add_transposed_product(&y, &mut transposed);
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
