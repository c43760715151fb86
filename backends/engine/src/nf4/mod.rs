//! NF4 with double quantisation, as bitsandbytes stores it (Dettmers et al. 2023, "QLoRA").
//!
//! A tensor is cut, row-major, into blocks of 64. Each block is scaled by its largest magnitude
//! (`absmax`) and every value becomes the nearest of 16 levels, the quantiles of a normal
//! distribution. The `absmax` values, less their mean, are themselves quantized to 8 bits in blocks
//! of 256: 4.127 bits a weight in all.
//!
//! Codes, scales and decoded values are those of bitsandbytes on a CPU, bit for bit. That is why the
//! arithmetic below is f32 in an exact order, with bitsandbytes' own corner cases.

mod block;
mod scales;

pub use scales::{DYNAMIC_MAP, Scales};

use rayon::prelude::*;
use std::convert::Infallible;
use std::ops::Range;
use std::sync::LazyLock;

/// Values that share one `absmax`.
pub const BLOCK: usize = 64;
/// `absmax` values that share one nested scale.
pub const NESTED_BLOCK: usize = 256;

/// The 16 levels (QLoRA, appendix E; the digits are those of bitsandbytes).
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Both levels of a byte: the high nibble comes first.
static PAIRS: LazyLock<[[f32; 2]; 256]> =
    LazyLock::new(|| std::array::from_fn(|byte| [LEVELS[byte >> 4], LEVELS[byte & 15]]));

/// A matrix in NF4.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Tensor {
    /// `[out_features, in_features]`
    pub shape: [usize; 2],
    /// Two values a byte, the first in the high nibble.
    pub codes: Vec<u8>,
    pub scales: Scales,
}

impl Nf4Tensor {
    /// Quantizes a whole matrix at once.
    pub fn quantize(shape: [usize; 2], values: &[f32]) -> Self {
        assert_eq!(values.len(), shape[0] * shape[1]);
        let mut builder = Nf4Builder::new(shape);
        let fill = |piece: &mut Nf4Piece<'_>| {
            piece.push(&values[piece.rest()]);
            Ok::<_, Infallible>(())
        };
        let Ok(()) = builder.fill(1024 * BLOCK, fill);
        builder.finish()
    }

    pub fn elements(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.codes.len() + 4 * self.scales.absmax.len() + 4
    }

    /// Decodes everything, row-major, on all threads.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        self.dequantize_into(&mut out);
        out
    }

    /// Decodes everything into `out`, which has the tensor's size, on all threads.
    pub fn dequantize_into(&self, out: &mut [f32]) {
        const PIECE: usize = 64 * BLOCK;
        assert_eq!(out.len(), self.elements());
        out.par_chunks_mut(PIECE).enumerate().for_each(|(i, piece)| {
            let start = i * PIECE;
            self.dequantize_range(start..start + piece.len(), piece);
        });
    }

    /// Decodes the elements of `range` on this thread. The range begins at a multiple of [`BLOCK`].
    pub fn dequantize_range(&self, range: Range<usize>, out: &mut [f32]) {
        assert!(range.start.is_multiple_of(BLOCK) && range.len() == out.len());
        let pairs = &*PAIRS;
        for (i, block) in out.chunks_mut(BLOCK).enumerate() {
            let index = range.start / BLOCK + i;
            let absmax = self.scales.absmax(index);
            let codes = &self.codes[index * (BLOCK / 2)..];
            for (values, &code) in block.chunks_mut(2).zip(codes) {
                for (value, level) in values.iter_mut().zip(pairs[code as usize]) {
                    *value = level * absmax;
                }
            }
        }
    }
}

