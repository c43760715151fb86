//! The gated activation of the MLP (Shazeer 2020).

use super::{Form, Graph, by_hand};
use crate::values::{CpuValues, stored};
use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Tensor};
use evalfw_kernels::elementwise::{swiglu_gradients_of, swiglu_of};

/// `silu(gate) · up`
pub fn swiglu(graph: Graph<'_>, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    match graph.form {
        Form::Host => graph.op2([gate, up], SwiGlu),
        Form::Device => fused(graph, gate, up),
        Form::Stock => gate.silu()? * up,
    }
}

fn fused(graph: Graph<'_>, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let result = (gate.detach().silu()? * up.detach())?;
    by_hand::op2(graph, "swiglu", [gate, up], result, |[gate, up], grad| {
        #[cfg(feature = "cuda")]
        if gate.device().is_cuda() {
            return crate::cuda::swiglu_backward(&gate.contiguous()?, &up.contiguous()?, grad);
        }
        let sigmoid = candle_nn::ops::sigmoid(gate)?;
        let silu = (gate * &sigmoid)?;
        // The derivative of silu is sigmoid · (1 + gate − silu).
        let derivative = (&sigmoid + (&sigmoid * (gate - &silu)?)?)?;
        Ok([((grad * up)? * derivative)?, (grad * silu)?])
    })
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (stored(gate, gate_layout)?, stored(up, up_layout)?);
        Ok((CpuStorage::F32(swiglu_of(gate, up)), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let shape = gate.shape();
        let grad = grad.contiguous()?;
        let (gate, up, grad) = (CpuValues::new(gate)?, CpuValues::new(up)?, CpuValues::new(&grad)?);
        let [of_gate, of_up] = swiglu_gradients_of(gate.slice()?, up.slice()?, grad.slice()?);
        let tensor = |values| Tensor::from_vec(values, shape, &Device::Cpu).map(Some);
        Ok((tensor(of_gate)?, tensor(of_up)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_alike, var};

    #[test]
    fn all_forms_are_alike() {
        let (gate, up) = (var(&[7, 19], 1), var(&[7, 19], 2));
        for form in [Form::Host, Form::Device] {
            assert_alike(
                &[&gate, &up],
                || swiglu(form.into(), &gate, &up),
                || swiglu(Form::Stock.into(), &gate, &up),
            );
        }
    }
}
