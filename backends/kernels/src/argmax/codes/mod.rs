//! Rows of 6-bit integers, and their products with a vector of 8-bit integers.
//!
//! A row is cut into groups of [`GROUP`] codes. A group has [`NIBBLES`] bytes with the upper four bits of its codes,
//! those of the second half in the upper nibbles, and [`PAIRS`] bytes with the lower two bits: code `i` of quarter `q`
//! has them at bit 2·q of byte `i`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::level::for_this_cpu;
#[cfg(target_arch = "x86_64")]
use crate::level::{Level, level};

/// Codes that are stored together: two registers of 64 bytes when they are unpacked.
pub const GROUP: usize = 128;
const NIBBLES: usize = GROUP / 2;
const PAIRS: usize = GROUP / 4;
/// Bytes of a group.
pub const BYTES: usize = NIBBLES + PAIRS;
/// Codes have no sign: this one stands for 0.
pub const ZERO: i32 = 32;
/// The largest size of what a code stands for.
pub const LARGEST: f32 = 31.0;

/// Packs one group; where there are fewer values, the rest is of no account.
pub fn pack(codes: &[u8; GROUP]) -> [u8; BYTES] {
    let mut packed = [0; BYTES];
    for (i, code) in codes.iter().enumerate() {
        packed[i % NIBBLES] |= code >> 2 << (4 * (i / NIBBLES));
        packed[NIBBLES + i % PAIRS] |= (code & 3) << (2 * (i / PAIRS));
    }
    packed
}

fn unpack(packed: &[u8; BYTES]) -> [u8; GROUP] {
    std::array::from_fn(|i| {
        let nibble = packed[i % NIBBLES] >> (4 * (i / NIBBLES)) & 15;
        let pair = packed[NIBBLES + i % PAIRS] >> (2 * (i / PAIRS)) & 3;
        nibble << 2 | pair
    })
}

/// Where registers are loaded from one line of memory each.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Aligned([i8; GROUP]);

/// A vector as integers times a scale, in whole groups.
pub struct Vector {
    codes: Vec<Aligned>,
    pub scale: f32,
    /// L2, of the vector.
    pub norm: f32,
    /// L2 norm of what rounding took away.
    pub error: f32,
    /// What the products with the codes of zeros add up to.
    of_zeros: i32,
}

impl Vector {
    /// `None` where an element is not finite.
    pub fn new(x: &[f32]) -> Option<Self> {
        if !x.iter().all(|v| v.is_finite()) {
            return None;
        }
        let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        // A vector of zeros is exact with any scale.
        let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
        let mut codes = vec![Aligned([0; GROUP]); x.len().div_ceil(GROUP)];
        let (mut norm, mut error, mut sum) = (0.0, 0.0, 0);
        for (x, group) in x.chunks(GROUP).zip(&mut codes) {
            let of_group = quantize(x, scale, &mut group.0);
            norm += of_group.norm;
            error += of_group.error;
            sum += of_group.codes;
        }
        let (norm, error) = (norm.sqrt() as f32, error.sqrt() as f32);
        Some(Self { codes, scale, norm, error, of_zeros: ZERO * sum })
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.codes.len() * BYTES
    }

    /// With each of some rows, exactly.
    pub fn products(&self, rows: &[u8], out: &mut [i32]) {
        assert_eq!(rows.len(), out.len() * self.row_bytes());
        let (rows, _) = rows.as_chunks();
        self.unsigned_products(rows, out);
        out.iter_mut().for_each(|sum| *sum -= self.of_zeros);
    }

    /// With the codes as they are.
    fn unsigned_products(&self, rows: &[[u8; BYTES]], out: &mut [i32]) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the CPU has the instructions of the level, and what is looked for beside it.
        unsafe {
            if avx512::is_there() {
                return avx512::products(&self.codes, rows, out);
            }
            if level() >= Level::Avx2 {
                return avx2::products(&self.codes, rows, out);
            }
        }
        for (sum, row) in out.iter_mut().zip(rows.chunks(self.codes.len())) {
            *sum =
                row.iter().zip(&self.codes).map(|(packed, vector)| product(&unpack(packed), &vector.0)).sum();
        }
    }
}

/// What a group adds up to: the squares of its values and of their errors, and its codes.
#[derive(Default)]
struct Sums {
    norm: f64,
    error: f64,
    codes: i32,
}

for_this_cpu! {
    /// Rounds up to a group of values to multiples of `scale`.
    fn quantize(x: &[f32], scale: f32, codes: &mut [i8; GROUP]) -> Sums = quantize_body
}

#[inline(always)]
fn quantize_body(x: &[f32], scale: f32, codes: &mut [i8; GROUP]) -> Sums {
    let mut sums = Sums::default();
    for (value, code) in x.iter().zip(codes) {
        *code = (value / scale).round_ties_even() as i8;
        sums.norm += f64::from(*value).powi(2);
        sums.error += f64::from(value - f32::from(*code) * scale).powi(2);
        sums.codes += i32::from(*code);
    }
    sums
}

fn product(codes: &[u8; GROUP], vector: &[i8; GROUP]) -> i32 {
    codes.iter().zip(vector).map(|(&code, &x)| i32::from(code) * i32::from(x)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packed_codes_come_back(codes in proptest::collection::vec(0u8..64, GROUP)) {
            let codes: [u8; GROUP] = codes.try_into().unwrap();
            prop_assert_eq!(unpack(&pack(&codes)), codes);
        }

        #[test]
        fn products_are_exact(
            rows in 1usize..40, x in proptest::collection::vec(-1f32..1.0, 1..400), seed: u64,
        ) {
            let vector = Vector::new(&x).unwrap();
            let code = |i: usize| ((i as u64).wrapping_mul(seed | 1) >> 29) as u8 % 64;
            let groups = vector.codes.len();
            let codes: Vec<[u8; GROUP]> =
                (0..rows * groups).map(|g| std::array::from_fn(|i| code(g * GROUP + i))).collect();
            let packed: Vec<u8> = codes.iter().flat_map(pack).collect();
            let mut products = vec![0; rows];
            vector.products(&packed, &mut products);
            for (product, row) in products.into_iter().zip(codes.chunks(groups)) {
                let pairs = row.as_flattened().iter().zip(vector.codes.iter().flat_map(|group| &group.0));
                let exact: i32 = pairs.map(|(&code, &x)| (i32::from(code) - ZERO) * i32::from(x)).sum();
                prop_assert_eq!(product, exact);
            }
        }
    }

    #[test]
    fn a_vector_that_is_not_finite_has_no_integers() {
        assert!(Vector::new(&[1.0, f32::INFINITY]).is_none());
        assert!(Vector::new(&[f32::NAN]).is_none());
    }
}