/// Quantizes a matrix that arrives in pieces, so that it never has to be whole in full precision.
pub struct Nf4Builder {
    shape: [usize; 2],
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl Nf4Builder {
    pub fn new(shape: [usize; 2]) -> Self {
        let elements = shape[0] * shape[1];
        Self { shape, codes: vec![0; elements.div_ceil(2)], absmax: vec![0.0; elements.div_ceil(BLOCK)] }
    }

    /// Hands out pieces of `len` elements, a multiple of [`BLOCK`], to all threads, from the first to the last;
    /// `fill` gives each its values. Ends early with an error of `fill`.
    pub fn fill<E: Send>(
        &mut self,
        len: usize,
        fill: impl Fn(&mut Nf4Piece<'_>) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        assert!(len > 0 && len.is_multiple_of(BLOCK), "a piece before the last must fill its blocks");
        let elements = self.shape[0] * self.shape[1];
        self.codes
            .chunks_mut(len / 2)
            .zip(self.absmax.chunks_mut(len / BLOCK))
            .enumerate()
            .par_bridge()
            .try_for_each(|(i, (codes, absmax))| {
                let rest = i * len..elements.min((i + 1) * len);
                let mut piece = Nf4Piece { rest, codes, absmax };
                fill(&mut piece)?;
                assert!(piece.rest.is_empty(), "fewer values than the piece holds");
                Ok(())
            })
    }

    pub fn finish(self) -> Nf4Tensor {
        Nf4Tensor { shape: self.shape, codes: self.codes, scales: Scales::quantize(&self.absmax) }
    }
}

/// A part of a matrix that is being quantized on one thread.
pub struct Nf4Piece<'a> {
    rest: Range<usize>,
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl Nf4Piece<'_> {
    /// The elements that are still to come, numbered row-major.
    pub fn rest(&self) -> Range<usize> {
        self.rest.clone()
    }

    /// Quantizes the next values and returns whether all of them are finite. All but the last of a piece come
    /// in multiples of [`BLOCK`].
    pub fn push(&mut self, values: &[f32]) -> bool {
        assert!(values.len() <= self.rest.len(), "more values than the piece holds");
        let last = values.len() == self.rest.len();
        assert!(last || values.len().is_multiple_of(BLOCK), "values before the last must fill their blocks");
        let codes = self.codes.split_off_mut(..values.len().div_ceil(2)).unwrap_or_default();
        let absmax = self.absmax.split_off_mut(..values.len().div_ceil(BLOCK)).unwrap_or_default();
        self.rest.start += values.len();
        block::quantize(values, codes, absmax)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn levels_times_a_common_scale_come_back_exactly() {
        // All blocks have absmax 3, so the nested quantisation has nothing to round.
        let values: Vec<f32> = (0..8 * BLOCK).map(|i| 3.0 * LEVELS[i % 16]).collect();
        let tensor = Nf4Tensor::quantize([8, BLOCK], &values);
        assert_eq!(tensor.dequantize(), values);
        assert_eq!(tensor.codes[0], 0x01);
    }

    #[test]
    fn zeros_stay_zero_and_odd_sizes_work() {
        let tensor = Nf4Tensor::quantize([3, 35], &[0.0; 105]);
        assert_eq!(tensor.dequantize(), vec![0.0; 105]);
        assert_eq!(tensor.codes.len(), 53);
    }

    proptest! {
        #[test]
        fn pieces_give_the_same_as_the_whole(len in 1usize..12, run in 1usize..12, seed in any::<u32>()) {
            let values: Vec<f32> = (0..10 * BLOCK as u32 + 7).map(|i| ((i ^ seed) as f32).sin()).collect();
            let shape = [1, values.len()];
            let mut builder = Nf4Builder::new(shape);
            let filled = builder.fill(len * BLOCK, |piece| {
                values[piece.rest()].chunks(run * BLOCK).all(|run| piece.push(run)).then_some(()).ok_or(())
            });
            prop_assert_eq!(filled, Ok(()));
            prop_assert_eq!(builder.finish(), Nf4Tensor::quantize(shape, &values));
        }

        #[test]
        fn the_error_stays_within_half_a_step(values in prop::collection::vec(-5f32..5.0, 1..300)) {
            let tensor = Nf4Tensor::quantize([1, values.len()], &values);
            let decoded = tensor.dequantize();
            for (i, (value, back)) in values.iter().zip(&decoded).enumerate() {
                // The widest gap between levels is 0.304; the nested scale adds at most 1.5 % of its range.
                let block = &values[i / BLOCK * BLOCK..values.len().min((i / BLOCK + 1) * BLOCK)];
                let absmax = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                prop_assert!((value - back).abs() <= 0.152 * absmax + 0.015 * 5.0 + 1e-6);
            }
        }

        #[test]
        fn any_range_of_blocks_decodes_as_the_whole(start in 0usize..6, len in 1usize..100) {
            let values: Vec<f32> = (0..7 * BLOCK).map(|i| (i as f32 * 0.37).cos()).collect();
            let tensor = Nf4Tensor::quantize([7, BLOCK], &values);
            let range = start * BLOCK..(start * BLOCK + len).min(values.len());
            let mut piece = vec![0.0; range.len()];
            tensor.dequantize_range(range.clone(), &mut piece);
            prop_assert_eq!(&piece[..], &tensor.dequantize()[range]);
        }
    }
}
