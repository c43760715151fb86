//! NF4 to f32.

use crate::level::{Level, level};
use evalfw_engine::nf4::{BLOCK, Nf4Tensor};

/// Decodes the elements from `start`, a multiple of [`BLOCK`], bit for bit as the tensor itself does.
pub fn widen(tensor: &Nf4Tensor, start: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        let whole = out.len() / BLOCK * BLOCK;
        let (blocks, rest) = out.split_at_mut(whole);
        // SAFETY: the CPU has the instructions of the level.
        unsafe { avx512::widen(tensor, start, blocks) };
        return tensor.dequantize_range(start + whole..start + whole + rest.len(), rest);
    }
    tensor.dequantize_range(start..start + out.len(), out);
}

#[cfg(target_arch = "x86_64")]
pub mod avx512 {
    use evalfw_engine::nf4::{BLOCK, LEVELS, Nf4Tensor};
    use std::arch::x86_64::*;

    /// Whole blocks only.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn widen(tensor: &Nf4Tensor, start: usize, out: &mut [f32]) {
        assert!(start.is_multiple_of(BLOCK) && out.len().is_multiple_of(BLOCK));
        let first = start / BLOCK;
        let codes = &tensor.codes[first * (BLOCK / 2)..][..out.len() / 2];
        // SAFETY: the table has 16 elements.
        let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
        // Of the two copies of a byte the first is shifted to its high nibble; the look-up sees four bits.
        let shifts = _mm512_set1_epi64(4);
        let blocks = out.as_chunks_mut::<BLOCK>().0.iter_mut();
        for (i, (block, codes)) in blocks.zip(codes.as_chunks::<{ BLOCK / 2 }>().0).enumerate() {
            let absmax = _mm512_set1_ps(tensor.scales.absmax(first + i));
            for (values, codes) in block.as_chunks_mut::<16>().0.iter_mut().zip(codes.as_chunks::<8>().0) {
                let bytes = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(i64::from_le_bytes(*codes)));
                let twice = _mm512_or_si512(bytes, _mm512_slli_epi64::<32>(bytes));
                let indices = _mm512_srlv_epi32(twice, shifts);
                let decoded = _mm512_mul_ps(_mm512_permutexvar_ps(indices, levels), absmax);
                // SAFETY: `values` has 16 elements.
                unsafe { _mm512_storeu_ps(values.as_mut_ptr(), decoded) };
            }
        }
    }
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
}
