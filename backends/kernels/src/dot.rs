//! Dot products: with AVX2 where the CPU has it, which is looked up at run time, and else in a form with several partial
//! sums that compilers know to turn into vector code.

#[cfg(target_arch = "x86_64")]
use crate::level::{Level, level};
use half::bf16;

/// Partial sums: four AVX registers.
const LANES: usize = 32;

/// Σ aᵢ bᵢ
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx2 {
        // SAFETY: the CPU has the instructions of the level.
        return unsafe { avx2::dot(a, b) };
    }
    portable(a, b, |value| value)
}

/// Σ aᵢ bᵢ, where `a` is widened on the way.
pub fn dot_bf16(a: &[bf16], b: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx2 {
        // SAFETY: the CPU has the instructions of the level.
        return unsafe { avx2::dot_bf16(a, b) };
    }
    portable(a, b, widen_bf16)
}

/// The f32 with the same value. `bf16::to_f32` also quiets NaN, which costs a branch.
#[inline(always)]
pub fn widen_bf16(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

#[inline(always)]
pub fn portable<T: Copy>(a: &[T], b: &[f32], widen: impl Fn(T) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] += widen(a[lane]) * b[lane];
        }
    }
    sums.iter().sum::<f32>() + sum_of_rest(a_rest, b_rest, widen)
}

#[inline(always)]
fn sum_of_rest<T: Copy>(a: &[T], b: &[f32], widen: impl Fn(T) -> f32) -> f32 {
    a.iter().zip(b).map(|(&a, &b)| widen(a) * b).sum()
}

/// By hand: compilers keep two sums in each register once these are added up.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{LANES, sum_of_rest, widen_bf16};
    use half::bf16;
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let (blocks, rest) = a.as_chunks();
        // SAFETY: eight elements are there.
        let sum = sum_of_blocks(blocks, b, |a| unsafe { _mm256_loadu_ps(a) });
        sum + sum_of_rest(rest, &b[LANES * blocks.len()..], |value| value)
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    pub fn dot_bf16(a: &[bf16], b: &[f32]) -> f32 {
        let (blocks, rest) = a.as_chunks();
        let sum = sum_of_blocks(blocks, b, |a| {
            // SAFETY: eight elements are there.
            let words = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(a.cast()) });
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
        });
        sum + sum_of_rest(rest, &b[LANES * blocks.len()..], widen_bf16)
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn sum_of_blocks<T>(a: &[[T; LANES]], b: &[f32], load: impl Fn(*const T) -> __m256) -> f32 {
        const WIDTH: usize = 8;
        let mut sums = [_mm256_setzero_ps(); LANES / WIDTH];
        for (a, b) in a.iter().zip(b.as_chunks::<LANES>().0) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: eight elements of both are there.
                let (a, b) =
                    unsafe { (load(a.as_ptr().add(i * WIDTH)), _mm256_loadu_ps(b[i * WIDTH..].as_ptr())) };
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
        sum_of_lanes(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])))
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn sum_of_lanes(sum: __m256) -> f32 {
        let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
        let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_types_agree_with_a_sum_in_f64() {
        for len in [0, 1, 31, 32, 100] {
            let a: Vec<bf16> = (0..len).map(|i| bf16::from_f32((i as f32 * 0.7).sin())).collect();
            let wide: Vec<f32> = a.iter().map(|v| v.to_f32()).collect();
            let b: Vec<f32> = (0..len).map(|i| (i as f32 * 0.3).cos()).collect();
            let exact: f64 = wide.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            assert!((f64::from(dot(&wide, &b)) - exact).abs() < 1e-5);
            assert_eq!(dot(&wide, &b), dot_bf16(&a, &b));
            assert!((f64::from(portable(&a, &b, widen_bf16)) - exact).abs() < 1e-5);
        }
    }
}
