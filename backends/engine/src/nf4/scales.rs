//! The `absmax` of blocks in 8 bits.

use super::NESTED_BLOCK;
use rayon::prelude::*;
use std::sync::LazyLock;

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
    pub(super) fn quantize(absmax: &[f32]) -> Self {
        let offset = torch_sum(absmax) / absmax.len().max(1) as f32;
        let mut codes = vec![0; absmax.len()];
        let mut nested = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK)];
        (absmax.par_chunks(NESTED_BLOCK), codes.par_chunks_mut(NESTED_BLOCK), &mut nested)
            .into_par_iter()
            .with_min_len(16)
            .for_each(|(absmax, codes, nested)| *nested = quantize_nested(absmax, offset, codes));
        Self { codes, absmax: nested, offset }
    }

    /// The scale of block `index`.
    pub fn absmax(&self, index: usize) -> f32 {
        DYNAMIC_MAP[self.codes[index] as usize] * self.absmax[index / NESTED_BLOCK] + self.offset
    }
}

/// Quantizes up to [`NESTED_BLOCK`] values to codes that are zero, and returns the nested scale.
fn quantize_nested(absmax: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    let largest = absmax.iter().fold(0f32, |m, v| m.max((v - offset).abs()));
    if largest != 0.0 {
        let scale = 1.0 / largest;
        let point_codes = &*POINT_CODES;
        for (code, value) in codes.iter_mut().zip(absmax) {
            *code = point_codes[nearest_point((value - offset) * scale)];
        }
    }
    largest
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

/// The points that divide -1..1 for bitsandbytes: it looks up the nearest one, for which it has tabulated the
/// code. So close to a boundary of codes it may take the second nearest.
const POINTS: usize = 1 << 16;
const LAST_POINT: f32 = (POINTS - 1) as f32;

/// Indices into [`DYNAMIC_MAP`].
static POINT_CODES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let points = (0..POINTS).map(|index| 2.0 * index as f32 / LAST_POINT - 1.0);
    points.map(|point| DYNAMIC_BOUNDARIES.partition_point(|&b| b < point) as u8).collect()
});

fn nearest_point(value: f32) -> usize {
    let unit = (value.clamp(-1.0, 1.0) + 1.0) * 0.5;
    // Zero times an infinite scale is NaN, which becomes point 0 here as there.
    usize::from(unit.mul_add(LAST_POINT, 0.5) as u16)
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

    #[test]
    fn the_dynamic_map_has_256_distinct_sorted_values() {
        assert!(DYNAMIC_MAP.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(DYNAMIC_MAP[255], 1.0);
        assert_eq!(DYNAMIC_MAP[127], 0.0);
    }
}
