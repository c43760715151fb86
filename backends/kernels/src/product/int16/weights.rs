//! Weights as multiples. Those of NF4 come from its levels without being widened.

use super::quantize::{self, Range, add_sizes, factor, unit_of_weights};
use super::{GROUP, Int16, LANES, WEIGHTS, lanes_of_group};
use crate::matrix::Elements;
use crate::nf4::avx2::{absmax, nibbles, tables, words};
use crate::product::tile::{Wanted, Weights};
use crate::product::{COLUMN_STRIDE, COLUMNS};
use evalfw_engine::nf4::{BLOCK, Nf4Tensor};
use std::arch::x86_64::*;

/// Bytes of a block.
const BYTES: usize = BLOCK / 2;
const LEVELS: [[u8; 16]; 2] = words(WEIGHTS);

/// Along the depth, for each column.
pub fn along(wanted: &Wanted<'_>, tile: &mut [Int16], weights: &mut Weights) {
    let Wanted { matrix, columns, depth } = wanted;
    let in_features = matrix.shape()[1];
    let wide = &mut weights.wide[0];
    wide.resize(depth.len(), 0.0);
    // SAFETY: lanes of integers are used only where the CPU has the instructions.
    let tables = unsafe { tables(&LEVELS) };
    for (row, lanes) in columns.clone().zip(tile.chunks_mut(COLUMN_STRIDE)) {
        let start = row * in_features + depth.start;
        match &matrix.elements {
            Elements::Nf4(tensor) if start.is_multiple_of(BLOCK) && depth.len().is_multiple_of(BLOCK) => {
                let blocks = depth.len() / BLOCK;
                // SAFETY: as above.
                unsafe { blocks_along(tensor, start / BLOCK, &tables, &mut wide[..blocks], lanes) };
            }
            _ => {
                matrix.widen(start, wide);
                quantize::along(wide, Range::Weights, lanes);
            }
        }
    }
}

/// Blocks of NF4, whose units are those of their groups; `scales` is memory for each of them.
#[target_feature(enable = "avx2,fma")]
fn blocks_along(
    tensor: &Nf4Tensor,
    first: usize,
    tables: &[__m256i; 2],
    scales: &mut [f32],
    lanes: &mut [Int16],
) {
    absmax(&tensor.scales, first, scales);
    let codes = tensor.codes[first * BYTES..].as_chunks::<BYTES>().0;
    for ((codes, &mut scale), lanes) in codes.iter().zip(scales).zip(lanes.as_chunks_mut::<LANES>().0) {
        let to = lanes.as_mut_ptr();
        for (i, levels) in levels(codes, tables).into_iter().enumerate() {
            // SAFETY: eight words are four lanes, those from 4 · i and those from 16 further on; there are 33.
            unsafe {
                _mm_storeu_si128(to.add(4 * i).cast(), _mm256_castsi256_si128(levels));
                _mm_storeu_si128(to.add(4 * i + BLOCK / 4).cast(), _mm256_extracti128_si256::<1>(levels));
            }
        }
        lanes[LANES - 1] = Int16::of_unit(unit_of_weights(scale));
    }
}

/// Along the columns, for each group of depths.
pub fn across(wanted: &Wanted<'_>, tile: &mut [Int16], weights: &mut Weights) {
    let Wanted { matrix, columns, depth } = wanted;
    let width = matrix.shape()[1];
    for first in depth.clone().step_by(GROUP) {
        let group = Wanted { matrix, columns: columns.clone(), depth: first..depth.end.min(first + GROUP) };
        let tile = &mut tile[(first - depth.start) / GROUP * LANES * COLUMNS..];
        match &matrix.elements {
            Elements::Nf4(tensor) if width.is_multiple_of(BLOCK) && columns.start.is_multiple_of(BLOCK) => {
                // SAFETY: lanes of integers are used only where the CPU has the instructions.
                unsafe { group_of_blocks(&group, tensor, tile, &mut weights.wide[0]) };
            }
            _ => group_of_values(&group, tile, weights),
        }
    }
}

