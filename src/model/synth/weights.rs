//! Seeded random bf16 weights, drawn piece by piece.
//!
//! Element `i` of tensor `t` depends on nothing but the seed, the model's name, `t` and `i`: ChaCha8 can
//! be entered at any position of any stream. So pieces can be drawn on any number of threads, and in
//! any order, with the same result.
//!
//! A draw is 16 random bits, which pick one of 65,536 equally likely quantiles of the normal
//! distribution. The table of quantiles is scaled and rounded to bf16 once per tensor, so that a
//! weight costs two bytes of cipher stream and one lookup.

use super::fnv1a;
use evalfw_engine::config::ModelConfig;
use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use std::f64::consts::TAU;
use std::sync::LazyLock;

/// Values that a draw can take.
const LEVELS: usize = 1 << 16;
/// Elements that one thread draws at a time; a whole number of cipher blocks.
const PIECE: usize = 32_768;

/// The normal distribution of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distribution {
    pub mean: f64,
    pub std: f64,
}

impl Distribution {
    /// The distribution that a trained model's tensor of this name roughly has.
    ///
    /// - A projection has N(0, 1/fan_in): an input of unit variance, which is what a norm hands it,
    ///   gives an output of unit variance.
    /// - `o_proj` and `down_proj` write to the residual stream, twice per layer. Divided by √(2·layers),
    ///   they keep its variance below about 1 at any depth.
    /// - Norm weights scatter around 1, and biases around 0, so that leaving one out is noticed.
    /// - Embeddings have the 0.02 of Qwen2's own `initializer_range`. As a tied head this keeps the
    ///   logits small, and the first loss near the logarithm of the vocabulary.
    pub fn of(name: &str, shape: &[usize], config: &ModelConfig) -> Self {
        let fan_in = shape.last().copied().unwrap_or(1) as f64;
        let residual_writes = 2.0 * config.num_hidden_layers as f64;
        let (mean, variance) = match name {
            _ if name.ends_with("norm.weight") => (1.0, 0.05 * 0.05),
            _ if name.ends_with(".bias") || name.ends_with("embed_tokens.weight") => (0.0, 0.02 * 0.02),
            _ if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") => {
                (0.0, 1.0 / (fan_in * residual_writes))
            }
            _ => (0.0, 1.0 / fan_in),
        };
        Self { mean, std: f64::sqrt(variance) }
    }
}

/// The source of one tensor's elements.
pub struct TensorSource {
    rng: ChaCha8Rng,
    /// The bf16 values as bits.
    table: Vec<u16>,
}

impl TensorSource {
    /// `tensor` is the tensor's number in the model.
    pub fn new(model: &str, seed: u64, tensor: usize, distribution: Distribution) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&fnv1a(model.as_bytes()).to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(tensor as u64);
        let Distribution { mean, std } = distribution;
        let table = QUANTILES.iter().map(|q| bf16::from_f64(mean + std * q).to_bits()).collect();
        Self { rng, table }
    }

    /// Fills `bytes` with little-endian bf16 elements from `first` on, which is a multiple of
    /// [`PIECE`](Self::ALIGNMENT).
    pub fn fill(&self, first: u64, bytes: &mut [u8]) {
        debug_assert!(first.is_multiple_of(Self::ALIGNMENT), "{first}");
        bytes.par_chunks_mut(2 * PIECE).enumerate().for_each(|(index, piece)| {
            let element = first + (index * PIECE) as u64;
            let mut rng = self.rng.clone();
            // A word of the cipher stream is 32 bits: two elements.
            rng.set_word_pos(u128::from(element / 2));
            rng.fill_bytes(piece);
            for pair in piece.as_chunks_mut::<2>().0 {
                *pair = self.table[usize::from(u16::from_le_bytes(*pair))].to_le_bytes();
            }
        });
    }

    pub const ALIGNMENT: u64 = PIECE as u64;
}

/// The quantiles of N(0, 1) at (i + ½) / 65,536.
static QUANTILES: LazyLock<Vec<f64>> = LazyLock::new(quantiles);

