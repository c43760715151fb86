//! A matrix times many rows of activations.
//!
//! Both products are one: `out[i, c] = Σ_d x[i, d] · w(d, c)`, where the depth `d` is the input of the
//! layer and `c` its output, or for a gradient the other way round. The rows `i` lie in the lanes of the
//! vector registers, in panels that are packed once ([`pack`]). A task owns some columns: it widens its
//! weights a tile at a time, multiplies the tile by all panels ([`strip`]), and writes its sums to the
//! result at the end ([`deep`] cuts otherwise). No weight is widened twice, no two tasks write to one place, and
//! there is one barrier.

#[cfg(target_arch = "x86_64")]
mod amx;
mod deep;
#[cfg(target_arch = "x86_64")]
mod int16;
mod lane;
mod pack;
mod strip;
mod tile;

#[cfg(target_arch = "x86_64")]
use crate::level::has_tiles;
use crate::level::{Factors, Level, level};
use crate::matrix::{HostMatrix, LowRank};
#[cfg(target_arch = "x86_64")]
use crate::transpose::Squares;
use evalfw_engine::nf4::BLOCK;
use lane::Lane;
use rayon::prelude::*;
use std::ops::Range;
use strip::{Kernel, Portable};
use tile::{Wanted, Weights};

/// Depth of a tile, in lanes.
const DEPTH: usize = 512;
/// Columns of a tile at most; a multiple of [`BLOCK`].
const COLUMNS: usize = 192;
/// Distance of two columns in a tile that lies along its depth. A power of two would put all of them into
/// the same sets of the cache.
const COLUMN_STRIDE: usize = DEPTH + 16;

/// Evaluates an expression with the kernel for this CPU and the matrix's type of products.
macro_rules! for_products {
    ($matrix:expr, $kernel:ident => $body:expr) => {
        match (level(), Factors::of($matrix.products)) {
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, Factors::Bf16) if has_tiles() => {
                type $kernel = amx::Amx;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, Factors::Bf16) => {
                type $kernel = strip::Avx512Bf16;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, Factors::Int16) => {
                type $kernel = int16::Avx512;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, Factors::F32) => {
                type $kernel = strip::Avx512;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, Factors::Int16) => {
                type $kernel = int16::Avx2;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, _) => {
                type $kernel = strip::Avx2;
                $body
            }
            #[cfg(target_arch = "aarch64")]
            (Level::Neon, _) => {
                type $kernel = strip::Neon;
                $body
            }
            _ => {
                type $kernel = Portable;
                $body
            }
        }
    };
}

/// `x · Wᵀ + bias` for row-major `x` `[rows, in_features]`.
pub fn product(matrix: &HostMatrix, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    for_products!(matrix, Kernel => {
        let x = Panels::new::<Kernel>(x, matrix.shape()[1]);
        multiply::<Kernel, false>(&[(matrix, &x)], bias)
    })
}

/// `y · W` for row-major `y` `[rows, out_features]`.
pub fn transposed_product(matrix: &HostMatrix, y: &[f32]) -> Vec<f32> {
    for_products!(matrix, Kernel => {
        if deep::is_worth_it(matrix) {
            return deep::transposed_product::<Kernel>(matrix, y);
        }
        let y = Panels::new::<Kernel>(y, matrix.shape()[0]);
        multiply::<Kernel, true>(&[(matrix, &y)], None)
    })
}

/// The same as [`product`] for `W + scale · B A`, and the rows in between: `scale · x · Aᵀ`.
pub fn adapted_product(
    matrix: &HostMatrix,
    LowRank { a, b, scale }: &LowRank,
    x: &[f32],
    bias: Option<&[f32]>,
) -> (Vec<f32>, Vec<f32>) {
    for_products!(matrix, Kernel => multiply_through::<Kernel, false>(matrix, x, ([a, b], *scale), bias))
}

/// The same as [`transposed_product`] for `W + scale · B A`, and the rows in between: `scale · y · B`.
pub fn adapted_transposed_product(
    matrix: &HostMatrix,
    LowRank { a, b, scale }: &LowRank,
    y: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    for_products!(matrix, Kernel => multiply_through::<Kernel, true>(matrix, y, ([b, a], *scale), None))
}

