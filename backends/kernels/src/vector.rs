//! A matrix times one vector: what decoding a token is made of. The matrix is read once, so that the
//! memory's bandwidth is the limit, and the arithmetic has to keep out of its way.

use crate::dot::{dot, dot_bf16};
#[cfg(target_arch = "x86_64")]
use crate::level::{Level, level};
#[cfg(target_arch = "x86_64")]
use crate::matrix::Products;
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
        return match matrix.products {
            Products::Bf16 => avx512::add_product::<avx512::Pairs>(tensor, x, out),
            Products::F32 => avx512::add_product::<avx512::Single>(tensor, x, out),
        };
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
    use super::ROWS;
    use crate::nf4::avx512::absmax;
    use crate::transpose::{SIDE, transpose};
    use evalfw_engine::nf4::{BLOCK, LEVELS, Nf4Tensor};
    use half::bf16;
    use rayon::prelude::*;
    use std::arch::x86_64::*;

    /// Weights that are multiplied together: the codes fill one register.
    const CHUNK: usize = 2 * BLOCK;
    /// Bytes by which codes are fetched ahead.
    const AHEAD: usize = 2048;

    /// How a register of codes is decoded and multiplied.
    pub trait Factors {
        /// A chunk of the vector, in the order in which shifting a register of codes uncovers their nibbles.
        type Chunk: Send + Sync;
        /// The levels, in a register that is looked up.
        type Table: Copy;

        fn chunk(x: &[f32; CHUNK]) -> Self::Chunk;

        /// # Safety
        /// The CPU has the instructions of the factors.
        unsafe fn table() -> Self::Table;

        /// The products of a chunk, without the scales of its blocks: those of the first block add up in the lower
        /// eight lanes, those of the second in the upper ones.
        ///
        /// # Safety
        /// As of [`table`](Self::table).
        unsafe fn multiply(codes: __m512i, table: Self::Table, x: &Self::Chunk) -> __m512;

        /// [`add_rows`], compiled for the instructions of the factors.
        ///
        /// # Safety
        /// As of [`table`](Self::table).
        unsafe fn add_rows(rows: Rows<'_>, x: &[Self::Chunk], scales: &mut Vec<f32>, out: &mut [f32]);
    }

    /// Some rows of a matrix.
    pub struct Rows<'a> {
        tensor: &'a Nf4Tensor,
        first: usize,
    }

    /// In f32, eight look-ups for a register of codes.
    pub struct Single;

    impl Factors for Single {
        type Chunk = [f32; CHUNK];
        type Table = __m512;

        fn chunk(x: &[f32; CHUNK]) -> Self::Chunk {
            std::array::from_fn(|place| {
                let (nibble, word) = (place / 16, place % 16);
                // The first weight of a byte is in its high nibble.
                x[8 * word + (nibble ^ 1)]
            })
        }

        #[inline(always)]
        unsafe fn table() -> __m512 {
            // SAFETY: there are 16 levels; the instructions are there by the contract, also below.
            unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) }
        }

        #[inline(always)]
        unsafe fn multiply(codes: __m512i, levels: __m512, x: &Self::Chunk) -> __m512 {
            // SAFETY: `x` has eight times 16 elements.
            unsafe {
                let x = |k: usize| _mm512_loadu_ps(x.as_ptr().add(16 * k));
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
                _mm512_add_ps(even, odd)
            }
        }

        unsafe fn add_rows(rows: Rows<'_>, x: &[Self::Chunk], scales: &mut Vec<f32>, out: &mut [f32]) {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn run(rows: Rows<'_>, x: &[<Single as Factors>::Chunk], scales: &mut Vec<f32>, out: &mut [f32]) {
                // SAFETY: the instructions are there, also below.
                unsafe { add_rows::<Single>(rows, x, scales, out) };
            }
            unsafe { run(rows, x, scales, out) };
        }
    }

    /// In bf16, summed in f32: four look-ups, of two weights in each lane.
    pub struct Pairs;

    impl Factors for Pairs {
        type Chunk = [bf16; CHUNK];
        type Table = __m512i;

        fn chunk(x: &[f32; CHUNK]) -> Self::Chunk {
            std::array::from_fn(|place| {
                let (nibble, word) = (place / 32, place % 32);
                bf16::from_f32(x[4 * word + (nibble ^ 1)])
            })
        }

        #[inline(always)]
        unsafe fn table() -> __m512i {
            // Twice, as the look-up sees five bits, one of them of the next nibble.
            let levels: [bf16; 32] = std::array::from_fn(|code| bf16::from_f32(LEVELS[code % 16]));
            // SAFETY: 32 values of 16 bits are read; the instructions are there by the contract, also below.
            unsafe { _mm512_loadu_si512(levels.as_ptr().cast()) }
        }

        #[inline(always)]
        unsafe fn multiply(codes: __m512i, levels: __m512i, x: &Self::Chunk) -> __m512 {
            // SAFETY: `x` has four times 32 elements; the types that are cast have the same bits.
            unsafe {
                let pairs = |v| std::mem::transmute::<__m512i, __m512bh>(v);
                let x = |k: usize| pairs(_mm512_loadu_si512(x.as_ptr().add(32 * k).cast()));
                let look_up = |indices| pairs(_mm512_permutexvar_epi16(indices, levels));
                let zero = _mm512_setzero_ps();
                let mut even = _mm512_dpbf16_ps(zero, look_up(codes), x(0));
                let mut odd = _mm512_dpbf16_ps(zero, look_up(_mm512_srli_epi16::<4>(codes)), x(1));
                even = _mm512_dpbf16_ps(even, look_up(_mm512_srli_epi16::<8>(codes)), x(2));
                odd = _mm512_dpbf16_ps(odd, look_up(_mm512_srli_epi16::<12>(codes)), x(3));
                _mm512_add_ps(even, odd)
            }
        }

        unsafe fn add_rows(rows: Rows<'_>, x: &[Self::Chunk], scales: &mut Vec<f32>, out: &mut [f32]) {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
            fn run(rows: Rows<'_>, x: &[<Pairs as Factors>::Chunk], scales: &mut Vec<f32>, out: &mut [f32]) {
                // SAFETY: the instructions are there, also below.
                unsafe { add_rows::<Pairs>(rows, x, scales, out) };
            }
            unsafe { run(rows, x, scales, out) };
        }
    }

    /// `out += W · x` on all threads, for rows that are whole chunks.
    pub fn add_product<F: Factors + 'static>(tensor: &Nf4Tensor, x: &[f32], out: &mut [f32]) {
        assert_eq!([out.len(), x.len()], tensor.shape);
        let chunks: Vec<F::Chunk> = x.as_chunks::<CHUNK>().0.iter().map(F::chunk).collect();
        out.par_chunks_mut(ROWS).enumerate().for_each_init(Vec::new, |scales, (i, out)| {
            // SAFETY: whoever chose the factors has seen that the CPU has their instructions.
            unsafe { F::add_rows(Rows { tensor, first: i * ROWS }, &chunks, scales, out) };
        });
    }

    /// `out` has an element for each of the rows; `scales` is memory to work in.
    ///
    /// # Safety
    /// The CPU has the instructions of the factors, and the caller is compiled for them.
    #[inline(always)]
    unsafe fn add_rows<F: Factors>(
        Rows { tensor, first }: Rows<'_>,
        x: &[F::Chunk],
        scales: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let (blocks, bytes) = (2 * x.len(), CHUNK / 2 * x.len());
        scales.resize(out.len() * blocks, 0.0);
        // SAFETY: the instructions are there, also below.
        unsafe { absmax(&tensor.scales, first * blocks, scales) };
        let codes = &tensor.codes[first * bytes..][..out.len() * bytes];
        let table = unsafe { F::table() };
        let (whole, rest) = out.as_chunks_mut::<SIDE>();
        let first_of_rest = whole.len() * SIDE;
        for (group, out) in whole.iter_mut().enumerate() {
            // The sums of 16 rows are added up side by side.
            unsafe {
                let mut sums = [_mm512_setzero_ps(); SIDE];
                for (i, sum) in sums.iter_mut().enumerate() {
                    let row = group * SIDE + i;
                    let (codes, scales) = (&codes[row * bytes..][..bytes], &scales[row * blocks..][..blocks]);
                    *sum = sum_of_row::<F>(codes, scales, table, x);
                }
                let mut total = _mm512_loadu_ps(out.as_ptr());
                for sum in transpose(sums) {
                    total = _mm512_add_ps(total, sum);
                }
                _mm512_storeu_ps(out.as_mut_ptr(), total);
            }
        }
        for (row, out) in (first_of_rest..).zip(rest) {
            let (codes, scales) = (&codes[row * bytes..][..bytes], &scales[row * blocks..][..blocks]);
            unsafe { *out += _mm512_reduce_add_ps(sum_of_row::<F>(codes, scales, table, x)) };
        }
    }

    /// One row, not yet added up over the lanes.
    ///
    /// # Safety
    /// As of [`add_rows`].
    #[inline(always)]
    unsafe fn sum_of_row<F: Factors>(
        codes: &[u8],
        scales: &[f32],
        table: F::Table,
        x: &[F::Chunk],
    ) -> __m512 {
        let chunks = codes.as_chunks::<{ CHUNK / 2 }>().0.iter().zip(scales.as_chunks::<2>().0).zip(x);
        // SAFETY: `codes` has 64 bytes; the instructions are there. What is fetched ahead need not be.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); 2];
            for (i, ((codes, scales), x)) in chunks.enumerate() {
                _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
                let products = F::multiply(_mm512_loadu_si512(codes.as_ptr().cast()), table, x);
                let scale =
                    _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));
                sums[i % 2] = _mm512_fmadd_ps(products, scale, sums[i % 2]);
            }
            _mm512_add_ps(sums[0], sums[1])
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{HostMatrix, Products};
    use evalfw_engine::nf4::Nf4Tensor;
    use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
    use half::{bf16, f16};

    /// All factors are at most 1; rounding one to bf16 is off by 2⁻⁹ of it, and both are rounded.
    #[test]
    fn products_of_bf16_agree_within_their_rounding() {
        for shape in [[130, 896], [7, 128], [64, 256], [65, 384]] {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.9).sin()).collect();
            let x: Vec<f32> = (0..shape[1]).map(|i| (i as f32 * 0.37).cos()).collect();
            let matrix = HostMatrix::new(Weight::Nf4(Nf4Tensor::quantize(shape, &values)), Products::Bf16);
            let rows = matrix.rows(&(0..shape[0] as u32).collect::<Vec<_>>());
            let mut out = vec![1.0; shape[0]];
            matrix.add_product(&x, &mut out);
            for (out, row) in out.iter().zip(rows.chunks(shape[1])) {
                let exact: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                let tolerance = (shape[1] as f64).sqrt() / 128.0;
                assert!((f64::from(*out) - 1.0 - exact).abs() < tolerance, "{shape:?}: {out} {exact}");
            }
        }
    }

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
