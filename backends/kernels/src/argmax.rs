//! The row of a matrix with the largest product with a vector: all that greedy decoding wants of the head,
//! which is as large as half of a small model.
//!
//! A copy in 8 bits is read first. For each row it gives the product to within a bound that holds for every
//! vector, so that only the few rows that may be the largest are read in full. The result is that of the
//! full product, at half the memory traffic.

use crate::dot::{dot, dot_bf16, dot_i8};
use crate::matrix::{Elements, HostMatrix};
use rayon::prelude::*;

/// Rows that one thread takes at a time.
const ROWS: usize = 512;
/// Rounding of two sums in f32, relative to the norms of their factors. Sums of `n` terms are off by less
/// than n·2⁻²⁴ of that; they have partial sums, and rows are shorter than this many terms.
const ROUNDING: f32 = 1e-4;

/// Each row as 8-bit integers times a scale.
pub struct Screen {
    codes: Vec<i8>,
    rows: Vec<Row>,
}

#[derive(Clone, Copy, Default)]
struct Row {
    scale: f32,
    /// The error of the product is at most this times the norm of the vector (Cauchy and Schwarz).
    error: f32,
    /// L2, of what the codes stand for.
    norm: f32,
    /// Of the codes.
    sum: i32,
}

/// The products of a vector with the codes of rows, to within a bound.
struct Approximation {
    products: Vec<f32>,
    /// The error is at most that of a row times the first, and the norm of a row times the second.
    of_errors: f32,
    of_norms: f32,
}

impl Screen {
    pub fn new(matrix: &HostMatrix) -> Self {
        let [height, width] = matrix.shape();
        let mut screen = Self { codes: vec![0; height * width], rows: vec![Row::default(); height] };
        let pieces = screen.codes.par_chunks_mut(ROWS * width).zip(screen.rows.par_chunks_mut(ROWS));
        pieces.enumerate().for_each_init(
            || vec![0.0; width],
            |wide, (piece, (codes, rows))| {
                for (i, (codes, row)) in codes.chunks_mut(width).zip(rows).enumerate() {
                    matrix.widen((piece * ROWS + i) * width, wide);
                    *row = quantize(wide, codes);
                }
            },
        );
        screen
    }

    /// The first row whose product with `x` is the largest; `None` if a product is not a number.
    pub fn argmax(&self, matrix: &HostMatrix, x: &[f32]) -> Option<usize> {
        let Approximation { products, of_errors, of_norms } = self.approximate(x);
        if products.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let bounds = || {
            products
                .iter()
                .zip(&self.rows)
                .map(|(value, row)| (value, row.error * of_errors + row.norm * of_norms))
        };
        let at_least = bounds().map(|(value, error)| value - error).fold(f32::NEG_INFINITY, f32::max);
        let candidates = bounds().enumerate().filter(|(_, (value, error))| *value + error >= at_least);
        let mut best = None;
        for (row, _) in candidates {
            let product = matrix.row_product(row, x);
            if product.is_nan() {
                return None;
            }
            if best.is_none_or(|(_, largest)| product > largest) {
                best = Some((row, product));
            }
        }
        best.map(|(row, _)| row)
    }

    fn approximate(&self, x: &[f32]) -> Approximation {
        let norm = dot(x, x).sqrt();
        #[cfg(target_arch = "x86_64")]
        if integers::are_there()
            && let Some(vector) = integers::Vector::new(x)
        {
            // SAFETY: the CPU has the instructions.
            let product = |codes: &[i8], row: &Row| unsafe { vector.product(codes, row.sum) } * row.scale;
            let products = self.products(x.len(), product);
            return Approximation { products, of_errors: norm, of_norms: vector.error };
        }
        let products = self.products(x.len(), |codes, row| row.scale * dot_i8(codes, x));
        Approximation { products, of_errors: norm, of_norms: 0.0 }
    }

    /// Of all rows, on all threads.
    fn products(&self, width: usize, product: impl Fn(&[i8], &Row) -> f32 + Sync) -> Vec<f32> {
        let mut products = vec![0.0; self.rows.len()];
        let rows = self.codes.par_chunks(ROWS * width).zip(self.rows.par_chunks(ROWS));
        products.par_chunks_mut(ROWS).zip(rows).for_each(|(out, (codes, rows))| {
            for ((out, codes), row) in out.iter_mut().zip(codes.chunks(width)).zip(rows) {
                *out = product(codes, row);
            }
        });
        products
    }
}

impl HostMatrix {
    /// One element of the product with a vector, computed as in the whole.
    fn row_product(&self, row: usize, x: &[f32]) -> f32 {
        let range = row * x.len()..(row + 1) * x.len();
        match &self.elements {
            Elements::F32(values) => dot(&values[range], x),
            Elements::Bf16(values) => dot_bf16(&values[range], x),
            Elements::F16(_) | Elements::Nf4(_) => {
                let mut wide = vec![0.0; x.len()];
                self.widen(range.start, &mut wide);
                dot(&wide, x)
            }
        }
    }
}