/// The product with a matrix and, past it, with the first factor, the scale and the second one; and the rows in
/// between. The activations are packed once.
fn multiply_through<K: Kernel, const TRANSPOSED: bool>(
    matrix: &HostMatrix,
    x: &[f32],
    ([first, second], scale): ([&HostMatrix; 2], f32),
    bias: Option<&[f32]>,
) -> (Vec<f32>, Vec<f32>) {
    let x = Panels::new::<K>(x, sides::<TRANSPOSED>(matrix).0);
    let mut inner = multiply::<K, TRANSPOSED>(&[(first, &x)], None);
    inner.iter_mut().for_each(|value| *value *= scale);
    let through = Panels::new::<K>(&inner, sides::<TRANSPOSED>(second).0);
    (multiply::<K, TRANSPOSED>(&[(matrix, &x), (second, &through)], bias), inner)
}

/// The depth and the width of a product.
fn sides<const TRANSPOSED: bool>(matrix: &HostMatrix) -> (usize, usize) {
    let [out_features, in_features] = matrix.shape();
    if TRANSPOSED { (out_features, in_features) } else { (in_features, out_features) }
}

/// Rows of activations as the kernels read them, or a part of their depth.
struct Panels<L> {
    lanes: Vec<L>,
    rows: usize,
    depth: Range<usize>,
}

impl<L: Lane> Panels<L> {
    fn new<K: Kernel<Lane = L>>(x: &[f32], depth: usize) -> Self {
        Self::of_part::<K>(x, depth, 0..depth)
    }

    fn of_part<K: Kernel<Lane = L>>(x: &[f32], depth: usize, part: Range<usize>) -> Self {
        assert!(x.len().is_multiple_of(depth), "{} values in rows of {depth}", x.len());
        let lanes = pack::panels(x, depth, part.clone(), K::LANES);
        Self { lanes, rows: x.len() / depth, depth: part }
    }

    /// Part of the depth of one panel; it begins with a group.
    fn part<K: Kernel<Lane = L>>(&self, panel: usize, depth: &Range<usize>) -> &[L] {
        let start = panel * L::lanes_of(self.depth.len()) + L::lanes_of(depth.start - self.depth.start);
        &self.lanes[start * K::LANES..][..L::lanes_of(depth.len()) * K::LANES]
    }
}

/// The sum of the products of some matrices, all of one width, with activations of their own, and the bias.
fn multiply<K: Kernel, const TRANSPOSED: bool>(
    factors: &[(&HostMatrix, &Panels<K::Lane>)],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let (rows, (_, width)) = (factors[0].1.rows, sides::<TRANSPOSED>(factors[0].0));
    for (matrix, x) in factors {
        assert_eq!(
            (x.rows, (x.depth.len(), width)),
            (rows, sides::<TRANSPOSED>(matrix)),
            "shapes do not fit"
        );
    }
    assert_eq!(bias.map_or(width, <[f32]>::len), width);
    // Along a row NF4 is widened in whole blocks.
    let (unit, least) = if TRANSPOSED { (BLOCK, BLOCK) } else { (1, K::COLUMNS) };
    let step = columns_of_a_task(width, unit, least);
    let mut out = Vec::with_capacity(rows * width);
    let destination = Destination { start: out.as_mut_ptr(), rows, width };
    (0..width.div_ceil(step)).into_par_iter().for_each_init(Scratch::default, |scratch, task| {
        let columns = task * step..width.min((task + 1) * step);
        scratch.sums.resize(step * rows.div_ceil(K::LANES) * K::LANES, 0.0);
        // So that nobody has to clear the sums of the last task.
        let mut from_zero = true;
        for (matrix, x) in factors {
            for depth in tiles::<K>(x.depth.clone()) {
                scratch.widen::<TRANSPOSED>(matrix, columns.clone(), depth.clone());
                for (panel, sums) in scratch.sums.chunks_exact_mut(step * K::LANES).enumerate() {
                    let panel = x.part::<K>(panel, &depth);
                    multiply_tile::<K, TRANSPOSED>(panel, &scratch.tile, columns.len(), sums, from_zero);
                }
                from_zero = false;
            }
        }
        if let Some(bias) = bias {
            add_bias(&mut scratch.sums, &bias[columns.clone()], K::LANES, step);
        }
        // SAFETY: no other task has these columns, and `out` outlives all tasks.
        unsafe { destination.put(columns, &scratch.sums, K::LANES, step) };
    });
    // SAFETY: the columns of the tasks are all columns.
    unsafe { out.set_len(rows * width) };
    out
}

