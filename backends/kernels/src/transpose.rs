//! Turns squares of 32-bit elements in registers: what lies along the lanes of a panel comes to lie along a row.

use crate::level::{Level, level};
use std::arch::x86_64::*;

/// Of a square for AVX-512.
pub const SIDE: usize = 16;
/// Of a square for AVX2.
const SIDE_OF_AVX2: usize = 8;

/// From where, with which distance between rows, to where, with which distance.
type CopySquare = unsafe fn(*const u32, usize, *mut u32, usize);

/// How this CPU turns squares.
pub struct Squares {
    pub side: usize,
    copy: CopySquare,
}

impl Squares {
    /// `None` where it does not do so in registers.
    pub fn of_this_cpu() -> Option<Self> {
        match level() {
            Level::Avx512 => Some(Self { side: SIDE, copy: copy_avx512 }),
            Level::Avx2 => Some(Self { side: SIDE_OF_AVX2, copy: copy_avx2 }),
            _ => None,
        }
    }

    /// `to[j][i] = from[i][j]` for a square; rows lie `from_stride` and `to_stride` elements apart.
    ///
    /// # Safety
    /// The memory of both squares is there and does not overlap.
    pub unsafe fn copy(&self, from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        // SAFETY: by the contract of this function; the CPU has the instructions of the level.
        unsafe { (self.copy)(from, from_stride, to, to_stride) };
    }
}

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

/// # Safety
/// As of [`Squares::copy`].
#[target_feature(enable = "avx512f")]
unsafe fn copy_avx512(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
    // SAFETY: by the contract of this function.
    unsafe {
        let rows = std::array::from_fn(|i| _mm512_loadu_ps(from.add(i * from_stride).cast()));
        for (j, column) in transpose(rows).into_iter().enumerate() {
            _mm512_storeu_ps(to.add(j * to_stride).cast(), column);
        }
    }
}

/// # Safety
/// As of [`Squares::copy`].
#[target_feature(enable = "avx2")]
unsafe fn copy_avx2(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
    // SAFETY: by the contract of this function.
    unsafe {
        // A half of a row, and in the upper half of the register that of the row four further on.
        let halves = |row: usize, half: usize| {
            let load = |row: usize| _mm_loadu_ps(from.add(row * from_stride + 4 * half).cast());
            _mm256_set_m128(load(row + 4), load(row))
        };
        for half in 0..2 {
            let [a, b, c, d]: [__m256d; 4] = {
                let rows: [__m256; 4] = std::array::from_fn(|row| halves(row, half));
                let pairs = [
                    _mm256_unpacklo_ps(rows[0], rows[1]),
                    _mm256_unpackhi_ps(rows[0], rows[1]),
                    _mm256_unpacklo_ps(rows[2], rows[3]),
                    _mm256_unpackhi_ps(rows[2], rows[3]),
                ];
                pairs.map(|pair| _mm256_castps_pd(pair))
            };
            let columns = [
                _mm256_unpacklo_pd(a, c),
                _mm256_unpackhi_pd(a, c),
                _mm256_unpacklo_pd(b, d),
                _mm256_unpackhi_pd(b, d),
            ];
            for (j, column) in columns.into_iter().enumerate() {
                _mm256_storeu_pd(to.add((4 * half + j) * to_stride).cast(), column);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(side: usize, copy: CopySquare) {
        let from: Vec<u32> = (0..side as u32 * 20).collect();
        let mut turned = vec![0u32; side * 24];
        // SAFETY: rows of 20 and of 24 elements are there.
        unsafe { copy(from.as_ptr(), 20, turned.as_mut_ptr(), 24) };
        for (j, row) in turned.chunks(24).enumerate() {
            assert!((0..side).all(|i| row[i] == from[i * 20 + j]), "{j}: {row:?}");
            assert!(row[side..].iter().all(|&v| v == 0));
        }
    }

    #[test]
    fn a_square_is_turned() {
        let checks: [(Level, usize, CopySquare); 2] =
            [(Level::Avx512, SIDE, copy_avx512), (Level::Avx2, SIDE_OF_AVX2, copy_avx2)];
        for (level, side, copy) in checks {
            if level.is_there() {
                check(side, copy);
            } else {
                eprintln!("left out: this CPU has no {}", level.name());
            }
        }
    }
}
