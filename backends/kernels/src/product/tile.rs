//! Weights on their way from a matrix to the tile that the strips read.

use super::lane::Joined;
use super::{COLUMN_STRIDE, COLUMNS, HostMatrix};
use half::bf16;
use std::ops::Range;

/// Rows of a dense matrix by which a strided read is fetched ahead: the CPU does not see where it goes.
const AHEAD: usize = 16;

/// What a tile is to be filled with.
pub struct Wanted<'a> {
    pub matrix: &'a HostMatrix,
    pub columns: Range<usize>,
    pub depth: Range<usize>,
}

impl Wanted<'_> {
    /// Widens the weights of the columns at one depth: part of a row of the matrix.
    pub fn widen_row(&self, depth: usize, wide: &mut [f32]) {
        self.matrix.widen(self.start_of_row(depth), wide);
    }

    /// Where the columns begin at one depth of a transposed product.
    pub fn start_of_row(&self, depth: usize) -> usize {
        depth * self.matrix.shape()[1] + self.columns.start
    }

    /// Begins to fetch what the columns have some depths further on.
    pub fn fetch_ahead(&self, depth: usize) {
        self.matrix.prefetch_stored(self.start_of_row(depth + AHEAD), self.columns.len());
    }
}

/// Memory that a thread keeps from one tile to the next.
#[derive(Default)]
pub struct Weights {
    /// Weights of some depths, or of one column.
    pub wide: [Vec<f32>; 2],
    pub in_bf16: [Vec<bf16>; 2],
    /// A tile that lies the other way round.
    #[cfg(target_arch = "x86_64")]
    pub pairs: Vec<super::lane::Pair>,
}

/// Fills a tile: along the depth for each column, or transposed along the columns for each depth.
pub fn widen<L: Joined, const TRANSPOSED: bool>(wanted: Wanted<'_>, tile: &mut [L], weights: &mut Weights) {
    let Wanted { matrix, columns, depth } = &wanted;
    let in_features = matrix.shape()[1];
    let [first, second] = &mut weights.wide;
    let [first_bf16, second_bf16] = &mut weights.in_bf16;
    if TRANSPOSED {
        first.resize(columns.len(), 0.0);
        second.resize(columns.len(), 0.0);
        for (row, lanes) in depth.clone().step_by(L::DEPTHS).zip(tile.chunks_mut(COLUMNS)) {
            wanted.fetch_ahead(row);
            wanted.fetch_ahead(row + 1);
            if L::OF_BF16
                && row + 1 < depth.end
                && let Some(first) = matrix.in_bf16(wanted.start_of_row(row), columns.len(), first_bf16)
                && let Some(second) = matrix.in_bf16(wanted.start_of_row(row + 1), columns.len(), second_bf16)
            {
                L::join_bf16(first, second, &mut lanes[..columns.len()]);
                continue;
            }
            wanted.widen_row(row, first);
            let has_second = L::DEPTHS == 2 && row + 1 < depth.end;
            if has_second {
                wanted.widen_row(row + 1, second);
            }
            L::join(first, has_second.then_some(second), &mut lanes[..columns.len()]);
        }
    } else {
        first.resize(depth.len(), 0.0);
        for (row, lanes) in columns.clone().zip(tile.chunks_mut(COLUMN_STRIDE)) {
            let start = row * in_features + depth.start;
            if L::OF_BF16
                && let Some(values) = matrix.in_bf16(start, depth.len(), first_bf16)
            {
                L::copy_along(values, lanes);
                continue;
            }
            matrix.widen(start, first);
            L::join_along(first, &mut lanes[..L::lanes_of(depth.len())]);
        }
    }
}
