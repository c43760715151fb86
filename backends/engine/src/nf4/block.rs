//! Blocks of values to codes.
//!
//! Every form gives the same bits: a code is the number of boundaries below the scaled value, however they
//! are counted.

use super::{BLOCK, LEVELS};

/// Bytes of a block's codes.
const BYTES: usize = BLOCK / 2;

/// What a smaller `absmax` is taken for, so that its reciprocal is finite.
const SMALLEST_ABSMAX: f32 = 1e-38;

/// The boundaries between neighbouring levels: their midpoints.
const BOUNDARIES: [f32; 15] = {
    let mut boundaries = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        boundaries[i] = ((LEVELS[i] as f64 + LEVELS[i + 1] as f64) / 2.0) as f32;
        i += 1;
    }
    boundaries
};

/// Quantizes values, of which the last block may be cut short, to the codes and the `absmax` of each block.
/// Returns whether all values are finite. An odd last value is paired with zero.
pub fn quantize(values: &[f32], codes: &mut [u8], absmax: &mut [f32]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has the instructions.
        return unsafe { avx2::quantize(values, codes, absmax) };
    }
    quantize_with(full_block, values, codes, absmax)
}

/// Quantizes with one of the forms of [`full_block`].
#[inline(always)]
fn quantize_with(
    full_block: impl Fn(&[f32; BLOCK], f32) -> [u8; BYTES],
    values: &[f32],
    codes: &mut [u8],
    absmax: &mut [f32],
) -> bool {
    let (blocks, last) = values.as_chunks::<BLOCK>();
    let (block_codes, last_codes) = codes.split_at_mut(blocks.len() * BYTES);
    let mut all_finite = true;
    let block_codes = block_codes.as_chunks_mut::<BYTES>().0;
    for ((values, codes), absmax) in blocks.iter().zip(block_codes).zip(&mut *absmax) {
        let (largest, finite) = largest_magnitude(values);
        *codes = full_block(values, 1.0 / largest.max(SMALLEST_ABSMAX));
        *absmax = largest;
        all_finite &= finite;
    }
    if !last.is_empty() {
        let (largest, finite) = largest_magnitude(last);
        let largest = largest.max(SMALLEST_ABSMAX);
        last_block(last, largest, last_codes);
        absmax[blocks.len()] = largest;
        all_finite &= finite;
    }
    all_finite
}

/// The largest magnitude, and whether all values are finite. What is not a number is passed over.
#[inline(always)]
fn largest_magnitude(values: &[f32]) -> (f32, bool) {
    // As integers magnitudes are in the same order, with infinity and NaN behind them, and vectorise.
    let bits = values.iter().fold(0, |bits, v| v.abs().to_bits().max(bits));
    match bits < f32::INFINITY.to_bits() {
        true => (f32::from_bits(bits), true),
        false => (values.iter().fold(0f32, |m, v| m.max(v.abs())), false),
    }
}

/// The codes of a block whose values are multiplied by `scale`.
fn full_block(values: &[f32; BLOCK], scale: f32) -> [u8; BYTES] {
    const LANES: usize = 16;
    let mut levels = [0; BLOCK];
    for (levels, values) in levels.as_chunks_mut::<LANES>().0.iter_mut().zip(values.as_chunks::<LANES>().0) {
        let scaled = values.map(|v| v * scale);
        // In lanes as wide as those compared, so that all of it vectorises.
        let mut counts = [0u32; LANES];
        for boundary in BOUNDARIES {
            for (count, value) in counts.iter_mut().zip(&scaled) {
                *count += u32::from(*value > boundary);
            }
        }
        *levels = counts.map(|count| count as u8);
    }
    let mut codes = [0; BYTES];
    pair(&levels, &mut codes);
    codes
}

/// The codes of a last block that is not full: there bitsandbytes divides, where it multiplies by the
/// reciprocal in others.
fn last_block(values: &[f32], absmax: f32, codes: &mut [u8]) {
    let mut levels = [level(0.0); BLOCK];
    for (level_of, value) in levels.iter_mut().zip(values) {
        *level_of = level(value / absmax);
    }
    pair(&levels, codes);
}

fn level(value: f32) -> u8 {
    BOUNDARIES.iter().map(|&boundary| u8::from(value > boundary)).sum()
}

