//! As [`product::strip`](crate::product::strip), for groups of integers.

use super::{Int16, LANES};
use crate::product::strip::{Kernel, Vector, kernel};
use crate::product::{COLUMN_STRIDE, COLUMNS};
use std::arch::x86_64::*;

/// A register of sums in 32 bits. Whoever calls sees to it that the CPU has it, and that the memory is there.
#[allow(clippy::missing_safety_doc, reason = "said once for all of them")]
trait Sums: Copy {
    /// The same in f32.
    type Vector: Vector<Lane = f32, Lanes = Self::Vector>;
    unsafe fn zero() -> Self;
    unsafe fn load(from: *const Int16) -> Self;
    unsafe fn splat(pair: Int16) -> Self;
    /// `self + a₀ · b₀ + a₁ · b₁`
    unsafe fn add_products(self, a: Self, b: Self) -> Self;
    /// `to + self · a · b`
    unsafe fn add_to(self, to: Self::Vector, a: Self::Vector, b: f32) -> Self::Vector;
}

/// # Safety
/// As of [`product::strip`](crate::product::strip).
#[inline(always)]
unsafe fn strip<S: Sums, const VECTORS: usize, const N: usize, const TRANSPOSED: bool>(
    panel: &[Int16],
    weights: &[Int16],
    sums: &mut [f32],
    mut from_zero: bool,
) {
    let width = S::Vector::WIDTH;
    let lanes = VECTORS * width;
    let (column, deeper) = if TRANSPOSED { (1, COLUMNS) } else { (COLUMN_STRIDE, 1) };
    let mut left = panel.len() / lanes;
    assert!(sums.len() == N * lanes && (left - 1) * deeper + (N - 1) * column < weights.len());
    // SAFETY: the assertion above bounds all reads and writes.
    unsafe {
        let out = sums.as_mut_ptr();
        let (mut x, mut w) = (panel.as_ptr(), weights.as_ptr());
        while left > 0 {
            let here = left.min(LANES);
            left -= here;
            let mut totals = [[S::zero(); VECTORS]; N];
            for _ in 1..here {
                let rows: [S; VECTORS] = std::array::from_fn(|v| S::load(x.add(v * width)));
                for (n, totals) in totals.iter_mut().enumerate() {
                    let weight = S::splat(*w.add(n * column));
                    for (total, row) in totals.iter_mut().zip(rows) {
                        *total = total.add_products(row, weight);
                    }
                }
                x = x.add(lanes);
                w = w.add(deeper);
            }
            let units: [S::Vector; VECTORS] =
                std::array::from_fn(|v| S::Vector::load(x.add(v * width).cast()));
            // By reference: an iterator that owns the array would take it out of the registers.
            for (n, totals) in totals.iter().enumerate() {
                let unit = w.add(n * column).cast::<f32>().read();
                for (v, total) in totals.iter().enumerate() {
                    let at = out.add(n * lanes + v * width);
                    let before = if from_zero { S::Vector::zero() } else { S::Vector::load(at) };
                    total.add_to(before, units[v], unit).store(at);
                }
            }
            x = x.add(lanes);
            w = w.add(deeper);
            from_zero = false;
        }
    }
}

kernel! {
    /// 12 of 16 registers hold sums.
    Avx2, strip::<__m256i> of Int16, 16 = 2 registers, strips of 1 2 3 4 5 6, "avx2,fma"
}

kernel! {
    /// 24 of 32 registers hold sums.
    Avx512, strip::<__m512i> of Int16, 32 = 2 registers, strips of 1 2 3 4 5 6 7 8 9 10 11 12, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
}

impl Sums for __m256i {
    type Vector = __m256;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: by the contract of `strip`, also below.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn load(from: *const Int16) -> Self {
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat(pair: Int16) -> Self {
        unsafe { _mm256_set1_epi32(pair.0 as i32) }
    }

    #[inline(always)]
    unsafe fn add_products(self, a: Self, b: Self) -> Self {
        unsafe { _mm256_add_epi32(self, _mm256_madd_epi16(a, b)) }
    }

    #[inline(always)]
    unsafe fn add_to(self, to: __m256, a: __m256, b: f32) -> __m256 {
        unsafe { _mm256_fmadd_ps(_mm256_cvtepi32_ps(self), _mm256_mul_ps(a, _mm256_set1_ps(b)), to) }
    }
}

impl Sums for __m512i {
    type Vector = __m512;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: by the contract of `strip`, also below.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn load(from: *const Int16) -> Self {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat(pair: Int16) -> Self {
        unsafe { _mm512_set1_epi32(pair.0 as i32) }
    }

    #[inline(always)]
    unsafe fn add_products(self, a: Self, b: Self) -> Self {
        unsafe { _mm512_dpwssd_epi32(self, a, b) }
    }

    #[inline(always)]
    unsafe fn add_to(self, to: __m512, a: __m512, b: f32) -> __m512 {
        unsafe { _mm512_fmadd_ps(_mm512_cvtepi32_ps(self), _mm512_mul_ps(a, _mm512_set1_ps(b)), to) }
    }
}
