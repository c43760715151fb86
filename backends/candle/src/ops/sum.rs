//! Sums, and the end of a graph, on the CPU without candle's own loops over elements: their threads wait in
//! a spin beside rayon's, and take turns with them.

use super::{Form, Graph, by_hand};
use crate::values::stored;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use evalfw_kernels::filled::{PIECE, filled};

/// `a + b` of the same shape.
pub fn add(graph: Graph<'_>, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match graph.form {
        Form::Host => graph.op2([a, b], Add),
        Form::Device | Form::Stock => a + b,
    }
}

/// The same on the CPU, untraced.
pub fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op2_no_bwd(&b.contiguous()?, &Add)
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (a, b) = (stored(a, a_layout)?, stored(b, b_layout)?);
        let out = filled(a.len(), PIECE, |start, out| {
            for ((out, a), b) in out.iter_mut().zip(&a[start..]).zip(&b[start..]) {
                *out = a + b;
            }
        });
        Ok((CpuStorage::F32(out), a_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), Some(grad.clone())))
    }
}

/// A scalar whose gradient with respect to `x` is `gradient`. Its value means nothing.
pub fn with_gradient(form: Form, x: &Tensor, gradient: Tensor) -> Result<Tensor> {
    match form {
        Form::Host | Form::Device => {
            let nothing = Tensor::zeros((), x.dtype(), x.device())?;
            by_hand::op1(form.into(), "seed", x, nothing, move |_, _| Ok(gradient.clone()))
        }
        Form::Stock => (x * gradient)?.sum_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_alike, var};

    #[test]
    fn all_forms_are_alike() {
        let (a, b) = (var(&[7, 19], 1), var(&[7, 19], 2));
        assert_alike(&[&a, &b], || add(Form::Host.into(), &a, &b), || add(Form::Stock.into(), &a, &b));
    }

    #[test]
    fn the_seed_is_the_gradient() {
        let x = var(&[3, 5], 1);
        let gradient = var(&[3, 5], 2).as_detached_tensor();
        let of_x = |form| {
            let store = with_gradient(form, &x, gradient.clone()).unwrap().backward().unwrap();
            store.get(&x).unwrap().to_vec2::<f32>().unwrap()
        };
        for form in [Form::Host, Form::Device] {
            assert_eq!(of_x(form), of_x(Form::Stock));
        }
    }
}
