//! Rotary positions in the half-split form: element i of a head is rotated with element i + dim / 2.

use crate::filled::filled;

/// The cosines and sines of some positions, each `[positions, dim / 2]`.
#[derive(Clone, Copy)]
pub struct Angles<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub dim: usize,
}

impl Angles<'_> {
    /// Rotates `x` `[examples, positions, heads, dim]`.
    pub fn rotate(self, x: &[f32], heads: usize) -> Vec<f32> {
        self.rotate_towards(x, heads, 1.0)
    }

    /// The reverse, which is also the gradient.
    pub fn rotate_back(self, x: &[f32], heads: usize) -> Vec<f32> {
        self.rotate_towards(x, heads, -1.0)
    }

    fn rotate_towards(self, x: &[f32], heads: usize, direction: f32) -> Vec<f32> {
        let (half, width) = (self.dim / 2, heads * self.dim);
        let positions = self.cos.len() / half;
        assert!(x.len().is_multiple_of(positions * width), "the tables are of other positions");
        filled(x.len(), width, |start, out| {
            let angles = start / width % positions * half;
            let (cos, sin) = (&self.cos[angles..angles + half], &self.sin[angles..angles + half]);
            for (out, x) in out.chunks_mut(self.dim).zip(x[start..].chunks(self.dim)) {
                let (out_first, out_second) = out.split_at_mut(half);
                let (first, second) = x.split_at(half);
                for i in 0..half {
                    let sin = direction * sin[i];
                    out_first[i] = first[i] * cos[i] - second[i] * sin;
                    out_second[i] = second[i] * cos[i] + first[i] * sin;
                }
            }
        })
    }
}
