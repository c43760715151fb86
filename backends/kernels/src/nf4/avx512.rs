//! With AVX-512.

use evalfw_engine::nf4::{BLOCK, DYNAMIC_MAP, LEVELS, NESTED_BLOCK, Nf4Tensor, Scales};
use half::bf16;
use std::arch::x86_64::*;
use std::sync::LazyLock;

/// Codes that are looked up together: a register of bytes.
const RUN: usize = 64;
/// Lanes of a register of f32.
const LANES: usize = 16;
/// Scales that are sooner looked up one by one.
const FEW: usize = 4;

/// The scales of the blocks from `first` on, bit for bit those of [`Scales::absmax`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn absmax(scales: &Scales, first: usize, out: &mut [f32]) {
    if out.len() <= FEW {
        for (block, out) in (first..).zip(out) {
            *out = scales.absmax(block);
        }
        return;
    }
    let whole = out.len() / RUN * RUN;
    let by_bytes = if whole > 0 && is_x86_feature_detected!("avx512vbmi") { whole } else { 0 };
    let (runs, rest) = out.split_at_mut(by_bytes);
    if by_bytes > 0 {
        // SAFETY: the CPU has the instructions.
        unsafe { absmax_by_bytes(scales, first, runs) };
    }
    absmax_by_gathering(scales, first + by_bytes, rest);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn absmax_by_gathering(scales: &Scales, first: usize, out: &mut [f32]) {
    let map: &[f32; 256] = &DYNAMIC_MAP;
    let codes = &scales.codes[first..first + out.len()];
    for (i, (codes, out)) in codes.chunks(LANES).zip(out.chunks_mut(LANES)).enumerate() {
        let here = u16::MAX >> (LANES - out.len());
        // SAFETY: the mask leaves out what is beyond `codes` and `out`, and the map has an element for
        // every code.
        unsafe {
            let codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, codes.as_ptr().cast()));
            let values = _mm512_i32gather_ps::<4>(codes, map.as_ptr());
            _mm512_mask_storeu_ps(out.as_mut_ptr(), here, unnest(values, scales, first + LANES * i));
        }
    }
}

/// Whole runs only.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn absmax_by_bytes(scales: &Scales, first: usize, out: &mut [f32]) {
    let (codes, _) = scales.codes[first..].as_chunks::<RUN>();
    for (run, (codes, out)) in codes.iter().zip(out.as_chunks_mut::<RUN>().0).enumerate() {
        let registers = look_up_bytes(codes).into_iter().zip(out.as_chunks_mut::<LANES>().0);
        for (i, (values, out)) in registers.enumerate() {
            let block = first + RUN * run + LANES * i;
            // SAFETY: there are as many elements as lanes.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), unnest(values, scales, block)) };
        }
    }
}

/// Elements of the dynamic map with the nested scales of the blocks from `block` on.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn unnest(values: __m512, scales: &Scales, block: usize) -> __m512 {
    let nested = |index: usize| _mm512_set1_ps(scales.absmax.get(index).copied().unwrap_or(0.0));
    let index = block / NESTED_BLOCK;
    // Lanes that belong to the next nested block.
    let beyond = (block % NESTED_BLOCK + LANES).saturating_sub(NESTED_BLOCK);
    let nested = _mm512_mask_blend_ps(!(u16::MAX >> beyond), nested(index), nested(index + 1));
    _mm512_add_ps(_mm512_mul_ps(values, nested), _mm512_set1_ps(scales.offset))
}

