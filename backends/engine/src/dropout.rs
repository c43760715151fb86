//! Dropout masks as a pure function of who asks.
//!
//! Every engine gets the same masks, the recomputation of a checkpointed block gets the masks of its
//! first pass, and no random state has to be carried along.

use crate::lora::Target;

/// Names one mask: the input of one adapter in one layer at one micro-batch of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskKey {
    pub seed: u64,
    pub step: u64,
    pub micro_batch: usize,
    pub layer: usize,
    pub target: Target,
}

impl MaskKey {
    /// Writes the mask for the flattened input: 0 where the value is dropped, `1 / (1 - rate)` where
    /// it is kept.
    pub fn fill(&self, rate: f32, mask: &mut [f32]) {
        self.fill_from(rate, 0, mask);
    }

    /// Writes the part of the mask that begins at element `start`, so that threads can share the work.
    pub fn fill_from(&self, rate: f32, start: usize, mask: &mut [f32]) {
        let MaskParameters { low, high, threshold, kept } = self.parameters(rate);
        let start = start as u32;
        for (index, value) in mask.iter_mut().enumerate() {
            let element = start.wrapping_add(index as u32);
            let hash = mix32(mix32(element.wrapping_mul(0x9E37_79B9) ^ low) ^ high);
            *value = if hash < threshold { 0.0 } else { kept };
        }
    }

    pub fn mask(&self, rate: f32, len: usize) -> Vec<f32> {
        let mut mask = vec![0.0; len];
        self.fill(rate, &mut mask);
        mask
    }

    /// For an engine that makes the mask on its device.
    pub fn parameters(&self, rate: f32) -> MaskParameters {
        let place = (self.micro_batch as u64) << 32 | (self.layer as u64) << 8 | self.target as u64;
        let key = mix64(mix64(mix64(self.seed) ^ self.step) ^ place);
        MaskParameters {
            low: key as u32,
            high: (key >> 32) as u32,
            threshold: (f64::from(rate) * 2f64.powi(32)) as u32,
            kept: 1.0 / (1.0 - rate),
        }
    }
}

/// What the values of a mask are computed from. For element `i`, a u32 that wraps around:
/// `mix32(mix32(i · 0x9E3779B9 ^ low) ^ high) < threshold ? 0 : kept`, with the 32-bit finalizer of MurmurHash3.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MaskParameters {
    pub low: u32,
    pub high: u32,
    pub threshold: u32,
    pub kept: f32,
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014), with its increment.
fn mix64(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The 32-bit finalizer of MurmurHash3 (Appleby): 32-bit operations only, so that it vectorises.
fn mix32(value: u32) -> u32 {
    let mut h = value;
    h = (h ^ (h >> 16)).wrapping_mul(0x85EB_CA6B);
    h = (h ^ (h >> 13)).wrapping_mul(0xC2B2_AE35);
    h ^ (h >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: MaskKey = MaskKey { seed: 7, step: 3, micro_batch: 0, layer: 2, target: Target::Up };

    #[test]
    fn the_rate_and_the_scale_are_as_asked() {
        let mask = KEY.mask(0.1, 1_000_000);
        let dropped = mask.iter().filter(|&&m| m == 0.0).count() as f64 / 1e6;
        // Five standard deviations of a binomial with p = 0.1, n = 10^6.
        assert!((dropped - 0.1).abs() < 0.0015, "{dropped}");
        assert!(mask.iter().all(|&m| m == 0.0 || m == 1.0 / 0.9));
    }

    #[test]
    fn neighbouring_values_and_masks_are_independent() {
        let n = 1_000_000;
        let a = KEY.mask(0.1, n);
        let others = [
            MaskKey { step: 4, ..KEY },
            MaskKey { layer: 3, ..KEY },
            MaskKey { micro_batch: 1, ..KEY },
            MaskKey { target: Target::Down, ..KEY },
            MaskKey { seed: 8, ..KEY },
        ];
        let both = |x: &[f32], y: &[f32]| {
            x.iter().zip(y).filter(|(a, b)| **a == 0.0 && **b == 0.0).count() as f64 / x.len() as f64
        };
        for other in others {
            let joint = both(&a, &other.mask(0.1, n));
            assert!((joint - 0.01).abs() < 0.0006, "{other:?}: {joint}");
        }
        let joint = both(&a[1..], &a[..n - 1]);
        assert!((joint - 0.01).abs() < 0.0006, "neighbours: {joint}");
    }

    #[test]
    fn a_part_is_a_window_of_the_whole() {
        let whole = KEY.mask(0.3, 1000);
        let mut part = vec![9.0; 300];
        KEY.fill_from(0.3, 450, &mut part);
        assert_eq!(part, whole[450..750]);
    }

    #[test]
    fn a_rate_of_zero_drops_nothing() {
        assert!(KEY.mask(0.0, 1000).iter().all(|&m| m == 1.0));
    }
}