fn quantize(values: &[f32], codes: &mut [i8]) -> Row {
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
    // A row of zeros is exact with any scale.
    let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
    let (mut error, mut norm, mut of_codes, mut sum) = (0f64, 0f64, 0f64, 0);
    for (value, code) in values.iter().zip(codes) {
        *code = (value / scale).round() as i8;
        let stands_for = f32::from(*code) * scale;
        error += f64::from(value - stands_for).powi(2);
        norm += f64::from(*value).powi(2);
        of_codes += f64::from(stands_for).powi(2);
        sum += i32::from(*code);
    }
    Row {
        scale,
        error: error.sqrt() as f32 * 1.001 + ROUNDING * norm.sqrt() as f32,
        norm: of_codes.sqrt() as f32 * 1.001,
        sum,
    }
}

/// Products of 8-bit integers, four in each lane of a register.
#[cfg(target_arch = "x86_64")]
mod integers {
    use super::ROUNDING;
    use crate::dot::dot;
    use crate::level::{Level, level};
    use std::arch::x86_64::*;

    /// The instruction multiplies bytes without a sign with bytes that have one.
    const ZERO: i16 = 128;

    pub fn are_there() -> bool {
        level() == Level::Avx512 && is_x86_feature_detected!("avx512vnni")
    }

    /// A vector as integers times a scale.
    pub struct Vector {
        /// With [`ZERO`] added.
        codes: Vec<u8>,
        scale: f32,
        /// L2 norm of what rounding took away.
        pub error: f32,
    }

    impl Vector {
        /// `None` where an element is not finite.
        pub fn new(x: &[f32]) -> Option<Self> {
            let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            if !x.iter().all(|v| v.is_finite()) {
                return None;
            }
            let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
            let mut codes = Vec::with_capacity(x.len());
            let mut error = 0f64;
            for value in x {
                let code = (value / scale).round();
                error += f64::from(value - code * scale).powi(2);
                codes.push((code as i16 + ZERO) as u8);
            }
            let error = error.sqrt() as f32 * 1.001 + ROUNDING * dot(x, x).sqrt();
            Some(Self { codes, scale, error })
        }

        /// With a row of codes whose sum is `sum`.
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        pub fn product(&self, row: &[i8], sum: i32) -> f32 {
            let (rows, rest) = row.as_chunks::<64>();
            let (vectors, vector_rest) = self.codes.as_chunks::<64>();
            let mut sums = [_mm512_setzero_si512(); 2];
            for (i, (row, vector)) in rows.iter().zip(vectors).enumerate() {
                // SAFETY: both have 64 bytes.
                let (row, vector) = unsafe {
                    (_mm512_loadu_si512(row.as_ptr().cast()), _mm512_loadu_si512(vector.as_ptr().cast()))
                };
                sums[i % 2] = _mm512_dpbusd_epi32(sums[i % 2], vector, row);
            }
            let rest: i32 = rest.iter().zip(vector_rest).map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
            let total = _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1])) + rest;
            (total - i32::from(ZERO) * sum) as f32 * self.scale
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{HostMatrix, Products};
    use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
    use half::bf16;
    use proptest::prelude::*;

    fn matrix(shape: [usize; 2], seed: u32) -> HostMatrix {
        // Rows of different sizes, some of them equal, one of them zero.
        let value = |i: usize| {
            let (row, column) = (i / shape[1] / 2 * 2, i % shape[1]);
            let noise = ((row * 7919 + column * 104_729) as u32 ^ seed).wrapping_mul(0x9e37_79b9) >> 8;
            let size = if row == 4 { 0.0 } else { 1.0 + (row % 5) as f32 };
            bf16::from_f32(size * (noise as f32 / 8_388_608.0 - 1.0))
        };
        let data = DenseData::Bf16((0..shape[0] * shape[1]).map(value).collect());
        HostMatrix::new(Weight::Dense(DenseTensor { shape, data }), Products::F32)
    }

    fn largest(products: &[f32]) -> usize {
        let best = |best: usize, i: usize| if products[i] > products[best] { i } else { best };
        (0..products.len()).fold(0, best)
    }

    proptest! {
        #[test]
        fn the_row_is_that_of_the_full_product(
            height in 1usize..1200, width in 1usize..200, seed: u32, frequency in 0.01f32..3.0,
        ) {
            let matrix = matrix([height, width], seed);
            let x: Vec<f32> = (0..width).map(|i| (i as f32 * frequency).cos()).collect();
            let mut products = vec![0.0; height];
            matrix.add_product(&x, &mut products);
            prop_assert_eq!(matrix.argmax(&x), Some(largest(&products)));
        }
    }

    #[test]
    fn a_vector_that_is_not_a_number_has_no_largest_row() {
        assert_eq!(matrix([9, 4], 1).argmax(&[1.0, f32::NAN, 0.0, 0.0]), None);
    }
}
