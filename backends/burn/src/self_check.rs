//! Holds a GPU against flex before anything relies on it. Some drivers give NaN for the gradients of the factors (burn
//! issue 5162), or gradients that explode from some sequence length on (5351).
//!
//! One small block of random weights in NF4, with factors on all of its projections, computes its output and the
//! gradients of its input and of its factors on both.

mod passed;

use crate::BurnDevice;
use crate::attention::Pass;
use crate::block::Block;
use crate::device::OpenDevice;
use crate::guard::{guard, read};
use crate::lora::{Factors, Lora, download};
use crate::training::{gradient_of, leaf};
use burn::tensor::{Tensor, TensorData};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::{Adapter, LoraConfig, LoraPair, Target};
use evalfw_engine::nf4::Nf4Tensor;
use evalfw_engine::weights::{Projection, Weight};
use evalfw_engine::{Error, Result};
use evalfw_kernels::Products;
use passed::Passed;
use std::path::Path;
use std::sync::OnceLock;

/// Of the largest value of a tensor. Both compute in f32; they add up in other orders, and shaders may be some units
/// in the last place off in their functions: 4e-5 at most on lavapipe. What drivers do wrong is larger by orders of
/// magnitude.
const TOLERANCE: f32 = 1e-3;
/// Stands in for a largest value that is smaller: with one position, queries and keys have no gradient.
const SMALL: f32 = 1e-3;

/// A single position, which goes through kernels of its own, and a short sequence: at each start of a worker.
const AT_EACH_START: [usize; 2] = [1, 128];
/// Up to more than the lengths that went wrong. Most of their time goes into compiling kernels, so that a smaller block
/// would take as long.
const ONCE: [usize; 2] = [1024, 2048];

/// The verdict on the GPU of this process: there is only one, and flex is what it is held against. In `cache` passed
/// checks of long sequences are remembered.
pub fn once(device: &OpenDevice, cache: Option<&Path>) -> Result<()> {
    static VERDICT: OnceLock<Result<()>> = OnceLock::new();
    match device.kind {
        BurnDevice::Flex => Ok(()),
        BurnDevice::Wgpu => VERDICT
            .get_or_init(|| {
                let passed = cache.and_then(|cache| Passed::of(cache, &device.info, &ONCE));
                check_or_remember(passed.as_ref(), |lengths| check(device, lengths))
            })
            .clone(),
    }
}

/// A check that failed is never remembered.
fn check_or_remember(passed: Option<&Passed>, check: impl Fn(&[usize]) -> Result<()>) -> Result<()> {
    check(&AT_EACH_START)?;
    if passed.is_some_and(Passed::is_remembered) {
        return Ok(());
    }
    check(&ONCE)?;
    if let Some(Err(error)) = passed.map(Passed::remember) {
        // The next worker checks again.
        eprintln!("the self-check passed, but that could not be written down: {error}");
    }
    Ok(())
}

fn check(device: &OpenDevice, lengths: &[usize]) -> Result<()> {
    let host = OpenDevice::open(BurnDevice::Flex, Products::F32)?;
    for &positions in lengths {
        let expected = Sample::new(positions).run(&host)?;
        let found = guard(|| Sample::new(positions).run(device))?;
        if let Some(problem) = difference(&found, &expected) {
            let name = &device.info.name;
            return Err(Error::wrong(format_args!(
                "the self-check on {name} with {positions} positions: {problem}"
            )));
        }
    }
    // The figures of a model shall not have the pages of this in them.
    guard(|| {
        device.device.memory_cleanup();
        Ok(())
    })
}

/// What a block gives, by name.
type Results = Vec<(String, Vec<f32>)>;

/// What is wrong with the first result that differs.
fn difference(found: &Results, expected: &Results) -> Option<String> {
    found.iter().zip(expected).find_map(|((name, found), (_, expected))| {
        if let Some(bad) = found.iter().find(|v| !v.is_finite()) {
            return Some(format!("{name} has the value {bad}"));
        }
        let largest = expected.iter().fold(SMALL, |largest, v| largest.max(v.abs()));
        let distance = found.iter().zip(expected).fold(0f32, |most, (f, e)| most.max((f - e).abs()));
        let relative = distance / largest;
        let alike = found.len() == expected.len() && relative <= TOLERANCE;
        (!alike).then(|| format!("{name} is off by {relative:.1e} of its largest value, from flex"))
    })
}

/// A block with its adapter and one sequence.
struct Sample {
    config: ModelConfig,
    positions: usize,
    /// Where the random values begin.
    seed: usize,
}

impl Sample {
    fn new(positions: usize) -> Self {
        let config = ModelConfig {
            vocab_size: 1,
            // Rows of whole blocks of NF4, as all models have them.
            hidden_size: 128,
            intermediate_size: 192,
            num_hidden_layers: 1,
            // Two heads that share a key: the scores of few heads are what bounds the memory of the longest sequence.
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 64,
            max_position_embeddings: positions,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            tie_word_embeddings: true,
        };
        Self { config, positions, seed: 1 }
    }

