//! What a lane of a panel or a tile holds.

use super::tile::{self, Wanted, Weights};
use half::bf16;

/// One f32, or the bf16 of two neighbouring depths, or [integers](super::int16).
pub trait Lane: Copy + Default + Send + Sync + 'static {
    /// Depths of a group, which lies in [`GROUP`](Self::GROUP) lanes; nothing goes across groups.
    const DEPTHS: usize;
    const GROUP: usize = 1;
    /// Whether the tiles of transposed products, too, lie along the depth.
    const ALONG: bool = false;

    /// The lanes of so many depths from the beginning of a group.
    fn lanes_of(depths: usize) -> usize {
        depths.div_ceil(Self::DEPTHS)
    }

    /// Joins values that lie along the depth. What is missing in the last lanes is zero.
    fn join_along(values: &[f32], lanes: &mut [Self]);

    /// Fills a tile with weights.
    fn fill<const TRANSPOSED: bool>(wanted: Wanted<'_>, tile: &mut [Self], weights: &mut Weights);
}

/// Lanes of which each stands for itself.
pub trait Joined: Lane {
    /// Joins the values of neighbouring depths; `second` may be missing, and is zero then.
    fn join(first: &[f32], second: Option<&[f32]>, lanes: &mut [Self]);

    /// Whether lanes hold bf16; the next two are for them alone.
    const OF_BF16: bool = false;

    /// Joins values in bf16 that lie along the depth.
    fn copy_along(_values: &[bf16], _lanes: &mut [Self]) {
        unreachable!("lanes of another type");
    }

    /// Joins the values of two neighbouring depths in bf16.
    fn join_bf16(_first: &[bf16], _second: &[bf16], _lanes: &mut [Self]) {
        unreachable!("lanes of another type");
    }
}

impl Lane for f32 {
    const DEPTHS: usize = 1;

    fn join_along(values: &[f32], lanes: &mut [Self]) {
        lanes.copy_from_slice(values);
    }

    fn fill<const TRANSPOSED: bool>(wanted: Wanted<'_>, tile: &mut [Self], weights: &mut Weights) {
        tile::widen::<Self, TRANSPOSED>(wanted, tile, weights);
    }
}

impl Joined for f32 {
    fn join(first: &[f32], _: Option<&[f32]>, lanes: &mut [Self]) {
        lanes.copy_from_slice(first);
    }
}

/// Two bf16, the first in the low half.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Pair(u32);

#[cfg(target_arch = "x86_64")]
impl Pair {
    fn new(first: f32, second: f32) -> Self {
        Self::of_bits(bf16::from_f32(first), bf16::from_f32(second))
    }

    fn of_bits(first: bf16, second: bf16) -> Self {
        Self(u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16)
    }

    pub fn bits(self) -> i32 {
        self.0 as i32
    }
}

#[cfg(target_arch = "x86_64")]
impl Lane for Pair {
    const DEPTHS: usize = 2;

    fn join_along(values: &[f32], lanes: &mut [Self]) {
        assert_eq!(lanes.len(), values.len().div_ceil(2));
        let whole = values.len() / 32 * 32;
        // SAFETY: pairs are used only where the CPU has the instructions.
        unsafe { avx512::join_along(&values[..whole], &mut lanes[..whole / 2]) };
        for (lane, pair) in lanes[whole / 2..].iter_mut().zip(values[whole..].chunks(2)) {
            *lane = Self::new(pair[0], pair.get(1).copied().unwrap_or(0.0));
        }
    }

    fn fill<const TRANSPOSED: bool>(wanted: Wanted<'_>, tile: &mut [Self], weights: &mut Weights) {
        tile::widen::<Self, TRANSPOSED>(wanted, tile, weights);
    }
}

#[cfg(target_arch = "x86_64")]
impl Joined for Pair {
    const OF_BF16: bool = true;

    fn copy_along(values: &[bf16], lanes: &mut [Self]) {
        let (pairs, rest) = values.as_chunks::<2>();
        for (lane, [first, second]) in lanes.iter_mut().zip(pairs) {
            *lane = Self::of_bits(*first, *second);
        }
        if let ([last], Some(lane)) = (rest, lanes.get_mut(pairs.len())) {
            *lane = Self::of_bits(*last, bf16::ZERO);
        }
    }

    fn join_bf16(first: &[bf16], second: &[bf16], lanes: &mut [Self]) {
        assert_eq!((first.len(), second.len()), (lanes.len(), lanes.len()));
        let whole = lanes.len() / 32 * 32;
        // SAFETY: pairs are used only where the CPU has the instructions.
        unsafe { avx512::join_bf16(&first[..whole], &second[..whole], &mut lanes[..whole]) };
        for i in whole..lanes.len() {
            lanes[i] = Self::of_bits(first[i], second[i]);
        }
    }

