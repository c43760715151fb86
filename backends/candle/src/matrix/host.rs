//! Frozen matrices in the host's memory, multiplied a tile at a time.

use crate::kernels::PIECE;
use crate::kernels::dot::{dot, dot_bf16, widen};
use crate::kernels::product::{Threads, View, ViewMut, add_product};
use evalfw_engine::nf4::{BLOCK, Nf4Tensor};
use evalfw_engine::weights::{DenseData, Weight};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Elements that are in f32 at a time: 4 MiB. Smaller tiles stay in a nearer cache, but the other
/// factor has to be packed once more for each of them.
const TILE: usize = 1 << 20;
/// Rows of a matrix that one thread takes at a time when it multiplies a single vector.
const VECTOR_ROWS: usize = 64;

pub struct HostMatrix {
    shape: [usize; 2],
    elements: Elements,
}

enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Nf4(Nf4Tensor),
}

impl HostMatrix {
    pub fn new(weight: Weight) -> Self {
        match weight {
            Weight::Nf4(tensor) => Self { shape: tensor.shape, elements: Elements::Nf4(tensor) },
            Weight::Dense(tensor) => {
                let elements = match tensor.data {
                    DenseData::F32(values) => Elements::F32(values),
                    DenseData::F16(values) => Elements::F16(values),
                    DenseData::Bf16(values) => Elements::Bf16(values),
                };
                Self { shape: tensor.shape, elements }
            }
        }
    }

    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// `out += x · Wᵀ` for row-major `x` `[rows, in_features]`.
    pub fn add_product(&self, x: &[f32], out: &mut [f32]) {
        let [out_features, in_features] = self.shape;
        if x.len() == in_features {
            return self.add_vector_product(x, out);
        }
        let x = View::new(x, in_features);
        self.for_each_tile(|rows, tile| {
            let out = ViewMut::columns(out, out_features, rows.start, rows.len());
            add_product(out, 1.0, x, tile.t(), Threads::All);
        });
    }

    /// `out += y · W` for row-major `y` `[rows, out_features]`.
    pub fn add_transposed_product(&self, y: &[f32], out: &mut [f32]) {
        let [out_features, in_features] = self.shape;
        let y = View::new(y, out_features);
        self.for_each_tile(|rows, tile| {
            let out = ViewMut::new(out, in_features);
            add_product(out, 1.0, y.columns(rows.start, rows.len()), tile, Threads::All);
        });
    }

    /// Looks up rows of a dense matrix, widened.
    pub fn rows(&self, ids: &[u32]) -> Vec<f32> {
        let width = self.shape[1];
        let mut out = vec![0.0; ids.len() * width];
        for (out, &id) in out.chunks_mut(width).zip(ids) {
            let start = id as usize * width;
            // A row need not begin with a block, so it is cut out of the blocks it lies in.
            let from = start / BLOCK * BLOCK;
            let mut blocks = vec![0.0; start + width - from];
            self.widen(from, &mut blocks);
            out.copy_from_slice(&blocks[start - from..]);
        }
        out
    }

    /// Calls `each` with one range of rows after another and their values.
    fn for_each_tile(&self, mut each: impl FnMut(Range<usize>, View<'_>)) {
        let [height, width] = self.shape;
        if let Elements::F32(values) = &self.elements {
            return each(0..height, View::new(values, width));
        }
        // Every row number that is a multiple of BLOCK begins a block of NF4, whatever the width.
        let tile_rows = (TILE / width / BLOCK).max(1) * BLOCK;
        let mut tile = vec![0.0; tile_rows.min(height) * width];
        for start in (0..height).step_by(tile_rows) {
            let rows = start..height.min(start + tile_rows);
            let tile = &mut tile[..rows.len() * width];
            tile.par_chunks_mut(PIECE)
                .enumerate()
                .for_each(|(i, piece)| self.widen(start * width + i * PIECE, piece));
            each(rows, View::new(tile, width));
        }
    }

    /// Decoding has one vector to multiply: each thread takes some rows and widens one after another
    /// just before it is used.
    fn add_vector_product(&self, x: &[f32], out: &mut [f32]) {
        let width = x.len();
        // The fewest rows of NF4 that begin with a block.
        let step = (1..=BLOCK).find(|rows| (rows * width).is_multiple_of(BLOCK)).unwrap_or(BLOCK);
        out.par_chunks_mut(VECTOR_ROWS).enumerate().for_each_init(
            || vec![0.0; step * width],
            |scratch, (i, out)| {
                for (j, out) in out.chunks_mut(step).enumerate() {
                    let start = (i * VECTOR_ROWS + j * step) * width;
                    let range = start..start + out.len() * width;
                    match &self.elements {
                        Elements::F32(values) => add_dots(out, &values[range], x, dot),
                        Elements::Bf16(values) => add_dots(out, &values[range], x, dot_bf16),
                        Elements::F16(_) | Elements::Nf4(_) => {
                            let scratch = &mut scratch[..range.len()];
                            self.widen(start, scratch);
                            add_dots(out, scratch, x, dot);
                        }
                    }
                }
            },
        );
    }

    /// Widens the elements from `start`, a multiple of [`BLOCK`], on this thread.
    fn widen(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match &self.elements {
            Elements::F32(values) => out.copy_from_slice(&values[range]),
            Elements::F16(values) => values[range].convert_to_f32_slice(out),
            Elements::Bf16(values) => {
                out.iter_mut().zip(&values[range]).for_each(|(out, &value)| *out = widen(value));
            }
            Elements::Nf4(tensor) => tensor.dequantize_range(range, out),
        }
    }
}

/// Adds to each element of `out` the product of its row and `x`.
fn add_dots<T>(out: &mut [f32], rows: &[T], x: &[f32], dot: fn(&[T], &[f32]) -> f32) {
    for (out, row) in out.iter_mut().zip(rows.chunks(x.len())) {
        *out += dot(row, x);
    }
}
