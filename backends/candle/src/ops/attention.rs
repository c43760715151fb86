//! Causal grouped-query attention (Ainslie et al. 2023).

use crate::kernels::attention::{self as kernel, Shape as HeadShape};
use crate::values::{CpuValues, stored};
use candle_core::{CpuStorage, CustomOp3, D, Device, Layout, Result, Shape, Tensor, bail};

/// Attends from `q` `[examples, queries, heads, dim]` to `k` and `v` `[examples, keys, kv_heads, dim]`;
/// the last query sees all keys, each one before it one key less. The softmax is in f32.
///
/// Padding on the right needs no mask of its own: no real token comes after it.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let shape = head_shape(q.shape(), k.shape(), v.shape())?;
    match q.device() {
        Device::Cpu => q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Attention(shape)),
        Device::Cuda(_) | Device::Metal(_) => composed(q, k, v, shape),
    }
}

fn head_shape(q: &Shape, k: &Shape, v: &Shape) -> Result<HeadShape> {
    let (examples, queries, heads, dim) = q.dims4()?;
    let (k_examples, keys, kv_heads, k_dim) = k.dims4()?;
    let fits = k.dims() == v.dims()
        && (examples, dim) == (k_examples, k_dim)
        && queries <= keys
        && heads.is_multiple_of(kv_heads);
    if !fits {
        bail!("attention from {q:?} to {k:?} and {v:?}");
    }
    Ok(HeadShape { examples, queries, keys, heads, kv_heads, dim })
}

/// The heads of a group stand below each other, so that keys and values need not be repeated.
fn composed(q: &Tensor, k: &Tensor, v: &Tensor, shape: HeadShape) -> Result<Tensor> {
    let HeadShape { examples, queries, keys, heads, kv_heads, dim } = shape;
    let group = heads / kv_heads;
    let q = q.transpose(1, 2)?.contiguous()?.reshape((examples, kv_heads, group * queries, dim))?;
    let k = k.transpose(1, 2)?.contiguous()?;
    let v = v.transpose(1, 2)?.contiguous()?;
    let scores = (q.matmul(&k.t()?)? * (1.0 / (dim as f64).sqrt()))?;
    let scores = scores.reshape((examples, kv_heads, group, queries, keys))?.broadcast_add(&causal_mask(
        queries,
        keys,
        q.device(),
    )?)?;
    // The maximum only keeps the exponentials in range: it has no gradient.
    let exponentials = scores.broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?.exp()?;
    let weights = exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?;
    weights
        .reshape((examples, kv_heads, group * queries, keys))?
        .matmul(&v)?
        .reshape((examples, heads, queries, dim))?
        .transpose(1, 2)?
        .contiguous()
}

fn causal_mask(queries: usize, keys: usize, device: &Device) -> Result<Tensor> {
    let cached = keys - queries;
    let mask: Vec<f32> = (0..queries)
        .flat_map(|query| {
            (0..keys).map(move |key| if key <= cached + query { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    Tensor::from_vec(mask, (queries, keys), device)
}

struct Attention(HeadShape);

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (stored(q, q_layout)?, stored(k, k_layout)?, stored(v, v_layout)?);
        Ok((CpuStorage::F32(kernel::forward(self.0, q, k, v)), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (q_values, k_values, v_values, grad) =
            (CpuValues::new(q)?, CpuValues::new(k)?, CpuValues::new(v)?, CpuValues::new(&grad)?);
        let gradients =
            kernel::backward(self.0, q_values.slice()?, k_values.slice()?, v_values.slice()?, grad.slice()?);
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu).map(Some);
        Ok((tensor(gradients.q, q)?, tensor(gradients.k, k)?, tensor(gradients.v, v)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_alike, var};

    /// Several pieces of queries, several examples, a cache, groups of one and of three heads.
    #[test]
    fn the_fused_form_is_the_composed_one() {
        for (examples, queries, keys, heads, kv_heads) in
            [(2, 5, 5, 6, 2), (1, 150, 150, 2, 2), (1, 70, 90, 2, 1), (1, 1, 9, 4, 2)]
        {
            let q = var(&[examples, queries, heads, 8], 1);
            let k = var(&[examples, keys, kv_heads, 8], 2);
            let v = var(&[examples, keys, kv_heads, 8], 3);
            let shape = head_shape(q.shape(), k.shape(), v.shape()).unwrap();
            assert_alike(&[&q, &k, &v], || attention(&q, &k, &v), || composed(&q, &k, &v, shape));
        }
    }
}
