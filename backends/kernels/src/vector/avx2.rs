//! NF4 with AVX2, in integers of 16 bits.
//!
//! AVX2 looks up bytes: two look-ups give a level in 16 bits, and four, with many more shuffles, one in f32. So the
//! levels are taken as multiples of 1/[`ONE`], and each block of the vector as 16-bit multiples of a scale of its own.
//! What is left over, less than one of these multiples, is multiplied by the upper byte of the levels alone. Sums of a
//! block are exact in 32 bits; blocks are added up in f32. What remains is the rounding of the levels, and a little
//! of the scales of blocks: a product of random vectors is off by some 1e-5 of its usual size.
//!
//! Where factors may be rounded to bf16, which is off by 2e-3, what is left over is left out: some 3e-5.

use crate::nf4::avx2::{absmax_times, nibbles, tables, words};
use evalfw_engine::nf4::{BLOCK, Nf4Tensor};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// What stands for a level of 1: of the numbers of 15 bits the one whose multiples are nearest to the levels, 3.7e-6 in
/// the mean.
const ONE: f32 = 25545.0;
/// Steps of what is left over in one multiple of the scale. Four of them times the upper bytes of the levels fit into 16
/// bits.
const STEPS: f32 = 64.0;
/// What stands for one step times one unit of a level's upper byte.
const STEP: i16 = 256 / STEPS as i16;
/// Bytes by which codes are fetched ahead: what the CPU fetches by itself stops at the end of a page.
const AHEAD: usize = 2048;
const LEVELS: [[u8; 16]; 2] = words(ONE);
/// Rows whose lanes are summed together: by themselves they take as long as two blocks.
const ROWS: usize = 4;
/// Rows whose scales are computed together.
const SCALED: usize = 4 * ROWS;
/// Lanes of sums in a register.
const LANES: usize = 8;
/// Words in a register.
const WORDS: usize = 16;
/// Bytes in a register.
const BYTES: usize = 32;
/// Registers of a block.
const PARTS: usize = BLOCK / WORDS;
/// What the sizes of the factors of one lane may add up to: times [`ONE`] they fit into 32 bits. Rounding adds up to
/// one to each of its eight, and what is left over as much again.
const LARGEST_SUM: f32 = 84066.0 - 16.0;
/// The largest multiple of a scale, with room for rounding.
const LARGEST: f32 = 32766.0;

thread_local! {
    /// Memory to work in.
    static SCALES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A block of the vector, in the order in which the levels of its weights are looked up: first those of the low nibbles,
/// which are the second in their bytes.
///
/// The multiples of the first half are rounded down and those of the second up, so that what is left over has one sign
/// in each, as the instruction wants it. As the halves are subtracted from each other, what the lower bytes of the levels
/// would have given cancels out but for chance.
#[repr(align(32))]
struct Block {
    multiples: [[i16; WORDS]; PARTS],
    left_over: [[u8; BYTES]; 2],
}

/// A vector of whole blocks.
pub struct Blocks {
    blocks: Vec<Block>,
    /// Of each block: what 1 times a level of 1 stands for; again for each of [`SCALED`] rows.
    scales: Vec<f32>,
    rounding: Rounding,
}

/// What the multiples stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// The values but for what is left over.
    WithRest,
    /// The values, rounded.
    ToMultiples,
}

