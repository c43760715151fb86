//! Loops over elements with an exponential in them, in a form that the compiler turns into vector code: a call
//! of the C library for each element costs more than the matrix products beside it.

use crate::dot;
use crate::filled::{PIECE, filled, zeros};
use crate::level::for_this_cpu;
use half::bf16;
use rayon::prelude::*;

/// eˣ to about one unit in the last place; 0 and ∞ beyond the range of f32, NaN for NaN.
///
/// Cephes' method: x = n·ln 2 + r, and a polynomial for eʳ.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer, in the low bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > 88.72 { 88.72 } else { x };
    let x = if x < -87.33 { -87.33 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    // 2ⁿ in two factors: n may be 128.
    let half = |bits: u32| f32::from_bits((bits << 23).wrapping_add(127 << 23));
    let bits = rounded.to_bits();
    let n = bits.wrapping_sub(ROUND.to_bits()) as i32;
    let (first, second) = (n >> 1, n - (n >> 1));
    (p * r * r + r + 1.0) * half(first as u32) * half(second as u32)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

for_this_cpu! {
    /// Rounds to the nearest bf16, of two the even one.
    pub fn narrow_to_bf16(values: &[f32], out: &mut [bf16]) -> () = narrow_to_bf16_body
}

#[inline(always)]
fn narrow_to_bf16_body(values: &[f32], out: &mut [bf16]) {
    for (out, value) in out.iter_mut().zip(values) {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // Rounding could carry a NaN over into infinity.
        let quiet = bits >> 16 | 0x40;
        *out = bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16);
    }
}

for_this_cpu! {
    pub fn widen_bf16(values: &[bf16], out: &mut [f32]) -> () = widen_bf16_body
}

#[inline(always)]
fn widen_bf16_body(values: &[bf16], out: &mut [f32]) {
    out.iter_mut().zip(values).for_each(|(out, &value)| *out = dot::widen_bf16(value));
}

/// [`narrow_to_bf16`] on all threads.
pub fn narrowed(values: &[f32]) -> Vec<bf16> {
    filled(values.len(), PIECE, |start, narrow| narrow_to_bf16(&values[start..], narrow))
}

/// [`widen_bf16`] on all threads.
pub fn widened(values: &[bf16]) -> Vec<f32> {
    filled(values.len(), PIECE, |start, wide| widen_bf16(&values[start..], wide))
}

for_this_cpu! {
    /// `out = silu(gate) · up`
    pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) -> () = swiglu_body
}

#[inline(always)]
fn swiglu_body(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate * sigmoid(gate) * up;
    }
}

/// [`swiglu`] on all threads.
pub fn swiglu_of(gate: &[f32], up: &[f32]) -> Vec<f32> {
    filled(gate.len(), PIECE, |start, out| {
        let here = start..start + out.len();
        swiglu(&gate[here.clone()], &up[here], out);
    })
}

/// [`swiglu_gradients`] on all threads, for the gate and for the way up.
pub fn swiglu_gradients_of(gate: &[f32], up: &[f32], grad: &[f32]) -> [Vec<f32>; 2] {
    let (mut of_gate, mut of_up) = (zeros(gate.len()), zeros(gate.len()));
    let outputs = of_gate.par_chunks_mut(PIECE).zip(of_up.par_chunks_mut(PIECE));
    let inputs = gate.par_chunks(PIECE).zip(up.par_chunks(PIECE)).zip(grad.par_chunks(PIECE));
    outputs.zip(inputs).for_each(|((of_gate, of_up), ((gate, up), grad))| {
        swiglu_gradients(gate, up, grad, Gradients { of_gate, of_up });
    });
    [of_gate, of_up]
}

/// The gradients of a loop over elements with two inputs.
pub struct Gradients<'a> {
    pub of_gate: &'a mut [f32],
    pub of_up: &'a mut [f32],
}

for_this_cpu! {
    /// The gradients of [`swiglu`] from that of its result.
    pub fn swiglu_gradients(gate: &[f32], up: &[f32], grad: &[f32], out: Gradients<'_>) -> () = swiglu_gradients_body
}

#[inline(always)]
fn swiglu_gradients_body(gate: &[f32], up: &[f32], grad: &[f32], out: Gradients<'_>) {
    let outputs = out.of_gate.iter_mut().zip(out.of_up);
    for ((of_gate, of_up), ((&gate, &up), &grad)) in outputs.zip(gate.iter().zip(up).zip(grad)) {
        let sigmoid = sigmoid(gate);
        *of_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
        *of_up = grad * gate * sigmoid;
    }
}

/// What one step of AdamW needs beside the tensors, with the bias corrections of the step in it.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// 1 − learning rate · weight decay
    pub keep: f32,
    /// Learning rate / (1 − β1ᵗ)
    pub rate: f32,
    /// 1 / (1 − β2ᵗ)
    pub second_correction: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
}

