//! NF4 with double quantisation, as bitsandbytes stores it (Dettmers et al. 2023, "QLoRA").
//!
//! A tensor is cut, row-major, into blocks of 64. Each block is scaled by its largest magnitude
//! (`absmax`) and every value becomes the nearest of 16 levels, the quantiles of a normal
//! distribution. The `absmax` values, less their mean, are themselves quantized to 8 bits in blocks
//! of 256: 4.127 bits a weight in all.
//!
//! Codes, scales and decoded values are those of bitsandbytes on a CPU, bit for bit. That is why the
//! arithmetic below is f32 in an exact order, with bitsandbytes' own corner cases.

use rayon::prelude::*;
use std::ops::Range;
use std::sync::LazyLock;

/// Values that share one `absmax`.
pub const BLOCK: usize = 64;
/// `absmax` values that share one nested scale.
pub const NESTED_BLOCK: usize = 256;

/// What a smaller `absmax` is taken for, so that its reciprocal is finite.
const SMALLEST_ABSMAX: f32 = 1e-38;

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

/// The boundaries between neighbouring levels: their midpoints.
static BOUNDARIES: LazyLock<[f32; 15]> = LazyLock::new(|| {
    std::array::from_fn(|i| ((f64::from(LEVELS[i]) + f64::from(LEVELS[i + 1])) / 2.0) as f32)
});

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

/// One `absmax` for each block, in 8 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Scales {
    /// Indices into the dynamic map.
    pub codes: Vec<u8>,
    /// The nested scale of each [`NESTED_BLOCK`] of `codes`.
    pub absmax: Vec<f32>,
    /// The mean that was taken off before quantizing.
    pub offset: f32,
}

impl Scales {
    fn quantize(absmax: &[f32]) -> Self {
        let offset = torch_sum(absmax) / absmax.len().max(1) as f32;
        let mut codes = Vec::with_capacity(absmax.len());
        let mut nested = Vec::with_capacity(absmax.len().div_ceil(NESTED_BLOCK));
        for block in absmax.chunks(NESTED_BLOCK) {
            let largest = block.iter().fold(0f32, |m, v| m.max((v - offset).abs()));
            let scale = 1.0 / largest;
            codes.extend(block.iter().map(|v| match largest {
                0.0 => 0,
                _ => dynamic_code((v - offset) * scale),
            }));
            nested.push(largest);
        }
        Self { codes, absmax: nested, offset }
    }

    /// The scale of block `index`.
    pub fn absmax(&self, index: usize) -> f32 {
        DYNAMIC_MAP[self.codes[index] as usize] * self.absmax[index / NESTED_BLOCK] + self.offset
    }
}

impl Nf4Tensor {
    /// Quantizes a whole matrix at once.
    pub fn quantize(shape: [usize; 2], values: &[f32]) -> Self {
        let mut builder = Nf4Builder::new(shape);
        builder.push(values);
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
    filled: usize,
}

impl Nf4Builder {
    pub fn new(shape: [usize; 2]) -> Self {
        let elements = shape[0] * shape[1];
        Self {
            shape,
            codes: vec![0; elements.div_ceil(2)],
            absmax: vec![0.0; elements.div_ceil(BLOCK)],
            filled: 0,
        }
    }

    /// Adds the next values. All pieces but the last have a multiple of [`BLOCK`] values.
    pub fn push(&mut self, values: &[f32]) {
        assert!(self.filled.is_multiple_of(BLOCK), "a piece before the last must fill its blocks");
        assert!(
            self.filled + values.len() <= self.shape[0] * self.shape[1],
            "more values than the shape holds"
        );
        let codes = &mut self.codes[self.filled / 2..];
        let absmax = &mut self.absmax[self.filled / BLOCK..];
        (values.par_chunks(BLOCK), codes.par_chunks_mut(BLOCK / 2), absmax)
            .into_par_iter()
            .with_min_len(64)
            .for_each(|(values, codes, absmax)| *absmax = quantize_block(values, codes));
        self.filled += values.len();
    }

