//! A matrix times one vector: what decoding a token is made of. The matrix is read once, so that the
//! memory's bandwidth is the limit, and the arithmetic has to keep out of its way.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::dot::{dot, dot_bf16};
#[cfg(target_arch = "x86_64")]
use crate::level::rows_in_16_bits;
#[cfg(target_arch = "x86_64")]
use crate::matrix::Products;
use crate::matrix::{Elements, HostMatrix};
use crate::team::for_each_piece;
use evalfw_engine::nf4::BLOCK;

/// Rows that one thread takes at a time.
const ROWS: usize = 64;

/// `out += W · x`, with the products of the matrices one after the other: in one loop over all their rows.
pub fn add_products(matrices: &[&HostMatrix], x: &[f32], out: &mut [f32]) {
    assert!(matrices.iter().all(|matrix| matrix.shape[1] == x.len()));
    assert_eq!(matrices.iter().map(|matrix| matrix.shape[0]).sum::<usize>(), out.len());
    let vector = Vector::new(matrices, x);
    for_each_piece(out, ROWS, |piece, mut out| {
        let mut first = piece * ROWS;
        for matrix in matrices {
            let height = matrix.shape[0];
            let here = out.len().min(height.saturating_sub(first));
            if let Some(out) = out.split_off_mut(..here).filter(|out| !out.is_empty()) {
                vector.add_rows(matrix, first, out);
            }
            first = first.saturating_sub(height);
        }
    });
}

/// A vector, in the form in which it is multiplied.
struct Vector<'a> {
    x: &'a [f32],
    #[cfg(target_arch = "x86_64")]
    chunks: Option<avx512::Chunks>,
    #[cfg(target_arch = "x86_64")]
    blocks: Option<avx2::Blocks>,
}

impl<'a> Vector<'a> {
    fn new(matrices: &[&HostMatrix], x: &'a [f32]) -> Self {
        #[cfg(not(target_arch = "x86_64"))]
        let _ = matrices;
        Self {
            x,
            #[cfg(target_arch = "x86_64")]
            chunks: avx512::Chunks::new(matrices, x),
            #[cfg(target_arch = "x86_64")]
            blocks: blocks(matrices, x),
        }
    }

    /// The rows from `first`, on this thread.
    fn add_rows(&self, matrix: &HostMatrix, first: usize, out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if self.chunks.as_ref().is_some_and(|chunks| chunks.add_rows(matrix, first, out)) {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if let (Some(blocks), Elements::Nf4(tensor)) = (&self.blocks, &matrix.elements) {
            // SAFETY: there are blocks only where the CPU has the instructions.
            return unsafe { blocks.add_rows(tensor, first, out) };
        }
        add_rows(matrix, first, self.x, out);
    }
}

/// `None` where no matrix asks for them or the vector cannot be written so.
#[cfg(target_arch = "x86_64")]
fn blocks(matrices: &[&HostMatrix], x: &[f32]) -> Option<avx2::Blocks> {
    let first = matrices.iter().find(|matrix| matches!(matrix.elements, Elements::Nf4(_)))?;
    let rounding = match first.products {
        Products::F32 => avx2::Rounding::WithRest,
        Products::Bf16 => avx2::Rounding::ToMultiples,
    };
    // SAFETY: the CPU has the instructions.
    rows_in_16_bits().then(|| unsafe { avx2::Blocks::new(x, rounding) }).flatten()
}

/// As [`Vector::add_rows`], on any CPU.
fn add_rows(matrix: &HostMatrix, first: usize, x: &[f32], out: &mut [f32]) {
    let width = x.len();
    // The fewest rows of NF4 that begin with a block.
    let step = (1..=BLOCK).find(|rows| (rows * width).is_multiple_of(BLOCK)).unwrap_or(BLOCK);
    let mut scratch = Vec::new();
    for (i, out) in out.chunks_mut(step).enumerate() {
        let start = (first + i * step) * width;
        let range = start..start + out.len() * width;
        match &matrix.elements {
            Elements::F32(values) => add_dots(out, &values[range], x, dot),
            Elements::Bf16(values) => add_dots(out, &values[range], x, dot_bf16),
            Elements::F16(_) | Elements::Nf4(_) => {
                scratch.resize(range.len(), 0.0);
                matrix.widen(start, &mut scratch);
                add_dots(out, &scratch, x, dot);
            }
        }
    }
}

/// Adds to each element of `out` the product of its row and `x`.
fn add_dots<T>(out: &mut [f32], rows: &[T], x: &[f32], dot: fn(&[T], &[f32]) -> f32) {
    for (out, row) in out.iter_mut().zip(rows.chunks(x.len())) {
        *out += dot(row, x);
    }
}

#[cfg(test)]
mod tests {
    use crate::level::{has_bf16_products, rows_in_16_bits};
    use crate::matrix::Elements;
    use crate::{HostMatrix, Products};
    use evalfw_engine::nf4::Nf4Tensor;
    use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
    use half::{bf16, f16};

