//! What a block's forward keeps for its backward on the CPU, so that it need not be computed again: the results of its
//! projections, in the type in which products read them.

use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::Target;
use evalfw_kernels::Products;
use evalfw_kernels::elementwise::{narrowed, widened};
use evalfw_kernels::filled::zeros;
use half::bf16;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What becomes of the results of a block's projections.
#[derive(Debug, Clone)]
pub enum Kept {
    /// They are computed and used.
    No,
    /// They are computed, and kept for when the block is computed again.
    Keep(Arc<Results>),
    /// The block is computed again for its backward: what was kept is used, and what nothing but the block's own
    /// result needs is left out.
    Again(Arc<Results>),
}

/// The kept results of one block.
#[derive(Debug)]
pub struct Results {
    products: Products,
    values: Mutex<BTreeMap<Target, Values>>,
}

#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// That of the last projection is only added to the residual.
fn is_needed_again(target: Target) -> bool {
    target != Target::Down
}

impl Kept {
    /// The result of a projection, computed where it is not known. A kept one is given out once.
    pub fn result(&self, target: Target, elements: usize, compute: impl FnOnce() -> Vec<f32>) -> Vec<f32> {
        match self {
            Self::No => compute(),
            Self::Keep(results) => {
                let result = compute();
                if is_needed_again(target) {
                    results.put(target, &result);
                }
                result
            }
            Self::Again(_) if !is_needed_again(target) => zeros(elements),
            Self::Again(results) => results.take(target).unwrap_or_else(compute),
        }
    }
}

impl Results {
    pub fn new(products: Products) -> Arc<Self> {
        Arc::new(Self { products, values: Mutex::default() })
    }

    /// Bytes that the results of a block take for `rows` positions.
    pub fn bytes(products: Products, config: &ModelConfig, rows: usize) -> u64 {
        let kept = Target::ALL.into_iter().filter(|&target| is_needed_again(target));
        let width: usize = kept.map(|target| config.projection_shape(target)[0]).sum();
        let size = match products {
            Products::F32 => size_of::<f32>(),
            Products::Bf16 => size_of::<bf16>(),
        };
        (rows * width * size) as u64
    }

    fn put(&self, target: Target, result: &[f32]) {
        let values = match self.products {
            Products::F32 => Values::F32(result.to_vec()),
            Products::Bf16 => Values::Bf16(narrowed(result)),
        };
        self.values.lock().unwrap_or_else(PoisonError::into_inner).insert(target, values);
    }

    fn take(&self, target: Target) -> Option<Vec<f32>> {
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner).remove(&target)?;
        Some(match values {
            Values::F32(values) => values,
            Values::Bf16(values) => widened(&values),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_computed_again_only_where_it_was_not_kept() {
        let never = || -> Vec<f32> { panic!("the result is known") };
        for products in [Products::F32, Products::Bf16] {
            let results = Results::new(products);
            let (keep, again) = (Kept::Keep(results.clone()), Kept::Again(results));
            for target in [Target::Q, Target::Down] {
                assert_eq!(keep.result(target, 2, || vec![1.5, -0.25]), [1.5, -0.25]);
            }
            assert_eq!(again.result(Target::Q, 2, never), [1.5, -0.25]);
            assert_eq!(again.result(Target::Q, 2, || vec![3.0, 4.0]), [3.0, 4.0]);
            assert_eq!(again.result(Target::Down, 2, never), [0.0, 0.0]);
            assert_eq!(Kept::No.result(Target::Down, 1, || vec![5.0]), [5.0]);
        }
    }
}
