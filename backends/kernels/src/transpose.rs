//! Turns squares of 16 × 16 elements in registers: what lies along the lanes of a panel comes to lie along a row.

use std::arch::x86_64::*;

pub const SIDE: usize = 16;

/// The transpose of 16 rows of 32-bit elements, whatever their type.
#[target_feature(enable = "avx512f")]
#[inline]
pub fn transpose(rows: [__m512; SIDE]) -> [__m512; SIDE] {
    // Pairs of rows, then quadruples: four elements of one column come into each quarter of a register.
    let pairs: [__m512; SIDE] = std::array::from_fn(|i| match i % 2 {
        0 => _mm512_unpacklo_ps(rows[i], rows[i + 1]),
        _ => _mm512_unpackhi_ps(rows[i - 1], rows[i]),
    });
    let [low, high] = [_mm512_unpacklo_pd, _mm512_unpackhi_pd];
    let quads: [__m512; SIDE] = std::array::from_fn(|i| {
        let (first, half) = (i / 4 * 4 + i % 4 / 2, i % 2);
        let (a, b) = (_mm512_castps_pd(pairs[first]), _mm512_castps_pd(pairs[first + 2]));
        _mm512_castpd_ps(if half == 0 { low(a, b) } else { high(a, b) })
    });
    // Then the quarters are gathered.
    let mut columns = rows;
    for k in 0..4 {
        let even = [0, 8].map(|i| _mm512_shuffle_f32x4::<0x88>(quads[i + k], quads[i + 4 + k]));
        let odd = [0, 8].map(|i| _mm512_shuffle_f32x4::<0xdd>(quads[i + k], quads[i + 4 + k]));
        columns[k] = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
        columns[8 + k] = _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]);
        columns[4 + k] = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
        columns[12 + k] = _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]);
    }
    columns
}

/// `to[j][i] = from[i][j]` for a square of 32-bit elements; rows lie `from_stride` and `to_stride` elements apart.
///
/// # Safety
/// The memory of both squares is there and does not overlap.
#[target_feature(enable = "avx512f")]
pub unsafe fn copy_transposed(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
    // SAFETY: by the contract of this function.
    unsafe {
        let rows = std::array::from_fn(|i| _mm512_loadu_ps(from.add(i * from_stride).cast()));
        for (j, column) in transpose(rows).into_iter().enumerate() {
            _mm512_storeu_ps(to.add(j * to_stride).cast(), column);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_square_is_turned() {
        if !is_x86_feature_detected!("avx512f") {
            return eprintln!("left out: this CPU has no AVX-512");
        }
        let from: Vec<f32> = (0..16 * 20).map(|i| i as f32).collect();
        let mut copy = vec![0u32; 16 * 24];
        // SAFETY: 16 rows of 20 and of 24 elements are there.
        unsafe {
            copy_transposed(from.as_ptr().cast(), 20, copy.as_mut_ptr(), 24);
        }
        for j in 0..16 {
            for i in 0..16 {
                assert_eq!(f32::from_bits(copy[j * 24 + i]), from[i * 20 + j]);
            }
            assert!(copy[j * 24 + 16..(j + 1) * 24].iter().all(|&v| v == 0));
        }
    }
}
