//! `y · W` for a matrix with many more rows than columns, as of a gradient through the head. Tasks own parts of
//! the depth instead of columns: activations and weights are read once, in the order in which they are stored.

use super::lane::Lane;
use super::strip::Kernel;
use super::{BLOCK, COLUMNS, Destination, HostMatrix, Panels, Scratch, multiply_tile, tiles};
use rayon::prelude::*;
use std::ops::Range;

/// So many on every machine, as the order of additions depends on it.
const PARTS: usize = 16;
/// Below that sums take more memory traffic than they save.
const DEPTH_OVER_WIDTH: usize = 8;

pub fn is_worth_it(matrix: &HostMatrix) -> bool {
    let [depth, width] = matrix.shape();
    depth >= DEPTH_OVER_WIDTH * width && depth >= PARTS * BLOCK
}

pub fn transposed_product<K: Kernel>(matrix: &HostMatrix, y: &[f32]) -> Vec<f32> {
    let [depth, width] = matrix.shape();
    let rows = y.len() / depth;
    if rows == 0 {
        return Vec::new();
    }
    // Along a row NF4 is widened in whole blocks.
    const { assert!(COLUMNS.is_multiple_of(BLOCK)) };
    let size = rows.div_ceil(K::LANES) * COLUMNS * K::LANES;
    let part = depth.div_ceil(PARTS).next_multiple_of(K::Lane::DEPTHS);
    let parts: Vec<_> = (0..depth)
        .into_par_iter()
        .step_by(part)
        .map(|first| sums_of_part::<K>(matrix, y, first..depth.min(first + part)))
        .collect();

    let mut out = Vec::with_capacity(rows * width);
    let destination = Destination { start: out.as_mut_ptr(), rows, width };
    (0..width.div_ceil(COLUMNS)).into_par_iter().for_each_init(Vec::new, |total, group| {
        total.clear();
        total.resize(size, 0.0f32);
        for part in &parts {
            total.iter_mut().zip(&part[group * size..]).for_each(|(total, sum)| *total += sum);
        }
        // SAFETY: no other task has these columns, and `out` outlives all tasks.
        unsafe { destination.put(columns(group, width), total, K::LANES, COLUMNS) };
    });
    // SAFETY: the groups have all columns.
    unsafe { out.set_len(rows * width) };
    out
}

fn columns(group: usize, width: usize) -> Range<usize> {
    group * COLUMNS..width.min((group + 1) * COLUMNS)
}

/// The product of a part of the depth, `[groups of columns, panels, columns, lanes]`.
fn sums_of_part<K: Kernel>(matrix: &HostMatrix, y: &[f32], part: Range<usize>) -> Vec<f32> {
    let [depth, width] = matrix.shape();
    let size = (y.len() / depth).div_ceil(K::LANES) * COLUMNS * K::LANES;
    let mut sums = vec![0.0; width.div_ceil(COLUMNS) * size];
    let mut scratch = Scratch::default();
    for tile in tiles::<K>(part) {
        let y = Panels::of_part::<K>(y, depth, tile.clone());
        for (group, sums) in sums.chunks_mut(size).enumerate() {
            let columns = columns(group, width);
            scratch.widen::<true>(matrix, columns.clone(), tile.clone());
            for (panel, sums) in sums.chunks_mut(COLUMNS * K::LANES).enumerate() {
                multiply_tile::<K, true>(
                    y.part::<K>(panel, &tile),
                    &scratch.tile,
                    columns.len(),
                    sums,
                    false,
                );
            }
        }
    }
    sums
}
