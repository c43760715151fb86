//! Rows of 6-bit integers, and their products with a vector of 8-bit integers.
//!
//! A row is cut into groups of [`GROUP`] codes. A group has [`NIBBLES`] bytes with the upper four bits of its codes,
//! those of the second half in the upper nibbles, and [`PAIRS`] bytes with the lower two bits: code `i` of quarter `q`
//! has them at bit 2·q of byte `i`.

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
        let (mut norm, mut error, mut sum) = (0f64, 0f64, 0);
        for (value, to) in x.iter().zip(codes.iter_mut().flat_map(|group| &mut group.0)) {
            *to = (value / scale).round() as i8;
            norm += f64::from(*value).powi(2);
            error += f64::from(value - f32::from(*to) * scale).powi(2);
            sum += i32::from(*to);
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
        #[cfg(target_arch = "x86_64")]
        if avx512::is_there() {
            // SAFETY: the CPU has the instructions.
            unsafe { avx512::products(&self.codes, rows, out) };
            return out.iter_mut().for_each(|sum| *sum -= self.of_zeros);
        }
        for (sum, row) in out.iter_mut().zip(rows.chunks(self.codes.len())) {
            let groups = row.iter().zip(&self.codes);
            *sum = groups.map(|(packed, vector)| product(&unpack(packed), &vector.0)).sum::<i32>()
                - self.of_zeros;
        }
    }
}

fn product(codes: &[u8; GROUP], vector: &[i8; GROUP]) -> i32 {
    codes.iter().zip(vector).map(|(&code, &x)| i32::from(code) * i32::from(x)).sum()
}

/// Products of bytes, four in each lane of a register.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Aligned, BYTES, GROUP, NIBBLES};
    use crate::level::{Level, level};
    use crate::transpose::{SIDE, transpose};
    use std::arch::x86_64::*;

    pub fn is_there() -> bool {
        level() == Level::Avx512 && is_x86_feature_detected!("avx512vnni")
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub fn products(vector: &[Aligned], rows: &[[u8; BYTES]], out: &mut [i32]) {
        let (whole, rest) = out.as_chunks_mut::<SIDE>();
        let first_of_rest = whole.len() * SIDE * vector.len();
        for (out, rows) in whole.iter_mut().zip(rows.chunks(SIDE * vector.len())) {
            let mut sums = [_mm512_setzero_ps(); SIDE];
            for (sum, row) in sums.iter_mut().zip(rows.chunks(vector.len())) {
                *sum = _mm512_castsi512_ps(sum_of_row(vector, row));
            }
            // The sums of 16 rows are added up side by side.
            let mut total = _mm512_setzero_si512();
            for sum in transpose(sums) {
                total = _mm512_add_epi32(total, _mm512_castps_si512(sum));
            }
            // SAFETY: there are as many elements as lanes.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), total) };
        }
        for (out, row) in rest.iter_mut().zip(rows[first_of_rest..].chunks(vector.len())) {
            *out = _mm512_reduce_add_epi32(sum_of_row(vector, row));
        }
    }

    /// One row, not yet added up over the lanes.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline]
    fn sum_of_row(vector: &[Aligned], row: &[[u8; BYTES]]) -> __m512i {
        /// The bits of a code that are in its nibble.
        const UPPER: i8 = 0b11_1100;
        /// All bits of a code.
        const CODE: i8 = 0b11_1111;
        /// Bits of the first where the third is 1, and else of the second.
        const SELECT: i32 = 0xe4;
        let (upper, code) = (_mm512_set1_epi8(UPPER), _mm512_set1_epi8(CODE));
        let quarters = |first: i16| {
            let (low, high) = (_mm256_set1_epi16(first), _mm256_set1_epi16(first + 2));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
        };
        let shifts = [quarters(0), quarters(4)];
        let mut sums = [_mm512_setzero_si512(); 2];
        for (packed, vector) in row.iter().zip(vector) {
            // SAFETY: what is loaded lies within the groups.
            let (nibbles, pairs, vectors) = unsafe {
                let pairs = _mm256_loadu_si256(packed.as_ptr().add(NIBBLES).cast());
                let vectors =
                    [0, GROUP / 2].map(|half| _mm512_load_si512(vector.0.as_ptr().add(half).cast()));
                (_mm512_loadu_si512(packed.as_ptr().cast()), _mm512_broadcast_i64x4(pairs), vectors)
            };
            let halves = [_mm512_slli_epi16::<2>(nibbles), _mm512_srli_epi16::<2>(nibbles)];
            for i in 0..2 {
                let pairs = _mm512_srlv_epi16(pairs, shifts[i]);
                let codes = _mm512_ternarylogic_epi64::<SELECT>(halves[i], pairs, upper);
                sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_and_si512(codes, code), vectors[i]);
            }
        }
        _mm512_add_epi32(sums[0], sums[1])
    }
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
