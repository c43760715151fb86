//! Which instructions this CPU has.

use crate::matrix::Products;
use std::sync::OnceLock;

/// Names a level to keep to, for tests and comparisons: `portable`, `neon`, `avx2` or `avx512` (without AMX).
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
        let usable = |l: &Level| limit().is_none_or(|limit| *l <= limit) && l.is_there();
        Level::ALL.into_iter().rfind(usable).unwrap_or(Level::Portable)
    })
}

/// What the environment says.
fn limit() -> Option<Level> {
    let name = std::env::var(LIMIT_VARIABLE).ok()?;
    Level::ALL.into_iter().find(|level| level.name() == name)
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
/// multiply-add in f32. On Intel's it takes longer than the two that it stands for (a product with NF4 on a Sapphire
/// Rapids ran at half of the f32 rate), but there may be tiles.
fn bf16_products_pay() -> bool {
    has_bf16_products() && (!is_intel() || has_tiles())
}

/// Whether the CPU multiplies tiles of bf16 (AMX), and system and environment let this process use them.
pub fn has_tiles() -> bool {
    static TILES: OnceLock<bool> = OnceLock::new();
    *TILES.get_or_init(|| has_bf16_products() && limit().is_none() && may_use_tiles())
}

/// As an engine on the CPU states them: what it multiplies with.
pub fn instructions(products: Products) -> impl Iterator<Item = &'static str> {
    let tiles = products == Products::Bf16 && has_tiles();
    [level().name()].into_iter().chain(tiles.then_some("amx"))
}

/// Asks for the registers: Linux saves their 8 KiB only for processes that have.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn may_use_tiles() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` of arch_prctl(2), and the number of the tiles among the states of a CPU.
    const REQUEST: [libc::c_long; 2] = [0x1023, 18];
    /// AMX-BF16 and AMX-TILE.
    const FEATURES: u32 = 1 << 22 | 1 << 24;
    if std::arch::x86_64::__cpuid(0).eax < 7
        || std::arch::x86_64::__cpuid_count(7, 0).edx & FEATURES != FEATURES
    {
        return false;
    }
    // SAFETY: the call takes two numbers and touches no memory of the process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST[0], REQUEST[1]) == 0 }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn may_use_tiles() -> bool {
    false
}

/// Whether the CPU multiplies pairs of 16-bit integers and sums them in 32 bits, in one instruction or two, and the
/// level allows it.
pub fn has_int16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return match level() {
        Level::Avx512 => is_x86_feature_detected!("avx512vnni"),
        level => level == Level::Avx2,
    };
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether products of integers are also faster than those of f32. AMD's CPUs before Zen 3 do as many of either in the
/// same time (instruction tables of Agner Fog, agner.org/optimize: PMADDWD and VFMADD).
fn int16_products_pay() -> bool {
    has_int16_products() && !is_amd_before_zen_3()
}

/// The type of the factors of a product of many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factors {
    F32,
    Bf16,
    /// Integers of 16 bits, with a scale for each group: nearer than bf16 to what they stand for.
    Int16,
}

impl Factors {
    /// What this CPU makes of it: for [`Products::Bf16`] the fastest type that rounds by no more.
    pub fn of(products: Products) -> Self {
        // Asked for every few rows of a product, and a virtual machine takes microseconds to tell which CPU it is.
        static ROUNDED: OnceLock<Factors> = OnceLock::new();
        match products {
            Products::F32 => Self::F32,
            Products::Bf16 => *ROUNDED.get_or_init(|| {
                if bf16_products_pay() {
                    Self::Bf16
                } else if int16_products_pay() {
                    Self::Int16
                } else {
                    Self::F32
                }
            }),
        }
    }

    /// Whether there is a variant for [`Products::Bf16`] on this CPU: if not, why.
    pub fn can_be_rounded() -> Result<(), &'static str> {
        if level() < Level::Avx2 {
            return Err("this CPU has no instruction for products of bf16 (AVX512_BF16), nor AVX2");
        }
        Ok(())
    }

    /// As an engine on the CPU states it that multiplies in this type. With [`Products::Bf16`] it keeps in bf16 what
    /// the backward pass needs of the forward pass, whatever the factors are.
    pub fn compute_dtype(products: Products) -> &'static str {
        match (products, Self::of(products)) {
            (Products::F32, _) => "f32",
            (Products::Bf16, Self::F32) => "f32, kept in bf16",
            (Products::Bf16, Self::Int16) => "int16 products",
            (Products::Bf16, Self::Bf16) => "bf16 products",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn vendor() -> [u8; 12] {
    let id = std::arch::x86_64::__cpuid(0);
    let mut letters = [0; 12];
    letters.copy_from_slice([id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).as_flattened());
    letters
}

fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    return &vendor() == b"GenuineIntel";
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Or one of the maker who took over the first Zen.
fn is_amd_before_zen_3() -> bool {
    #[cfg(target_arch = "x86_64")]
    return [b"AuthenticAMD", b"HygonGenuine"].contains(&&vendor()) && family() < 0x19;
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
fn family() -> u32 {
    let version = std::arch::x86_64::__cpuid(1).eax;
    let (base, extended) = (version >> 8 & 0xf, version >> 20 & 0xff);
    if base == 0xf { base + extended } else { base }
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