/// A depth in tiles.
fn tiles<K: Kernel>(depth: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let size = DEPTH / K::Lane::GROUP * K::Lane::DEPTHS;
    depth.clone().step_by(size).map(move |first| first..depth.end.min(first + size))
}

/// `sums` is `[panels, step, lanes]`.
fn add_bias(sums: &mut [f32], bias: &[f32], lanes: usize, step: usize) {
    for panel in sums.chunks_mut(step * lanes) {
        for (sums, bias) in panel.chunks_mut(lanes).zip(bias) {
            sums.iter_mut().for_each(|sum| *sum += bias);
        }
    }
}

/// All strips of one panel with one tile. `sums` is `[columns, lanes]`.
fn multiply_tile<K: Kernel, const TRANSPOSED: bool>(
    panel: &[K::Lane],
    tile: &[K::Lane],
    columns: usize,
    sums: &mut [f32],
    from_zero: bool,
) {
    for first in (0..columns).step_by(K::COLUMNS) {
        let count = K::COLUMNS.min(columns - first);
        let across = TRANSPOSED && !K::Lane::ALONG;
        let weights = if across { &tile[first..] } else { &tile[first * COLUMN_STRIDE..] };
        let sums = &mut sums[first * K::LANES..(first + count) * K::LANES];
        K::multiply::<TRANSPOSED>(panel, weights, sums, from_zero);
    }
}

/// So many that the tile stays in the cache, and that every thread gets the same number of tasks, several of
/// them. A task begins at a multiple of `unit`, and is worth its price from `least` columns on.
fn columns_of_a_task(width: usize, unit: usize, least: usize) -> usize {
    let threads = rayon::current_num_threads();
    let columns = width.div_ceil(8 * threads).clamp(least, COLUMNS);
    let tasks = width.div_ceil(columns).next_multiple_of(threads);
    width.div_ceil(tasks).next_multiple_of(unit)
}

/// Memory that a thread keeps from one task to the next.
#[derive(Default)]
struct Scratch<L> {
    tile: Vec<L>,
    sums: Vec<f32>,
    weights: Weights,
}

impl<L: Lane> Scratch<L> {
    fn widen<const TRANSPOSED: bool>(
        &mut self,
        matrix: &HostMatrix,
        columns: Range<usize>,
        depth: Range<usize>,
    ) {
        self.tile.resize(COLUMNS * COLUMN_STRIDE, L::default());
        L::fill::<TRANSPOSED>(Wanted { matrix, columns, depth }, &mut self.tile, &mut self.weights);
    }
}

/// The memory of a row-major matrix to which tasks write their columns.
struct Destination {
    start: *mut f32,
    rows: usize,
    width: usize,
}

// SAFETY: whoever calls `put` sees to it that no two threads write to one place.
unsafe impl Sync for Destination {}

impl Destination {
    /// Writes `sums`, `[panels, step, lanes]`, as the columns.
    ///
    /// # Safety
    /// The memory is there, and nobody else reads or writes these columns.
    unsafe fn put(&self, columns: Range<usize>, sums: &[f32], lanes: usize, step: usize) {
        // SAFETY: by the contract of this function.
        let turned = unsafe { self.put_squares(&columns, sums, lanes, step) };
        for row in 0..self.rows {
            let sums = &sums[row / lanes * lanes * step + row % lanes..];
            let done = if row < turned.rows { turned.columns } else { 0 };
            for (column, sum) in columns.clone().zip(sums.iter().step_by(lanes)).skip(done) {
                // SAFETY: by the contract of this function, and row and column are within the matrix.
                unsafe { self.start.add(row * self.width + column).write(*sum) };
            }
        }
    }

    /// Writes whole squares, where the CPU turns them in registers, and says how far they reach.
    ///
    /// # Safety
    /// As of [`put`](Self::put).
    unsafe fn put_squares(&self, columns: &Range<usize>, sums: &[f32], lanes: usize, step: usize) -> Turned {
        #[cfg(target_arch = "x86_64")]
        if let Some(squares) = Squares::of_this_cpu()
            && lanes.is_multiple_of(squares.side)
        {
            let side = squares.side;
            let whole = |n: usize| n / side * side;
            let turned = Turned { rows: whole(self.rows), columns: whole(columns.len()) };
            for row in (0..turned.rows).step_by(side) {
                for column in (0..turned.columns).step_by(side) {
                    let from = &sums[row / lanes * lanes * step + column * lanes + row % lanes..];
                    assert!(from.len() >= (side - 1) * lanes + side);
                    // SAFETY: the square of sums is there, and that of the matrix is ours by the contract.
                    unsafe {
                        let to = self.start.add(row * self.width + columns.start + column);
                        squares.copy(from.as_ptr().cast(), lanes, to.cast(), self.width);
                    }
                }
            }
            return turned;
        }
        let _ = (columns, sums, lanes, step);
        Turned { rows: 0, columns: 0 }
    }
}