/// The elements of the dynamic map with these codes, for CPUs that gather slowly: each byte of them is looked up
/// by itself.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
#[inline]
fn look_up_bytes(codes: &[u8; RUN]) -> [__m512; RUN / LANES] {
    /// Of each element the first byte, then of each the second, and so on; in registers.
    static BYTES: LazyLock<[[[u8; 64]; 4]; 4]> = LazyLock::new(|| {
        let byte = |byte: usize, code: usize| DYNAMIC_MAP[code].to_le_bytes()[byte];
        std::array::from_fn(|i| std::array::from_fn(|j| std::array::from_fn(|k| byte(i, 64 * j + k))))
    });
    // SAFETY: a register has 64 bytes.
    let load = |bytes: &[u8; 64]| unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) };
    // Where bytes are interleaved below, each register takes four codes from every quarter.
    let quarters = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    let codes = _mm512_permutexvar_epi32(quarters, load(codes));
    let upper = _mm512_movepi8_mask(codes);
    let mut bytes = [codes; 4];
    for (byte, [a, b, c, d]) in bytes.iter_mut().zip(&*BYTES) {
        let low = _mm512_permutex2var_epi8(load(a), codes, load(b));
        let high = _mm512_permutex2var_epi8(load(c), codes, load(d));
        *byte = _mm512_mask_blend_epi8(upper, low, high);
    }
    let low = [_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpacklo_epi8(bytes[2], bytes[3])];
    let high = [_mm512_unpackhi_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[2], bytes[3])];
    [
        _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[0], low[1])),
        _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[0], low[1])),
        _mm512_castsi512_ps(_mm512_unpacklo_epi16(high[0], high[1])),
        _mm512_castsi512_ps(_mm512_unpackhi_epi16(high[0], high[1])),
    ]
}

/// Whole blocks only.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub fn narrow(tensor: &Nf4Tensor, start: usize, out: &mut [bf16]) {
    let first = start / BLOCK;
    let codes = &tensor.codes[first * (BLOCK / 2)..][..out.len() / 2];
    // SAFETY: the table has 16 elements.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    let mut scales = [0.0; RUN];
    let runs = out.chunks_mut(RUN * BLOCK).zip(codes.chunks(RUN * BLOCK / 2)).enumerate();
    for (run, (out, codes)) in runs {
        let scales = &mut scales[..out.len() / BLOCK];
        absmax(&tensor.scales, first + RUN * run, scales);
        let halves = out.as_chunks_mut::<{ BLOCK / 2 }>().0.as_chunks_mut::<2>().0.iter_mut();
        let codes = codes.as_chunks::<{ BLOCK / 4 }>().0.as_chunks::<2>().0;
        for ((halves, codes), &scale) in halves.zip(codes).zip(&*scales) {
            // All that the block can hold, twice, as the look-up sees a fifth bit, of the other code.
            let levels = _mm512_cvtneps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(scale)));
            // SAFETY: the types have the same bits.
            let levels = unsafe { std::mem::transmute::<__m256bh, __m256i>(levels) };
            let levels = _mm512_broadcast_i64x4(levels);
            for (values, codes) in halves.iter_mut().zip(codes) {
                // SAFETY: 16 bytes are read, and 32 values written.
                unsafe {
                    let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
                    // The first weight of a byte is in its high nibble.
                    let indices =
                        _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
                    let decoded = _mm512_permutexvar_epi16(indices, levels);
                    _mm512_storeu_si512(values.as_mut_ptr().cast(), decoded);
                }
            }
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
    let mut scales = [0.0; RUN];
    let runs = out.chunks_mut(RUN * BLOCK).zip(codes.chunks(RUN * BLOCK / 2)).enumerate();
    for (run, (out, codes)) in runs {
        let scales = &mut scales[..out.len() / BLOCK];
        absmax(&tensor.scales, first + RUN * run, scales);
        let blocks = out.as_chunks_mut::<BLOCK>().0.iter_mut();
        for ((block, codes), &scale) in blocks.zip(codes.as_chunks::<{ BLOCK / 2 }>().0).zip(&*scales) {
            let scale = _mm512_set1_ps(scale);
            for (values, codes) in block.as_chunks_mut::<16>().0.iter_mut().zip(codes.as_chunks::<8>().0) {
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
