//! The row of a matrix with the largest product with a vector: all that greedy decoding wants of the head,
//! which is as large as half of a small model.
//!
//! A copy in 6 bits is read first. For each row it gives the product to within a bound that holds for every
//! vector, so that only the few rows that may be the largest are read in full. The result is that of the
//! full product, at three eighths of the memory traffic.

mod codes;

use crate::dot::{dot, dot_bf16};
use crate::level::for_this_cpu;
use crate::matrix::{Elements, HostMatrix};
use crate::pages::prefer_huge_pages;
use crate::team::for_each_piece;
use codes::{BYTES, GROUP, LARGEST, Vector, ZERO, pack};
use rayon::prelude::*;
use std::sync::atomic::{AtomicU32, Ordering};

/// Rows that one thread takes at a time.
const ROWS: usize = 256;
/// Sums and maxima that are kept side by side, for the compiler to use vector registers.
const LANES: usize = 16;
/// Rows that are multiplied in full first.
const FIRST: usize = 64;
/// Rows that one thread multiplies in full at a time.
const AT_A_TIME: usize = 8;
/// Rounding of two sums in f32, relative to the norms of their factors. Sums of `n` terms are off by less
/// than n·2⁻²⁴ of that; they have partial sums, and rows are shorter than this many terms.
const ROUNDING: f32 = 1e-4;
/// More than what underflow takes from a sum.
const UNDERFLOW: f32 = 1e-30;
/// Sums whose terms add up to less than this do not overflow.
const SAFE: f32 = f32::MAX / 4.0;

/// Each row as 6-bit integers times a scale.
pub struct Screen {
    /// Whole groups for each row.
    codes: Vec<u8>,
    height: usize,
    rows: Vec<Rows>,
}

/// What is known of the rows of a piece, side by side.
#[derive(Clone)]
struct Rows {
    scales: [f32; ROWS],
    /// The error of a product is at most this times the norm of the vector (Cauchy and Schwarz).
    errors: [f32; ROWS],
    /// L2, of what the codes stand for.
    norms: [f32; ROWS],
}

impl Rows {
    /// Products with rows that are not there have no lower bound.
    fn none() -> Self {
        Self { scales: [0.0; ROWS], errors: [f32::INFINITY; ROWS], norms: [0.0; ROWS] }
    }
}

/// The largest of what some products are at least.
struct AtLeast(AtomicU32);

impl Screen {
    pub fn new(matrix: &HostMatrix) -> Self {
        let [height, width] = matrix.shape();
        let bytes = width.div_ceil(GROUP) * BYTES;
        let mut codes = vec![0; height * bytes];
        prefer_huge_pages(&mut codes);
        let pieces = codes.par_chunks_mut(ROWS * bytes).enumerate();
        let rows = pieces.map(|(piece, codes)| {
            let mut rows = Rows::none();
            let mut wide = vec![0.0; width];
            for (i, codes) in codes.chunks_mut(bytes).enumerate() {
                matrix.widen((piece * ROWS + i) * width, &mut wide);
                let row = quantize(&wide, codes.as_chunks_mut().0);
                (rows.scales[i], rows.errors[i], rows.norms[i]) = (row.scale, row.error, row.norm);
            }
            rows
        });
        Self { rows: rows.collect(), height, codes }
    }

    /// The first row whose product with `x` is the largest; `None` if a product is not a number.
    pub fn argmax(&self, matrix: &HostMatrix, x: &[f32]) -> Option<usize> {
        let vector = Vector::new(x)?;
        let errors = Errors::new(&vector);
        let at_least = AtLeast::nothing();
        let mut pieces = vec![Vec::new(); self.rows.len()];
        for_each_piece(&mut pieces, 1, |piece, found| {
            let first = piece * ROWS;
            let height = ROWS.min(self.height - first);
            let codes = &self.codes[first * vector.row_bytes()..][..height * vector.row_bytes()];
            let (mut products, mut limits) = ([0; ROWS], [0.0; ROWS]);
            vector.products(codes, &mut products[..height]);
            let here = bound(&products, &self.rows[piece], (vector.scale, errors), &mut limits);
            let at_least = at_least.raise(here);
            let limits = (first..).zip(&limits[..height]);
            found[0]
                .extend(limits.filter(|(_, limit)| **limit >= at_least).map(|(row, &limit)| (row, limit)));
        });
        let at_least = at_least.get();
        let found = pieces.into_iter().flatten().filter(|(_, limit)| *limit >= at_least);
        let found = found.map(|(row, limit)| Candidate { row, limit, product: f32::NEG_INFINITY });
        let mut candidates: Vec<_> = found.collect();
        // The products of the most promising tell that most of the others are not the largest.
        if candidates.len() > FIRST {
            candidates.select_nth_unstable_by(FIRST, |a, b| b.limit.total_cmp(&a.limit));
        }
        let rest = candidates.split_off(FIRST.min(candidates.len()));
        multiply(&mut candidates, matrix, x);
        let best = candidates.iter().map(|candidate| candidate.product).fold(f32::NEG_INFINITY, f32::max);
        let first_of_rest = candidates.len();
        candidates.extend(rest.into_iter().filter(|candidate| candidate.limit >= best));
        multiply(&mut candidates[first_of_rest..], matrix, x);
        largest(&candidates)
    }
}

