//! Products of bytes with AVX2, two in each lane of 16 bits.

use super::{Aligned, BYTES, GROUP, NIBBLES};
use std::arch::x86_64::*;

/// Bytes by which codes are fetched ahead.
const AHEAD: usize = 2048;
/// Bytes of a register.
const REGISTER: usize = 32;

#[target_feature(enable = "avx2")]
pub fn products(vector: &[Aligned], rows: &[[u8; BYTES]], out: &mut [i32]) {
    for (out, row) in out.iter_mut().zip(rows.chunks(vector.len())) {
        *out = product(vector, row);
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn product(vector: &[Aligned], row: &[[u8; BYTES]]) -> i32 {
    let (upper, lower) = (_mm256_set1_epi8(0b11_1100), _mm256_set1_epi8(0b11));
    let ones = _mm256_set1_epi16(1);
    let mut sum = _mm256_setzero_si256();
    for (packed, vector) in row.iter().zip(vector) {
        // A group is longer than a line of the cache; what is fetched need not be there.
        for line in [0, NIBBLES] {
            _mm_prefetch::<_MM_HINT_T0>(packed.as_ptr().wrapping_add(AHEAD + line).cast());
        }
        // SAFETY: what is loaded lies within the groups.
        let load = |place: usize| unsafe { _mm256_loadu_si256(packed.as_ptr().add(place).cast()) };
        let (nibbles, pairs) = ([load(0), load(REGISTER)], load(NIBBLES));
        // Two quarters of the group have their upper bits in the same bytes.
        let codes = [
            (_mm256_slli_epi16::<2>(nibbles[0]), pairs),
            (_mm256_slli_epi16::<2>(nibbles[1]), _mm256_srli_epi16::<2>(pairs)),
            (_mm256_srli_epi16::<2>(nibbles[0]), _mm256_srli_epi16::<4>(pairs)),
            (_mm256_srli_epi16::<2>(nibbles[1]), _mm256_srli_epi16::<6>(pairs)),
        ];
        let mut products = [_mm256_setzero_si256(); GROUP / REGISTER];
        for (quarter, (product, (nibbles, pairs))) in products.iter_mut().zip(codes).enumerate() {
            let codes = _mm256_or_si256(_mm256_and_si256(nibbles, upper), _mm256_and_si256(pairs, lower));
            // SAFETY: as above.
            let x = unsafe { _mm256_load_si256(vector.0.as_ptr().add(quarter * REGISTER).cast()) };
            *product = _mm256_maddubs_epi16(codes, x);
        }
        // Two products of a code, 63 at most, and a value of 127 at most, twice: 16 bits hold it.
        let [a, b, c, d] = products;
        let (first, second) = (_mm256_add_epi16(a, b), _mm256_add_epi16(c, d));
        let both = _mm256_add_epi32(_mm256_madd_epi16(first, ones), _mm256_madd_epi16(second, ones));
        sum = _mm256_add_epi32(sum, both);
    }
    let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
    let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b1110>(sum));
    _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<0b01>(sum)))
}
