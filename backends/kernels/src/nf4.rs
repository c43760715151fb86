//! NF4 to f32.

#[cfg(target_arch = "x86_64")]
use crate::level::{Level, level};
#[cfg(target_arch = "x86_64")]
use evalfw_engine::nf4::BLOCK;
use evalfw_engine::nf4::Nf4Tensor;

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
    use evalfw_engine::nf4::{BLOCK, DYNAMIC_MAP, LEVELS, NESTED_BLOCK, Nf4Tensor, Scales};
    use std::arch::x86_64::*;

    /// The scales of the blocks from `first` on, bit for bit those of [`Scales::absmax`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn absmax(scales: &Scales, first: usize, out: &mut [f32]) {
        let map: &[f32; 256] = &DYNAMIC_MAP;
        let codes = &scales.codes[first..first + out.len()];
        let offset = _mm512_set1_ps(scales.offset);
        for (i, (codes, out)) in codes.chunks(16).zip(out.chunks_mut(16)).enumerate() {
            let block = first + 16 * i;
            let here = u16::MAX >> (16 - out.len());
            // Lanes that belong to the next nested block.
            let beyond = (block % NESTED_BLOCK + 16).saturating_sub(NESTED_BLOCK);
            let next = ((u32::from(u16::MAX) << (16 - beyond)) & 0xffff) as u16 & here;
            let nested = |index: usize| _mm512_set1_ps(scales.absmax.get(index).copied().unwrap_or(0.0));
            let index = block / NESTED_BLOCK;
            let nested = _mm512_mask_blend_ps(next, nested(index), nested(index + 1));
            // SAFETY: the mask leaves out what is beyond `codes` and `out`, and the map has an element for
            // every code.
            unsafe {
                let codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, codes.as_ptr().cast()));
                let values = _mm512_i32gather_ps::<4>(codes, map.as_ptr());
                let absmax = _mm512_add_ps(_mm512_mul_ps(values, nested), offset);
                _mm512_mask_storeu_ps(out.as_mut_ptr(), here, absmax);
            }
        }
    }

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
        let mut scales = [0.0; 16];
        let runs = out.chunks_mut(16 * BLOCK).zip(codes.chunks(8 * BLOCK)).enumerate();
        for (run, (out, codes)) in runs {
            let scales = &mut scales[..out.len() / BLOCK];
            absmax(&tensor.scales, first + 16 * run, scales);
            let blocks = out.as_chunks_mut::<BLOCK>().0.iter_mut();
            for ((block, codes), &scale) in blocks.zip(codes.as_chunks::<{ BLOCK / 2 }>().0).zip(&*scales) {
                let scale = _mm512_set1_ps(scale);
                for (values, codes) in block.as_chunks_mut::<16>().0.iter_mut().zip(codes.as_chunks::<8>().0)
                {
                    let bytes = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(i64::from_le_bytes(*codes)));
                    let twice = _mm512_or_si512(bytes, _mm512_slli_epi64::<32>(bytes));
                    let indices = _mm512_srlv_epi32(twice, shifts);
                    let decoded = _mm512_mul_ps(_mm512_permutexvar_ps(indices, levels), scale);
                    // SAFETY: `values` has 16 elements.
                    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), decoded) };
                }
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