/// Two levels a byte, the first in the high nibble.
fn pair(levels: &[u8; BLOCK], codes: &mut [u8]) {
    for (code, pair) in codes.iter_mut().zip(levels.as_chunks::<2>().0) {
        *code = pair[0] << 4 | pair[1];
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{BLOCK, BOUNDARIES, BYTES, quantize_with};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2")]
    pub fn quantize(values: &[f32], codes: &mut [u8], absmax: &mut [f32]) -> bool {
        quantize_with(|values, scale| full_block(values, scale), values, codes, absmax)
    }

    /// Finds the number of boundaries by halving: four comparisons instead of fifteen.
    #[target_feature(enable = "avx2")]
    fn full_block(values: &[f32; BLOCK], scale: f32) -> [u8; BYTES] {
        let scale = _mm256_set1_ps(scale);
        let counts: [__m256i; 8] = std::array::from_fn(|i| {
            // SAFETY: the block has 64 values.
            let values = unsafe { _mm256_loadu_ps(values.as_ptr().add(8 * i)) };
            negated_counts(_mm256_mul_ps(values, scale))
        });
        // To bytes. Each of these puts the halves of registers side by side: in the end all first halves lie
        // in the lower half.
        let bytes = |i: usize| {
            let low = _mm256_packs_epi32(counts[i], counts[i + 1]);
            let high = _mm256_packs_epi32(counts[i + 2], counts[i + 3]);
            _mm256_packs_epi16(low, high)
        };
        // 16 times the first and once the second of a pair.
        let nibbles = _mm256_set1_epi16(0x0110);
        let [low, high] = [bytes(0), bytes(4)].map(|b| _mm256_abs_epi16(_mm256_maddubs_epi16(nibbles, b)));
        let codes = _mm256_packus_epi16(low, high);
        let (first, second) = (_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
        let mut out = [0; BYTES];
        // SAFETY: the codes have 32 bytes.
        unsafe {
            let to = out.as_mut_ptr().cast::<__m128i>();
            _mm_storeu_si128(to, _mm_unpacklo_epi16(first, second));
            _mm_storeu_si128(to.add(1), _mm_unpackhi_epi16(first, second));
        }
        out
    }

    /// The number of boundaries below each value, negated, for that is how a comparison counts.
    #[target_feature(enable = "avx2")]
    fn negated_counts(values: __m256) -> __m256i {
        let above = |boundaries| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(values, boundaries));
        let twice = |counts| _mm256_add_epi32(counts, counts);
        // What the next bit is decided by; look-ups take the lowest bits of a negated count.
        let [half, quarters, eighths] = [&HALVES, &QUARTERS, &EIGHTHS].map(|table| {
            // SAFETY: each table has 8 elements.
            unsafe { _mm256_loadu_ps(table.as_ptr()) }
        });
        let count = above(_mm256_set1_ps(BOUNDARIES[7]));
        let count = _mm256_add_epi32(twice(count), above(_mm256_permutevar_ps(half, count)));
        let count = _mm256_add_epi32(twice(count), above(_mm256_permutevar_ps(quarters, count)));
        _mm256_add_epi32(twice(count), above(_mm256_permutevar8x32_ps(eighths, count)))
    }

    const HALVES: [f32; 8] = table(2);
    const QUARTERS: [f32; 8] = table(4);
    const EIGHTHS: [f32; 8] = table(8);

    /// The middles of `parts` parts of the boundaries, by the part's negated number modulo `parts`, repeated
    /// over the register.
    const fn table(parts: usize) -> [f32; 8] {
        let mut table = [0.0; 8];
        let mut i = 0;
        while i < 8 {
            let part = (parts - i % parts) % parts;
            table[i] = BOUNDARIES[part * (16 / parts) + 8 / parts - 1];
            i += 1;
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Form = fn(&[f32], &mut [u8], &mut [f32]) -> bool;

    fn forms() -> Vec<Form> {
        let portable: Form = |values, codes, absmax| quantize_with(full_block, values, codes, absmax);
        vec![quantize, portable]
    }

    /// As it is defined: one value after the other.
    fn plain(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
        let blocks = values.chunks(BLOCK).map(|block| {
            let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
            let absmax = largest.max(SMALLEST_ABSMAX);
            let full = block.len() == BLOCK;
            let scaled = block.iter().map(|v| if full { v * (1.0 / absmax) } else { v / absmax });
            let mut levels: Vec<u8> = scaled.map(level).collect();
            levels.resize(block.len().next_multiple_of(2), level(0.0));
            let codes: Vec<u8> = levels.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect();
            (codes, if full { largest } else { absmax })
        });
        let (codes, absmax): (Vec<_>, Vec<_>) = blocks.unzip();
        (codes.concat(), absmax)
    }

    fn check(values: &[f32]) -> Result<(), TestCaseError> {
        let (codes, absmax) = plain(values);
        for form in forms() {
            let mut found = (vec![0; codes.len()], vec![0.0; absmax.len()]);
            let finite = form(values, &mut found.0, &mut found.1);
            prop_assert_eq!(finite, values.iter().all(|v| v.is_finite()));
            prop_assert_eq!(&found.0, &codes);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&found.1), bits(&absmax));
        }
        Ok(())
    }

    #[test]
    fn values_at_and_beside_a_boundary_get_the_same_code_in_every_form() {
        // The first value of a block makes the scale 1 or very small.
        for unit in [1.0f32, f32::MIN_POSITIVE, 1e-38, 1e-40, f32::MAX] {
            let near = |b: f32| [b, b.next_up(), b.next_down()];
            let values = BOUNDARIES.into_iter().chain(LEVELS).flat_map(near).chain([0.0, -0.0]);
            let values: Vec<f32> = values.map(|v| v.clamp(-1.0, 1.0) * unit).collect();
            let blocks: Vec<f32> =
                values.chunks(BLOCK - 1).flat_map(|block| [&[unit], block].concat()).collect();
            check(&blocks).unwrap();
        }
    }

    #[test]
    fn a_block_of_zeros_has_the_code_of_zero() {
        check(&[0.0; BLOCK]).unwrap();
        check(&[-0.0; BLOCK + 3]).unwrap();
    }

    #[test]
    fn the_last_block_may_have_any_length() {
        let values: Vec<f32> = (0..3 * BLOCK).map(|i| (i as f32 * 0.37).sin()).collect();
        for len in 0..=values.len() {
            check(&values[..len]).unwrap();
        }
    }

    proptest! {
        #[test]
        fn all_forms_agree_on_what_is_drawn_evenly(values in prop::collection::vec(-1f32..1.0, 0..300)) {
            check(&values)?;
        }

        #[test]
        fn all_forms_agree_on_any_bits(bits in prop::collection::vec(any::<u32>(), 0..300)) {
            let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            check(&values)?;
        }

        #[test]
        fn all_forms_agree_where_a_value_is_not_finite(
            mut values in prop::collection::vec(-1f32..1.0, 1..200),
            index in any::<prop::sample::Index>(),
            odd in prop::sample::select(vec![f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
        ) {
            *index.get_mut(&mut values) = odd;
            check(&values)?;
        }
    }
}