    /// The output, the gradient of the input, and those of the factors, of the sum of the output times random values.
    fn run(&self, device: &OpenDevice) -> Result<Results> {
        let (config, hidden) = (&self.config, self.config.hidden_size);
        let shape = [self.positions, hidden];
        let tensor = |values| Tensor::<2>::from_data(TensorData::new(values, shape), &device.device);
        let norms = [1, 2].map(|at| self.values(at, hidden, 0.2).into_iter().map(|v| v + 1.0).collect());
        let block = Block::new(config, norms, |target| Ok(self.projection(target)), device)?;
        let lora = Lora::new(&self.adapter(), config, &device.device)?;
        let pass = Pass::new(config, 1, 0, self.positions, device);

        let (input, factors) = (leaf(tensor(self.values(3, shape[0] * hidden, 1.0))), lora.leaves(0));
        let output = block.forward(input.clone(), &pass, Some(lora.layer_with(&factors, 0, None)), None);
        let direction = tensor(self.values(4, shape[0] * hidden, 1.0));
        let mut gradients = (output.clone() * direction).sum().backward();

        let mut results = vec![
            ("the output".to_owned(), read(output.inner())?),
            ("the gradient of the input".to_owned(), read(gradient_of(&input, &mut gradients)?)?),
        ];
        let gradients = factors.iter().map(|factors| {
            let (a, b) = (gradient_of(&factors.a, &mut gradients)?, gradient_of(&factors.b, &mut gradients)?);
            Ok(Factors { a, b })
        });
        for ((_, target), LoraPair { a, b }) in download(&gradients.collect::<Result<Vec<_>>>()?)? {
            let name = |factor| format!("the gradient of {factor} of {}", target.module());
            results.extend([(name("A"), a), (name("B"), b)]);
        }
        Ok(results)
    }

    fn projection(&self, target: Target) -> Projection {
        let shape @ [rows, columns] = self.config.projection_shape(target);
        let at = 10 + target as usize;
        let values = self.values(at, rows * columns, 3.0 * (columns as f32).powf(-0.5));
        let bias = target.has_bias().then(|| self.values(at + 10, rows, 0.1));
        Projection { weight: Weight::Nf4(Nf4Tensor::quantize(shape, &values)), bias }
    }

    fn adapter(&self) -> Adapter {
        let config = LoraConfig { r: 8, lora_alpha: 16.0, lora_dropout: 0.0 };
        let pair = |target| {
            let [rows, columns] = self.config.projection_shape(target);
            let at = 30 + target as usize;
            let a = self.values(at, config.r * columns, 0.1);
            ((0, target), LoraPair { a, b: self.values(at + 10, rows * config.r, 0.1) })
        };
        Adapter { tensors: Target::ALL.into_iter().map(pair).collect(), config: config.clone() }
    }

    /// Reproducible values in (-scale, scale), others for every place.
    fn values(&self, place: usize, count: usize, scale: f32) -> Vec<f32> {
        let first = (self.seed + place) as f32;
        (0..count).map(|i| (first * 1.7 + (i * (2 * place + 3)) as f32 * 0.7311).sin() * scale).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::all_for_tests;
    use std::cell::RefCell;

    fn on_flex(sample: &Sample) -> Results {
        sample.run(&OpenDevice::open(BurnDevice::Flex, Products::F32).unwrap()).unwrap()
    }

    #[test]
    fn every_device_here_passes() {
        for device in all_for_tests() {
            assert_eq!(check(&device, &AT_EACH_START), Ok(()));
        }
    }

    #[test]
    fn long_sequences_are_checked_until_they_pass_and_short_ones_always() {
        let cache = tempfile::tempdir().unwrap();
        let device = OpenDevice::open(BurnDevice::Flex, Products::F32).unwrap();
        let passed = Passed::of(cache.path(), &device.info, &ONCE).unwrap();
        let start = |passed: Option<&Passed>, works: bool| {
            let checked = RefCell::new(Vec::new());
            let verdict = check_or_remember(passed, |lengths| {
                checked.borrow_mut().extend(lengths);
                if works || lengths == AT_EACH_START { Ok(()) } else { Err(Error::wrong("planted")) }
            });
            (checked.into_inner(), verdict.is_ok())
        };
        let all = [AT_EACH_START, ONCE].concat();
        assert_eq!(start(Some(&passed), false), (all.clone(), false));
        assert_eq!(start(Some(&passed), true), (all.clone(), true));
        assert_eq!(start(Some(&passed), true), (AT_EACH_START.to_vec(), true));
        assert_eq!(start(None, true), (all, true));
    }

    #[test]
    fn every_result_takes_part_and_none_is_zero() {
        let results = on_flex(&Sample::new(9));
        assert_eq!(results.len(), 2 + 2 * Target::ALL.len());
        for (name, values) in &results {
            assert!(values.iter().any(|v| v.abs() > 1e-3), "{name}");
        }
    }

    #[test]
    fn a_planted_error_in_any_result_is_caught() {
        let expected = on_flex(&Sample::new(9));
        assert_eq!(difference(&expected, &expected), None);
        for (index, (name, values)) in expected.iter().enumerate() {
            let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
            for (bad, words) in
                [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (1e6 * largest, "off"), (1.01 * largest, "off")]
            {
                let mut found = expected.clone();
                found[index].1[3] = bad;
                let problem = difference(&found, &expected).unwrap();
                assert!(problem.contains(&**name) && problem.contains(words), "{problem}");
            }
        }
    }

    #[test]
    fn another_computation_is_caught() {
        let sample = Sample::new(9);
        let other = Sample { seed: 2, ..Sample::new(9) };
        assert!(difference(&on_flex(&other), &on_flex(&sample)).is_some());
    }
}