/// The running means of a gradient and of its square.
pub struct Moments<'a> {
    pub first: &'a mut [f32],
    pub second: &'a mut [f32],
}

for_this_cpu! {
    /// One step of AdamW (Loshchilov and Hutter 2019), as PyTorch takes it.
    pub fn adamw(theta: &mut [f32], moments: Moments<'_>, grad: &[f32], step: AdamW) -> () = adamw_body
}

#[inline(always)]
fn adamw_body(theta: &mut [f32], moments: Moments<'_>, grad: &[f32], step: AdamW) {
    let values = theta.iter_mut().zip(grad);
    for ((theta, grad), (first, second)) in values.zip(moments.first.iter_mut().zip(moments.second)) {
        *first = step.beta1 * *first + (1.0 - step.beta1) * grad;
        *second = step.beta2 * *second + (1.0 - step.beta2) * grad * grad;
        let spread = (*second * step.second_correction).sqrt() + step.epsilon;
        *theta = *theta * step.keep - step.rate * *first / spread;
    }
}

for_this_cpu! {
    /// Replaces `row` by its exponentials less the maximum and returns (maximum, their sum).
    pub fn exponentials(row: &mut [f32]) -> (f32, f64) = exponentials_body
}

#[inline(always)]
fn exponentials_body(row: &mut [f32]) -> (f32, f64) {
    const LANES: usize = 16;
    // `max` drops NaN; the sum below keeps it.
    let mut largest = [f32::NEG_INFINITY; LANES];
    let (parts, rest) = row.as_chunks::<LANES>();
    for part in parts {
        for (largest, &value) in largest.iter_mut().zip(part) {
            *largest = if value > *largest { value } else { *largest };
        }
    }
    let max = largest.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    // A vocabulary is too long to be summed in f32 alone.
    for part in row.chunks_mut(16 * LANES) {
        let mut sums = [0f32; LANES];
        let (parts, rest) = part.as_chunks_mut::<LANES>();
        for part in parts {
            for (sum, value) in sums.iter_mut().zip(part) {
                *value = exp(*value - max);
                *sum += *value;
            }
        }
        for (sum, value) in sums.iter_mut().zip(rest) {
            *value = exp(*value - max);
            *sum += *value;
        }
        sum += f64::from(sums.iter().sum::<f32>());
    }
    (max, sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_ends_of_the_range() {
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::INFINITY) > 3e38);
        assert!((exp(88.7) / 88.7f32.exp() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn a_nan_is_in_the_sum() {
        let mut row = [1.0, f32::NAN, 2.0];
        assert!(exponentials(&mut row).1.is_nan());
    }

    proptest! {
        #[test]
        fn bf16_is_rounded_as_in_the_half_crate(bits in prop::collection::vec(any::<u32>(), 1..70)) {
            let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let mut narrow = vec![bf16::ZERO; values.len()];
            narrow_to_bf16(&values, &mut narrow);
            let mut wide = vec![0.0; values.len()];
            widen_bf16(&narrow, &mut wide);
            for ((value, narrow), wide) in values.iter().zip(&narrow).zip(&wide) {
                prop_assert_eq!(narrow.to_bits(), bf16::from_f32(*value).to_bits());
                prop_assert_eq!(wide.to_bits(), narrow.to_f32().to_bits());
            }
        }

        #[test]
        fn exp_is_close_to_that_of_the_library(x in -87f32..88.0) {
            let exact = f64::from(x).exp();
            prop_assert!((f64::from(exp(x)) / exact - 1.0).abs() < 2.5e-7, "{} {}", exp(x), exact);
        }

        #[test]
        fn softmax_sums_to_one(mut row in prop::collection::vec(-20f32..20.0, 1..400)) {
            let values = row.clone();
            let (max, sum) = exponentials(&mut row);
            prop_assert_eq!(max, values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let exact: f64 = values.iter().map(|v| f64::from(v - max).exp()).sum();
            prop_assert!((sum / exact - 1.0).abs() < 1e-6);
        }
    }
}
