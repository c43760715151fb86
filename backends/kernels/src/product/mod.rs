//! A matrix times many rows of activations.
//!
//! Both products are one: `out[i, c] += Σ_d x[i, d] · w(d, c)`, where the depth `d` is the input of the
//! layer and `c` its output, or for a gradient the other way round. The rows `i` lie in the lanes of the
//! vector registers, in panels that are packed once ([`pack`]). A task owns some columns: it widens its
//! weights a tile at a time, multiplies the tile by all panels ([`strip`]), and adds its sums to `out` at
//! the end. No weight is widened twice, no two tasks write to one place, and there is one barrier.

mod pack;
mod strip;

use crate::level::{Level, level};
use crate::matrix::HostMatrix;
use evalfw_engine::nf4::BLOCK;
use rayon::prelude::*;
use std::ops::Range;
use strip::{Kernel, Portable};

/// Depth of a tile.
const DEPTH: usize = 512;
/// Columns of a tile at most; a multiple of [`BLOCK`].
const COLUMNS: usize = 192;
/// Distance of two columns in a tile that is widened along its depth. A power of two would put all of
/// them into the same sets of the cache.
const COLUMN_STRIDE: usize = DEPTH + 16;

/// `out += x · Wᵀ` for row-major `x` `[rows, in_features]`.
pub fn add_product(matrix: &HostMatrix, x: &[f32], out: &mut [f32]) {
    let [out_features, in_features] = matrix.shape();
    let widen = |columns: Range<usize>, depth: Range<usize>, tile: &mut [f32]| {
        for (row, column) in columns.zip(tile.chunks_mut(COLUMN_STRIDE)) {
            matrix.widen(row * in_features + depth.start, &mut column[..depth.len()]);
        }
    };
    let shape = Shape { depth: in_features, columns: out_features, alignment: 1 };
    run::<false>(shape, x, out, &widen);
}

/// `out += y · W` for row-major `y` `[rows, out_features]`.
pub fn add_transposed_product(matrix: &HostMatrix, y: &[f32], out: &mut [f32]) {
    let [out_features, in_features] = matrix.shape();
    let widen = |columns: Range<usize>, depth: Range<usize>, tile: &mut [f32]| {
        for (row, tile_row) in depth.zip(tile.chunks_mut(COLUMNS)) {
            matrix.widen(row * in_features + columns.start, &mut tile_row[..columns.len()]);
        }
    };
    let shape = Shape { depth: out_features, columns: in_features, alignment: BLOCK };
    run::<true>(shape, y, out, &widen);
}

#[derive(Clone, Copy)]
struct Shape {
    depth: usize,
    columns: usize,
    /// Of the columns at which a task may begin.
    alignment: usize,
}

/// Writes the weights of some columns and some depth into a tile.
type Widen<'a> = dyn Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync + 'a;

fn run<const TRANSPOSED: bool>(shape: Shape, x: &[f32], out: &mut [f32], widen: &Widen<'_>) {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => run_on::<strip::Avx512, TRANSPOSED>(shape, x, out, widen),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => run_on::<strip::Avx2, TRANSPOSED>(shape, x, out, widen),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => run_on::<strip::Neon, TRANSPOSED>(shape, x, out, widen),
        _ => run_on::<Portable, TRANSPOSED>(shape, x, out, widen),
    }
}

fn run_on<K: Kernel, const TRANSPOSED: bool>(shape: Shape, x: &[f32], out: &mut [f32], widen: &Widen<'_>) {
    let rows = x.len() / shape.depth;
    assert_eq!((x.len(), out.len()), (rows * shape.depth, rows * shape.columns));
    if out.is_empty() {
        return;
    }
    let packed = pack::panels(x, shape.depth, K::LANES);
    let panels = rows.div_ceil(K::LANES);
    let step = columns_of_a_task(shape, K::COLUMNS);
    let destination = Destination { start: out.as_mut_ptr(), rows, width: shape.columns };
    (0..shape.columns.div_ceil(step)).into_par_iter().for_each_init(Scratch::default, |scratch, task| {
        let columns = task * step..shape.columns.min((task + 1) * step);
        let (tile, sums) = scratch.get(step * panels * K::LANES);
        for depth in (0..shape.depth).step_by(DEPTH) {
            let depth = depth..shape.depth.min(depth + DEPTH);
            widen(columns.clone(), depth.clone(), tile);
            for (panel, sums) in sums.chunks_exact_mut(step * K::LANES).enumerate() {
                let panel =
                    &packed[(panel * shape.depth + depth.start) * K::LANES..][..depth.len() * K::LANES];
                multiply_tile::<K, TRANSPOSED>(panel, tile, columns.len(), sums);
            }
        }
        // SAFETY: no other task has these columns, and `out` outlives all tasks.
        unsafe { destination.add(columns, sums, K::LANES, step) };
    });
}

/// All strips of one panel with one tile. `sums` is `[columns, lanes]`.
fn multiply_tile<K: Kernel, const TRANSPOSED: bool>(
    panel: &[f32],
    tile: &[f32],
    columns: usize,
    sums: &mut [f32],
) {
    for first in (0..columns).step_by(K::COLUMNS) {
        let count = K::COLUMNS.min(columns - first);
        let weights = if TRANSPOSED { &tile[first..] } else { &tile[first * COLUMN_STRIDE..] };
        let sums = &mut sums[first * K::LANES..(first + count) * K::LANES];
        K::multiply::<TRANSPOSED>(panel, weights, sums);
    }
}

