//! Which instructions this CPU has.

use crate::matrix::Products;
use std::sync::OnceLock;

/// Names a level to stay below, for tests and comparisons: `portable`, `neon`, `avx2` or `avx512`.
pub const LIMIT_VARIABLE: &str = "EVALFW_SIMD";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    Portable,
    Neon,
    /// With FMA.
    Avx2,
    /// F, BW, DQ and VL.
    Avx512,
}

impl Level {
    pub const ALL: [Self; 4] = [Self::Portable, Self::Neon, Self::Avx2, Self::Avx512];

    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this CPU can run it.
    pub fn is_there(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Neon => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_there()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }
}

/// The best level of this CPU, or the best below the limit in the environment.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let limit = std::env::var(LIMIT_VARIABLE).unwrap_or_default();
        let limit = Level::ALL.into_iter().find(|l| l.name() == limit).unwrap_or(Level::Avx512);
        let usable = |l: &Level| *l <= limit && l.is_there();
        Level::ALL.into_iter().rfind(usable).unwrap_or(Level::Portable)
    })
}

/// Whether NF4 is multiplied by one row, as in decoding, in integers of 16 bits: with AVX2, which has no other way to
/// keep up with the memory.
pub fn rows_in_16_bits() -> bool {
    level() == Level::Avx2
}

/// Whether the CPU multiplies pairs of bf16 and sums them in f32 in one instruction, and the level allows it.
pub fn has_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return level() == Level::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether products of bf16 are also faster than those of f32. On AMD's CPUs the instruction does twice the work of a
/// multiply-add in f32. On Intel's it takes longer than the two that it stands for: a product with NF4 on a Sapphire
/// Rapids ran at half of the f32 rate.
pub fn bf16_products_pay() -> bool {
    has_bf16_products() && !is_intel()
}

/// What [`Products::Bf16`] stands for on a CPU. In both, an engine keeps in bf16 what the
/// backward pass needs of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InBf16 {
    /// The factors of all products are rounded.
    Products,
    /// For want of an instruction, products stay in f32, but for those of NF4 and one row where
    /// [`rows_in_16_bits`] says so.
    Kept,
}

impl InBf16 {
    /// What this CPU makes of it; where nothing that is faster than f32, why.
    pub fn on_cpu() -> Result<Self, &'static str> {
        if bf16_products_pay() {
            Ok(Self::Products)
        } else if has_bf16_products() {
            Err("this CPU multiplies bf16 more slowly than f32")
        } else if level() >= Level::Avx2 {
            Ok(Self::Kept)
        } else {
            Err("this CPU has no instruction for products of bf16 (AVX512_BF16), nor AVX2")
        }
    }

    /// As an engine on the CPU states it that multiplies in this type.
    pub fn compute_dtype(products: Products) -> &'static str {
        match (products, Self::on_cpu()) {
            (Products::F32, _) => "f32",
            (Products::Bf16, Ok(Self::Kept)) => "f32, kept in bf16",
            (Products::Bf16, _) => "bf16 products",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    let letters = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    letters.as_flattened() == b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn is_intel() -> bool {
    false
}

/// Defines a function twice, the second time compiled for AVX2 and FMA, and calls the better one that the
/// level allows.
macro_rules! for_this_cpu {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),*) -> $out:ty = $body:ident) => {
        $(#[$doc])*
        $vis fn $name($($arg: $type),*) -> $out {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn vectorised($($arg: $type),*) -> $out {
                    $body($($arg),*)
                }
                if $crate::level::level() >= $crate::level::Level::Avx2 {
                    // SAFETY: the CPU has the instructions of the level.
                    return unsafe { vectorised($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}
pub(crate) use for_this_cpu;