/// A row that may have the largest product.
struct Candidate {
    row: usize,
    /// The product is at most this.
    limit: f32,
    product: f32,
}

fn multiply(candidates: &mut [Candidate], matrix: &HostMatrix, x: &[f32]) {
    for_each_piece(candidates, AT_A_TIME, |_, candidates| {
        for candidate in candidates {
            candidate.product = matrix.row_product(candidate.row, x);
        }
    });
}

/// The first row with the largest product.
fn largest(candidates: &[Candidate]) -> Option<usize> {
    if candidates.iter().any(|candidate| candidate.product.is_nan()) {
        return None;
    }
    // Adding 0 makes one of the two zeros.
    let size = |candidate: &Candidate| candidate.product + 0.0;
    let order = |a: &&Candidate, b: &&Candidate| size(a).total_cmp(&size(b)).then(b.row.cmp(&a.row));
    candidates.iter().max_by(order).map(|candidate| candidate.row)
}

impl AtLeast {
    fn nothing() -> Self {
        Self(AtomicU32::new(Self::ordered(f32::NEG_INFINITY)))
    }

    /// The same order as that of the numbers, as integers.
    fn ordered(value: f32) -> u32 {
        let bits = value.to_bits();
        if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
    }

    fn raise(&self, value: f32) -> f32 {
        self.0.fetch_max(Self::ordered(value), Ordering::Relaxed);
        self.get()
    }

    fn get(&self) -> f32 {
        let bits = self.0.load(Ordering::Relaxed);
        f32::from_bits(if bits >> 31 == 1 { bits & !(1 << 31) } else { !bits })
    }
}

/// What a product of codes is off by, at most: the error of its row times the first, and the norm of its row times the
/// second.
#[derive(Clone, Copy)]
struct Errors {
    of_rows: f32,
    of_vector: f32,
}

impl Errors {
    fn new(vector: &Vector) -> Self {
        let of_vector = vector.error * 1.001 + ROUNDING * vector.norm + UNDERFLOW;
        Self { of_rows: vector.norm * 1.001 + UNDERFLOW, of_vector }
    }
}

for_this_cpu! {
    /// What each product is at most, for a scale of the vector; returns what the largest is at least.
    fn bound(products: &[i32; ROWS], rows: &Rows, vector: (f32, Errors), limits: &mut [f32; ROWS]) -> f32 = add_errors
}