    fn join(first: &[f32], second: Option<&[f32]>, lanes: &mut [Self]) {
        assert_eq!(lanes.len(), first.len());
        let whole = match second {
            Some(second) => {
                let whole = first.len() / 16 * 16;
                // SAFETY: as above.
                unsafe { avx512::join(&first[..whole], &second[..whole], &mut lanes[..whole]) };
                whole
            }
            None => 0,
        };
        for i in whole..first.len() {
            lanes[i] = Self::new(first[i], second.map_or(0.0, |second| second[i]));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::Pair;
    use half::bf16;
    use std::arch::x86_64::*;

    /// Multiples of 32 values.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn join_along(values: &[f32], lanes: &mut [Pair]) {
        for (values, lanes) in values.as_chunks::<32>().0.iter().zip(lanes.as_chunks_mut::<16>().0) {
            // SAFETY: 32 values are read and 16 lanes written; the types have the same bits.
            unsafe {
                let [low, high] = [0, 16].map(|i| _mm512_loadu_ps(values.as_ptr().add(i)));
                let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(lanes.as_mut_ptr().cast(), pairs);
            }
        }
    }

    /// Multiples of 32 values.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn join_bf16(first: &[bf16], second: &[bf16], lanes: &mut [Pair]) {
        // Of 64 halves those of the second row have an index from 32 on.
        let order =
            |start: u16| -> [u16; 32] { std::array::from_fn(|i| start + i as u16 / 2 + i as u16 % 2 * 32) };
        let orders = [order(0), order(16)];
        let rows = first.as_chunks::<32>().0.iter().zip(second.as_chunks::<32>().0);
        for ((first, second), lanes) in rows.zip(lanes.as_chunks_mut::<32>().0) {
            // SAFETY: 32 of each are read and written.
            unsafe {
                let [first, second] =
                    [first, second].map(|values| _mm512_loadu_si512(values.as_ptr().cast()));
                for (order, lanes) in orders.iter().zip(lanes.as_chunks_mut::<16>().0) {
                    let order = _mm512_loadu_si512(order.as_ptr().cast());
                    let pairs = _mm512_permutex2var_epi16(first, order, second);
                    _mm512_storeu_si512(lanes.as_mut_ptr().cast(), pairs);
                }
            }
        }
    }

    /// Multiples of 16 values.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn join(first: &[f32], second: &[f32], lanes: &mut [Pair]) {
        // Of 32 halves the first 16 come into the low halves of the lanes, the others into the high ones.
        let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
        // SAFETY: there are 32 indices.
        let interleave = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
        let rows = first.as_chunks::<16>().0.iter().zip(second.as_chunks::<16>().0);
        for ((first, second), lanes) in rows.zip(lanes.as_chunks_mut::<16>().0) {
            // SAFETY: 16 of each are read and written; the types have the same bits.
            unsafe {
                let [first, second] = [first, second].map(|values| _mm512_loadu_ps(values.as_ptr()));
                let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
                let pairs = _mm512_permutexvar_epi16(interleave, halves);
                _mm512_storeu_si512(lanes.as_mut_ptr().cast(), pairs);
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::level::has_bf16_products;

    #[test]
    fn pairs_round_to_the_nearest_bf16() {
        if !has_bf16_products() {
            return eprintln!("left out: this CPU has no bf16 products");
        }
        let values: Vec<f32> = (0..71).map(|i| (i as f32 * 0.77).sin() * 1e3).collect();
        let others: Vec<f32> = values.iter().map(|v| v * 0.37 - 1.0).collect();
        let mut along = vec![Pair::default(); 36];
        Pair::join_along(&values, &mut along);
        for (i, pair) in along.iter().enumerate() {
            let second = values.get(2 * i + 1).copied().unwrap_or(0.0);
            assert_eq!(*pair, Pair::new(values[2 * i], second));
        }
        let mut joined = vec![Pair::default(); 71];
        Pair::join(&values, Some(&others), &mut joined);
        assert!((0..71).all(|i| joined[i] == Pair::new(values[i], others[i])));
        let stored = |values: &[f32]| values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
        let mut copied = vec![Pair::default(); 71];
        Pair::join_bf16(&stored(&values), &stored(&others), &mut copied);
        assert_eq!(copied, joined);
        let mut copied = vec![Pair::default(); 36];
        Pair::copy_along(&stored(&values), &mut copied);
        assert_eq!(copied, along);
        Pair::join(&values, None, &mut joined);
        assert!((0..71).all(|i| joined[i] == Pair::new(values[i], 0.0)));
    }
}
