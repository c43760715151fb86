//! Holds the tuned operations of a GPU against candle's plain ones, on that GPU, before anything relies on them: a
//! fused kernel may be wrong on one kind of device only.

use crate::matrix::{FrozenMatrix, Nf4Tables};
use crate::ops::{Causal, Form, RopeTables, attention, by_hand, rms_norm, rope, swiglu};
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};
use evalfw_engine::nf4::Nf4Tensor;
use evalfw_engine::weights::Weight;
use evalfw_kernels::Products;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Of the largest value. Both forms compute in f32, and add up in other orders.
const TOLERANCE: f32 = 1e-4;

const EXAMPLES: usize = 2;
/// More than the lanes of any reduction, so that its steps between groups of threads are tried as well.
const POSITIONS: usize = 200;
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 64;

/// An operation in some form, on its variables.
type Operation<'a> = Box<dyn Fn(Form) -> Result<Tensor> + 'a>;

/// What is wrong with the first operation whose result or gradients differ between the forms, or that fails.
pub fn problem(device: &Device) -> Result<Option<String>> {
    let var = |shape: &[usize], seed| variable(shape, seed, device);
    let x = var(&[POSITIONS, 192], 1)?;
    let weight = var(&[192], 2)?.as_detached_tensor();
    let (gate, up) = (var(&[POSITIONS, 320], 3)?, var(&[POSITIONS, 320], 4)?);
    let q = var(&[EXAMPLES, POSITIONS, HEADS, DIM], 5)?;
    let k = var(&[EXAMPLES, POSITIONS, KV_HEADS, DIM], 6)?;
    let v = var(&[EXAMPLES, POSITIONS, KV_HEADS, DIM], 7)?;
    let tables = RopeTables::new(1e6, DIM, 5, POSITIONS, device)?;
    let attend = |form: Form| {
        let causal = Causal::new(form, [EXAMPLES, HEADS], 0, POSITIONS, device)?;
        attention(form.into(), [&q, &k, &v], &causal, None)
    };
    let linear = |form| self::linear(form, &x, device);
    let one_row = x.as_tensor().narrow(0, 0, 1)?;
    let operations: [(&'static str, &[&Var], Operation<'_>); 6] = [
        ("a product with NF4", &[&x], Box::new(linear)),
        ("a product of one row with NF4", &[], Box::new(|form| nf4(form, device)?.product(&one_row))),
        ("rms-norm", &[&x], Box::new(|form: Form| rms_norm(form.into(), &x, &weight, 1e-6))),
        ("swiglu", &[&gate, &up], Box::new(|form| swiglu(form.into(), &gate, &up))),
        ("rope", &[&q], Box::new(|form| rope(form.into(), &q, &tables))),
        ("attention", &[&q, &k, &v], Box::new(attend)),
    ];
    for (name, vars, operation) in operations {
        // A driver that does not know a kernel may panic as well.
        match catch_unwind(AssertUnwindSafe(|| are_alike(vars, &operation))) {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return Ok(Some(format!("{name} differs on this device"))),
            Ok(Err(error)) => return Ok(Some(format!("{name} fails on this device: {error}"))),
            Err(_) => return Ok(Some(format!("{name} panics on this device"))),
        }
    }
    Ok(None)
}

/// A frozen matrix of 320 rows for `x`.
fn nf4(form: Form, device: &Device) -> Result<FrozenMatrix> {
    let values: Vec<f32> = (0..320 * 192).map(|i| (i as f32 * 0.9).sin()).collect();
    let weight = Weight::Nf4(Nf4Tensor::quantize([320, 192], &values));
    FrozenMatrix::new(weight, device, &Nf4Tables::new(device)?, (form, Products::F32))
}

fn linear(form: Form, x: &Tensor, device: &Device) -> Result<Tensor> {
    let matrix = nf4(form, device)?;
    match form {
        Form::Stock => x.matmul(&matrix.decode()?.t()?),
        Form::Host | Form::Device => {
            let result = matrix.product(&x.detach())?;
            by_hand::op1(form.into(), "self-check", x, result, move |_, grad| matrix.transposed_product(grad))
        }
    }
}

fn are_alike(vars: &[&Var], operation: &Operation<'_>) -> Result<bool> {
    let (tuned, stock) = (operation(Form::Device)?, operation(Form::Stock)?);
    let seed = variable(stock.dims(), 11, stock.device())?.as_detached_tensor();
    let mut pairs = vec![(&tuned, &stock)];
    let gradients = |result: &Tensor| match vars {
        [] => Ok(GradStore::default()),
        _ => (result * &seed)?.sum_all()?.backward(),
    };
    let (of_tuned, of_stock) = (gradients(&tuned)?, gradients(&stock)?);
    for var in vars {
        match (of_tuned.get(var), of_stock.get(var)) {
            (Some(tuned), Some(stock)) => pairs.push((tuned, stock)),
            _ => return Ok(false),
        }
    }
    for (tuned, stock) in pairs {
        let largest = |t: &Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        let distance = largest(&(tuned - stock)?)? / largest(stock)?;
        // What is not a number is not alike.
        if distance.is_nan() || distance > TOLERANCE {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Reproducible values around 0.
fn variable(shape: &[usize], seed: usize, device: &Device) -> Result<Var> {
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|i| ((i * (seed + 3) + seed) as f32 * 0.7311).sin()).collect();
    Var::from_vec(values, shape, device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_operations_are_alike_on_the_cpu() {
        assert_eq!(problem(&Device::Cpu).unwrap(), None);
    }

    #[test]
    fn a_wrong_result_and_a_wrong_gradient_are_seen() {
        let x = variable(&[3, 4], 1, &Device::Cpu).unwrap();
        let scaled =
            |form, factor| if form == Form::Device { x.as_tensor() * factor } else { x.as_tensor() * 1.0 };
        assert!(are_alike(&[&x], &(Box::new(|form| scaled(form, 1.0)) as Operation<'_>)).unwrap());
        assert!(!are_alike(&[&x], &(Box::new(|form| scaled(form, 1.01)) as Operation<'_>)).unwrap());
        let none: Operation<'_> = Box::new(|form| match form {
            Form::Device => Ok(x.detach()),
            _ => x.as_tensor() * 1.0,
        });
        assert!(!are_alike(&[&x], &none).unwrap());
    }
}
