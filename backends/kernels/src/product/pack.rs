//! Activations in panels of as many rows as a strip has lanes.

use super::lane::Lane;
use crate::filled::filled;
#[cfg(target_arch = "x86_64")]
use crate::transpose::Squares;
use rayon::prelude::*;
use std::ops::Range;

/// Lanes of the depth that a thread turns over at a time: whole cache lines on both sides.
const SQUARE: usize = 16;
/// Lanes of the depth of one task, at most: the rows and what becomes of them stay in the cache.
const PIECE: usize = 16 * SQUARE;

/// A part of the depth of row-major `x` `[rows, depth]` as `[panels, part, lanes]`; rows that are missing in the
/// last panel are zero, as is what is missing in the last lanes of the part.
pub fn panels<L: Lane>(x: &[f32], depth: usize, part: Range<usize>, lanes: usize) -> Vec<L> {
    let rows = x.len() / depth;
    let panel_size = lanes * L::lanes_of(part.len());
    let groups = PIECE / L::GROUP;
    filled(rows.div_ceil(lanes) * panel_size, panel_size.max(1), |start, panel| {
        let x = &x[start / panel_size * lanes * depth..];
        let x = &x[..x.len().min(lanes * depth)];
        let pieces = panel.par_chunks_mut(lanes * groups * L::GROUP).enumerate();
        pieces.for_each_init(Vec::new, |scratch, (i, piece)| {
            let width = piece.len() / lanes;
            let first = part.start + i * groups * L::DEPTHS;
            let last = part.end.min(first + groups * L::DEPTHS);
            scratch.resize(lanes * width, L::default());
            for (row, x) in scratch.chunks_mut(width).zip(x.chunks(depth)) {
                L::join_along(&x[first..last], row);
            }
            turn(&scratch[..x.len() / depth * width], width, piece, lanes);
        });
    })
}

/// Rows of `width` as columns of `lanes`.
fn turn<L: Lane>(rows: &[L], width: usize, piece: &mut [L], lanes: usize) {
    let turned = turn_squares(rows, width, piece, lanes);
    for (square, columns) in piece[turned * lanes..].chunks_mut(lanes * SQUARE).enumerate() {
        let columns_here = columns.len() / lanes;
        for (lane, row) in rows.chunks(width).enumerate() {
            let row = &row[turned + square * SQUARE..][..columns_here];
            for (column, &value) in columns.chunks_mut(lanes).zip(row) {
                column[lane] = value;
            }
        }
    }
}

/// The same for whole squares, where the CPU turns them in registers and the panel is full. Returns how much of the
/// width is done.
fn turn_squares<L: Lane>(rows: &[L], width: usize, piece: &mut [L], lanes: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if let Some(squares) = Squares::of_this_cpu()
        && size_of::<L>() == size_of::<u32>()
        && lanes.is_multiple_of(squares.side)
        && rows.len() == lanes * width
    {
        let side = squares.side;
        let whole = width / side * side;
        assert!(piece.len() >= whole * lanes);
        for first in (0..whole).step_by(side) {
            for lane in (0..lanes).step_by(side) {
                // SAFETY: a lane is as large as a u32; both squares are within what was just compared.
                unsafe {
                    let from = rows.as_ptr().add(lane * width + first).cast();
                    squares.copy(from, width, piece.as_mut_ptr().add(first * lanes + lane).cast(), lanes);
                }
            }
        }
        return whole;
    }
    let _ = (rows, width, piece, lanes);
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panel_is_turned_and_filled_up() {
        for (depth, part) in [(19, 0..19), (PIECE + 3, 0..PIECE + 3), (19, 4..13)] {
            let x: Vec<f32> = (0..5 * depth).map(|i| i as f32).collect();
            let packed: Vec<f32> = panels(&x, depth, part.clone(), 4);
            let width = part.len();
            assert_eq!(packed.len(), 2 * 4 * width);
            for (i, &value) in packed.iter().enumerate() {
                let (panel, d, lane) = (i / (4 * width), i / 4 % width, i % 4);
                let row = panel * 4 + lane;
                assert_eq!(value, if row < 5 { x[row * depth + part.start + d] } else { 0.0 });
            }
        }
    }
}
