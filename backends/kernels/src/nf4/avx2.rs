//! With AVX2, whose look-ups have 16 entries of one byte: the four bytes of a level are looked up apart.

use evalfw_engine::nf4::{BLOCK, DYNAMIC_MAP, LEVELS, NESTED_BLOCK, Nf4Tensor, Scales};
use std::arch::x86_64::*;

/// Elements of a register.
const LANES: usize = 8;
/// The code of 0.
const ZERO: i32 = 127;
/// Scales that are looked up before the blocks that need them.
const RUN: usize = 64;

/// The first bytes of 16 values, then their second ones, and so on.
type Bytes<const N: usize> = [[u8; 16]; N];

/// Of the levels in f32.
const SINGLES: Bytes<4> = {
    let mut bytes = [[0; 16]; 4];
    let mut code = 0;
    while code < 16 {
        let level = LEVELS[code].to_le_bytes();
        (bytes[0][code], bytes[1][code]) = (level[0], level[1]);
        (bytes[2][code], bytes[3][code]) = (level[2], level[3]);
        code += 1;
    }
    bytes
};

/// Of the levels in 16 bits, as multiples of one of so many.
pub const fn words(one: f32) -> Bytes<2> {
    let mut bytes = [[0; 16]; 2];
    let mut code = 0;
    while code < 16 {
        let level = ((LEVELS[code] * one).round() as i16).to_le_bytes();
        (bytes[0][code], bytes[1][code]) = (level[0], level[1]);
        code += 1;
    }
    bytes
}

/// As they are looked up: the same 16 in both halves of a register.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub fn tables<const N: usize>(bytes: &Bytes<N>) -> [__m256i; N] {
    let mut tables = [_mm256_setzero_si256(); N];
    for (table, bytes) in tables.iter_mut().zip(bytes) {
        // SAFETY: 16 bytes are read.
        *table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
    }
    tables
}

/// The low nibbles of 32 bytes, which are the second weights of their pairs, and the high ones.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub fn nibbles(codes: __m256i) -> [__m256i; 2] {
    let nibble = _mm256_set1_epi8(15);
    [_mm256_and_si256(codes, nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(codes), nibble)]
}

/// The scales of the blocks from `first` on, bit for bit those of [`Scales::absmax`].
#[target_feature(enable = "avx2,fma")]
pub fn absmax(scales: &Scales, first: usize, out: &mut [f32]) {
    let map: &[f32; 256] = &DYNAMIC_MAP;
    let offset = scales.offset;
    let mut at = first;
    let mut out = out;
    while !out.is_empty() {
        // All of them share a nested scale.
        let here = out.len().min(NESTED_BLOCK - at % NESTED_BLOCK);
        let Some(blocks) = out.split_off_mut(..here) else { return };
        let codes = &scales.codes[at..at + here];
        let nested = scales.absmax[at / NESTED_BLOCK];
        // In two passes, of which the second computes eight at a time: nothing looks up as many.
        for (&code, out) in codes.iter().zip(&mut *blocks) {
            *out = map[usize::from(code)];
        }
        for out in blocks {
            *out = *out * nested + offset;
        }
        at += here;
    }
}

/// Of each decade of [`DYNAMIC_MAP`], and last of its ends 0 and 1: what stands before the place, counted from that of
/// the zero, and what is added. Within a decade the values are equally far apart.
const LINES: [[f32; LANES]; 2] = {
    let mut lines = [[0.0; LANES]; 2];
    let (mut decade, mut unit, mut steps) = (0, 1e-6f64, 1.0f64);
    while decade < LANES - 1 {
        lines[0][decade] = (unit * 0.9 / steps) as f32;
        lines[1][decade] = (unit * (0.1 - 0.9 + 0.45 / steps)) as f32;
        (decade, unit, steps) = (decade + 1, unit * 10.0, steps * 2.0);
    }
    lines[0][decade] = 1.0 / steps as f32;
    lines
};

