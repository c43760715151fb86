//! NF4 with AVX2, in integers of 16 bits.
//!
//! AVX2 looks up bytes: two look-ups give a level in 16 bits, and four, with many more shuffles, one in f32. So the
//! levels are taken as multiples of 1/[`ONE`], and each block of the vector as 16-bit multiples of a scale of its own,
//! and what is left over as multiples of a finer one. Products and the sums of a block are exact in 32 bits; blocks are
//! added up in f32. What remains is the rounding of the levels: a product of random vectors is off by some 1e-5 of its
//! usual size (rounding the factors to bf16: 2e-3).

use crate::dot::avx2::sum_of_lanes;
use crate::nf4::avx2::{absmax, nibbles, table};
use evalfw_engine::nf4::{BLOCK, LEVELS, Nf4Tensor};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// What stands for a level of 1: of the numbers of 15 bits the one whose multiples are nearest to the levels, 3.7e-6 in
/// the mean.
const ONE: f32 = 25545.0;
/// Steps of the finer scale in one of the coarser.
const FINE: f32 = 16384.0;
/// Bytes by which codes are fetched ahead: what the CPU fetches by itself stops at the end of a page.
const AHEAD: usize = 2048;
/// Lanes of sums in a register.
const LANES: usize = 8;
/// Words in a register.
const WORDS: usize = 16;
/// Registers of a block.
const PARTS: usize = BLOCK / WORDS;
/// What the sizes of the factors of one lane may add up to: times [`ONE`] they fit into 32 bits. Rounding adds half to
/// each of its eight. Eight times half of [`FINE`] is less.
const LARGEST_SUM: f32 = 84066.0 - 4.0;

thread_local! {
    /// Memory to work in.
    static SCALES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A block of the vector, in the order in which the levels of its weights are looked up.
#[repr(align(32))]
struct Block {
    coarse: [[i16; WORDS]; PARTS],
    fine: [[i16; WORDS]; PARTS],
}

/// A vector of whole blocks.
pub struct Blocks {
    blocks: Vec<Block>,
    /// Of each block: what 1 times a level of 1 stands for.
    scales: Vec<f32>,
}

impl Blocks {
    /// `None` where the vector does not consist of whole blocks or is not finite.
    pub fn new(x: &[f32]) -> Option<Self> {
        let (blocks, rest) = x.as_chunks::<BLOCK>();
        if !rest.is_empty() || !x.iter().all(|v| v.is_finite()) {
            return None;
        }
        let (blocks, scales) = blocks.iter().map(block).unzip();
        Some(Self { blocks, scales })
    }

    /// Adds the products of the rows from `first`.
    ///
    /// # Safety
    /// The CPU has AVX2 and FMA.
    pub unsafe fn add_rows(&self, tensor: &Nf4Tensor, first: usize, out: &mut [f32]) {
        // SAFETY: by the contract of this function.
        SCALES.with_borrow_mut(|scales| unsafe { self.add_rows_with(tensor, first, scales, out) });
    }

    /// `scales` is memory to work in.
    #[target_feature(enable = "avx2,fma")]
    fn add_rows_with(&self, tensor: &Nf4Tensor, first: usize, scales: &mut Vec<f32>, out: &mut [f32]) {
        let width = self.blocks.len();
        scales.resize(out.len() * width, 0.0);
        absmax(&tensor.scales, first * width, scales);
        let (codes, _) = tensor.codes[first * width * (BLOCK / 2)..].as_chunks();
        let levels = LEVELS.map(|level| (level * ONE).round() as i16);
        let tables: [__m256i; 2] = std::array::from_fn(|i| table(|code| levels[code].to_le_bytes()[i]));
        for ((out, scales), codes) in out.iter_mut().zip(scales.chunks_mut(width)).zip(codes.chunks(width)) {
            for (scale, of_x) in scales.iter_mut().zip(&self.scales) {
                *scale *= of_x;
            }
            *out += self.product(codes, scales, &tables);
        }
    }

    /// With one row.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn product(&self, codes: &[[u8; BLOCK / 2]], scales: &[f32], tables: &[__m256i; 2]) -> f32 {
        let mut sum = _mm256_setzero_ps();
        let step = _mm256_set1_ps(1.0 / FINE);
        for ((codes, scale), x) in codes.iter().zip(scales).zip(&self.blocks) {
            // SAFETY: a register has 32 bytes. What is fetched ahead need not be there.
            let codes = unsafe {
                _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
                _mm256_loadu_si256(codes.as_ptr().cast())
            };
            let [second, first] = nibbles(codes);
            let look_up = |codes| tables.map(|table| _mm256_shuffle_epi8(table, codes));
            let ([a, b], [c, d]) = (look_up(second), look_up(first));
            let levels = [
                _mm256_unpacklo_epi8(a, b),
                _mm256_unpackhi_epi8(a, b),
                _mm256_unpacklo_epi8(c, d),
                _mm256_unpackhi_epi8(c, d),
            ];
            let (coarse, fine) = (sums_of_block(levels, &x.coarse), sums_of_block(levels, &x.fine));
            let products = _mm256_fmadd_ps(fine, step, coarse);
            sum = _mm256_fmadd_ps(products, _mm256_set1_ps(*scale), sum);
        }
        sum_of_lanes(sum)
    }
}