impl Blocks {
    /// `None` where the vector does not consist of whole blocks, or sizes in one add up to what is not finite.
    ///
    /// # Safety
    /// The CPU has AVX2 and FMA.
    pub unsafe fn new(x: &[f32], rounding: Rounding) -> Option<Self> {
        let (parts, rest) = x.as_chunks::<BLOCK>();
        if !rest.is_empty() {
            return None;
        }
        let (mut blocks, mut scales) = (Vec::with_capacity(parts.len()), Vec::with_capacity(parts.len()));
        for part in parts {
            // SAFETY: by the contract of this function.
            let (block, scale) = unsafe { block(part, rounding) }?;
            blocks.push(block);
            scales.push(scale);
        }
        Some(Self { blocks, scales: scales.repeat(SCALED), rounding })
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
        let width = self.scales.len() / SCALED;
        let tables = tables(&LEVELS);
        for (i, out) in out.chunks_mut(SCALED).enumerate() {
            let start = (first + SCALED * i) * width;
            scales.resize(out.len() * width, 0.0);
            absmax_times(&tensor.scales, start, &self.scales, scales);
            let (codes, _) = tensor.codes[start * (BLOCK / 2)..].as_chunks();
            let rows = scales.chunks(ROWS * width).zip(codes.chunks(ROWS * width));
            for (out, (scales, codes)) in out.chunks_mut(ROWS).zip(rows) {
                let mut sums = [_mm256_setzero_ps(); ROWS];
                let rows = scales.chunks(width).zip(codes.chunks(width));
                for (sum, (scales, codes)) in sums.iter_mut().zip(rows) {
                    *sum = match self.rounding {
                        Rounding::WithRest => self.product::<true>(codes, scales, tables),
                        Rounding::ToMultiples => self.product::<false>(codes, scales, tables),
                    };
                }
                for (out, sum) in out.iter_mut().zip(sums_of_lanes(sums)) {
                    *out += sum;
                }
            }
        }
    }

    /// With one row, in parts whose sum it is.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn product<const REST: bool>(
        &self,
        codes: &[[u8; BLOCK / 2]],
        scales: &[f32],
        [lower, upper]: [__m256i; 2],
    ) -> __m256 {
        let mut sum = _mm256_setzero_ps();
        let step = _mm256_set1_epi16(STEP);
        for ((codes, scale), x) in codes.iter().zip(scales).zip(&self.blocks) {
            // SAFETY: a register has 32 bytes. What is fetched ahead need not be there.
            let codes = unsafe {
                _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
                _mm256_loadu_si256(codes.as_ptr().cast())
            };
            let [second, first] = nibbles(codes);
            let (a, b) = (_mm256_shuffle_epi8(lower, second), _mm256_shuffle_epi8(upper, second));
            let (c, d) = (_mm256_shuffle_epi8(lower, first), _mm256_shuffle_epi8(upper, first));
            let levels = [
                _mm256_unpacklo_epi8(a, b),
                _mm256_unpackhi_epi8(a, b),
                _mm256_unpacklo_epi8(c, d),
                _mm256_unpackhi_epi8(c, d),
            ];
            let mut sums = _mm256_setzero_si256();
            for (levels, multiples) in levels.into_iter().zip(&x.multiples) {
                // SAFETY: parts of a block are as large as a register and begin where one may, also below.
                let multiples = unsafe { _mm256_load_si256(multiples.as_ptr().cast()) };
                sums = _mm256_add_epi32(sums, _mm256_madd_epi16(levels, multiples));
            }
            if REST {
                let [of_second, of_first] = &x.left_over;
                // SAFETY: as above.
                let of_second = unsafe { _mm256_load_si256(of_second.as_ptr().cast()) };
                let of_first = unsafe { _mm256_load_si256(of_first.as_ptr().cast()) };
                let rest =
                    _mm256_sub_epi16(_mm256_maddubs_epi16(of_second, b), _mm256_maddubs_epi16(of_first, d));
                sums = _mm256_add_epi32(sums, _mm256_madd_epi16(rest, step));
            }
            sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(*scale), sum);
        }
        sum
    }
}

/// Of each register.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn sums_of_lanes(registers: [__m256; ROWS]) -> [f32; ROWS] {
    let [a, b, c, d] = registers;
    let halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
    let mut out = [0.0; ROWS];
    // SAFETY: four elements are written.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
    out
}

