//! Products of bytes, four in each lane of a register.

use super::{Aligned, BYTES, GROUP, NIBBLES};
use crate::level::{Level, level};
use crate::transpose::{SIDE, transpose};
use std::arch::x86_64::*;

pub fn is_there() -> bool {
    level() == Level::Avx512 && is_x86_feature_detected!("avx512vnni")
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub fn products(vector: &[Aligned], rows: &[[u8; BYTES]], out: &mut [i32]) {
    let (whole, rest) = out.as_chunks_mut::<SIDE>();
    let first_of_rest = whole.len() * SIDE * vector.len();
    for (out, rows) in whole.iter_mut().zip(rows.chunks(SIDE * vector.len())) {
        let mut sums = [_mm512_setzero_ps(); SIDE];
        for (sum, row) in sums.iter_mut().zip(rows.chunks(vector.len())) {
            *sum = _mm512_castsi512_ps(sum_of_row(vector, row));
        }
        // The sums of 16 rows are added up side by side.
        let mut total = _mm512_setzero_si512();
        for sum in transpose(sums) {
            total = _mm512_add_epi32(total, _mm512_castps_si512(sum));
        }
        // SAFETY: there are as many elements as lanes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), total) };
    }
    for (out, row) in rest.iter_mut().zip(rows[first_of_rest..].chunks(vector.len())) {
        *out = _mm512_reduce_add_epi32(sum_of_row(vector, row));
    }
}

/// One row, not yet added up over the lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn sum_of_row(vector: &[Aligned], row: &[[u8; BYTES]]) -> __m512i {
    /// The bits of a code that are in its nibble.
    const UPPER: i8 = 0b11_1100;
    /// All bits of a code.
    const CODE: i8 = 0b11_1111;
    /// Bits of the first where the third is 1, and else of the second.
    const SELECT: i32 = 0xe4;
    let (upper, code) = (_mm512_set1_epi8(UPPER), _mm512_set1_epi8(CODE));
    let quarters = |first: i16| {
        let (low, high) = (_mm256_set1_epi16(first), _mm256_set1_epi16(first + 2));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    };
    let shifts = [quarters(0), quarters(4)];
    let mut sums = [_mm512_setzero_si512(); 2];
    for (packed, vector) in row.iter().zip(vector) {
        // SAFETY: what is loaded lies within the groups.
        let (nibbles, pairs, vectors) = unsafe {
            let pairs = _mm256_loadu_si256(packed.as_ptr().add(NIBBLES).cast());
            let vectors = [0, GROUP / 2].map(|half| _mm512_load_si512(vector.0.as_ptr().add(half).cast()));
            (_mm512_loadu_si512(packed.as_ptr().cast()), _mm512_broadcast_i64x4(pairs), vectors)
        };
        let halves = [_mm512_slli_epi16::<2>(nibbles), _mm512_srli_epi16::<2>(nibbles)];
        for i in 0..2 {
            let pairs = _mm512_srlv_epi16(pairs, shifts[i]);
            let codes = _mm512_ternarylogic_epi64::<SELECT>(halves[i], pairs, upper);
            sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_and_si512(codes, code), vectors[i]);
        }
    }
    _mm512_add_epi32(sums[0], sums[1])
}
