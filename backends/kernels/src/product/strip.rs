//! The innermost product: one panel of activations times a strip of columns, with all sums in registers.

use super::lane::Lane;
use super::{COLUMN_STRIDE, COLUMNS};

/// An instruction set's way of multiplying.
pub trait Kernel {
    type Lane: Lane;
    /// Rows of a panel.
    const LANES: usize;
    /// Columns of a strip at most.
    const COLUMNS: usize;

    /// `sums[c, lane] += Σ_d panel[d, lane] · weights(d, c)`, for `sums.len() / LANES` columns. The weights
    /// lie along the depth with [`COLUMN_STRIDE`] between columns, or, transposed, along the columns with
    /// [`COLUMNS`] between depths, unless its lanes [always lie along the depth](Lane::ALONG). Of sums that begin
    /// `from_zero` nothing is read.
    fn multiply<const TRANSPOSED: bool>(
        panel: &[Self::Lane],
        weights: &[Self::Lane],
        sums: &mut [f32],
        from_zero: bool,
    );
}

/// A register of sums, and what it takes to add to it. Whoever calls sees to it that the CPU has the
/// register, and that the memory is there.
#[allow(clippy::missing_safety_doc, reason = "said once for all of them")]
pub trait Vector: Copy {
    /// A register of lanes.
    type Lanes: Copy;
    type Lane: Lane;
    const WIDTH: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn load_lanes(from: *const Self::Lane) -> Self::Lanes;
    unsafe fn splat(value: Self::Lane) -> Self::Lanes;
    /// `self + a · b`
    unsafe fn add_product(self, a: Self::Lanes, b: Self::Lanes) -> Self;
}

/// # Safety
/// The CPU has the instructions of `V`. `panel` has a multiple of the lanes, the weights reach as far as
/// the depth and the columns, and `sums` has `N` columns.
#[inline(always)]
unsafe fn strip<V: Vector, const VECTORS: usize, const N: usize, const TRANSPOSED: bool>(
    panel: &[V::Lane],
    weights: &[V::Lane],
    sums: &mut [f32],
    from_zero: bool,
) {
    let lanes = VECTORS * V::WIDTH;
    let (column, deeper) = if TRANSPOSED { (1, COLUMNS) } else { (COLUMN_STRIDE, 1) };
    let depth = panel.len() / lanes;
    assert!(sums.len() == N * lanes && (depth - 1) * deeper + (N - 1) * column < weights.len());
    // SAFETY: the assertion above bounds all reads and writes.
    unsafe {
        let out = sums.as_mut_ptr();
        let mut totals = [[V::zero(); VECTORS]; N];
        if !from_zero {
            for (n, totals) in totals.iter_mut().enumerate() {
                for (v, total) in totals.iter_mut().enumerate() {
                    *total = V::load(out.add(n * lanes + v * V::WIDTH));
                }
            }
        }
        let (mut x, mut w) = (panel.as_ptr(), weights.as_ptr());
        for _ in 0..depth {
            let rows: [V::Lanes; VECTORS] = std::array::from_fn(|v| V::load_lanes(x.add(v * V::WIDTH)));
            for (n, totals) in totals.iter_mut().enumerate() {
                let weight = V::splat(*w.add(n * column));
                for (total, row) in totals.iter_mut().zip(rows) {
                    *total = total.add_product(row, weight);
                }
            }
            x = x.add(lanes);
            w = w.add(deeper);
        }
        // By reference: an iterator that owns the array would take it out of the registers.
        for (n, totals) in totals.iter().enumerate() {
            for (v, total) in totals.iter().enumerate() {
                total.store(out.add(n * lanes + v * V::WIDTH));
            }
        }
    }
}

