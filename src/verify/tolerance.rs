//! How far an engine may be from the reference, by the type in which it says that it computes.
//!
//! - **f32**: two correct implementations differ by the order of their sums, some 1e-6 of the largest
//!   value in models of this size. The tolerances leave room for longer sums and for fused kernels, and
//!   are far below what any mistake in the arithmetic makes.
//! - **f16, bf16**: each operation rounds to 11 or 8 significant bits. `tests/reference/precision.py`
//!   runs transformers and PEFT in these types on the golden models and on random other ones; the
//!   tolerances are about twice the largest distance it saw. A gradient that is missing is off by 1, and
//!   still caught.
//!
//! - **bf16 products**: f32, but for the factors of matrix products, which round to 8 significant bits. The
//!   tolerances are about twice the largest distance of candle's on the golden models, and a fifth to a half
//!   of those for bf16.
//!
//! - **int16 products**: f32, but the factors of matrix products round to 16-bit multiples of a unit that 64 of them
//!   share, and what the backward pass reads of the forward pass to 8 significant bits. The tolerances are about twice
//!   the largest distance of candle's and Burn's, or more, where that is next to nothing.
//!
//! - **f32, kept in bf16**: products and sums are f32, but what the backward pass reads of the forward pass was rounded
//!   to 8 significant bits, and a single row that is multiplied with NF4 to 15. The forward pass of many rows is as
//!   exact as in f32; the tolerances for what is not are about twice the largest distance of candle's and Burn's.
//!
//! The device does not matter: a GPU that computes in f32 only adds up in another order. One that rounds
//! the inputs of its products to fewer bits (TF32) does not compute in f32.

use serde::Serialize;

/// Of a framework's own quantized format from the unquantized model, where the engine does not tell the weights that
/// it made: logits, of the largest one. For one that has 8 bits on models as narrow as the reference's.
pub const NATIVE_LOGITS: f64 = 2e-1;
/// The same for the losses of evaluation.
pub const NATIVE_LOSSES: f64 = 2e-2;
/// Where it tells them: the distance of a matrix from the checkpoint's, over that of the same matrix in NF4.
///
/// Of normal values, NF4 in blocks of 64 loses 9 % of the norm. Whole numbers from -7 to 7 lose 1/√12 of a step, which
/// is a seventh of the largest value of a block: 8 % with blocks of 32, whose largest value is 2.1 deviations, and
/// 14 % with one block of thousands. With one bit less they lose more than twice as much.
pub const NATIVE_WEIGHTS_OF_NF4: f64 = 1.5;

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Tolerances {
    pub compute_dtype: &'static str,
    pub reason: &'static str,
    /// Of the largest logit.
    pub logits: f64,
    /// Of evaluation.
    pub losses: f64,
    /// Of each factor of each projection: L2 norm of the difference over that of the reference.
    pub gradients: f64,
    /// In training, where AdamW lets a small difference grow.
    pub curve_losses: f64,
    /// Of the gradient norms after the first step of a curve. `None`: not compared, because the paths
    /// have parted.
    pub later_norms: Option<f64>,
    /// Two computations of the same by one engine.
    pub repetition: f64,
    /// Central differences of the loss. `None`: not computed, because the loss is rounded by more than
    /// it would change.
    pub finite_differences: Option<f64>,
    /// Evaluation losses of two engines from each other.
    pub between_engines: f64,
}

const F32: Tolerances = Tolerances {
    compute_dtype: "f32",
    reason: "correct implementations differ by the order of their sums only",
    logits: 1e-4,
    losses: 1e-3,
    gradients: 1e-3,
    curve_losses: 1e-3,
    later_norms: Some(1e-3),
    repetition: 1e-6,
    // A central difference of an f32 loss is itself good to about a percent.
    finite_differences: Some(5e-2),
    between_engines: 1e-5,
};

const F16: Tolerances = Tolerances {
    compute_dtype: "f16",
    reason: "each operation rounds to 11 significant bits",
    logits: 1e-2,
    losses: 4e-3,
    gradients: 3e-2,
    curve_losses: 4e-2,
    later_norms: None,
    // One rounding that went the other way.
    repetition: 1e-3,
    finite_differences: None,
    // Each may be off to another side.
    between_engines: 8e-3,
};

const BF16: Tolerances = Tolerances {
    compute_dtype: "bf16",
    reason: "each operation rounds to 8 significant bits",
    logits: 1.5e-1,
    losses: 1.2e-2,
    gradients: 3e-1,
    curve_losses: 1.5e-1,
    later_norms: None,
    repetition: 8e-3,
    finite_differences: None,
    between_engines: 2.4e-2,
};

const BF16_PRODUCTS: Tolerances = Tolerances {
    compute_dtype: "bf16 products",
    reason: "the factors of matrix products round to 8 significant bits; sums and all else are f32",
    logits: 4e-2,
    losses: 6e-3,
    gradients: 6e-2,
    curve_losses: 3e-2,
    later_norms: None,
    repetition: 1e-6,
    finite_differences: None,
    between_engines: 1.2e-2,
};

const INT16_PRODUCTS: Tolerances = Tolerances {
    compute_dtype: "int16 products",
    reason: "the factors of matrix products round to 16-bit multiples of a unit that 64 of them share; what the backward \
             pass reads of the forward pass rounds to 8 significant bits",
    logits: 2e-3,
    losses: 1e-3,
    gradients: 1e-2,
    curve_losses: 2.5e-2,
    later_norms: None,
    repetition: 1e-6,
    finite_differences: None,
    between_engines: 2e-3,
};

const KEPT_IN_BF16: Tolerances = Tolerances {
    compute_dtype: "f32, kept in bf16",
    reason: "what the backward pass reads of the forward pass rounds to 8 significant bits, single rows to 15",
    logits: 1e-3,
    losses: 1e-3,
    gradients: 1e-2,
    curve_losses: 1.5e-2,
    later_norms: None,
    repetition: 1e-6,
    finite_differences: None,
    between_engines: 2e-3,
};

impl Tolerances {
    /// For an engine's `compute_dtype`.
    pub fn of(compute_dtype: &str) -> Result<Self, String> {
        let known = [F32, F16, BF16, BF16_PRODUCTS, INT16_PRODUCTS, KEPT_IN_BF16];
        known.into_iter().find(|tolerances| tolerances.compute_dtype == compute_dtype).ok_or_else(|| {
            let known = known.map(|tolerances| format!("`{}`", tolerances.compute_dtype)).join(", ");
            format!("the engine computes in `{compute_dtype}`; there are tolerances for {known} only")
        })
    }
}
