//! Products of bf16 with AMX, which multiplies what lies in two registers of 16 rows of 64 bytes.
//!
//! ```text
//! weights  [16 columns, 16 pairs of depths]     as in a tile that lies along the depth
//! panel    [16 pairs of depths, 16 lanes]       as it is
//! sums     [16 columns, 16 lanes]               as they are
//! ```
//!
//! Rust has no stable intrinsics for it, so that the instructions are written out.

use super::COLUMN_STRIDE;
use super::lane::{Lane, Pair};
use super::strip::Kernel;
use super::tile::{self, Wanted, Weights};
use crate::transpose::{SIDE, Squares};
use std::arch::asm;

/// Pairs of a panel between two depths.
const LANES: usize = 2 * SIDE;
/// Bytes of a row of a register.
const ROW: usize = SIDE * size_of::<Pair>();

/// A [`Pair`] in whole registers: what is missing in the last one is zero. Its tiles always lie along the depth.
#[derive(Debug, Clone, Copy, Default)]
#[repr(transparent)]
pub struct Tiled(Pair);

impl Tiled {
    fn pairs(lanes: &mut [Self]) -> &mut [Pair] {
        // SAFETY: a lane is nothing but its pair.
        unsafe { std::slice::from_raw_parts_mut(lanes.as_mut_ptr().cast(), lanes.len()) }
    }
}

impl Lane for Tiled {
    const DEPTHS: usize = SIDE * Pair::DEPTHS;
    const GROUP: usize = SIDE;
    const ALONG: bool = true;

    fn lanes_of(depths: usize) -> usize {
        depths.div_ceil(Self::DEPTHS) * SIDE
    }

    fn join_along(values: &[f32], lanes: &mut [Self]) {
        let (pairs, missing) = Self::pairs(lanes).split_at_mut(Pair::lanes_of(values.len()));
        Pair::join_along(values, pairs);
        missing.fill(Pair::default());
    }

    fn fill<const TRANSPOSED: bool>(wanted: Wanted<'_>, tile: &mut [Self], weights: &mut Weights) {
        let (columns, depths) = (wanted.columns.len(), wanted.depth.len());
        let (pairs, lanes) = (Pair::lanes_of(depths), Self::lanes_of(depths));
        let tile = Self::pairs(tile);
        if !TRANSPOSED {
            tile::widen::<Pair, false>(wanted, tile, weights);
            for column in tile.chunks_mut(COLUMN_STRIDE).take(columns) {
                column[pairs..lanes].fill(Pair::default());
            }
            return;
        }
        let mut across = std::mem::take(&mut weights.pairs);
        across.resize(lanes * super::COLUMNS, Pair::default());
        across[pairs * super::COLUMNS..].fill(Pair::default());
        tile::widen::<Pair, true>(wanted, &mut across, weights);
        turn(&across, columns, tile);
        weights.pairs = across;
    }
}

/// What lies along the columns comes to lie along the depth. Whole squares are turned; those at the end have columns
/// that nobody reads.
fn turn(across: &[Pair], columns: usize, tile: &mut [Pair]) {
    let depths = across.len() / super::COLUMNS;
    let last = (columns.next_multiple_of(SIDE) - 1) * COLUMN_STRIDE + depths;
    assert!(columns <= super::COLUMNS && super::COLUMNS.is_multiple_of(SIDE) && depths.is_multiple_of(SIDE));
    assert!(last <= tile.len());
    let Some(squares) = Squares::of_this_cpu().filter(|squares| squares.side == SIDE) else {
        unreachable!("AMX comes with AVX-512");
    };
    for depth in (0..depths).step_by(SIDE) {
        for column in (0..columns).step_by(SIDE) {
            // SAFETY: the assertions bound both squares; a pair is as large as a u32.
            unsafe {
                let from = across.as_ptr().add(depth * super::COLUMNS + column);
                let to = tile.as_mut_ptr().add(column * COLUMN_STRIDE + depth);
                squares.copy(from.cast(), super::COLUMNS, to.cast(), COLUMN_STRIDE);
            }
        }
    }
}

/// Two registers of columns times two of lanes: four of eight hold sums.
pub struct Amx;

impl Kernel for Amx {
    type Lane = Tiled;
    const LANES: usize = LANES;
    const COLUMNS: usize = 2 * SIDE;

    fn multiply<const TRANSPOSED: bool>(
        panel: &[Tiled],
        weights: &[Tiled],
        sums: &mut [f32],
        from_zero: bool,
    ) {
        let (columns, depths) = (sums.len() / LANES, panel.len() / LANES);
        assert!(sums.len().is_multiple_of(LANES) && panel.len().is_multiple_of(LANES * SIDE));
        assert!(columns > 0 && depths > 0 && (columns - 1) * COLUMN_STRIDE + depths <= weights.len());
        let sums = sums.as_mut_ptr();
        let (start, distance) =
            if from_zero { (ZEROS.0.as_ptr(), 0) } else { (sums.cast_const(), LANES * size_of::<f32>()) };
        let strip = Strip {
            shapes: &SHAPES[columns - 1],
            panel: panel.as_ptr(),
            weights: weights.as_ptr(),
            groups: depths / SIDE,
            start,
            distance,
            sums,
            second: if columns > SIDE { SIDE } else { 0 },
        };
        // SAFETY: a kernel is used only where its instructions have been found, and the assertions bound all that is
        // read and written.
        unsafe { strip.multiply() };
    }
}