/// And the scale: what 1 times a level of 1 stands for. `None` where the sizes of a lane add up to what is not finite.
// Loops: closures that the methods of arrays call are not compiled for the instructions.
#[target_feature(enable = "avx2,fma")]
fn block(x: &[f32; BLOCK], rounding: Rounding) -> Option<(Block, f32)> {
    let halves = in_order(x);
    let sign = _mm256_set1_ps(-0.0);
    let mut largest = _mm256_setzero_ps();
    // Neighbouring words of the registers come into one lane, and so do the four registers.
    let mut sums = [_mm256_setzero_ps(); PARTS];
    for half in halves {
        for (sum, values) in sums.iter_mut().zip(half) {
            let sizes = _mm256_andnot_ps(sign, values);
            largest = _mm256_max_ps(largest, sizes);
            *sum = _mm256_add_ps(*sum, sizes);
        }
    }
    let [a, b, c, d] = sums;
    let sums = _mm256_hadd_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
    let finite = _mm256_cmp_ps::<_CMP_LT_OQ>(sums, _mm256_set1_ps(f32::INFINITY));
    if _mm256_movemask_ps(finite) != (1 << LANES) - 1 {
        return None;
    }
    let scale = (largest_of_lanes(largest) / LARGEST).max(largest_of_lanes(sums) / LARGEST_SUM);
    let mut block = Block { multiples: [[0; WORDS]; PARTS], left_over: [[0; BYTES]; 2] };
    if !scale.is_normal() {
        // Nothing that the sum would show.
        return Some((block, 0.0));
    }
    let factor = _mm256_set1_ps(1.0 / scale);
    for (half, values) in halves.into_iter().enumerate() {
        for (group, values) in values.into_iter().enumerate() {
            let values = _mm256_mul_ps(values, factor);
            let multiples = match (rounding, half) {
                (Rounding::ToMultiples, _) => values,
                (Rounding::WithRest, 0) => _mm256_floor_ps(values),
                (Rounding::WithRest, _) => _mm256_ceil_ps(values),
            };
            let words = block.multiples[2 * half + group % 2].as_mut_ptr();
            // SAFETY: eight words are written, of which there are twice as many.
            unsafe {
                let words = words.add(group / 2 * LANES);
                _mm_storeu_si128(words.cast(), narrow(_mm256_cvtps_epi32(multiples)));
            }
            if rounding == Rounding::WithRest {
                let left_over = _mm256_andnot_ps(sign, _mm256_sub_ps(values, multiples));
                let left_over = _mm256_cvtps_epi32(_mm256_mul_ps(left_over, _mm256_set1_ps(STEPS)));
                let narrow = narrow(left_over);
                // SAFETY: eight bytes are written, of which there are four times as many.
                unsafe {
                    let bytes = block.left_over[half].as_mut_ptr().add(group * LANES);
                    _mm_storel_epi64(bytes.cast(), _mm_packus_epi16(narrow, narrow));
                }
            }
        }
    }
    Some((block, scale / ONE))
}

/// The values at odd places, whose weights are second in their bytes, and those at even places. Their levels are
/// unpacked from eight bytes of each half of a register: of four registers in this order, the words of the first two
/// parts are those of the first and third and of the second and fourth.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn in_order(x: &[f32; BLOCK]) -> [[__m256; PARTS]; 2] {
    let mut halves = [[_mm256_setzero_ps(); PARTS]; 2];
    for (i, x) in x.as_chunks::<{ 2 * LANES }>().0.iter().enumerate() {
        // SAFETY: eight values are there, twice.
        let (a, b) = unsafe { (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x[LANES..].as_ptr())) };
        halves[0][i] = middle_changed(_mm256_shuffle_ps::<0b11_01_11_01>(a, b));
        halves[1][i] = middle_changed(_mm256_shuffle_ps::<0b10_00_10_00>(a, b));
    }
    halves
}

/// Of each half of both registers there are two values: those in the middle change places.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn middle_changed(values: __m256) -> __m256 {
    _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(values)))
}

/// Eight integers of 32 bits in 16.
#[target_feature(enable = "avx2")]
#[inline]
fn narrow(values: __m256i) -> __m128i {
    _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256::<1>(values))
}

