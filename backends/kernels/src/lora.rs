//! A frozen matrix with a LoRA adapter beside it (Hu et al. 2021): `x Wᵀ + bias + scale · (mask ⊙ x) Aᵀ Bᵀ`, and
//! its gradients.

use crate::filled::{PIECE, zeros};
use crate::views::{Threads, View, ViewMut, add_product};
use crate::{HostMatrix, LowRank};
use rayon::prelude::*;

/// The adapter's part.
#[derive(Clone, Copy)]
pub struct Factors<'a> {
    /// `[r, in_features]`
    pub a: &'a [f32],
    /// `[out_features, r]`
    pub b: &'a [f32],
    pub r: usize,
    pub scale: f32,
}

/// What dropout made of the input.
pub struct Masked {
    /// 0, or the factor of what is left.
    pub mask: Vec<f32>,
    /// `mask ⊙ x`
    pub x: Vec<f32>,
}

pub struct Gradients {
    pub x: Vec<f32>,
    pub a: Vec<f32>,
    /// Transposed: `[r, out_features]`.
    pub b: Vec<f32>,
}

impl Factors<'_> {
    /// As an update of the matrix.
    fn update(self, matrix: &HostMatrix) -> LowRank {
        LowRank::new(matrix, (self.a, self.b), self.scale)
    }
}

impl Masked {
    pub fn new(mask: Vec<f32>, x: &[f32]) -> Self {
        let mut masked = mask.clone();
        masked.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(masked, x)| {
            masked.iter_mut().zip(x).for_each(|(masked, x)| *masked *= x);
        });
        Self { mask, x: masked }
    }
}

/// The result `[rows, out_features]`, and what is between the factors: `scale · (mask ⊙ x) Aᵀ` `[rows, r]`.
pub fn forward(
    matrix: &HostMatrix,
    factors: Factors<'_>,
    (x, masked): (&[f32], Option<&Masked>),
    bias: Option<&[f32]>,
) -> (Vec<f32>, Vec<f32>) {
    let [out_features, in_features] = matrix.shape();
    // One row is not worth the packing.
    if masked.is_none() && x.len() > in_features {
        return matrix.adapted_product(&factors.update(matrix), x, bias);
    }
    let inner = inner(matrix, factors, (x, masked));
    let mut out = matrix.product(x, bias);
    let (rows, b) = (View::new(&inner, factors.r), View::new(factors.b, factors.r));
    add_product(ViewMut::new(&mut out, out_features), 1.0, rows, b.t(), Threads::All);
    (out, inner)
}

/// From the gradient of the result; `inner` where the forward has left it.
pub fn backward(
    matrix: &HostMatrix,
    factors: Factors<'_>,
    (x, masked): (&[f32], Option<&Masked>),
    inner: Option<Vec<f32>>,
    grad: &[f32],
) -> Gradients {
    let [out_features, in_features] = matrix.shape();
    let Factors { a, r, scale, .. } = factors;
    let input = masked.map_or(x, |masked| &masked.x);
    let inner = inner.unwrap_or_else(|| self::inner(matrix, factors, (x, masked)));
    // The narrow factor first: the other way round the result has too few columns to fill registers.
    let of_b = product(out_features, 1.0, View::new(&inner, r).t(), View::new(grad, out_features));
    let (of_x, of_inner) = match masked {
        None => matrix.adapted_transposed_product(&factors.update(matrix), grad),
        Some(Masked { mask, .. }) => {
            let of_inner = product(r, scale, View::new(grad, out_features), View::new(factors.b, r));
            let through_a = product(in_features, 1.0, View::new(&of_inner, r), View::new(a, in_features));
            let mut of_x = matrix.transposed_product(grad);
            add_masked(&mut of_x, &through_a, mask);
            (of_x, of_inner)
        }
    };
    let of_a = product(in_features, 1.0, View::new(&of_inner, r).t(), View::new(input, in_features));
    Gradients { x: of_x, a: of_a, b: of_b }
}

/// In the same arithmetic as in the forward, so that it does not matter who computes it.
fn inner(matrix: &HostMatrix, factors: Factors<'_>, (x, masked): (&[f32], Option<&Masked>)) -> Vec<f32> {
    let [_, in_features] = matrix.shape();
    let Factors { a, r, scale, .. } = factors;
    match masked {
        Some(masked) => product(r, scale, View::new(&masked.x, in_features), View::new(a, in_features).t()),
        None => {
            let mut inner = factors.update(matrix).a.product(x, None);
            inner.iter_mut().for_each(|value| *value *= scale);
            inner
        }
    }
}

fn add_masked(sum: &mut [f32], values: &[f32], mask: &[f32]) {
    let values = values.par_chunks(PIECE).zip(mask.par_chunks(PIECE));
    sum.par_chunks_mut(PIECE).zip(values).for_each(|(sum, (values, mask))| {
        sum.iter_mut().zip(values.iter().zip(mask)).for_each(|(sum, (value, mask))| *sum += value * mask);
    });
}

/// `factor · a · b`, row-major with `width` columns.
fn product(width: usize, factor: f32, a: View<'_>, b: View<'_>) -> Vec<f32> {
    let mut out = zeros(a.height() * width);
    add_product(ViewMut::new(&mut out, width), factor, a, b, Threads::All);
    out
}