/// The scales of the blocks from `first` on, times factors. Computed instead of looked up, which is off by at most 1e-6
/// of the nested scale and what rounding takes.
#[target_feature(enable = "avx2,fma")]
pub fn absmax_times(scales: &Scales, first: usize, factors: &[f32], out: &mut [f32]) {
    let mut start = 0;
    while start < out.len() {
        let at = first + start;
        let here = start..out.len().min(start + NESTED_BLOCK - at % NESTED_BLOCK);
        let nested = scales.absmax[at / NESTED_BLOCK];
        let (codes, rest) = scales.codes[at..at + here.len()].as_chunks::<LANES>();
        let (first_of_rest, end) = (here.end - rest.len(), here.end);
        let factors_here = factors[here.clone()].as_chunks::<LANES>().0;
        for ((codes, factors), out) in
            codes.iter().zip(factors_here).zip(out[here].as_chunks_mut::<LANES>().0)
        {
            absmax_of_lanes(codes, [nested, scales.offset], factors, out);
        }
        for i in first_of_rest..end {
            out[i] = scales.absmax(first + i) * factors[i];
        }
        start = end;
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn absmax_of_lanes(
    codes: &[u8; LANES],
    [nested, offset]: [f32; 2],
    factors: &[f32; LANES],
    out: &mut [f32; LANES],
) {
    // SAFETY: eight of each are read and written.
    unsafe {
        let [slopes, starts] = [_mm256_loadu_ps(LINES[0].as_ptr()), _mm256_loadu_ps(LINES[1].as_ptr())];
        let codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()));
        let places = _mm256_sub_epi32(codes, _mm256_set1_epi32(ZERO));
        let sizes = _mm256_cvtepi32_ps(_mm256_abs_epi32(places));
        // Decade k has the places from 2ᵏ on. Of twice the place and one more the exponent is one more, and that of the
        // zero is none: the look-up sees three of its bits.
        let odd = _mm256_fmadd_ps(sizes, _mm256_set1_ps(2.0), _mm256_set1_ps(1.0));
        let decades = _mm256_srli_epi32::<23>(_mm256_castps_si256(odd));
        let slopes = _mm256_permutevar8x32_ps(slopes, decades);
        let values = _mm256_fmadd_ps(slopes, sizes, _mm256_permutevar8x32_ps(starts, decades));
        let signs = _mm256_and_ps(_mm256_castsi256_ps(places), _mm256_set1_ps(-0.0));
        let values = _mm256_xor_ps(values, signs);
        let scales = _mm256_fmadd_ps(values, _mm256_set1_ps(nested), _mm256_set1_ps(offset));
        _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(scales, _mm256_loadu_ps(factors.as_ptr())));
    }
}

/// Whole blocks only.
#[target_feature(enable = "avx2,fma")]
pub fn widen(tensor: &Nf4Tensor, start: usize, out: &mut [f32]) {
    assert!(start.is_multiple_of(BLOCK) && out.len().is_multiple_of(BLOCK));
    let first = start / BLOCK;
    let codes = &tensor.codes[first * (BLOCK / 2)..][..out.len() / 2];
    let tables = tables(&SINGLES);
    let mut scales = [0.0; RUN];
    let runs = out.chunks_mut(RUN * BLOCK).zip(codes.chunks(RUN * BLOCK / 2)).enumerate();
    for (run, (out, codes)) in runs {
        let scales = &mut scales[..out.len() / BLOCK];
        absmax(&tensor.scales, first + RUN * run, scales);
        let blocks = out.as_chunks_mut::<BLOCK>().0.iter_mut();
        for ((block, codes), &scale) in blocks.zip(codes.as_chunks::<{ BLOCK / 2 }>().0).zip(&*scales) {
            widen_block(codes, &tables, scale, block);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn widen_block(codes: &[u8; BLOCK / 2], tables: &[__m256i; 4], scale: f32, out: &mut [f32; BLOCK]) {
    let scale = _mm256_set1_ps(scale);
    // SAFETY: 32 bytes are read.
    let [second, first] = nibbles(unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) });
    // In the order of the weights; the upper half of a register is 32 of them further on.
    let parts = [_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)];
    for (part, codes) in parts.into_iter().enumerate() {
        let mut bytes = *tables;
        for table in &mut bytes {
            *table = _mm256_shuffle_epi8(*table, codes);
        }
        let low = [_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[0], bytes[1])];
        let high = [_mm256_unpacklo_epi8(bytes[2], bytes[3]), _mm256_unpackhi_epi8(bytes[2], bytes[3])];
        for half in 0..2 {
            let levels =
                [_mm256_unpacklo_epi16(low[half], high[half]), _mm256_unpackhi_epi16(low[half], high[half])];
            for (i, levels) in levels.into_iter().enumerate() {
                let values = _mm256_mul_ps(_mm256_castsi256_ps(levels), scale);
                let place = 16 * part + 8 * half + 4 * i;
                // SAFETY: place + 4 is at most 32, and the block has 64 elements.
                unsafe {
                    let to = out.as_mut_ptr().add(place);
                    _mm_storeu_ps(to, _mm256_castps256_ps128(values));
                    _mm_storeu_ps(to.add(BLOCK / 2), _mm256_extractf128_ps::<1>(values));
                }
            }
        }
    }
}
