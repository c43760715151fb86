//! NF4 with AVX2, in integers of 16 bits.
//!
//! AVX2 looks up bytes: two look-ups give a level in 16 bits, and four, with many more shuffles, one in f32. So the
//! levels are taken as multiples of 1/[`ONE`], and each block of the vector as 16-bit multiples of a scale of its own.
//! What is left over, less than one of these multiples, is multiplied by the upper byte of the levels alone. Sums of a
//! block are exact in 32 bits; blocks are added up in f32. What remains is the rounding of the levels: a product of
//! random vectors is off by some 1e-5 of its usual size (rounding the factors to bf16: 2e-3).

use crate::dot::avx2::sum_of_lanes;
use crate::nf4::avx2::{absmax, nibbles, table};
use evalfw_engine::nf4::{BLOCK, LEVELS, Nf4Tensor};
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
    /// Of each block: what 1 times a level of 1 stands for.
    scales: Vec<f32>,
}

impl Blocks {
    /// `None` where the vector does not consist of whole blocks or is not finite.
    ///
    /// # Safety
    /// The CPU has AVX2 and FMA.
    pub unsafe fn new(x: &[f32]) -> Option<Self> {
        let (blocks, rest) = x.as_chunks::<BLOCK>();
        if !rest.is_empty() || !x.iter().all(|v| v.is_finite()) {
            return None;
        }
        // SAFETY: by the contract of this function.
        let (blocks, scales) = blocks.iter().map(|x| unsafe { block(x) }).unzip();
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
        let step = _mm256_set1_epi16(STEP);
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
            // SAFETY: all parts are as large as a register, and begin where one may.
            let (x, left_over): ([__m256i; PARTS], [__m256i; 2]) = unsafe {
                let load = |from: *const __m256i| _mm256_load_si256(from);
                (
                    x.multiples.each_ref().map(|x| load(x.as_ptr().cast())),
                    x.left_over.each_ref().map(|x| load(x.as_ptr().cast())),
                )
            };
            let products: [__m256i; PARTS] = std::array::from_fn(|i| _mm256_madd_epi16(levels[i], x[i]));
            let [first, second] =
                [[products[0], products[1]], [products[2], products[3]]].map(|[a, b]| _mm256_add_epi32(a, b));
            let upper = _mm256_sub_epi16(
                _mm256_maddubs_epi16(left_over[0], b),
                _mm256_maddubs_epi16(left_over[1], d),
            );
            let sums = _mm256_add_epi32(_mm256_add_epi32(first, second), _mm256_madd_epi16(upper, step));
            sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(*scale), sum);
        }
        sum_of_lanes(sum)
    }
}

/// Where the weight that is `byte` in the register of its half lies in a block.
const fn place(half: usize, byte: usize) -> usize {
    2 * byte + 1 - half
}

/// Where the level of that weight is found when it has been unpacked, which takes eight bytes of each half of a
/// register: in which register, and in which word.
const fn unpacked(half: usize, byte: usize) -> (usize, usize) {
    (2 * half + byte % 16 / 8, byte / 16 * 8 + byte % 8)
}

/// And the scale: what 1 times a level of 1 stands for.
#[target_feature(enable = "avx2,fma")]
fn block(x: &[f32; BLOCK]) -> (Block, f32) {
    let halves: [[f32; BYTES]; 2] =
        std::array::from_fn(|half| std::array::from_fn(|byte| x[place(half, byte)]));
    let (mut largest, mut sums) = ([0f32; BYTES], [0f32; LANES]);
    for (half, values) in halves.iter().enumerate() {
        for (byte, (value, largest)) in values.iter().zip(&mut largest).enumerate() {
            *largest = largest.max(value.abs());
            sums[unpacked(half, byte).1 / 2] += value.abs();
        }
    }
    let [largest, largest_sum] =
        [&largest[..], &sums].map(|sizes| sizes.iter().copied().fold(0f32, f32::max));
    let scale = (largest / LARGEST).max(largest_sum / LARGEST_SUM);
    let mut block = Block { multiples: [[0; WORDS]; PARTS], left_over: [[0; BYTES]; 2] };
    if !scale.is_normal() {
        // Nothing that the sum would show.
        return (block, 0.0);
    }
    for (half, values) in halves.iter().enumerate() {
        for (byte, value) in values.iter().map(|value| value / scale).enumerate() {
            let multiple = if half == 0 { value.floor() } else { value.ceil() };
            let (part, word) = unpacked(half, byte);
            block.multiples[part][word] = multiple as i16;
            block.left_over[half][byte] = ((value - multiple).abs() * STEPS).round_ties_even() as u8;
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
            // SAFETY: as above, also below.
            assert!(unsafe { Blocks::new(&[bad; 64]) }.is_none());
        }
        assert!(unsafe { Blocks::new(&[1.0; 65]) }.is_none());
    }

    #[test]
    fn each_weight_has_a_place() {
        let of_all = || (0..2).flat_map(|half| (0..BYTES).map(move |byte| (half, byte)));
        let mut places: Vec<_> = of_all().map(|(half, byte)| place(half, byte)).collect();
        places.sort_unstable();
        assert!(places.into_iter().eq(0..BLOCK));
        let mut words: Vec<_> = of_all().map(|(half, byte)| unpacked(half, byte)).collect();
        words.sort_unstable();
        assert!(words.into_iter().eq((0..PARTS).flat_map(|part| (0..WORDS).map(move |word| (part, word)))));
    }
}