/// The quantile function solves dx/dp = √(2π)·exp(x²/2) with x(½) = 0; a Runge-Kutta march of the fourth
/// order from the middle to the tail gives the upper half, and symmetry the lower.
fn quantiles() -> Vec<f64> {
    const STEPS_PER_LEVEL: usize = 8;
    let slope = |x: f64| TAU.sqrt() * (x * x / 2.0).exp();
    let march = |mut x: f64, distance: f64| {
        let h = distance / STEPS_PER_LEVEL as f64;
        for _ in 0..STEPS_PER_LEVEL {
            let a = slope(x);
            let b = slope(x + h / 2.0 * a);
            let c = slope(x + h / 2.0 * b);
            let d = slope(x + h * c);
            x += h / 6.0 * (a + 2.0 * b + 2.0 * c + d);
        }
        x
    };
    let level = 1.0 / LEVELS as f64;
    let mut upper = Vec::with_capacity(LEVELS / 2);
    let mut x = march(0.0, level / 2.0);
    for _ in 0..LEVELS / 2 {
        upper.push(x);
        x = march(x, level);
    }
    upper.iter().rev().map(|x| -x).chain(upper.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::presets::Preset;

    fn draw(source: &TensorSource, first: u64, count: usize) -> Vec<f32> {
        let mut bytes = vec![0; 2 * count];
        source.fill(first, &mut bytes);
        bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
    }

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        // Index of p: 65,536·p − ½. Values from tables of the normal distribution.
        let at = |p: f64| QUANTILES[(65_536.0 * p - 0.5).round() as usize];
        for (p, z) in [(0.5, 0.0), (0.841_345, 1.0), (0.975, 1.959_964), (0.999, 3.090_232)] {
            assert!((at(p) - z).abs() < 3e-3, "{p}: {}", at(p));
            assert!((at(1.0 - p) + z).abs() < 3e-3, "{}: {}", 1.0 - p, at(1.0 - p));
        }
        assert!((QUANTILES[65_535] - 4.324_0).abs() < 1e-3, "{}", QUANTILES[65_535]);
        assert!(QUANTILES.windows(2).all(|w| w[0] < w[1]));
    }

    #[test]
    fn draws_have_the_mean_and_deviation_asked_for() {
        let source = TensorSource::new("m", 1, 0, Distribution { mean: 1.0, std: 0.05 });
        let values = draw(&source, 0, 200_000);
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32;
        assert!((mean - 1.0).abs() < 1e-3, "{mean}");
        assert!((variance.sqrt() - 0.05).abs() < 1e-3, "{}", variance.sqrt());
    }

    #[test]
    fn a_piece_from_the_middle_is_the_middle_of_the_whole() {
        let source = TensorSource::new("m", 7, 3, Distribution { mean: 0.0, std: 1.0 });
        let whole = draw(&source, 0, 3 * PIECE + 5);
        assert_eq!(draw(&source, PIECE as u64, 2 * PIECE + 5), whole[PIECE..]);
    }

    #[test]
    fn the_number_of_threads_does_not_matter() {
        let source = TensorSource::new("m", 7, 3, Distribution { mean: 0.0, std: 1.0 });
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| draw(&source, 0, 5 * PIECE))
        };
        assert_eq!(on(1), on(4));
    }

    #[test]
    fn seed_name_and_tensor_each_give_another_stream() {
        let normal = Distribution { mean: 0.0, std: 1.0 };
        let first = |name, seed, tensor| draw(&TensorSource::new(name, seed, tensor, normal), 0, 100);
        let base = first("m", 1, 1);
        assert_eq!(base, first("m", 1, 1));
        for other in [first("n", 1, 1), first("m", 2, 1), first("m", 1, 2)] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn residual_projections_shrink_with_depth_and_the_others_do_not() {
        let deviation = |size: &str, name: &str, shape: &[usize]| {
            Distribution::of(name, shape, &Preset::parse(size).unwrap().config).std
        };
        let up = "model.layers.3.mlp.up_proj.weight";
        let down = "model.layers.3.mlp.down_proj.weight";
        assert_eq!(deviation("7b", up, &[10, 400]), 0.05);
        assert_eq!(deviation("7b", down, &[10, 400]), 0.05 / f64::sqrt(56.0));
        assert_eq!(deviation("14b", up, &[10, 400]), 0.05);
        assert!(deviation("14b", down, &[10, 400]) < deviation("7b", down, &[10, 400]));
        let norm = Distribution::of("model.norm.weight", &[64], &Preset::parse("tiny").unwrap().config);
        assert_eq!(norm.mean, 1.0);
    }
}
