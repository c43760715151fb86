//! Rotary positions in the half-split form: element i is rotated with element i + dim / 2.

use super::{Form, Graph, by_hand};
use crate::values::{CpuValues, stored};
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};
use candle_nn::rotary_emb::rope_thd;
use evalfw_kernels::rope::Angles;

/// Cosines and sines of some positions, each f32 `[positions, dim / 2]`.
#[derive(Clone)]
pub struct RopeTables {
    cos: Tensor,
    sin: Tensor,
}

impl RopeTables {
    /// The tables for the positions from `start`.
    pub fn new(theta: f64, dim: usize, start: usize, positions: usize, device: &Device) -> Result<Self> {
        let (cos, sin) = evalfw_engine::rope::tables(theta, dim, start, positions);
        let shape = (positions, dim / 2);
        Ok(Self { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
    }
}

/// Rotates `x` `[examples, positions, heads, dim]`.
pub fn rope(graph: Graph<'_>, x: &Tensor, tables: &RopeTables) -> Result<Tensor> {
    match graph.form {
        Form::Host => graph.op1(x, Rope { tables: tables.clone() }),
        Form::Device => fused(graph, x, tables),
        Form::Stock => composed(x, tables),
    }
}

fn fused(graph: Graph<'_>, x: &Tensor, tables: &RopeTables) -> Result<Tensor> {
    let x = x.contiguous()?;
    let result = rope_thd(&x, &tables.cos, &tables.sin)?;
    let tables = tables.clone();
    // Back by the same angle.
    by_hand::op1(graph, "rope", &x, result, move |_, grad| rope_thd(grad, &tables.cos, &tables.sin.neg()?))
}

fn composed(x: &Tensor, tables: &RopeTables) -> Result<Tensor> {
    let (positions, half) = tables.cos.dims2()?;
    let cos = tables.cos.reshape((1, positions, 1, half))?;
    let sin = tables.sin.reshape((1, positions, 1, half))?;
    let (first, second) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
    let rotated_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let rotated_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Tensor::cat(&[rotated_first, rotated_second], 3)
}

struct Rope {
    tables: RopeTables,
}

impl Rope {
    /// By the tables, for something of `shape`.
    fn with_angles(
        &self,
        shape: &Shape,
        rotate: impl FnOnce(Angles<'_>, usize) -> Vec<f32>,
    ) -> Result<Vec<f32>> {
        let (_, positions, heads, dim) = shape.dims4()?;
        if self.tables.cos.dims() != [positions, dim / 2] {
            bail!("rope tables {:?} for {shape:?}", self.tables.cos.shape());
        }
        let (cos, sin) = (CpuValues::new(&self.tables.cos)?, CpuValues::new(&self.tables.sin)?);
        Ok(rotate(Angles { cos: cos.slice()?, sin: sin.slice()?, dim }, heads))
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = stored(storage, layout)?;
        let out = self.with_angles(layout.shape(), |angles, heads| angles.rotate(x, heads))?;
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let values = CpuValues::new(&grad)?;
        let values = values.slice()?;
        let out = self.with_angles(grad.shape(), |angles, heads| angles.rotate_back(values, heads))?;
        Tensor::from_vec(out, grad.shape(), &Device::Cpu).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_alike, var};

    #[test]
    fn all_forms_are_alike() {
        let x = var(&[2, 5, 3, 8], 1);
        let tables = RopeTables::new(100.0, 8, 7, 5, &Device::Cpu).unwrap();
        for form in [Form::Host, Form::Device] {
            assert_alike(&[&x], || rope(form.into(), &x, &tables), || rope(Form::Stock.into(), &x, &tables));
        }
    }
}
