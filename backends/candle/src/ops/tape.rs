//! The graph of operations on the CPU, and its backward.
//!
//! candle's own backward begins every gradient with zeros and adds each part in loops whose threads wait in a
//! spin beside rayon's: beside our loops that is a tenth of a training step. A tape calls the same backwards of
//! the same custom operations, moves the first part of a gradient to where it belongs, and lets go of what an
//! operation kept as soon as its backward is done.

use super::sum::sum;
use candle_core::backprop::GradStore;
use candle_core::{CustomOp1, CustomOp2, CustomOp3, Result, Shape, Tensor, TensorId};
use std::cell::RefCell;
use std::collections::HashSet;

/// Operations in the order in which they ran.
#[derive(Default)]
pub struct Tape {
    steps: RefCell<Vec<Step>>,
    /// Results that depend on a variable.
    traced: RefCell<HashSet<TensorId>>,
}

struct Step {
    operation: Operation,
    arguments: Vec<Tensor>,
    result: Tensor,
}

enum Operation {
    Reshape,
    One(Box<dyn CustomOp1>),
    Two(Box<dyn CustomOp2>),
    Three(Box<dyn CustomOp3>),
}

impl Tape {
    pub fn reshape(&self, x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
        let result = x.reshape(shape.into())?;
        Ok(self.trace(Operation::Reshape, &[x], result))
    }

    pub fn op1(&self, x: &Tensor, op: impl CustomOp1 + 'static) -> Result<Tensor> {
        let result = x.apply_op1_no_bwd(&op)?;
        Ok(self.trace(Operation::One(Box::new(op)), &[x], result))
    }

    pub fn op2(&self, [a, b]: [&Tensor; 2], op: impl CustomOp2 + 'static) -> Result<Tensor> {
        let result = a.apply_op2_no_bwd(b, &op)?;
        Ok(self.trace(Operation::Two(Box::new(op)), &[a, b], result))
    }

    pub fn op3(&self, [a, b, c]: [&Tensor; 3], op: impl CustomOp3 + 'static) -> Result<Tensor> {
        let result = a.apply_op3_no_bwd(b, c, &op)?;
        Ok(self.trace(Operation::Three(Box::new(op)), &[a, b, c], result))
    }

    fn trace(&self, operation: Operation, arguments: &[&Tensor], result: Tensor) -> Tensor {
        let mut traced = self.traced.borrow_mut();
        if arguments.iter().any(|x| x.is_variable() || traced.contains(&x.id())) {
            traced.insert(result.id());
            let arguments = arguments.iter().map(|&x| x.clone()).collect();
            self.steps.borrow_mut().push(Step { operation, arguments, result: result.clone() });
        }
        result
    }

    /// The gradients of all variables that `result` depends on, from the gradient of `result`.
    pub fn backward(self, result: &Tensor, gradient: Tensor) -> Result<GradStore> {
        let traced = self.traced.into_inner();
        let mut gradients = GradStore::default();
        gradients.insert(result, gradient);
        for step in self.steps.into_inner().into_iter().rev() {
            let Some(gradient) = gradients.remove(&step.result) else { continue };
            for (argument, part) in step.arguments.iter().zip(step.parts(&gradient)?) {
                let Some(part) = part else { continue };
                if !argument.is_variable() && !traced.contains(&argument.id()) {
                    continue;
                }
                let sum = match gradients.remove(argument) {
                    Some(others) => sum(&others, &part)?,
                    None => part,
                };
                gradients.insert(argument, sum);
            }
        }
        Ok(gradients)
    }
}

impl Step {
    /// What the gradient of the result adds to that of each argument.
    fn parts(&self, gradient: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(match (&self.operation, &self.arguments[..]) {
            (Operation::Reshape, [x]) => vec![Some(gradient.reshape(x.shape())?)],
            (Operation::One(op), [x]) => vec![op.bwd(x, &self.result, gradient)?],
            (Operation::Two(op), [a, b]) => {
                let (of_a, of_b) = op.bwd(a, b, &self.result, gradient)?;
                vec![of_a, of_b]
            }
            (Operation::Three(op), [a, b, c]) => {
                let (of_a, of_b, of_c) = op.bwd(a, b, c, &self.result, gradient)?;
                vec![of_a, of_b, of_c]
            }
            _ => unreachable!("an operation has as many arguments as its kind says"),
        })
    }
}
