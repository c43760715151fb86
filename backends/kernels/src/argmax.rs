//! The row of a matrix with the largest product with a vector: all that greedy decoding wants of the head,
//! which is as large as half of a small model.
//!
//! A copy in 8 bits is read first. For each row it gives the product to within a bound that holds for every
//! vector, so that only the few rows that may be the largest are read in full. The result is that of the
//! full product, at half the memory traffic.

use crate::dot::{dot, dot_bf16, dot_i8};
use crate::level::for_this_cpu;
use crate::matrix::{Elements, HostMatrix};
use crate::pages::prefer_huge_pages;
use crate::team::for_each_piece;
use rayon::prelude::*;

/// Rows that one thread takes at a time.
const ROWS: usize = 512;
/// Rows that one thread multiplies in full at a time.
const CANDIDATES: usize = 16;
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

/// A vector, in the form in which it is multiplied with codes.
struct Vector<'a> {
    x: &'a [f32],
    #[cfg(target_arch = "x86_64")]
    integers: Option<integers::Vector>,
    /// The error of a product is at most that of a row times the first, and the norm of a row times the second.
    of_errors: f32,
    of_norms: f32,
}

/// What the products of some rows are between.
#[derive(Clone, Copy)]
struct Bounds {
    /// The largest product is at least this.
    at_least: f32,
    /// No product is larger than this.
    at_most: f32,
    finite: bool,
}

impl Bounds {
    /// Of no rows.
    const NONE: Self = Self { at_least: f32::NEG_INFINITY, at_most: f32::NEG_INFINITY, finite: true };
}

impl Screen {
    pub fn new(matrix: &HostMatrix) -> Self {
        let [height, width] = matrix.shape();
        let mut screen = Self { codes: vec![0; height * width], rows: vec![Row::default(); height] };
        prefer_huge_pages(&mut screen.codes);
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
        let vector = Vector::new(x);
        let mut limits = vec![0.0; self.rows.len()];
        let mut pieces: Vec<_> = limits.chunks_mut(ROWS).map(|limits| (limits, Bounds::NONE)).collect();
        for_each_piece(&mut pieces, 1, |i, piece| {
            for (limits, bounds) in piece {
                let first = i * ROWS;
                let rows = &self.rows[first..first + limits.len()];
                vector.products(&self.codes[first * x.len()..][..rows.len() * x.len()], rows, limits);
                *bounds = bound(limits, rows, &vector);
            }
        });
        if pieces.iter().any(|(_, bounds)| !bounds.finite) {
            return None;
        }
        let at_least = pieces.iter().map(|(_, bounds)| bounds.at_least).fold(f32::NEG_INFINITY, f32::max);
        let mut candidates = Vec::new();
        for (i, (limits, bounds)) in pieces.iter().enumerate() {
            if bounds.at_most >= at_least {
                let rows = (i * ROWS..).zip(limits.iter()).filter(|(_, limit)| **limit >= at_least);
                candidates.extend(rows.map(|(row, _)| (row, 0.0)));
            }
        }
        for_each_piece(&mut candidates, CANDIDATES, |_, candidates| {
            for (row, product) in candidates {
                *product = matrix.row_product(*row, x);
            }
        });
        largest(&candidates)
    }
}

/// The first row with the largest product.
fn largest(products: &[(usize, f32)]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for &(row, product) in products {
        if product.is_nan() {
            return None;
        }
        if best.is_none_or(|(_, largest)| product > largest) {
            best = Some((row, product));
        }
    }
    best.map(|(row, _)| row)
}