#[inline(always)]
fn add_errors(
    products: &[i32; ROWS],
    rows: &Rows,
    (scale, errors): (f32, Errors),
    limits: &mut [f32; ROWS],
) -> f32 {
    let mut at_least = [f32::NEG_INFINITY; LANES];
    for start in (0..ROWS).step_by(LANES) {
        for (lane, at_least) in at_least.iter_mut().enumerate() {
            let i = start + lane;
            // In this order, as codes times one scale could overflow.
            let product = products[i] as f32 * (scale * rows.scales[i]);
            let error = rows.errors[i] * errors.of_rows + rows.norms[i] * errors.of_vector + UNDERFLOW;
            // Nothing is known of rows that are not finite, and of sums that may overflow.
            let is_known = (rows.norms[i] + rows.errors[i]) * errors.of_rows < SAFE;
            limits[i] = if is_known { product + error } else { f32::INFINITY };
            *at_least = at_least.max(if is_known { product - error } else { f32::NEG_INFINITY });
        }
    }
    at_least.into_iter().fold(f32::NEG_INFINITY, f32::max)
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

struct Row {
    scale: f32,
    error: f32,
    norm: f32,
}

fn quantize(values: &[f32], groups: &mut [[u8; BYTES]]) -> Row {
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
    // A row of zeros is exact with any scale. That of a row next to it may be 0.
    let scale = Some(largest / LARGEST).filter(|scale| *scale > 0.0).unwrap_or(1.0);
    let (mut error, mut norm, mut of_codes) = (0f64, 0f64, 0f64);
    for (values, packed) in values.chunks(GROUP).zip(groups) {
        let mut codes = [0; GROUP];
        for (value, code) in values.iter().zip(&mut codes) {
            // A scale that is subnormal is not precise.
            let rounded = (value / scale).round().clamp(-LARGEST, LARGEST);
            *code = (rounded as i32 + ZERO) as u8;
            error += f64::from(value - rounded * scale).powi(2);
            norm += f64::from(*value).powi(2);
            of_codes += f64::from(rounded * scale).powi(2);
        }
        *packed = pack(&codes);
    }
    Row {
        scale,
        error: error.sqrt() as f32 * 1.001 + ROUNDING * norm.sqrt() as f32 + UNDERFLOW,
        norm: of_codes.sqrt() as f32 * 1.001,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Products;
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
            let vector = Vector::new(&x).unwrap();
            let errors = Errors::new(&vector);
            let (mut products, mut limits) = ([0; ROWS], [0.0; ROWS]);
            vector.products(&screen.codes, &mut products[..height]);
            let at_least = bound(&products, &screen.rows[0], (vector.scale, errors), &mut limits);
            let largest = exact.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert!(f64::from(at_least) <= largest);
            for (i, exact) in exact.iter().enumerate() {
                let product = f64::from(products[i]) * f64::from(vector.scale * screen.rows[0].scales[i]);
                assert!((exact - product).abs() <= f64::from(limits[i]) - product + 1e-6);
            }
        }
    }

    #[test]
    fn the_largest_bound_is_kept() {
        let at_least = AtLeast::nothing();
        for (value, largest) in
            [(-3.0, -3.0), (-5.0, -3.0), (-0.5, -0.5), (0.0, 0.0), (2.5, 2.5), (-1.0, 2.5)]
        {
            assert_eq!(at_least.raise(value), largest);
        }
    }

    proptest! {
        /// Whatever the sizes, also where products overflow, vanish or are not numbers.
        #[test]
        fn sizes_do_not_matter(
            height in 1usize..600, width in 1usize..150, seed: u32, of_rows in -44i32..39, of_x in -44i32..39,
            odd in proptest::collection::vec((0usize..600, 0usize..150, 0usize..ODD.len()), 0..4),
        ) {
            let noise = |i: usize| (i as u32 ^ seed).wrapping_mul(0x9e37_79b9) as f32 / 2_147_483_648.0 - 1.0;
            // Rows that are much alike.
            let value = |i: usize| f64::from(noise(i % width)) + f64::from(noise(i)) * 1e-3;
            let mut values: Vec<f32> =
                (0..height * width).map(|i| (value(i) * 10f64.powi(of_rows)) as f32).collect();
            for (row, column, of) in odd {
                values[row % height * width + column % width] = ODD[of];
            }
            let x: Vec<f32> =
                (0..width).map(|i| (f64::from(noise(i * 977)) * 10f64.powi(of_x)) as f32).collect();
            let data = DenseData::F32(values);
            let matrix =
                HostMatrix::new(Weight::Dense(DenseTensor { shape: [height, width], data }), Products::F32);
            let mut products = vec![0.0; height];
            matrix.add_product(&x, &mut products);
            let expected = x.iter().all(|v| v.is_finite()) && !products.iter().any(|v| v.is_nan());
            prop_assert_eq!(matrix.argmax(&x), expected.then(|| place_of_largest(&products)));
        }
    }

    const ODD: [f32; 7] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 3e38, 1e-45];

    #[test]
    fn a_row_that_is_not_a_number_leaves_no_largest_one() {
        let argmax = |odd: f32| {
            let mut values = vec![1.0; 300 * 4];
            values[290 * 4] = odd;
            let data = DenseData::F32(values);
            let matrix = HostMatrix::new(Weight::Dense(DenseTensor { shape: [300, 4], data }), Products::F32);
            matrix.argmax(&[1.0; 4])
        };
        assert_eq!(argmax(f32::NAN), None);
        assert_eq!(argmax(f32::INFINITY), Some(290));
        assert_eq!(argmax(f32::NEG_INFINITY), Some(0));
    }

    #[test]
    fn a_vector_that_is_not_a_number_has_no_largest_row() {
        assert_eq!(matrix([9, 4], 1).argmax(&[1.0, f32::NAN, 0.0, 0.0]), None);
    }
}
