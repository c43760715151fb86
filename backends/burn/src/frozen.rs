//! A matrix of the frozen base. How it is stored and multiplied is known here and in [`packed`](crate::packed).

use crate::BurnDevice;
use crate::device::OpenDevice;
use crate::packed::{HostMatrix, Packed, PackedOps, ROW_ALIGNMENT, Storage};
use crate::product::product;
use burn::backend::Dispatch;
use burn::tensor::{Device, Tensor, TensorData};
use evalfw_engine::nf4::Nf4Tensor;
use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
use std::ops::Range;

/// W, `[out_features, in_features]`. Never differentiated: no gradient for it is computed or kept.
#[derive(Debug)]
pub enum FrozenMatrix {
    /// f32, outside autodiff.
    Dense(Tensor<2>),
    Packed(Packed<Dispatch>),
}

impl FrozenMatrix {
    pub fn new(weight: Weight, device: &OpenDevice) -> Self {
        match weight {
            weight if device.kind == BurnDevice::Flex => {
                Self::on_host(HostMatrix::new(weight, device.products), device)
            }
            Weight::Nf4(tensor) => Self::nf4(&tensor, device),
            Weight::Dense(tensor) => {
                let shape = tensor.shape;
                Self::Dense(dense(tensor.into_f32(), shape, &device.device))
            }
        }
    }

    fn nf4(tensor: &Nf4Tensor, device: &OpenDevice) -> Self {
        let [rows, columns] = tensor.shape;
        Self::packed(Storage::nf4_words(tensor, &device.device), 0..rows, columns, device)
    }

    /// A matrix that stays where it is.
    pub fn on_host(matrix: HostMatrix, device: &OpenDevice) -> Self {
        let [rows, columns] = matrix.shape();
        Self::packed(Storage::Host(matrix), 0..rows, columns, device)
    }

    /// Some rows of a table, in the memory of a GPU.
    pub fn rows_of(table: &DenseTensor, rows: Range<usize>, device: &OpenDevice) -> Self {
        let columns = table.shape[1];
        let elements = rows.start * columns..rows.end * columns;
        let shape = [rows.len(), columns];
        match &table.data {
            DenseData::Bf16(values) => {
                let storage = Storage::bf16_words(&values[elements], &device.device);
                Self::packed(storage, 0..shape[0], columns, device)
            }
            DenseData::F16(values) => {
                let values = values[elements].iter().map(|v| v.to_f32()).collect();
                Self::Dense(dense(values, shape, &device.device))
            }
            DenseData::F32(values) => Self::Dense(dense(values[elements].to_vec(), shape, &device.device)),
        }
    }

    fn packed(storage: Storage<Dispatch>, rows: Range<usize>, columns: usize, device: &OpenDevice) -> Self {
        let piece = rows_at_a_time(columns, device) / ROW_ALIGNMENT * ROW_ALIGNMENT;
        Self::Packed(Packed { storage, rows, columns, piece: piece.max(ROW_ALIGNMENT) })
    }

    /// `x [n, in] · Wᵀ`, which is `[n, out]`; differentiable in `x`.
    pub fn matmul(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => product(x, weight.clone().transpose()),
            Self::Packed(weight) => {
                Tensor::from_dispatch(Dispatch::packed_matmul(x.into_dispatch(), weight.clone()))
            }
        }
    }

    /// The matrix where it is in host memory.
    pub fn host(&self) -> Option<&HostMatrix> {
        match self {
            Self::Packed(Packed { storage: Storage::Host(matrix), .. }) => Some(matrix),
            Self::Packed(_) | Self::Dense(_) => None,
        }
    }

    /// `y [n, out] · W`, which is `[n, in]`; differentiable in `y`.
    pub fn matmul_transposed(&self, y: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => product(y, weight.clone()),
            Self::Packed(weight) => {
                Tensor::from_dispatch(Dispatch::packed_matmul_transposed(y.into_dispatch(), weight.clone()))
            }
        }
    }
}

/// Rows whose f32 values keep a GPU busy and fit into one buffer.
pub fn rows_at_a_time(columns: usize, device: &OpenDevice) -> usize {
    let bytes = device.max_buffer_bytes.min(64 << 20);
    (bytes as usize / size_of::<f32>() / columns).max(1)
}