/// The products of some levels and a part of the vector, in the lanes of their sums.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn sums_of_block(levels: [__m256i; PARTS], x: &[[i16; WORDS]; PARTS]) -> __m256 {
    // SAFETY: the parts are as large as a register, and begin where one may.
    let x: [__m256i; PARTS] = std::array::from_fn(|i| unsafe { _mm256_load_si256(x[i].as_ptr().cast()) });
    let [a, b, c, d]: [__m256i; PARTS] = std::array::from_fn(|i| _mm256_madd_epi16(levels[i], x[i]));
    _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d)))
}

/// Which weight of a block is word `word` of register `part`: those of the low nibbles, which are second in their
/// bytes, come first; unpacking takes eight bytes of each half of a register.
const fn place(part: usize, word: usize) -> usize {
    let byte = word / 8 * 16 + part % 2 * 8 + word % 8;
    2 * byte + 1 - part / 2
}

fn block(x: &[f32; BLOCK]) -> (Block, f32) {
    let (mut largest, mut sums) = (0f32, [0f32; LANES]);
    for part in 0..PARTS {
        for word in 0..WORDS {
            let size = x[place(part, word)].abs();
            largest = largest.max(size);
            sums[word / 2] += size;
        }
    }
    let largest_sum = sums.into_iter().fold(0f32, f32::max);
    let scale = (largest / f32::from(i16::MAX)).max(largest_sum / LARGEST_SUM);
    let mut block = Block { coarse: [[0; WORDS]; PARTS], fine: [[0; WORDS]; PARTS] };
    if !scale.is_normal() {
        // Nothing that the sum would show.
        return (block, 0.0);
    }
    for part in 0..PARTS {
        for word in 0..WORDS {
            let value = x[place(part, word)] / scale;
            let coarse = value.round();
            block.coarse[part][word] = coarse as i16;
            block.fine[part][word] = ((value - coarse) * FINE).round() as i16;
        }
    }
    (block, scale / ONE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The largest distance from sums in f64, and what it may be: each level is off by at most
    /// 1e-5 of the largest of its block, and errors of different terms have different signs.
    fn distance(tensor: &Nf4Tensor, x: &[f32]) -> (f64, f64) {
        let [height, width] = tensor.shape;
        let mut out = vec![0.0; height];
        // SAFETY: the callers have seen that the CPU has the instructions.
        unsafe { Blocks::new(x).unwrap().add_rows(tensor, 0, &mut out) };
        let largest: f64 = x.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max);
        let mut most = 0f64;
        let mut scale = 0f64;
        for (out, row) in out.iter().zip(tensor.dequantize().chunks(width)) {
            let exact: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            most = most.max((f64::from(*out) - exact).abs());
            scale = row.iter().fold(scale, |scale, w| scale.max(f64::from(w.abs())));
        }
        (most, 4e-5 * (width as f64).sqrt() * scale * largest)
    }

    fn is_there() -> bool {
        let there = crate::level::Level::Avx2.is_there();
        if !there {
            eprintln!("left out: this CPU has no AVX2");
        }
        there
    }

    proptest! {
        #[test]
        fn products_agree_with_sums_in_f64(
            blocks in 1usize..9, height in 1usize..20, exponent in -30i32..30, seed: u32,
        ) {
            if is_there() {
                let width = blocks * BLOCK;
                let wave = |i: usize, step: f32| ((i as f32 + seed as f32 * 1e-3) * step).sin();
                let values: Vec<f32> = (0..height * width).map(|i| wave(i, 0.713)).collect();
                let size = 2f32.powi(exponent);
                let x: Vec<f32> = (0..width).map(|i| wave(i, 0.37).powi(3) * size).collect();
                let (distance, tolerance) = distance(&Nf4Tensor::quantize([height, width], &values), &x);
                prop_assert!(distance <= tolerance, "{distance} {tolerance}");
            }
        }
    }

    /// All of one sign and of the largest size: no sum overflows.
    #[test]
    fn the_largest_sums_fit() {
        if !is_there() {
            return;
        }
        for sign in [1.0, -1.0] {
            let tensor = Nf4Tensor::quantize([3, 128], &[sign; 3 * 128]);
            for x in [[1.0; 128], [f32::MAX / 256.0; 128], std::array::from_fn(|i| (i % 64 == 5).into())] {
                let (distance, tolerance) = distance(&tensor, &x);
                // All errors have one sign.
                let tolerance = tolerance * (x.len() as f64).sqrt();
                assert!(distance <= tolerance, "{distance} {tolerance}");
            }
        }
    }

    #[test]
    fn what_has_no_size_gives_zero_and_what_is_not_finite_no_integers() {
        if !is_there() {
            return;
        }
        let tensor = Nf4Tensor::quantize([1, 64], &[1.0; 64]);
        for size in [0.0, f32::MIN_POSITIVE / 8.0] {
            let mut out = [1.0];
            // SAFETY: the CPU has the instructions.
            unsafe { Blocks::new(&[size; 64]).unwrap().add_rows(&tensor, 0, &mut out) };
            assert_eq!(out, [1.0]);
        }
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(Blocks::new(&[bad; 64]).is_none());
        }
        assert!(Blocks::new(&[1.0; 65]).is_none());
    }

    #[test]
    fn each_weight_has_a_place() {
        let mut places: Vec<_> =
            (0..PARTS).flat_map(|part| (0..WORDS).map(move |word| place(part, word))).collect();
        places.sort_unstable();
        assert!(places.into_iter().eq(0..BLOCK));
    }
}
