//! The kernels that are measured: those of burn's own list that multiply f32 as f32. Those for matrix units would
//! round it, and WGSL has none.

use super::problem::Problem;
use burn_wgpu::CubeTensor;
use cubecl::prelude::Scalar;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy as Kernel;
use cubek::matmul::multi_level::routines::TileSizeSelection;
use cubek::matmul::multi_level::routines::batch::double_unit::DoubleUnitSelectionArgs;
use cubek::matmul::multi_level::routines::batch::simple_unit::SimpleUnitSelectionArgs;
use cubek::matmul::routine::BlueprintStrategy::Inferred;
use cubek::matmul::strategy::Strategy;
use cubek::std::InputBinding;
use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Candidate {
    /// What burn takes without measuring.
    Default,
    SimpleUnitLargeTiles,
    SimpleUnitSmallTiles,
    DoubleUnitLargeTiles,
    DoubleUnitSmallTiles,
    Gemm,
    SimpleVecMat,
    DoubleVecMat,
    GemvUnitPerpendicular,
    Naive,
}

/// Above, one thread an element would take seconds.
const NAIVE_MULTIPLICATIONS: usize = 1 << 24;

impl Candidate {
    pub const ALL: [Self; 10] = [
        Self::Default,
        Self::SimpleUnitLargeTiles,
        Self::SimpleUnitSmallTiles,
        Self::DoubleUnitLargeTiles,
        Self::DoubleUnitSmallTiles,
        Self::Gemm,
        Self::SimpleVecMat,
        Self::DoubleVecMat,
        Self::GemvUnitPerpendicular,
        Self::Naive,
    ];

    /// Whether it may be the fastest.
    pub fn suits(self, problem: &Problem) -> bool {
        match self {
            Self::SimpleVecMat | Self::DoubleVecMat | Self::GemvUnitPerpendicular => problem.has_vector(),
            Self::Naive => problem.multiplications() <= NAIVE_MULTIPLICATIONS,
            _ => true,
        }
    }

    fn strategy(self) -> Strategy {
        let simple = |tile_size| Kernel::SimpleUnit(Inferred(SimpleUnitSelectionArgs { tile_size }));
        let double = |tile_size| Kernel::DoubleUnit(Inferred(DoubleUnitSelectionArgs { tile_size }));
        Strategy::MultiLevel(match self {
            Self::Default => return Strategy::Auto,
            Self::SimpleUnitLargeTiles => simple(TileSizeSelection::MaxTileSize),
            Self::SimpleUnitSmallTiles => simple(TileSizeSelection::MinTileSize),
            Self::DoubleUnitLargeTiles => double(TileSizeSelection::MaxTileSize),
            Self::DoubleUnitSmallTiles => double(TileSizeSelection::MinTileSize),
            Self::Gemm => Kernel::Gemm(Inferred(Default::default())),
            Self::SimpleVecMat => Kernel::SimpleVecMat(Inferred(().into())),
            Self::DoubleVecMat => Kernel::DoubleVecMat(Inferred(().into())),
            Self::GemvUnitPerpendicular => Kernel::GemvUnitPerpendicular(Inferred(Default::default())),
            Self::Naive => Kernel::Naive,
        })
    }

    /// Puts the product into `out`, or says why the kernel does not do it.
    pub fn launch(self, lhs: CubeTensor, rhs: CubeTensor, out: CubeTensor) -> Result<(), String> {
        let element = f32::elem_type_native();
        let mut elements =
            MatmulElems::from_globals(&MatmulGlobalElems { lhs: element, rhs: element, out: element });
        let input = |x: CubeTensor| InputBinding::new(x.binding(), element);
        let client = out.client.clone();
        launch_ref(&self.strategy(), &client, input(lhs), input(rhs), out.binding(), &mut elements)
            .map_err(|error| format!("{error:?}"))
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
