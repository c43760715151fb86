//! Activations in panels of as many rows as a strip has lanes.

use rayon::prelude::*;

/// Depth that a thread turns over at a time: whole cache lines on both sides.
const SQUARE: usize = 16;

/// Row-major `x` `[rows, depth]` as `[panels, depth, lanes]`; rows that are missing in the last panel are
/// zero.
pub fn panels(x: &[f32], depth: usize, lanes: usize) -> Vec<f32> {
    let rows = x.len() / depth;
    let mut packed = vec![0.0; rows.div_ceil(lanes) * lanes * depth];
    packed.par_chunks_mut(lanes * depth).zip(x.par_chunks(lanes * depth)).for_each(|(panel, x)| {
        for (d, columns) in panel.chunks_mut(lanes * SQUARE).enumerate() {
            let width = columns.len() / lanes;
            for (lane, row) in x.chunks(depth).enumerate() {
                for (column, &value) in columns.chunks_mut(lanes).zip(&row[d * SQUARE..][..width]) {
                    column[lane] = value;
                }
            }
        }
    });
    packed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panel_is_turned_and_filled_up() {
        let x: Vec<f32> = (0..5 * 19).map(|i| i as f32).collect();
        let packed = panels(&x, 19, 4);
        assert_eq!(packed.len(), 2 * 4 * 19);
        for (i, &value) in packed.iter().enumerate() {
            let (panel, d, lane) = (i / (4 * 19), i / 4 % 19, i % 4);
            let row = panel * 4 + lane;
            assert_eq!(value, if row < 5 { x[row * 19 + d] } else { 0.0 });
        }
    }
}
