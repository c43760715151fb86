//! Products that are measured once and then alike.

use crate::buffer::unwritten;
use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_wgpu::CubeTensor;
use cubecl::tune::AutotuneKey;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Sizes are rounded up to powers of two: a sequence that grows by a token is no new problem.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// Products with as many pairs of matrices.
    pub batch: usize,
    pub rows: usize,
    pub inner: usize,
    pub columns: usize,
    pub lhs: Layout,
    pub rhs: Layout,
}

/// Where the neighbours of an element are in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    Rows,
    Columns,
    Scattered,
}

impl AutotuneKey for Problem {}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch, rows, inner, columns, lhs, rhs } = self;
        write!(f, "{batch} x [{rows}, {inner}] ({lhs:?}) x [{inner}, {columns}] ({rhs:?})")
    }
}

impl Problem {
    /// `None` for what is left to burn: other types than f32, matrices that are used for several products, nothing to
    /// multiply.
    pub fn of(lhs: &CubeTensor, rhs: &CubeTensor) -> Option<Self> {
        let is_plain = |x: &CubeTensor| x.dtype == DType::F32 && x.qparams.is_none();
        let ([lhs_batch @ .., rows, inner], [rhs_batch @ .., _, columns]) =
            (&lhs.shape()[..], &rhs.shape()[..])
        else {
            return None;
        };
        let batch: usize = lhs_batch.iter().product();
        let alike = is_plain(lhs) && is_plain(rhs) && lhs_batch == rhs_batch;
        let problem = Self {
            batch: batch.next_power_of_two(),
            rows: rows.next_power_of_two(),
            inner: inner.next_power_of_two(),
            columns: columns.next_power_of_two(),
            lhs: Layout::of(lhs),
            rhs: Layout::of(rhs),
        };
        (alike && [batch, *rows, *inner, *columns].iter().all(|&size| size > 0)).then_some(problem)
    }

    /// Whether one of the factors is a vector.
    pub fn has_vector(&self) -> bool {
        self.rows == 1 || self.columns == 1
    }

    pub fn multiplications(&self) -> usize {
        [self.batch, self.rows, self.inner, self.columns].into_iter().fold(1, usize::saturating_mul)
    }
}

impl Layout {
    fn of(x: &CubeTensor) -> Self {
        match x.meta.strides()[..] {
            [.., _, 1] => Self::Rows,
            [.., 1, _] => Self::Columns,
            _ => Self::Scattered,
        }
    }
}

/// Memory for the product of two tensors that make a [`Problem`].
pub fn output(lhs: &CubeTensor, rhs: &CubeTensor) -> CubeTensor {
    let (mut dims, columns) = (lhs.shape()[..].to_vec(), rhs.shape()[rhs.shape().len() - 1]);
    if let Some(last) = dims.last_mut() {
        *last = columns;
    }
    unwritten(lhs, dims)
}