fn dense(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::all_for_tests;
    use crate::guard::read;
    use half::{bf16, f16};

    fn wave(count: usize, frequency: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * frequency).sin()).collect()
    }

    #[track_caller]
    fn assert_close(found: &[f32], expected: &[f32], what: &str) {
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!(
                (found - expected).abs() <= 1e-3 + 1e-4 * expected.abs(),
                "{what} {i}: {found} {expected}"
            );
        }
    }

    /// `a [n, inner] · b [inner, m]` with the strides of b, in f64.
    fn product(a: &[f32], b: &[f32], [n, inner, m]: [usize; 3], [row, column]: [usize; 2]) -> Vec<f32> {
        let value = |i: usize, j: usize| -> f64 {
            (0..inner).map(|k| f64::from(a[i * inner + k]) * f64::from(b[k * row + j * column])).sum()
        };
        (0..n).flat_map(|i| (0..m).map(move |j| (i, j))).map(|(i, j)| value(i, j) as f32).collect()
    }

    /// In several pieces, the last of which is ragged.
    #[test]
    fn products_in_pieces_equal_those_of_the_decoded_matrix() {
        let shape @ [rows, columns] = [150, 44];
        let packed = Nf4Tensor::quantize(shape, &wave(rows * columns, 0.713));
        let decoded = packed.dequantize();
        let (x, dy) = (wave(2 * columns, 0.31), wave(2 * rows, 0.17));
        let y = product(&x, &decoded, [2, columns, rows], [1, columns]);
        let dx = product(&dy, &decoded, [2, rows, columns], [columns, 1]);
        for device in all_for_tests() {
            let mut weight = FrozenMatrix::new(Weight::Nf4(packed.clone()), &device);
            if let FrozenMatrix::Packed(packed) = &mut weight {
                packed.piece = ROW_ALIGNMENT;
            }
            let tensor = |values: &[f32], width| dense(values.to_vec(), [2, width], &device.device);
            let what = device.info.name.clone();

            let leaf = tensor(&x, columns).autodiff().require_grad();
            let output = weight.matmul(leaf.clone());
            assert_close(&read(output.clone().inner()).unwrap(), &y, &what);
            let gradients = (output * tensor(&dy, rows)).sum().backward();
            assert_close(&read(leaf.grad(&gradients).unwrap()).unwrap(), &dx, &what);

            let leaf = tensor(&dy, rows).autodiff().require_grad();
            let output = weight.matmul_transposed(leaf.clone());
            assert_close(&read(output.clone().inner()).unwrap(), &dx, &what);
            let gradients = (output * tensor(&x, columns)).sum().backward();
            assert_close(&read(leaf.grad(&gradients).unwrap()).unwrap(), &y, &what);
        }
    }

    /// Of matrices whose rows begin with a block of NF4 and of others, with fewer and more words than threads, and an
    /// odd number of values; from the middle on as well.
    #[test]
    fn products_of_one_row_equal_those_of_the_decoded_matrix() {
        for shape @ [rows, columns] in [[7, 64], [150, 44], [130, 896], [1, 320], [65, 33]] {
            let packed = Nf4Tensor::quantize(shape, &wave(rows * columns, 0.713));
            let narrow: Vec<_> = packed.dequantize().into_iter().map(bf16::from_f32).collect();
            let wide: Vec<f32> = narrow.iter().map(|v| v.to_f32()).collect();
            let x = wave(columns, 0.31);
            for device in all_for_tests() {
                let what = format!("{shape:?} on {}", device.info.name);
                let nf4 = FrozenMatrix::new(Weight::Nf4(packed.clone()), &device);
                assert_one_row(nf4, &x, &packed.dequantize(), &device, &what);
                if device.kind == BurnDevice::Wgpu {
                    let table = DenseTensor { shape, data: DenseData::Bf16(narrow.clone()) };
                    let bf16 = FrozenMatrix::rows_of(&table, 0..rows, &device);
                    assert_one_row(bf16, &x, &wide, &device, &what);
                }
            }
        }
    }

    /// Holds `weight` times `x` against `decoded` times `x`; on a GPU its last rows, too.
    fn assert_one_row(mut weight: FrozenMatrix, x: &[f32], decoded: &[f32], device: &OpenDevice, what: &str) {
        let columns = x.len();
        let rows = decoded.len() / columns;
        let y = product(x, decoded, [1, columns, rows], [1, columns]);
        let found = |weight: &FrozenMatrix| {
            let x = dense(x.to_vec(), [1, columns], &device.device);
            read(weight.matmul(x)).unwrap()
        };
        assert_close(&found(&weight), &y, what);
        if let FrozenMatrix::Packed(packed) = &mut weight
            && device.kind == BurnDevice::Wgpu
        {
            packed.rows.start = rows / 2;
            assert_close(&found(&weight), &y[rows / 2..], what);
        }
    }

    #[test]
    fn rows_of_a_table_are_the_same_in_every_type_on_a_gpu() {
        let shape = [7, 5];
        // Few bits, so that each type holds them exactly.
        let values: Vec<f32> = (0..35).map(|i| (i % 13) as f32 / 8.0 - 0.5).collect();
        let x: Vec<f32> = vec![1.0, -2.0, 0.5, 3.0, 0.25];
        let expected = product(&x, &values[10..25], [1, 5, 3], [1, 5]);
        for device in all_for_tests().into_iter().filter(|device| device.kind == BurnDevice::Wgpu) {
            let types = [
                DenseData::F32(values.clone()),
                DenseData::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
                DenseData::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
            ];
            for data in types {
                let table = DenseTensor { shape, data };
                let rows = FrozenMatrix::rows_of(&table, 2..5, &device);
                let y = rows.matmul(dense(x.clone(), [1, 5], &device.device));
                assert_eq!(read(y).unwrap(), expected, "{:?} on {}", table.data, device.info.name);
            }
        }
    }
}
