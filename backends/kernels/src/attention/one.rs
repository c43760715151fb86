//! Attention of one query, as in decoding: a product with each key, and a weighted sum of the values.

use crate::dot;
use crate::elementwise::exponentials;
use crate::level::for_this_cpu;

/// What one head of the query sees: rows of its width, `stride` elements apart, of which there are as many as keys.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    pub keys: &'a [f32],
    pub values: &'a [f32],
    pub stride: usize,
}

/// `out = softmax(q · keysᵀ / sqrt(dim)) · values`, for `q` and `out` of `dim` elements.
pub fn attend(q: &[f32], seen: Seen<'_>, out: &mut [f32]) {
    let mut weights = vec![0.0; seen.keys.len().div_ceil(seen.stride)];
    products(q, (seen.keys, seen.stride), &mut weights);
    let scale = 1.0 / (q.len() as f32).sqrt();
    weights.iter_mut().for_each(|score| *score *= scale);
    let (_, sum) = exponentials(&mut weights);
    out.fill(0.0);
    add_weighted(&weights, (seen.values, seen.stride), out);
    let factor = (1.0 / sum) as f32;
    out.iter_mut().for_each(|value| *value *= factor);
}

fn products(q: &[f32], (rows, stride): (&[f32], usize), out: &mut [f32]) {
    for (row, out) in rows.chunks(stride).zip(out) {
        *out = dot(&row[..q.len()], q);
    }
}

for_this_cpu! {
    fn add_weighted(weights: &[f32], rows: (&[f32], usize), out: &mut [f32]) -> () = add_weighted_body
}

#[inline(always)]
fn add_weighted_body(weights: &[f32], (rows, stride): (&[f32], usize), out: &mut [f32]) {
    /// Elements that stay in registers from the first row to the last.
    const LANES: usize = 64;
    for (start, out) in (0..).step_by(LANES).zip(out.chunks_mut(LANES)) {
        if let Ok(whole) = <&mut [f32; LANES]>::try_from(&mut *out) {
            let mut sums = *whole;
            for (weight, row) in weights.iter().zip(rows.chunks(stride)) {
                for (sum, value) in sums.iter_mut().zip(&row[start..start + LANES]) {
                    *sum += weight * value;
                }
            }
            *whole = sums;
        } else {
            for (weight, row) in weights.iter().zip(rows.chunks(stride)) {
                for (sum, value) in out.iter_mut().zip(&row[start..]) {
                    *sum += weight * value;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_definition_in_f64() {
        for (keys, dim, heads) in [(1, 8, 1), (9, 64, 2), (40, 100, 3), (5, 128, 2)] {
            let value = |i: usize| (i as f32 * 0.7311).sin();
            let stride = heads * dim;
            let (q, k) = ((0..dim).map(value).collect::<Vec<_>>(), (7..7 + keys * stride).map(value));
            let (k, v) = (k.collect::<Vec<_>>(), (3..3 + keys * stride).map(value).collect::<Vec<_>>());
            let first = (heads - 1) * dim;
            let mut out = vec![f32::NAN; dim];
            attend(&q, Seen { keys: &k[first..], values: &v[first..], stride }, &mut out);

            let row = |of: &[f32], key: usize, i: usize| f64::from(of[key * stride + first + i]);
            let score = |key| (0..dim).map(|i| f64::from(q[i]) * row(&k, key, i)).sum::<f64>();
            let weights: Vec<_> = (0..keys).map(|key| (score(key) / (dim as f64).sqrt()).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (i, out) in out.into_iter().enumerate() {
                let exact = (0..keys).map(|key| weights[key] * row(&v, key, i)).sum::<f64>() / sum;
                assert!((f64::from(out) - exact).abs() < 1e-6, "{out} {exact}");
            }
        }
    }
}
