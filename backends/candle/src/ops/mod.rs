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
mod tape;

pub use attention::{Causal, attention};
pub use rms_norm::rms_norm;
pub use rope::{RopeTables, rope};
pub use sum::{add, with_gradient};
pub use swiglu::swiglu;
pub use tape::Tape;

use candle_core::{CustomOp1, CustomOp2, CustomOp3, Device, Result, Shape, Tensor};

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

/// How operations are computed, and where they are traced.
#[derive(Clone, Copy)]
pub struct Graph<'a> {
    pub form: Form,
    /// On the CPU. Without one candle traces for itself, as it always does in the other forms.
    pub tape: Option<&'a Tape>,
}

impl From<Form> for Graph<'_> {
    fn from(form: Form) -> Self {
        Self { form, tape: None }
    }
}

impl Graph<'_> {
    pub fn reshape(self, x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
        match self.tape {
            Some(tape) => tape.reshape(x, shape.into()),
            None => x.reshape(shape.into()),
        }
    }

    pub fn op1(self, x: &Tensor, op: impl CustomOp1 + Send + Sync + 'static) -> Result<Tensor> {
        match self.tape {
            Some(tape) => tape.op1(x, op),
            None => x.apply_op1(op),
        }
    }

    pub fn op2(self, [a, b]: [&Tensor; 2], op: impl CustomOp2 + Send + Sync + 'static) -> Result<Tensor> {
        match self.tape {
            Some(tape) => tape.op2([a, b], op),
            None => a.apply_op2(b, op),
        }
    }

    pub fn op3(self, [a, b, c]: [&Tensor; 3], op: impl CustomOp3 + Send + Sync + 'static) -> Result<Tensor> {
        match self.tape {
            Some(tape) => tape.op3([a, b, c], op),
            None => a.apply_op3(b, c, op),
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