    pub fn finish(self) -> Nf4Tensor {
        assert_eq!(self.filled, self.shape[0] * self.shape[1], "fewer values than the shape holds");
        Nf4Tensor { shape: self.shape, codes: self.codes, scales: Scales::quantize(&self.absmax) }
    }
}

/// Quantizes up to [`BLOCK`] values and returns their `absmax`. An odd last value is paired with zero.
fn quantize_block(values: &[f32], codes: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
    let absmax = largest.max(SMALLEST_ABSMAX);
    let mut levels = [nearest_level(0.0); BLOCK];
    // bitsandbytes divides in a last block that is not full, and multiplies by the reciprocal in others.
    let full = values.len() == BLOCK;
    if full {
        let scale = 1.0 / absmax;
        for (level, value) in levels.iter_mut().zip(values) {
            *level = nearest_level(value * scale);
        }
    } else {
        for (level, value) in levels.iter_mut().zip(values) {
            *level = nearest_level(value / absmax);
        }
    }
    for (code, pair) in codes.iter_mut().zip(levels.as_chunks::<2>().0) {
        *code = pair[0] << 4 | pair[1];
    }
    if full { largest } else { absmax }
}

/// Counts the boundaries below `value`: branch-free, so that it vectorises.
fn nearest_level(value: f32) -> u8 {
    BOUNDARIES.iter().map(|&boundary| u8::from(value > boundary)).sum()
}

/// The signed 8-bit dynamic data type of Dettmers et al. 2022 ("8-bit Optimizers via Block-wise
/// Quantization"): 7 decades, each with twice as many steps as the one below, plus 0 and 1.
pub static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut values = vec![0.0, 1.0];
    for decade in 0..7 {
        let steps = 1usize << decade;
        let unit = 10f64.powi(decade - 6) as f32;
        for i in 0..steps {
            let value = unit * ((dynamic_boundary(i, steps) + dynamic_boundary(i + 1, steps)) / 2.0);
            values.extend([value, -value]);
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
});

static DYNAMIC_BOUNDARIES: LazyLock<[f32; 255]> =
    LazyLock::new(|| std::array::from_fn(|i| 0.5 * (DYNAMIC_MAP[i] + DYNAMIC_MAP[i + 1])));

/// Number `i` of the points that cut 0.1..1 into `steps`, as `torch.linspace` rounds it: counted from the
/// nearer end, in one fused operation.
fn dynamic_boundary(i: usize, steps: usize) -> f32 {
    let step = (1.0 - 0.1f32) / steps as f32;
    if i < steps.div_ceil(2) { step.mul_add(i as f32, 0.1) } else { (-step).mul_add((steps - i) as f32, 1.0) }
}

/// Index into [`DYNAMIC_MAP`] for a value in -1..1.
///
/// bitsandbytes looks up the nearest of 65 536 points, for which it has tabulated the code; so close to a
/// boundary it may be the second nearest code.
fn dynamic_code(value: f32) -> u8 {
    const LAST_POINT: f32 = 65_535.0;
    let unit = (value.clamp(-1.0, 1.0) + 1.0) * 0.5;
    // Zero times an infinite scale is NaN, which becomes point 0 here as there.
    let index = unit.mul_add(LAST_POINT, 0.5) as u16;
    let point = 2.0 * f32::from(index) / LAST_POINT - 1.0;
    DYNAMIC_BOUNDARIES.partition_point(|&boundary| boundary < point) as u8
}

/// Vectors that torch adds up side by side.
const SUM_ROWS: usize = 4;
type SumRows<const LANES: usize> = [[f32; LANES]; SUM_ROWS];

/// The sum as torch computes it on one thread of an x86 CPU: the offset is a mean, and on its last bit
/// depend all decoded values.
fn torch_sum(values: &[f32]) -> f32 {
    if values.len() < 8 { sum_in_lanes::<1>(values) } else { sum_in_lanes::<8>(values) }
}

fn sum_in_lanes<const LANES: usize>(values: &[f32]) -> f32 {
    let (vectors, rest) = values.as_chunks::<LANES>();
    let (steps, last_vectors) = vectors.as_chunks::<SUM_ROWS>();
    let [mut total, rows @ ..] = cascade(steps);
    for vector in last_vectors.iter().chain(&rows) {
        add(&mut total, vector);
    }
    rest.iter().chain(&total).fold(0.0, |sum, value| sum + value)
}

/// Adds up `steps` in four levels, each of which is carried to the next after a power of two of steps.
fn cascade<const LANES: usize>(steps: &[SumRows<LANES>]) -> SumRows<LANES> {
    const LEVELS: usize = 4;
    let ceil_log2 = (usize::BITS - steps.len().saturating_sub(1).leading_zeros()) as usize;
    let power = (ceil_log2 / LEVELS).max(4);
    let mut sums = [[[0f32; LANES]; SUM_ROWS]; LEVELS];
    for (done, rows) in (1..).zip(steps) {
        add_rows(&mut sums[0], rows);
        for level in 1..LEVELS {
            if done % (1usize << (level * power)) != 0 {
                break;
            }
            let carried = std::mem::replace(&mut sums[level - 1], [[0.0; LANES]; SUM_ROWS]);
            add_rows(&mut sums[level], &carried);
        }
    }
    let [mut total, levels @ ..] = sums;
    for level in &levels {
        add_rows(&mut total, level);
    }
    total
}

fn add_rows<const LANES: usize>(sum: &mut SumRows<LANES>, rows: &SumRows<LANES>) {
    for (sum, row) in sum.iter_mut().zip(rows) {
        add(sum, row);
    }
}

fn add<const LANES: usize>(sum: &mut [f32; LANES], vector: &[f32; LANES]) {
    for (sum, value) in sum.iter_mut().zip(vector) {
        *sum += value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_dynamic_map_has_256_distinct_sorted_values() {
        assert!(DYNAMIC_MAP.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(DYNAMIC_MAP[255], 1.0);
        assert_eq!(DYNAMIC_MAP[127], 0.0);
    }

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
        fn pieces_give_the_same_as_the_whole(cut in 0usize..10, seed in any::<u32>()) {
            let values: Vec<f32> = (0..10 * BLOCK as u32 + 7).map(|i| ((i ^ seed) as f32).sin()).collect();
            let shape = [1, values.len()];
            let mut builder = Nf4Builder::new(shape);
            builder.push(&values[..cut * BLOCK]);
            builder.push(&values[cut * BLOCK..]);
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