#[target_feature(enable = "avx2")]
#[inline]
fn largest_of_lanes(values: __m256) -> f32 {
    let largest = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps::<1>(values));
    let largest = _mm_max_ps(largest, _mm_movehl_ps(largest, largest));
    _mm_cvtss_f32(_mm_max_ss(largest, _mm_movehdup_ps(largest)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROUNDINGS: [Rounding; 2] = [Rounding::WithRest, Rounding::ToMultiples];

    /// The largest distance from sums in f64, and what it may be: each level is off by at most 1e-5 of the largest of
    /// its block and, where a value is rounded, so is that by 4.8e-5; errors of different terms have different signs.
    fn distance(tensor: &Nf4Tensor, x: &[f32], rounding: Rounding) -> (f64, f64) {
        let [height, width] = tensor.shape;
        let mut out = vec![0.0; height];
        // SAFETY: the callers have seen that the CPU has the instructions.
        unsafe { Blocks::new(x, rounding).unwrap().add_rows(tensor, 0, &mut out) };
        let largest: f64 = x.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max);
        let mut most = 0f64;
        let mut scale = 0f64;
        for (out, row) in out.iter().zip(tensor.dequantize().chunks(width)) {
            let exact: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            most = most.max((f64::from(*out) - exact).abs());
            scale = row.iter().fold(scale, |scale, w| scale.max(f64::from(w.abs())));
        }
        let each = match rounding {
            Rounding::WithRest => 4e-5,
            Rounding::ToMultiples => 1e-4,
        };
        (most, each * (width as f64).sqrt() * scale * largest)
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
                let tensor = Nf4Tensor::quantize([height, width], &values);
                for rounding in ROUNDINGS {
                    let (distance, tolerance) = distance(&tensor, &x, rounding);
                    prop_assert!(distance <= tolerance, "{rounding:?}: {distance} {tolerance}");
                }
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
                for rounding in ROUNDINGS {
                    let (distance, tolerance) = distance(&tensor, &x, rounding);
                    // All errors have one sign.
                    let tolerance = tolerance * (x.len() as f64).sqrt();
                    assert!(distance <= tolerance, "{rounding:?}: {distance} {tolerance}");
                }
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
            unsafe { Blocks::new(&[size; 64], Rounding::WithRest).unwrap().add_rows(&tensor, 0, &mut out) };
            assert_eq!(out, [1.0]);
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in 0..BLOCK {
                let x: [f32; BLOCK] = std::array::from_fn(|i| if i == place { bad } else { 1.0 });
                // SAFETY: as above, also below.
                assert!(unsafe { Blocks::new(&x, Rounding::WithRest) }.is_none(), "{bad} at {place}");
            }
        }
        assert!(unsafe { Blocks::new(&[f32::MAX; 64], Rounding::WithRest) }.is_none());
        assert!(unsafe { Blocks::new(&[1.0; 65], Rounding::WithRest) }.is_none());
    }

    /// A weight of 1 at one place after the other picks its value.
    #[test]
    fn each_weight_has_its_value() {
        if !is_there() {
            return;
        }
        let x: [f32; BLOCK] = std::array::from_fn(|i| (i as f32 + 1.0) * if i % 3 == 0 { -1.0 } else { 1.0 });
        for place in 0..BLOCK {
            let weights: [f32; BLOCK] = std::array::from_fn(|i| if i == place { 1.0 } else { 0.0 });
            let tensor = Nf4Tensor::quantize([1, BLOCK], &weights);
            for (rounding, tolerance) in ROUNDINGS.into_iter().zip([1e-3, 3.2e-3]) {
                let mut out = [0.0];
                // SAFETY: the CPU has the instructions.
                unsafe { Blocks::new(&x, rounding).unwrap().add_rows(&tensor, 0, &mut out) };
                let distance = (out[0] - x[place]).abs();
                assert!(distance < tolerance, "{place}, {rounding:?}: {} {}", out[0], x[place]);
            }
        }
    }
}