/// What has been written in squares: the first rows, of each the first columns.
struct Turned {
    rows: usize,
    columns: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Products;
    use crate::level::{has_bf16_products, has_int16_products};
    use evalfw_engine::nf4::Nf4Tensor;
    use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
    use half::bf16;
    use proptest::prelude::*;

    fn values(len: usize, frequency: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * frequency).sin()).collect()
    }

    /// In f64.
    fn exact(
        rows: usize,
        depth: usize,
        columns: usize,
        x: &[f32],
        w: impl Fn(usize, usize) -> f32,
    ) -> Vec<f64> {
        let sum = |i: usize, c: usize| {
            (0..depth).map(|d| f64::from(x[i * depth + d]) * f64::from(w(d, c))).sum::<f64>()
        };
        (0..rows * columns).map(|at| sum(at / columns, at % columns)).collect()
    }

    fn assert_close(got: &[f32], expected: &[f64], tolerance: f64) {
        assert_eq!(got.len(), expected.len());
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let difference = (f64::from(*got) - expected).abs();
            assert!(difference <= tolerance, "{i}: {got} {expected}");
        }
    }

    fn check<K: Kernel>(shape: [usize; 2], rows: usize, tolerance: f64) {
        let numbers = values(shape[0] * shape[1], 0.9);
        let stored = DenseData::Bf16(numbers.iter().map(|&v| bf16::from_f32(v)).collect());
        for weight in [
            Weight::Nf4(Nf4Tensor::quantize(shape, &numbers)),
            Weight::Dense(DenseTensor { shape, data: stored }),
        ] {
            check_weight::<K>(weight, shape, rows, tolerance);
        }
    }

    fn check_weight<K: Kernel>(weight: Weight, shape: [usize; 2], rows: usize, tolerance: f64) {
        let [out_features, in_features] = shape;
        let matrix = HostMatrix::new(weight, Products::F32);
        let mut weights = vec![0.0; out_features * in_features];
        matrix.widen(0, &mut weights);
        let x = values(rows * in_features, 0.37);
        let bias = values(out_features, 0.21);
        let panels = Panels::new::<K>(&x, in_features);
        let out = multiply::<K, false>(&[(&matrix, &panels)], Some(&bias));
        let mut expected = exact(rows, in_features, out_features, &x, |d, c| weights[c * in_features + d]);
        for row in expected.chunks_mut(out_features) {
            row.iter_mut().zip(&bias).for_each(|(sum, bias)| *sum += f64::from(*bias));
        }
        assert_close(&out, &expected, tolerance * (in_features as f64).sqrt());

        let y = values(rows * out_features, 0.53);
        let panels = Panels::new::<K>(&y, out_features);
        let out = multiply::<K, true>(&[(&matrix, &panels)], None);
        let expected = exact(rows, out_features, in_features, &y, |d, c| weights[d * in_features + c]);
        assert_close(&out, &expected, tolerance * (out_features as f64).sqrt());
    }

    /// For each product, on average; all factors are below 1, and a product of bf16 is off by 2⁻⁸ at most.
    const F32: f64 = 1e-5;
    const BF16: f64 = 1.0 / 128.0;
    /// Half a unit is 1.6e-4 for activations of this size and 3e-5 for weights; the largest of thousands of errors is
    /// some deviations off.
    const INT16: f64 = 5e-4;

    fn check_all(shape: [usize; 2], rows: usize) {
        check::<Portable>(shape, rows, F32);
        #[cfg(target_arch = "aarch64")]
        check::<strip::Neon>(shape, rows, F32);
        #[cfg(target_arch = "x86_64")]
        {
            if Level::Avx2.is_there() {
                check::<strip::Avx2>(shape, rows, F32);
            }
            if Level::Avx512.is_there() {
                check::<strip::Avx512>(shape, rows, F32);
            }
            if has_bf16_products() {
                check::<strip::Avx512Bf16>(shape, rows, BF16);
                check::<amx::InLoops>(shape, rows, BF16);
            }
            if has_tiles() {
                check::<amx::Amx>(shape, rows, BF16);
            } else {
                eprintln!("AMX left out: this CPU has none, or may not use it");
            }
            if Level::Avx2.is_there() {
                check::<int16::Avx2>(shape, rows, INT16);
            }
            if level() == Level::Avx512 && has_int16_products() {
                check::<int16::Avx512>(shape, rows, INT16);
            }
        }
    }

    #[test]
    fn every_instruction_set_agrees_with_a_sum_in_f64() {
        // The last two are deeper than two tiles, one way round and the other.
        for (shape, rows) in [
            ([896, 130], 33),
            ([130, 896], 2),
            ([200, 640], 70),
            ([1, 64], 3),
            ([40, 2112], 33),
            ([2112, 64], 33),
        ] {
            check_all(shape, rows);
        }
    }

    #[test]
    fn a_deep_product_agrees_with_a_sum_in_f64() {
        for (shape, rows) in [([3000, 70], 33), ([2500, 200], 5)] {
            let numbers = values(shape[0] * shape[1], 0.9);
            let data = DenseData::Bf16(numbers.iter().map(|&v| bf16::from_f32(v)).collect());
            let weight = Weight::Dense(DenseTensor { shape, data });
            let y = values(rows * shape[0], 0.53);
            for (products, tolerance) in [(Products::F32, F32), (Products::Bf16, BF16)] {
                let matrix = HostMatrix::new(weight.clone(), products);
                let mut weights = vec![0.0; numbers.len()];
                matrix.widen(0, &mut weights);
                assert!(deep::is_worth_it(&matrix));
                let out = transposed_product(&matrix, &y);
                let expected = exact(rows, shape[0], shape[1], &y, |d, c| weights[d * shape[1] + c]);
                assert_close(&out, &expected, tolerance * (shape[0] as f64).sqrt());
                assert!(transposed_product(&matrix, &[]).is_empty());
            }
        }
    }

    /// With the update folded into the matrix.
    #[test]
    fn an_adapted_matrix_is_that_of_the_sum() {
        let (out_features, in_features, r, scale, rows) = (130, 200, 5, 1.5f32, 40);
        let dense = |shape: [usize; 2], frequency| {
            let data = DenseData::F32(values(shape[0] * shape[1], frequency));
            HostMatrix::new(Weight::Dense(DenseTensor { shape, data }), Products::F32)
        };
        let update = LowRank { a: dense([r, in_features], 0.3), b: dense([out_features, r], 0.7), scale };
        let (a, b) = (values(r * in_features, 0.3), values(out_features * r, 0.7));
        let mut sum = values(out_features * in_features, 0.9);
        for (row, sum) in sum.chunks_mut(in_features).enumerate() {
            for (column, sum) in sum.iter_mut().enumerate() {
                *sum += scale * (0..r).map(|k| b[row * r + k] * a[k * in_features + column]).sum::<f32>();
            }
        }
        let data = DenseData::F32(sum);
        let sum = HostMatrix::new(
            Weight::Dense(DenseTensor { shape: [out_features, in_features], data }),
            Products::F32,
        );
        let matrix = dense([out_features, in_features], 0.9);

        let alike = |got: &[f32], expected: &[f32]| {
            assert_eq!(got.len(), expected.len());
            assert!(got.iter().zip(expected).all(|(got, expected)| (got - expected).abs() < 2e-3));
        };
        let x = values(rows * in_features, 0.37);
        let bias = values(out_features, 0.21);
        let (out, inner) = adapted_product(&matrix, &update, &x, Some(&bias));
        alike(&out, &product(&sum, &x, Some(&bias)));
        alike(&inner, &product(&update.a, &x, None).iter().map(|v| v * scale).collect::<Vec<_>>());
        let y = values(rows * out_features, 0.53);
        let (out, inner) = adapted_transposed_product(&matrix, &update, &y);
        alike(&out, &transposed_product(&sum, &y));
        alike(&inner, &transposed_product(&update.b, &y).iter().map(|v| v * scale).collect::<Vec<_>>());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_shape_will_do(out_features in 1usize..260, in_features in 1usize..260, rows in 1usize..70) {
            check_all([out_features, in_features], rows);
        }
    }
}
