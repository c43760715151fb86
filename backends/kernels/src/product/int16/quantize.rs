//! f32 to multiples of a unit.

use super::{ACTIVATIONS, GROUP, Int16, LANES, LARGEST, WEIGHTS, lanes_of_group};
use std::arch::x86_64::*;

/// What the multiples of a group have to keep to.
#[derive(Debug, Clone, Copy)]
pub enum Range {
    Activations,
    Weights,
}

impl Range {
    /// The unit for values with this largest size and this sum of sizes; not a number where a value is not finite.
    fn unit(self, largest: f32, sum: f32) -> f32 {
        match self {
            _ if !largest.is_finite() => f32::NAN,
            Self::Activations => (largest / LARGEST).max(sum / ACTIVATIONS),
            Self::Weights => largest / WEIGHTS,
        }
    }
}

/// The sum of their sizes does not matter.
pub fn unit_of_weights(largest: f32) -> f32 {
    Range::Weights.unit(largest, 0.0)
}

/// By what values are multiplied: nothing is left of those whose unit is too small to divide by, or not finite.
pub fn factor(unit: f32) -> f32 {
    if unit.is_normal() { 1.0 / unit } else { 0.0 }
}

/// Values along the depth, group by group. A value that is not finite makes all products of its group not a number.
pub fn along(values: &[f32], range: Range, lanes: &mut [Int16]) {
    let (whole, rest) = values.as_chunks::<GROUP>();
    let (groups, last) = lanes.split_at_mut(whole.len() * LANES);
    for (values, lanes) in whole.iter().zip(groups.as_chunks_mut::<LANES>().0) {
        // SAFETY: lanes of integers are used only where the CPU has the instructions.
        unsafe { group(values, range, lanes) };
    }
    if !rest.is_empty() {
        let mut values = [0.0; GROUP];
        values[..rest.len()].copy_from_slice(rest);
        let mut lanes = [Int16::default(); LANES];
        // SAFETY: as above.
        unsafe { group(&values, range, &mut lanes) };
        let pairs = lanes_of_group(rest.len()) - 1;
        last[..pairs].copy_from_slice(&lanes[..pairs]);
        last[pairs] = lanes[LANES - 1];
    }
}

#[target_feature(enable = "avx2,fma")]
fn group(values: &[f32; GROUP], range: Range, lanes: &mut [Int16; LANES]) {
    // SAFETY: eight values are read.
    let load = |values: &[f32; 8]| unsafe { _mm256_loadu_ps(values.as_ptr()) };
    let sign = _mm256_set1_ps(-0.0);
    let (mut largest, mut sum) = (_mm256_setzero_si256(), _mm256_setzero_ps());
    for values in values.as_chunks::<8>().0 {
        let sizes = _mm256_andnot_ps(sign, load(values));
        // Sizes are in the order of their bits; what is not a number is beyond all others.
        largest = _mm256_max_epu32(largest, _mm256_castps_si256(sizes));
        sum = _mm256_add_ps(sum, sizes);
    }
    // SAFETY: both have eight elements of 32 bits.
    let (largest, sum) = unsafe {
        (std::mem::transmute::<__m256i, [u32; 8]>(largest), std::mem::transmute::<__m256, [f32; 8]>(sum))
    };
    let largest = f32::from_bits(largest.into_iter().fold(0, u32::max));
    let unit = range.unit(largest, sum.iter().sum());
    let by = _mm256_set1_ps(factor(unit));
    let (pairs, last) = lanes.split_at_mut(LANES - 1);
    for (values, pairs) in values.as_chunks::<16>().0.iter().zip(pairs.as_chunks_mut::<8>().0) {
        let integers = |values| _mm256_cvtps_epi32(_mm256_mul_ps(load(values), by));
        let [first, second] = values.as_chunks::<8>().0 else { continue };
        // SAFETY: eight lanes are written.
        unsafe { _mm256_storeu_si256(pairs.as_mut_ptr().cast(), words(integers(first), integers(second))) };
    }
    last[0] = Int16::of_unit(unit);
}

