//! Activations in panels of as many rows as a strip has lanes.

use super::lane::Lane;
use rayon::prelude::*;

/// Depth that a thread turns over at a time: whole cache lines on both sides.
const SQUARE: usize = 16;

/// Row-major `x` `[rows, depth]` as `[panels, depth, lanes]`; rows that are missing in the last panel are
/// zero, as is what is missing in the last lane of the depth.
pub fn panels<L: Lane>(x: &[f32], depth: usize, lanes: usize) -> Vec<L> {
    let rows = x.len() / depth;
    let joined = depth.div_ceil(L::DEPTHS);
    let mut packed = vec![L::default(); rows.div_ceil(lanes) * lanes * joined];
    packed.par_chunks_mut(lanes * joined).zip(x.par_chunks(lanes * depth)).for_each_init(
        || vec![L::default(); lanes * joined],
        |rows, (panel, x)| {
            for (row, x) in rows.chunks_mut(joined).zip(x.chunks(depth)) {
                L::join_along(x, row);
            }
            let rows = &rows[..x.len() / depth * joined];
            let turned = L::turn_squares(rows, joined, panel, lanes);
            for (square, columns) in panel.chunks_mut(lanes * SQUARE).enumerate().skip(turned) {
                let width = columns.len() / lanes;
                for (lane, row) in rows.chunks(joined).enumerate() {
                    for (column, &value) in columns.chunks_mut(lanes).zip(&row[square * SQUARE..][..width]) {
                        column[lane] = value;
                    }
                }
            }
        },
    );
    packed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panel_is_turned_and_filled_up() {
        let x: Vec<f32> = (0..5 * 19).map(|i| i as f32).collect();
        let packed: Vec<f32> = panels(&x, 19, 4);
        assert_eq!(packed.len(), 2 * 4 * 19);
        for (i, &value) in packed.iter().enumerate() {
            let (panel, d, lane) = (i / (4 * 19), i / 4 % 19, i % 4);
            let row = panel * 4 + lane;
            assert_eq!(value, if row < 5 { x[row * 19 + d] } else { 0.0 });
        }
    }
}
