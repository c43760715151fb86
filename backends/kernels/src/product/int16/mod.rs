//! Products of 16-bit integers, for CPUs that multiply them faster than f32 and have no fast bf16.
//!
//! Factors are multiples of a unit that up to [`GROUP`] neighbours along the depth share: block floating point. The
//! products of a group are summed exactly in 32 bits, and groups in f32. So a lane holds the multiples of two depths,
//! and behind those of a group stands its unit, an f32:
//!
//! ```text
//! of one row or column:  (m₀ m₁) (m₂ m₃) … (m₆₂ m₆₃) unit  (m₆₄ m₆₅) …
//! ```
//!
//! Weights are at most [`WEIGHTS`] multiples, and the sizes of a group of activations add up to [`ACTIVATIONS`] at
//! most: no sum overflows. A factor is off by half a unit. For normal values that is some 1e-4 of their deviation,
//! where bf16 rounds off 1e-3.

mod quantize;
mod strip;
mod weights;

use super::lane::Lane;
use super::tile::{Wanted, Weights};
use quantize::Range;
pub use strip::{Avx2, Avx512};

/// Depths that share a unit: also the weights of a block of NF4.
const GROUP: usize = evalfw_engine::nf4::BLOCK;
/// Lanes of a whole group.
const LANES: usize = GROUP / 2 + 1;
/// The multiple of the largest weight of a group.
const WEIGHTS: f32 = 16384.0;
/// Times [`WEIGHTS`] this is 2³¹; rounding adds half a unit to each.
const ACTIVATIONS: f32 = 131_072.0 - GROUP as f32;
/// The largest multiple of an activation, with room for rounding.
const LARGEST: f32 = 32766.0;

/// Two multiples, the first in the low half, or a unit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Int16(u32);

impl Int16 {
    fn of_unit(unit: f32) -> Self {
        Self(unit.to_bits())
    }
}

/// Of so many depths with a unit of their own.
fn lanes_of_group(depths: usize) -> usize {
    depths.div_ceil(2) + 1
}

impl Lane for Int16 {
    const DEPTHS: usize = GROUP;
    const GROUP: usize = LANES;

    fn lanes_of(depths: usize) -> usize {
        let (groups, rest) = (depths / GROUP, depths % GROUP);
        groups * LANES + if rest > 0 { lanes_of_group(rest) } else { 0 }
    }

    fn join_along(values: &[f32], lanes: &mut [Self]) {
        quantize::along(values, Range::Activations, lanes);
    }

    fn fill<const TRANSPOSED: bool>(wanted: Wanted<'_>, tile: &mut [Self], weights: &mut Weights) {
        if TRANSPOSED {
            weights::across(&wanted, tile, weights);
        } else {
            weights::along(&wanted, tile, weights);
        }
    }
}