/// So many that every thread gets several tasks, and that the tile stays in the cache.
fn columns_of_a_task(shape: Shape, strip: usize) -> usize {
    let tasks = 4 * rayon::current_num_threads();
    let unit = if shape.alignment > 1 { shape.alignment } else { strip };
    shape.columns.div_ceil(tasks).next_multiple_of(unit).min(COLUMNS / unit * unit)
}

/// Memory that a thread keeps from one task to the next.
#[derive(Default)]
struct Scratch {
    tile: Vec<f32>,
    sums: Vec<f32>,
}

impl Scratch {
    /// A tile, and sums that are zero.
    fn get(&mut self, sums: usize) -> (&mut [f32], &mut [f32]) {
        self.tile.resize(COLUMNS * COLUMN_STRIDE, 0.0);
        self.sums.clear();
        self.sums.resize(sums, 0.0);
        (&mut self.tile, &mut self.sums)
    }
}

/// A row-major matrix to which tasks add their columns.
struct Destination {
    start: *mut f32,
    rows: usize,
    width: usize,
}

// SAFETY: whoever calls `add` sees to it that no two threads write to one place.
unsafe impl Sync for Destination {}

impl Destination {
    /// Adds `sums`, `[panels, step, lanes]`, to the columns.
    ///
    /// # Safety
    /// The matrix is there, and nobody else reads or writes these columns.
    unsafe fn add(&self, columns: Range<usize>, sums: &[f32], lanes: usize, step: usize) {
        for row in 0..self.rows {
            let sums = &sums[row / lanes * lanes * step + row % lanes..];
            // SAFETY: by the contract of this function, and row and columns are within the matrix.
            let out = unsafe {
                std::slice::from_raw_parts_mut(
                    self.start.add(row * self.width + columns.start),
                    columns.len(),
                )
            };
            for (out, sum) in out.iter_mut().zip(sums.iter().step_by(lanes)) {
                *out += sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use evalfw_engine::nf4::Nf4Tensor;
    use evalfw_engine::weights::Weight;
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

    fn assert_close(got: &[f32], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            // Every sum began with 1.
            let difference = (f64::from(*got) - 1.0 - expected).abs();
            assert!(difference < 1e-4 * (1.0 + expected.abs()), "{i}: {got} {expected}");
        }
    }

    fn check<K: Kernel>(shape: [usize; 2], rows: usize) {
        let [out_features, in_features] = shape;
        let matrix =
            HostMatrix::new(Weight::Nf4(Nf4Tensor::quantize(shape, &values(shape[0] * shape[1], 0.9))));
        let mut weights = vec![0.0; out_features * in_features];
        matrix.widen(0, &mut weights);
        let x = values(rows * in_features, 0.37);
        let mut out = vec![1.0; rows * out_features];
        let widen = |columns: Range<usize>, depth: Range<usize>, tile: &mut [f32]| {
            for (row, column) in columns.zip(tile.chunks_mut(COLUMN_STRIDE)) {
                matrix.widen(row * in_features + depth.start, &mut column[..depth.len()]);
            }
        };
        let forward = Shape { depth: in_features, columns: out_features, alignment: 1 };
        run_on::<K, false>(forward, &x, &mut out, &widen);
        assert_close(&out, &exact(rows, in_features, out_features, &x, |d, c| weights[c * in_features + d]));

        let y = values(rows * out_features, 0.53);
        let mut out = vec![1.0; rows * in_features];
        let widen = |columns: Range<usize>, depth: Range<usize>, tile: &mut [f32]| {
            for (row, tile_row) in depth.zip(tile.chunks_mut(COLUMNS)) {
                matrix.widen(row * in_features + columns.start, &mut tile_row[..columns.len()]);
            }
        };
        let backward = Shape { depth: out_features, columns: in_features, alignment: BLOCK };
        run_on::<K, true>(backward, &y, &mut out, &widen);
        assert_close(&out, &exact(rows, out_features, in_features, &y, |d, c| weights[d * in_features + c]));
    }

    fn check_all(shape: [usize; 2], rows: usize) {
        check::<Portable>(shape, rows);
        #[cfg(target_arch = "aarch64")]
        check::<strip::Neon>(shape, rows);
        #[cfg(target_arch = "x86_64")]
        {
            if Level::Avx2.is_there() {
                check::<strip::Avx2>(shape, rows);
            }
            if Level::Avx512.is_there() {
                check::<strip::Avx512>(shape, rows);
            }
        }
    }

    #[test]
    fn every_instruction_set_agrees_with_a_sum_in_f64() {
        for (shape, rows) in [([896, 130], 33), ([130, 896], 2), ([200, 640], 70), ([1, 64], 3)] {
            check_all(shape, rows);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_shape_will_do(out_features in 1usize..260, in_features in 1usize..260, rows in 1usize..70) {
            check_all([out_features, in_features], rows);
        }
    }
}