/// Sixteen integers of 32 bits in 16, in their order.
#[target_feature(enable = "avx2")]
#[inline]
fn words(a: __m256i, b: __m256i) -> __m256i {
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b))
}

/// Rows of two depths, each value times the factor of its column, as pairs. `second` may be missing.
#[target_feature(enable = "avx2,fma")]
pub fn across(first: &[f32], second: Option<&[f32]>, factors: &[f32], lanes: &mut [Int16]) {
    let whole = factors.len() / 8 * 8;
    for i in (0..whole).step_by(8) {
        // SAFETY: all four have `whole` elements.
        unsafe {
            let by = _mm256_loadu_ps(factors[i..whole].as_ptr());
            let integers = |values: &[f32]| {
                _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values[i..whole].as_ptr()), by))
            };
            let low = integers(first);
            let high = second.map_or(_mm256_setzero_si256(), integers);
            let low = _mm256_and_si256(low, _mm256_set1_epi32(0xffff));
            let pairs = _mm256_or_si256(low, _mm256_slli_epi32::<16>(high));
            _mm256_storeu_si256(lanes[i..whole].as_mut_ptr().cast(), pairs);
        }
    }
    for i in whole..factors.len() {
        let integer = |values: &[f32]| (values[i] * factors[i]).round_ties_even() as i16 as u16;
        lanes[i] = Int16(u32::from(integer(first)) | u32::from(second.map_or(0, integer)) << 16);
    }
}

/// The largest size of each column, as far as it has been seen, as bits: what is not a number is beyond all others.
#[target_feature(enable = "avx2,fma")]
pub fn add_sizes(values: &[f32], largest: &mut [u32]) {
    for (largest, value) in largest.iter_mut().zip(values) {
        *largest = value.abs().to_bits().max(*largest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::level::Level;

    fn values_of(lanes: &[Int16]) -> Vec<f32> {
        let (unit, pairs) = lanes.split_last().unwrap();
        let unit = f32::from_bits(unit.0);
        pairs
            .iter()
            .flat_map(|pair| [pair.0 as i16, (pair.0 >> 16) as i16])
            .map(|m| f32::from(m) * unit)
            .collect()
    }

    #[test]
    fn a_group_is_off_by_half_a_unit_at_most() {
        if !Level::Avx2.is_there() {
            return eprintln!("left out: this CPU has no AVX2");
        }
        for len in [64, 1, 2, 63, 31] {
            for size in [1.0, 1e-30, 1e30] {
                let values: Vec<f32> = (0..len).map(|i| (i as f32 * 0.77 + 0.3).sin() * size).collect();
                for range in [Range::Activations, Range::Weights] {
                    let mut lanes = vec![Int16::default(); lanes_of_group(len)];
                    along(&values, range, &mut lanes);
                    let unit = f32::from_bits(lanes.last().unwrap().0);
                    for (value, got) in values.iter().zip(values_of(&lanes)) {
                        assert!((value - got).abs() <= 0.501 * unit, "{range:?} {len} {size}: {value} {got}");
                    }
                    let multiples: f32 = values_of(&lanes).iter().map(|v| v.abs() / unit).sum();
                    assert!(multiples <= 131_072.0 || matches!(range, Range::Weights));
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_a_number_and_what_has_no_size_is_zero() {
        if !Level::Avx2.is_there() {
            return eprintln!("left out: this CPU has no AVX2");
        }
        for (value, not_a_number) in [
            (f32::NAN, true),
            (-f32::NAN, true),
            (f32::INFINITY, true),
            (0.0, false),
            (f32::MIN_POSITIVE, false),
        ] {
            let mut values = [0.0; GROUP];
            values[17] = value;
            let mut lanes = [Int16::default(); LANES];
            along(&values, Range::Activations, &mut lanes);
            let got = values_of(&lanes);
            assert!(
                got.iter().all(|v| if not_a_number { v.is_nan() } else { *v == 0.0 }),
                "{value}: {got:?}"
            );
        }
    }
}
