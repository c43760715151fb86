//! Dot products with several partial sums, so that the compiler can use vector registers, in two
//! versions: for every CPU, and for those with AVX2, which is looked up at run time.

use crate::level::for_this_cpu;
use half::bf16;

/// Partial sums: four AVX registers.
const LANES: usize = 32;

for_this_cpu! {
    /// Σ aᵢ bᵢ
    pub fn dot(a: &[f32], b: &[f32]) -> f32 = dot_f32
}

for_this_cpu! {
    /// Σ aᵢ bᵢ, where `a` is widened on the way.
    pub fn dot_bf16(a: &[bf16], b: &[f32]) -> f32 = dot_widening
}

#[inline(always)]
fn dot_f32(a: &[f32], b: &[f32]) -> f32 {
    dot_body(a, b, |v| v)
}

#[inline(always)]
fn dot_widening(a: &[bf16], b: &[f32]) -> f32 {
    dot_body(a, b, widen_bf16)
}

/// The f32 with the same value. `bf16::to_f32` also quiets NaN, which costs a branch.
#[inline(always)]
pub fn widen_bf16(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

#[inline(always)]
pub fn dot_body<T: Copy>(a: &[T], b: &[f32], widen: impl Fn(T) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] += widen(a[lane]) * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(&a, &b)| widen(a) * b).sum();
    // By halves: one after the other, each sum would wait for the one before.
    let mut lanes = LANES;
    while lanes > 1 {
        lanes /= 2;
        let (low, high) = sums.split_at_mut(lanes);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
    }
    sums[0] + rest
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
        }
    }
}
