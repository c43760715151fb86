//! A matrix times one vector: what decoding a token is made of. The matrix is read once, so that the
//! memory's bandwidth is the limit, and the arithmetic has to keep out of its way.

use crate::dot::{dot, dot_bf16};
#[cfg(target_arch = "x86_64")]
use crate::level::{Level, level};
use crate::matrix::{Elements, HostMatrix};
use evalfw_engine::nf4::BLOCK;
use rayon::prelude::*;

/// Rows that one thread takes at a time.
const ROWS: usize = 64;

/// `out += W · x`
pub fn add_product(matrix: &HostMatrix, x: &[f32], out: &mut [f32]) {
    let width = x.len();
    #[cfg(target_arch = "x86_64")]
    if let Elements::Nf4(tensor) = &matrix.elements
        && level() == Level::Avx512
        && width.is_multiple_of(2 * BLOCK)
    {
        let x = avx512::in_order_of_nibbles(x);
        out.par_chunks_mut(ROWS).enumerate().for_each(|(i, out)| {
            // SAFETY: the CPU has the instructions of the level.
            unsafe { avx512::add_products(tensor, i * ROWS, &x, out) };
        });
        return;
    }
    // The fewest rows of NF4 that begin with a block.
    let step = (1..=BLOCK).find(|rows| (rows * width).is_multiple_of(BLOCK)).unwrap_or(BLOCK);
    out.par_chunks_mut(ROWS).enumerate().for_each_init(
        || vec![0.0; step * width],
        |scratch, (i, out)| {
            for (j, out) in out.chunks_mut(step).enumerate() {
                let start = (i * ROWS + j * step) * width;
                let range = start..start + out.len() * width;
                match &matrix.elements {
                    Elements::F32(values) => add_dots(out, &values[range], x, dot),
                    Elements::Bf16(values) => add_dots(out, &values[range], x, dot_bf16),
                    Elements::F16(_) | Elements::Nf4(_) => {
                        let scratch = &mut scratch[..range.len()];
                        matrix.widen(start, scratch);
                        add_dots(out, scratch, x, dot);
                    }
                }
            }
        },
    );
}

/// Adds to each element of `out` the product of its row and `x`.
fn add_dots<T>(out: &mut [f32], rows: &[T], x: &[f32], dot: fn(&[T], &[f32]) -> f32) {
    for (out, row) in out.iter_mut().zip(rows.chunks(x.len())) {
        *out += dot(row, x);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use crate::nf4::avx512::absmax;
    use evalfw_engine::nf4::{BLOCK, LEVELS, Nf4Tensor};
    use std::arch::x86_64::*;

    /// Weights that are multiplied together: the codes fill one register.
    const CHUNK: usize = 2 * BLOCK;

    /// `x` in the order in which shifting a register of codes uncovers their nibbles: number `k` of eight
    /// shifts by four bits leaves nibble `k` of each of 16 words in the place where the look-up sees it.
    pub fn in_order_of_nibbles(x: &[f32]) -> Vec<f32> {
        let mut ordered = vec![0.0; x.len()];
        for (ordered, x) in ordered.chunks_mut(CHUNK).zip(x.chunks(CHUNK)) {
            for (place, value) in ordered.iter_mut().enumerate() {
                let (nibble, word) = (place / 16, place % 16);
                // The first weight of a byte is in its high nibble.
                *value = x[8 * word + (nibble ^ 1)];
            }
        }
        ordered
    }

    /// `out += W · x` for the rows of `tensor` from `first_row`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn add_products(tensor: &Nf4Tensor, first_row: usize, x: &[f32], out: &mut [f32]) {
        let width = x.len();
        assert!(width.is_multiple_of(CHUNK) && width == tensor.shape[1]);
        let blocks = width / BLOCK;
        let (x, _) = x.as_chunks::<CHUNK>();
        // SAFETY: the table has 16 elements.
        let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
        let mut scales = vec![0.0; blocks];
        for (row, out) in (first_row..).zip(out) {
            absmax(&tensor.scales, row * blocks, &mut scales);
            let codes = &tensor.codes[row * width / 2..][..width / 2];
            let mut sum = _mm512_setzero_ps();
            let pairs = scales.as_chunks::<2>().0;
            for ((codes, x), scales) in codes.as_chunks::<{ CHUNK / 2 }>().0.iter().zip(x).zip(pairs) {
                // SAFETY: `codes` has 64 bytes, and `x` has 8 times 16 elements.
                let (codes, x) = unsafe {
                    (_mm512_loadu_si512(codes.as_ptr().cast()), |k: usize| {
                        _mm512_loadu_ps(x.as_ptr().add(16 * k))
                    })
                };
                let look_up = |indices| _mm512_permutexvar_ps(indices, levels);
                // Two sums, for the multiply-add takes longer than the look-up.
                let mut even = _mm512_mul_ps(look_up(codes), x(0));
                let mut odd = _mm512_mul_ps(look_up(_mm512_srli_epi32::<4>(codes)), x(1));
                even = _mm512_fmadd_ps(look_up(_mm512_srli_epi32::<8>(codes)), x(2), even);
                odd = _mm512_fmadd_ps(look_up(_mm512_srli_epi32::<12>(codes)), x(3), odd);
                even = _mm512_fmadd_ps(look_up(_mm512_srli_epi32::<16>(codes)), x(4), even);
                odd = _mm512_fmadd_ps(look_up(_mm512_srli_epi32::<20>(codes)), x(5), odd);
                even = _mm512_fmadd_ps(look_up(_mm512_srli_epi32::<24>(codes)), x(6), even);
                odd = _mm512_fmadd_ps(look_up(_mm512_srli_epi32::<28>(codes)), x(7), odd);
                // Words 0 to 7 are the first block, 8 to 15 the second.
                let scale =
                    _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));
                sum = _mm512_fmadd_ps(_mm512_add_ps(even, odd), scale, sum);
            }
            *out += _mm512_reduce_add_ps(sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{HostMatrix, Products};
    use evalfw_engine::nf4::Nf4Tensor;
    use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
    use half::{bf16, f16};

    #[test]
    fn every_storage_agrees_with_a_sum_in_f64() {
        for shape in [[130, 896], [7, 128], [70, 192], [33, 35], [1, 64]] {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.9).sin()).collect();
            let x: Vec<f32> = (0..shape[1]).map(|i| (i as f32 * 0.37).cos()).collect();
            let dense = |data| Weight::Dense(DenseTensor { shape, data });
            for weight in [
                Weight::Nf4(Nf4Tensor::quantize(shape, &values)),
                dense(DenseData::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect())),
                dense(DenseData::F16(values.iter().map(|&v| f16::from_f32(v)).collect())),
                dense(DenseData::F32(values.clone())),
            ] {
                let matrix = HostMatrix::new(weight, Products::F32);
                let rows = matrix.rows(&(0..shape[0] as u32).collect::<Vec<_>>());
                let mut out = vec![1.0; shape[0]];
                matrix.add_product(&x, &mut out);
                for (out, row) in out.iter().zip(rows.chunks(shape[1])) {
                    let exact: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                    assert!((f64::from(*out) - 1.0 - exact).abs() < 1e-4, "{shape:?}: {out} {exact}");
                }
            }
        }
    }
}
