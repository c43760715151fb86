//! Sums, and the end of a graph, on the CPU without candle's own loops over elements: their threads wait in
//! a spin beside rayon's, and take turns with them.

use crate::kernels::PIECE;
use crate::values::stored;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `a + b` of the same shape.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match a.device().is_cpu() {
        true => a.contiguous()?.apply_op2(&b.contiguous()?, Add),
        false => a + b,
    }
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
        let mut out = vec![0.0; a.len()];
        out.par_chunks_mut(PIECE).zip(a.par_chunks(PIECE)).zip(b.par_chunks(PIECE)).for_each(
            |((out, a), b)| {
                for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                    *out = a + b;
                }
            },
        );
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
pub fn with_gradient(x: &Tensor, gradient: Tensor) -> Result<Tensor> {
    match x.device().is_cpu() {
        true => x.apply_op1(Seed(gradient)),
        false => (x * gradient)?.sum_all(),
    }
}

struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_alike, var};

    #[test]
    fn the_fused_form_is_the_composed_one() {
        let (a, b) = (var(&[7, 19], 1), var(&[7, 19], 2));
        assert_alike(&[&a, &b], || add(&a, &b), || a.as_tensor() + b.as_tensor());
    }

    #[test]
    fn the_seed_is_the_gradient() {
        let x = var(&[3, 5], 1);
        let gradient = var(&[3, 5], 2).as_detached_tensor();
        let seeded = |x: &Tensor| with_gradient(x, gradient.clone());
        let product = |x: &Tensor| (x * &gradient)?.sum_all();
        let of_x = |scalar: Result<Tensor>| {
            let store = scalar.unwrap().backward().unwrap();
            store.get(&x).unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(of_x(seeded(&x)), of_x(product(&x)));
    }
}