/// What sums may begin with: a row for each part of the columns.
#[repr(align(64))]
struct Zeros([f32; SIDE * LANES + LANES]);

static ZEROS: Zeros = Zeros([0.0; SIDE * LANES + LANES]);

/// How many rows and bytes of each register are used, as the instruction reads it.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// For each number of columns. Registers 0 to 3 are the sums of two parts of the columns with two of the lanes, 4 and 5
/// the weights, 6 and 7 the panel. Where there is one part only, it is both.
static SHAPES: [Shapes; 2 * SIDE] = {
    const NONE: Shapes =
        Shapes { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
    let mut all = [NONE; 2 * SIDE];
    let mut i = 0;
    while i < all.len() {
        let columns = i + 1;
        let first = if columns < SIDE { columns } else { SIDE };
        let second = if columns > SIDE { columns - SIDE } else { columns };
        let rows = [first, first, second, second, first, second, SIDE, SIDE];
        let mut register = 0;
        while register < rows.len() {
            all[i].rows[register] = rows[register] as u8;
            all[i].bytes[register] = ROW as u16;
            register += 1;
        }
        i += 1;
    }
    all
};

/// What is read and written.
struct Strip {
    shapes: &'static Shapes,
    panel: *const Tiled,
    weights: *const Tiled,
    /// Of 16 pairs, at least one.
    groups: usize,
    /// What the sums begin with, and the bytes between its rows.
    start: *const f32,
    distance: usize,
    sums: *mut f32,
    /// The column with which the second part begins: as the first where there is one part only.
    second: usize,
}

impl Strip {
    /// # Safety
    /// The CPU has AMX, and all memory is there.
    unsafe fn multiply(self) {
        // SAFETY: by the contract of this function.
        unsafe {
            asm!(
                "ldtilecfg [{shapes}]",
                "tileloadd tmm0, [{start} + {distance}]",
                "tileloadd tmm1, [{start} + {distance} + {half}]",
                "tileloadd tmm2, [{more_start} + {distance}]",
                "tileloadd tmm3, [{more_start} + {distance} + {half}]",
                "2:",
                "tileloadd tmm4, [{weights} + {column}]",
                "tileloadd tmm6, [{panel} + {lanes}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{panel} + {lanes} + {half}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{more_weights} + {column}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {weights}, {half}",
                "add {more_weights}, {half}",
                "add {panel}, {square}",
                "dec {groups}",
                "jnz 2b",
                "tilestored [{sums} + {lanes}], tmm0",
                "tilestored [{sums} + {lanes} + {half}], tmm1",
                "tilestored [{more_sums} + {lanes}], tmm2",
                "tilestored [{more_sums} + {lanes} + {half}], tmm3",
                "tilerelease",
                shapes = in(reg) self.shapes,
                start = in(reg) self.start,
                more_start = in(reg) self.start.add(self.second * LANES),
                distance = in(reg) self.distance,
                sums = in(reg) self.sums,
                more_sums = in(reg) self.sums.add(self.second * LANES),
                weights = inout(reg) self.weights => _,
                more_weights = inout(reg) self.weights.add(self.second * COLUMN_STRIDE) => _,
                panel = inout(reg) self.panel => _,
                groups = inout(reg) self.groups => _,
                lanes = in(reg) LANES * size_of::<f32>(),
                column = in(reg) COLUMN_STRIDE * size_of::<Pair>(),
                half = const ROW,
                square = const SIDE * LANES * size_of::<Pair>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// The same without its instructions, so that the order of the lanes is tested on all CPUs with bf16.
#[cfg(test)]
pub struct InLoops;

#[cfg(test)]
impl Kernel for InLoops {
    type Lane = Tiled;
    const LANES: usize = Amx::LANES;
    const COLUMNS: usize = Amx::COLUMNS;

    fn multiply<const TRANSPOSED: bool>(
        panel: &[Tiled],
        weights: &[Tiled],
        sums: &mut [f32],
        from_zero: bool,
    ) {
        if from_zero {
            sums.fill(0.0);
        }
        let factors = |Tiled(pair): Tiled| {
            let bits = pair.bits() as u32;
            [f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000)]
        };
        for (column, sums) in sums.chunks_mut(LANES).enumerate() {
            for (depth, lanes) in panel.chunks(LANES).enumerate() {
                let [a, b] = factors(weights[column * COLUMN_STRIDE + depth]);
                for (sum, &x) in sums.iter_mut().zip(lanes) {
                    let [x, next] = factors(x);
                    *sum += a * x + b * next;
                }
            }
        }
    }
}