/// Implements [`Kernel`] with a function for a register of a type of lanes, and how many of them make a panel and a
/// strip.
macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident, $strip:ident::<$vector:ty> of $lane:ty, $lanes:literal = $vectors:literal registers, strips of $($n:literal)+ $(, $features:literal)?) => {
        $(#[$doc])*
        pub struct $name;

        impl Kernel for $name {
            type Lane = $lane;
            const LANES: usize = $lanes;
            const COLUMNS: usize = {
                let mut largest = 0;
                $(if $n > largest { largest = $n; })+
                largest
            };

            fn multiply<const TRANSPOSED: bool>(
                panel: &[Self::Lane],
                weights: &[Self::Lane],
                sums: &mut [f32],
                from_zero: bool,
            ) {
                $(#[target_feature(enable = $features)])?
                unsafe fn run<const N: usize, const TRANSPOSED: bool>(
                    panel: &[$lane],
                    weights: &[$lane],
                    sums: &mut [f32],
                    from_zero: bool,
                ) {
                    const { assert!($lanes * size_of::<f32>() == $vectors * size_of::<$vector>()) };
                    // SAFETY: the caller sees to the instructions; the rest is checked inside.
                    unsafe { $strip::<$vector, $vectors, N, TRANSPOSED>(panel, weights, sums, from_zero) }
                }
                // SAFETY: a kernel is used only where its level has been found.
                unsafe {
                    match sums.len() / $lanes {
                        $($n => run::<$n, TRANSPOSED>(panel, weights, sums, from_zero),)+
                        _ => unreachable!("strips have at most {} columns", Self::COLUMNS),
                    }
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use kernel;

kernel! {
    /// For every CPU; the compiler makes of it what it can.
    Portable, strip::<[f32; 8]> of f32, 8 = 1 registers, strips of 1 2 3 4
}

impl Vector for [f32; 8] {
    type Lanes = Self;
    type Lane = f32;
    const WIDTH: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: by the contract of `strip`.
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: by the contract of `strip`.
        unsafe { to.cast::<Self>().write_unaligned(self) };
    }

    #[inline(always)]
    unsafe fn load_lanes(from: *const f32) -> Self {
        // SAFETY: by the contract of `strip`.
        unsafe { Self::load(from) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] + a[i] * b[i])
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512, Avx512Bf16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Vector, strip};
    use crate::product::lane::Pair;
    use std::arch::x86_64::*;

    kernel! {
        /// 24 of 32 registers hold sums.
        Avx512, strip::<__m512> of f32, 32 = 2 registers, strips of 1 2 3 4 5 6 7 8 9 10 11 12, "avx512f,avx512bw,avx512dq,avx512vl"
    }

    kernel! {
        /// 12 of 16 registers hold sums.
        Avx2, strip::<__m256> of f32, 16 = 2 registers, strips of 1 2 3 4 5 6, "avx2,fma"
    }

    kernel! {
        /// Products of bf16, two to a lane, summed in f32: twice the work of an instruction in f32.
        Avx512Bf16, strip::<PairSums> of Pair, 32 = 2 registers, strips of 1 2 3 4 5 6 7 8 9 10 11 12, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
    }

    /// Sums of products of pairs.
    #[derive(Clone, Copy)]
    pub struct PairSums(__m512);

    impl Vector for PairSums {
        type Lanes = __m512i;
        type Lane = Pair;
        const WIDTH: usize = 16;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: by the contract of `strip`, also below.
            Self(unsafe { _mm512_setzero_ps() })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(unsafe { _mm512_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) };
        }

        #[inline(always)]
        unsafe fn load_lanes(from: *const Pair) -> __m512i {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        unsafe fn splat(value: Pair) -> __m512i {
            unsafe { _mm512_set1_epi32(value.bits()) }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: __m512i, b: __m512i) -> Self {
            // SAFETY: the types have the same bits.
            unsafe {
                let pairs = |v| std::mem::transmute::<__m512i, __m512bh>(v);
                Self(_mm512_dpbf16_ps(self.0, pairs(a), pairs(b)))
            }
        }
    }

    impl Vector for __m512 {
        type Lanes = Self;
        type Lane = f32;
        const WIDTH: usize = 16;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: by the contract of `strip`, also below.
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) };
        }

        #[inline(always)]
        unsafe fn load_lanes(from: *const f32) -> Self {
            unsafe { Self::load(from) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
    }

    impl Vector for __m256 {
        type Lanes = Self;
        type Lane = f32;
        const WIDTH: usize = 8;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: by the contract of `strip`, also below.
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) };
        }

        #[inline(always)]
        unsafe fn load_lanes(from: *const f32) -> Self {
            unsafe { Self::load(from) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { _mm256_fmadd_ps(a, b, self) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub use arm::Neon;

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::{Kernel, Vector, strip};
    use std::arch::aarch64::*;

    kernel! {
        /// 24 of 32 registers hold sums.
        Neon, strip::<float32x4_t> of f32, 16 = 4 registers, strips of 1 2 3 4 5 6, "neon"
    }

    impl Vector for float32x4_t {
        type Lanes = Self;
        type Lane = f32;
        const WIDTH: usize = 4;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: by the contract of `strip`, also below.
            unsafe { vdupq_n_f32(0.0) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { vld1q_f32(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { vst1q_f32(to, self) };
        }

        #[inline(always)]
        unsafe fn load_lanes(from: *const f32) -> Self {
            unsafe { Self::load(from) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { vdupq_n_f32(value) }
        }

        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { vfmaq_f32(self, a, b) }
        }
    }
}
