//! The operations of a Qwen2 block, all with a true backward.
//!
//! candle's own fused operations (`rms_norm`, `softmax_last_dim`, `rope`, `sdpa`) have none, and
//! `backward` passes over them without an error. Here each operation has several forms; see [`Form`]. Tests
//! hold them against each other.

mod attention;
pub mod by_hand;
mod rms_norm;
mod rope;
mod sum;
mod swiglu;

pub use attention::{Causal, attention};
pub use rms_norm::rms_norm;
pub use rope::{RopeTables, rope};
pub use sum::{add, with_gradient};
pub use swiglu::swiglu;

use candle_core::Device;

/// How operations are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Loops of our own on the CPU, with a backward that recomputes what it needs.
    Host,
    /// On a GPU: candle's fused operations, with a backward of our own.
    Device,
    /// Nothing but what candle ships, with its autograd: compositions of differentiable operations.
    Stock,
}

impl Form {
    /// The tuned form for a device.
    pub fn tuned(device: &Device) -> Self {
        match device {
            Device::Cpu => Self::Host,
            Device::Cuda(_) | Device::Metal(_) => Self::Device,
        }
    }
}

#[cfg(test)]
pub mod testing {
    use candle_core::{Device, Result, Tensor, Var};

    /// A variable with reproducible values around 0.
    pub fn var(shape: &[usize], seed: usize) -> Var {
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|i| ((i * (seed + 3) + seed) as f32 * 0.7311).sin()).collect();
        Var::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Asserts that both forms give the same result and, for a gradient of no special form, the same
    /// gradients.
    pub fn assert_alike(
        vars: &[&Var],
        fused: impl Fn() -> Result<Tensor>,
        composed: impl Fn() -> Result<Tensor>,
    ) {
        let (fused, composed) = (fused().unwrap(), composed().unwrap());
        assert_eq!(fused.dims(), composed.dims());
        assert_close(&fused, &composed);
        let weight = var(fused.dims(), 11);
        let backward = |out: &Tensor| {
            (out * weight.as_detached_tensor()).unwrap().sum_all().unwrap().backward().unwrap()
        };
        let (fused, composed) = (backward(&fused), backward(&composed));
        for var in vars {
            assert_close(fused.get(var).unwrap(), composed.get(var).unwrap());
        }
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (a, b) in values(a).iter().zip(&values(b)) {
            assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a} {b}");
        }
    }
}