impl<'a> Vector<'a> {
    fn new(x: &'a [f32]) -> Self {
        let of_errors = dot(x, x).sqrt();
        #[cfg(target_arch = "x86_64")]
        {
            let integers = integers::are_there().then(|| integers::Vector::new(x)).flatten();
            let of_norms = integers.as_ref().map_or(0.0, |vector| vector.error);
            Self { x, integers, of_errors, of_norms }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Self { x, of_errors, of_norms: 0.0 }
    }

    /// With rows of codes, to within a bound.
    fn products(&self, codes: &[i8], rows: &[Row], out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(vector) = &self.integers {
            // SAFETY: the CPU has the instructions, or there were no integers.
            return unsafe { vector.products(codes, rows, out) };
        }
        for ((out, codes), row) in out.iter_mut().zip(codes.chunks(self.x.len())).zip(rows) {
            *out = row.scale * dot_i8(codes, self.x);
        }
    }
}

for_this_cpu! {
    /// Adds to each product what it may be off by.
    fn bound(products: &mut [f32], rows: &[Row], vector: &Vector<'_>) -> Bounds = add_errors
}

#[inline(always)]
fn add_errors(products: &mut [f32], rows: &[Row], vector: &Vector<'_>) -> Bounds {
    let mut bounds = Bounds::NONE;
    for (product, row) in products.iter_mut().zip(rows) {
        let error = row.error * vector.of_errors + row.norm * vector.of_norms;
        bounds.finite &= product.is_finite();
        bounds.at_least = bounds.at_least.max(*product - error);
        *product += error;
        bounds.at_most = bounds.at_most.max(*product);
    }
    bounds
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
    use super::{ROUNDING, Row};
    use crate::dot::dot;
    use crate::level::{Level, level};
    use crate::transpose::{SIDE, transpose};
    use std::arch::x86_64::*;

    /// The instruction multiplies bytes without a sign with bytes that have one.
    const ZERO: i16 = 128;
    /// Bytes in a register.
    const BYTES: usize = 64;

    pub fn are_there() -> bool {
        level() == Level::Avx512 && is_x86_feature_detected!("avx512vnni")
    }

    /// A vector as integers times a scale.
    pub struct Vector {
        /// With [`ZERO`] added; whole registers.
        codes: Vec<[u8; BYTES]>,
        width: usize,
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
            let mut codes = vec![[0; BYTES]; x.len().div_ceil(BYTES)];
            let mut error = 0f64;
            for (value, to) in x.iter().zip(codes.as_flattened_mut()) {
                let code = (value / scale).round();
                error += f64::from(value - code * scale).powi(2);
                *to = (code as i16 + ZERO) as u8;
            }
            let error = error.sqrt() as f32 * 1.001 + ROUNDING * dot(x, x).sqrt();
            Some(Self { codes, width: x.len(), scale, error })
        }

        /// With each of some rows of codes.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        pub fn products(&self, codes: &[i8], rows: &[Row], out: &mut [f32]) {
            let groups = out.chunks_mut(SIDE).zip(rows.chunks(SIDE)).zip(codes.chunks(SIDE * self.width));
            for ((out, rows), codes) in groups {
                let mut sums = [_mm512_setzero_ps(); SIDE];
                for (sum, row) in sums.iter_mut().zip(codes.chunks(self.width)) {
                    *sum = _mm512_castsi512_ps(self.sum_of_row(row));
                }
                // The sums of 16 rows are added up side by side.
                let mut total = _mm512_setzero_si512();
                for sum in transpose(sums) {
                    total = _mm512_add_epi32(total, _mm512_castps_si512(sum));
                }
                let mut totals = [0; SIDE];
                // SAFETY: there are as many totals as lanes.
                unsafe { _mm512_storeu_si512(totals.as_mut_ptr().cast(), total) };
                for ((out, row), total) in out.iter_mut().zip(rows).zip(totals) {
                    *out = (total - i32::from(ZERO) * row.sum) as f32 * self.scale * row.scale;
                }
            }
        }

        /// One row, not yet added up over the lanes. Rows are read one after the other, as the CPU fetches ahead
        /// best: there is little else to do.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        #[inline]
        fn sum_of_row(&self, row: &[i8]) -> __m512i {
            let mut sums = [_mm512_setzero_si512(); 2];
            for (codes, vectors) in row.chunks(2 * BYTES).zip(self.codes.chunks(2)) {
                for ((codes, vector), sum) in codes.chunks(BYTES).zip(vectors).zip(&mut sums) {
                    let here = u64::MAX >> (BYTES - codes.len());
                    // SAFETY: the vector has 64 bytes, and the mask leaves out what is beyond the row.
                    unsafe {
                        let codes = _mm512_maskz_loadu_epi8(here, codes.as_ptr());
                        let vector = _mm512_loadu_si512(vector.as_ptr().cast());
                        *sum = _mm512_dpbusd_epi32(*sum, vector, codes);
                    }
                }
            }
            _mm512_add_epi32(sums[0], sums[1])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Screen, Vector, bound};
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

    fn place_of_largest(products: &[f32]) -> usize {
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
            prop_assert_eq!(matrix.argmax(&x), Some(place_of_largest(&products)));
        }
    }

    #[test]
    fn exact_products_lie_within_the_bounds() {
        for [height, width] in [[40, 7], [16, 64], [33, 130], [3, 896]] {
            let matrix = matrix([height, width], 5);
            let screen = Screen::new(&matrix);
            let x: Vec<f32> = (0..width).map(|i| (i as f32 * 0.7).cos()).collect();
            let rows = matrix.rows(&(0..height as u32).collect::<Vec<_>>());
            let product = |row: &[f32]| row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            let exact: Vec<f64> = rows.chunks(width).map(product).collect();
            let mut vectors = vec![Vector::new(&x)];
            #[cfg(target_arch = "x86_64")]
            vectors.push(Vector { integers: None, of_norms: 0.0, ..Vector::new(&x) });
            for vector in vectors {
                let mut products = vec![0.0; height];
                vector.products(&screen.codes, &screen.rows, &mut products);
                let mut limits = products.clone();
                let bounds = bound(&mut limits, &screen.rows, &vector);
                assert!(bounds.finite && limits.iter().all(|limit| *limit <= bounds.at_most));
                let largest = exact.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert!(f64::from(bounds.at_least) <= largest);
                for ((exact, product), limit) in exact.iter().zip(products).zip(limits) {
                    assert!((exact - f64::from(product)).abs() <= f64::from(limit - product) + 1e-6);
                }
            }
        }
    }

    #[test]
    fn a_vector_that_is_not_a_number_has_no_largest_row() {
        assert_eq!(matrix([9, 4], 1).argmax(&[1.0, f32::NAN, 0.0, 0.0]), None);
    }
}