/// Depths of NF4, whose blocks lie along the columns: they share the unit of the largest.
#[target_feature(enable = "avx2,fma")]
fn group_of_blocks(wanted: &Wanted<'_>, tensor: &Nf4Tensor, tile: &mut [Int16], scales: &mut Vec<f32>) {
    let (columns, depths) = (wanted.columns.len(), wanted.depth.len());
    let blocks = columns / BLOCK;
    let start = |depth: usize| wanted.start_of_row(wanted.depth.start + depth) / BLOCK;
    scales.resize(depths * blocks, 0.0);
    for (depth, scales) in scales.chunks_mut(blocks).enumerate() {
        absmax(&tensor.scales, start(depth), scales);
    }
    let tables = tables(&LEVELS);
    let (pairs, units) = tile.split_at_mut((lanes_of_group(depths) - 1) * COLUMNS);
    for block in 0..blocks {
        let largest =
            scales.iter().skip(block).step_by(blocks).fold(0f32, |most, scale| most.max(scale.abs()));
        units[block * BLOCK..][..BLOCK].fill(Int16::of_unit(unit_of_weights(largest)));
        let by = factor(largest) * f32::from(i16::MAX);
        // The multiples of one depth, 16 to a register as they come from the look-up.
        let multiples = |depth: usize| -> [__m256i; 4] {
            if depth == depths {
                return [_mm256_setzero_si256(); 4];
            }
            let codes = &tensor.codes[(start(depth) + block) * BYTES..].as_chunks::<BYTES>().0[0];
            let scale = _mm256_set1_epi16((scales[depth * blocks + block] * by).round_ties_even() as i16);
            let [a, b, c, d] = levels(codes, &tables);
            [
                _mm256_mulhrs_epi16(a, scale),
                _mm256_mulhrs_epi16(b, scale),
                _mm256_mulhrs_epi16(c, scale),
                _mm256_mulhrs_epi16(d, scale),
            ]
        };
        for (pair, lanes) in pairs.chunks_mut(COLUMNS).enumerate() {
            let (first, second) = (multiples(2 * pair), multiples(2 * pair + 1));
            let to = lanes[block * BLOCK..][..BLOCK].as_mut_ptr();
            for (i, (a, b)) in first.into_iter().zip(second).enumerate() {
                let halves = [_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)];
                for (half, pairs) in halves.into_iter().enumerate() {
                    // SAFETY: four lanes of 64, and four that are 32 further on.
                    unsafe {
                        let to = to.add(8 * i + 4 * half);
                        _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(pairs));
                        _mm_storeu_si128(to.add(BLOCK / 2).cast(), _mm256_extracti128_si256::<1>(pairs));
                    }
                }
            }
        }
    }
}

/// Depths of any matrix. Each column has a unit of its own.
fn group_of_values(wanted: &Wanted<'_>, tile: &mut [Int16], weights: &mut Weights) {
    let (columns, depths) = (wanted.columns.len(), wanted.depth.len());
    let [wide, factors] = &mut weights.wide;
    wide.resize(GROUP * columns, 0.0);
    let mut largest = [0; COLUMNS];
    for (depth, wide) in wanted.depth.clone().zip(wide.chunks_mut(columns)) {
        wanted.fetch_ahead(depth);
        wanted.widen_row(depth, wide);
        // SAFETY: lanes of integers are used only where the CPU has the instructions.
        unsafe { add_sizes(wide, &mut largest) };
    }
    let (pairs, units) = tile.split_at_mut((lanes_of_group(depths) - 1) * COLUMNS);
    factors.resize(columns, 0.0);
    for ((factor, unit), &largest) in factors.iter_mut().zip(units).zip(&largest) {
        let of_column = unit_of_weights(f32::from_bits(largest));
        *factor = quantize::factor(of_column);
        *unit = Int16::of_unit(of_column);
    }
    for (lanes, rows) in pairs.chunks_mut(COLUMNS).zip(wide[..depths * columns].chunks(2 * columns)) {
        let (first, second) = rows.split_at(columns);
        // SAFETY: as above.
        unsafe { quantize::across(first, (!second.is_empty()).then_some(second), factors, lanes) };
    }
}

/// The levels of a block in the order of its weights, but for the upper half of each register, which is 32 of them
/// further on.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn levels(codes: &[u8; BYTES], tables: &[__m256i; 2]) -> [__m256i; 4] {
    // SAFETY: 32 bytes are read.
    let [second, first] = nibbles(unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) });
    let (low, high) = (_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second));
    // Without closures: those that `map` calls are not compiled for the instructions.
    let (a, b) = (_mm256_shuffle_epi8(tables[0], low), _mm256_shuffle_epi8(tables[1], low));
    let (c, d) = (_mm256_shuffle_epi8(tables[0], high), _mm256_shuffle_epi8(tables[1], high));
    [
        _mm256_unpacklo_epi8(a, b),
        _mm256_unpackhi_epi8(a, b),
        _mm256_unpacklo_epi8(c, d),
        _mm256_unpackhi_epi8(c, d),
    ]
}
