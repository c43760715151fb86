//! NF4 to f32.

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;

#[cfg(target_arch = "x86_64")]
use crate::level::{Level, has_bf16_products, level};
#[cfg(target_arch = "x86_64")]
use evalfw_engine::nf4::BLOCK;
use evalfw_engine::nf4::Nf4Tensor;
use half::bf16;

/// Decodes the elements from `start`, a multiple of [`BLOCK`], bit for bit as the tensor itself does.
pub fn widen(tensor: &Nf4Tensor, start: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx2 {
        let whole = out.len() / BLOCK * BLOCK;
        let (blocks, rest) = out.split_at_mut(whole);
        // SAFETY: the CPU has the instructions of the level.
        unsafe {
            match level() {
                Level::Avx512 => avx512::widen(tensor, start, blocks),
                _ => avx2::widen(tensor, start, blocks),
            }
        }
        return tensor.dequantize_range(start + whole..start + whole + rest.len(), rest);
    }
    tensor.dequantize_range(start..start + out.len(), out);
}

/// The same rounded to bf16, for whole blocks, where the CPU has bf16. Says whether it has.
pub fn narrow(tensor: &Nf4Tensor, start: usize, out: &mut [bf16]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if has_bf16_products() && start.is_multiple_of(BLOCK) && out.len().is_multiple_of(BLOCK) {
        // SAFETY: the CPU has the instructions.
        unsafe { avx512::narrow(tensor, start, out) };
        return true;
    }
    let _ = (tensor, start, out);
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_decodes_as_in_the_tensor_itself() {
        let values: Vec<f32> = (0..700 * BLOCK + 21).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut tensor = Nf4Tensor::quantize([1, values.len()], &values);
        tensor.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i * 37) as u8);
        for start in [0, 3 * BLOCK] {
            let mut out = vec![0.0; values.len() - start];
            widen(&tensor, start, &mut out);
            assert_eq!(out, tensor.dequantize()[start..]);
        }
    }

    #[test]
    fn rounding_is_that_of_the_decoded_values() {
        if !has_bf16_products() {
            return eprintln!("left out: this CPU has no bf16 products");
        }
        let values: Vec<f32> = (0..700 * BLOCK).map(|i| (i as f32 * 0.37).sin() * (1.0 + i as f32)).collect();
        let tensor = Nf4Tensor::quantize([700, BLOCK], &values);
        let expected: Vec<bf16> = tensor.dequantize().iter().map(|&v| bf16::from_f32(v)).collect();
        for range in [0..700, 3..700, 250..253, 699..700] {
            let range = range.start * BLOCK..range.end * BLOCK;
            let mut out = vec![bf16::ZERO; range.len()];
            assert!(narrow(&tensor, range.start, &mut out));
            assert_eq!(out, expected[range]);
        }
        assert!(!narrow(&tensor, 1, &mut [bf16::ZERO; BLOCK]));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn avx2_gives_what_the_tensor_itself_does() {
        if !Level::Avx2.is_there() {
            return eprintln!("left out: this CPU has no AVX2");
        }
        let values: Vec<f32> = (0..700 * BLOCK).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut tensor = Nf4Tensor::quantize([1, values.len()], &values);
        tensor.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i * 37) as u8);
        tensor.scales.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i * 37) as u8);
        for (first, len) in [(0, 700), (14, 64), (250, 3), (255, 2), (699, 1), (5, 0)] {
            let expected: Vec<f32> = (first..first + len).map(|block| tensor.scales.absmax(block)).collect();
            let (mut scales, mut out) = (vec![0.0; len], vec![0.0; len * BLOCK]);
            // SAFETY: the CPU has the instructions.
            unsafe {
                avx2::absmax(&tensor.scales, first, &mut scales);
                avx2::widen(&tensor, first * BLOCK, &mut out);
            }
            assert_eq!(scales, expected);
            assert_eq!(out, tensor.dequantize()[first * BLOCK..][..len * BLOCK]);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn computed_scales_are_near_those_that_are_looked_up() {
        use evalfw_engine::nf4::{NESTED_BLOCK, Scales};
        if !Level::Avx2.is_there() {
            return eprintln!("left out: this CPU has no AVX2");
        }
        for offset in [0.0, 2.0] {
            // All codes, in blocks of different nested scales.
            let codes = (0..700).map(|i| (i * 37) as u8).collect();
            let scales = Scales { codes, absmax: vec![1.0, 0.25, 3.0], offset };
            for (first, len) in [(0, 700), (14, 500), (3, 600), (250, 3), (255, 2), (699, 1), (5, 0)] {
                let factors: Vec<f32> = (0..len).map(|i| 1.0 - i as f32 / 3.0).collect();
                let mut out = vec![0.0; len];
                // SAFETY: the CPU has the instructions.
                unsafe { avx2::absmax_times(&scales, first, &factors, &mut out) };
                for (i, (out, factor)) in out.iter().zip(factors).enumerate() {
                    let (exact, nested) =
                        (scales.absmax(first + i), scales.absmax[(first + i) / NESTED_BLOCK]);
                    let tolerance = (1e-6 * nested + f32::EPSILON * exact.abs()) * factor.abs();
                    assert!((out - exact * factor).abs() <= tolerance, "{out}, not {exact} x {factor}");
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn scales_are_those_of_the_tensor_whatever_looks_them_up() {
        if level() != Level::Avx512 {
            return eprintln!("left out: this CPU has no AVX-512, or may not use it");
        }
        let values: Vec<f32> = (0..700 * BLOCK).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut scales = Nf4Tensor::quantize([1, values.len()], &values).scales;
        scales.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i * 37) as u8);
        for (first, len) in [(0, 700), (14, 64), (200, 100), (250, 3), (699, 1), (5, 0)] {
            let expected: Vec<f32> = (first..first + len).map(|block| scales.absmax(block)).collect();
            let mut out = [vec![0.0; len], vec![0.0; len]];
            // SAFETY: the CPU has the instructions of the level.
            unsafe {
                avx512::absmax(&scales, first, &mut out[0]);
                avx512::absmax_by_gathering(&scales, first, &mut out[1]);
            }
            assert_eq!(out, [expected.clone(), expected]);
        }
    }
}