    /// All factors are at most 1; rounding one to bf16 is off by 2⁻⁹ of it, and both are rounded.
    #[test]
    fn products_of_bf16_agree_within_their_rounding() {
        for shape in [[200, 896], [7, 128], [64, 256], [65, 384]] {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.9).sin()).collect();
            let x: Vec<f32> = (0..shape[1]).map(|i| (i as f32 * 0.37).cos()).collect();
            let matrix = HostMatrix::new(Weight::Nf4(Nf4Tensor::quantize(shape, &values)), Products::Bf16);
            let rows = matrix.rows(&(0..shape[0] as u32).collect::<Vec<_>>());
            let mut out = vec![1.0; shape[0]];
            matrix.add_product(&x, &mut out);
            for (out, row) in out.iter().zip(rows.chunks(shape[1])) {
                let exact: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                let tolerance = (shape[1] as f64).sqrt() / 128.0;
                assert!((f64::from(*out) - 1.0 - exact).abs() < tolerance, "{shape:?}: {out} {exact}");
            }
        }
    }

    #[test]
    fn every_storage_agrees_with_a_sum_in_f64() {
        for shape in [[200, 896], [7, 128], [70, 192], [33, 35], [1, 64]] {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.9).sin()).collect();
            let x: Vec<f32> = (0..shape[1]).map(|i| (i as f32 * 0.37).cos()).collect();
            let dense = |data| Weight::Dense(DenseTensor { shape, data });
            for weight in [
                Weight::Nf4(Nf4Tensor::quantize(shape, &values)),
                dense(DenseData::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect())),
                dense(DenseData::F16(values.iter().map(|&v| f16::from_f32(v)).collect())),
                dense(DenseData::F32(values.clone())),
            ] {
                let matrix = HostMatrix::new(weight, Products::F32);
                let rows = matrix.rows(&(0..shape[0] as u32).collect::<Vec<_>>());
                let mut out = vec![1.0; shape[0]];
                matrix.add_product(&x, &mut out);
                for (out, row) in out.iter().zip(rows.chunks(shape[1])) {
                    let exact: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                    let in_16_bits = rows_in_16_bits() && matches!(matrix.elements, Elements::Nf4(_));
                    // All factors are at most 1.
                    let tolerance = if in_16_bits { 4e-5 * (shape[1] as f64).sqrt() } else { 1e-4 };
                    assert!((f64::from(*out) - 1.0 - exact).abs() < tolerance, "{shape:?}: {out} {exact}");
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_chunk_lies_in_the_order_of_the_nibbles() {
        use super::avx512::{Factors, Pairs, Single};
        let mut x: [f32; 128] = std::array::from_fn(|i| 1.0 + i as f32 / 129.0);
        x[5] = f32::INFINITY;
        // SAFETY: the factors in f32 need no instructions for it.
        let single = unsafe { Single::chunk(&x) }.0;
        assert_eq!(single, std::array::from_fn(|i| x[i % 16 * 8 + ((i / 16) ^ 1)]));
        if !has_bf16_products() {
            return eprintln!("left out: this CPU has no products of bf16, or may not use them");
        }
        // SAFETY: the CPU has the instructions.
        let pairs = unsafe { Pairs::chunk(&x) }.0;
        assert_eq!(pairs, std::array::from_fn(|i| bf16::from_f32(x[i % 32 * 4 + ((i / 32) ^ 1)])));
    }
}
