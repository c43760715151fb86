//! The errors that can be planted.

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mutation {
    /// No error: shows that the wrapper itself is right.
    None,
    /// Rotary angles of another theta.
    Rope,
    /// No bias on the keys of the last layer.
    Bias,
    /// Decoding goes on one position too late, with a key twice in the cache.
    Cache,
    /// Padding stands on the left, where later tokens attend to it.
    PaddingAttended,
    /// A loss that is not a number.
    NotFinite,
    /// The mean over all positions instead of the supervised ones.
    LossOverAllPositions,
    /// One adapter matrix gets no gradient.
    Gradient,
    /// The adapter's output is scaled by alpha instead of alpha / r.
    Scale,
    /// A and B of one projection change places.
    SwappedFactors,
    /// Two layers have each other's adapter on one projection.
    WrongLayer,
    /// Dropout in evaluation: the adapter drops everything.
    DropoutInEvaluation,
    /// What dropout keeps is not scaled by 1 / (1 - p).
    DropoutUnscaled,
    /// Half the rate.
    DropoutRate,
    /// No dropout in training either.
    DropoutNever,
    NoBiasCorrection,
    /// Weight decay goes through the moments, as L2 regularisation in Adam.
    CoupledWeightDecay,
    NoClipping,
    /// Each micro-batch counts alike, however many supervised positions it has.
    MeanOfMicroBatches,
    /// Of the weights of its own format it tells those of one matrix from before they were quantized.
    WeightsUntold,
    /// It tells weights of three levels.
    WeightsCoarse,
}

impl Mutation {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "none" => Self::None,
            "rope" => Self::Rope,
            "bias" => Self::Bias,
            "cache" => Self::Cache,
            "padding-attended" => Self::PaddingAttended,
            "not-finite" => Self::NotFinite,
            "loss-over-all-positions" => Self::LossOverAllPositions,
            "gradient" => Self::Gradient,
            "scale" => Self::Scale,
            "swapped-factors" => Self::SwappedFactors,
            "wrong-layer" => Self::WrongLayer,
            "dropout-in-evaluation" => Self::DropoutInEvaluation,
            "dropout-unscaled" => Self::DropoutUnscaled,
            "dropout-rate" => Self::DropoutRate,
            "dropout-never" => Self::DropoutNever,
            "no-bias-correction" => Self::NoBiasCorrection,
            "coupled-weight-decay" => Self::CoupledWeightDecay,
            "no-clipping" => Self::NoClipping,
            "mean-of-micro-batches" => Self::MeanOfMicroBatches,
            "weights-untold" => Self::WeightsUntold,
            "weights-coarse" => Self::WeightsCoarse,
            _ => return None,
        })
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Mutant {
    pub mutation: Mutation,
    /// Computes as if in bf16.
    pub rounds: bool,
    /// Says so.
    pub says_bf16: bool,
    /// Has NF4 in the place of candle's own format, and tells its weights.
    pub native: bool,
}

impl Mutant {
    pub fn parse(arguments: &[String]) -> Result<Self, String> {
        let [mutation, flags @ ..] = arguments else { return Err("which mutation?".into()) };
        let mutation = Mutation::parse(mutation).ok_or_else(|| format!("no mutation {mutation}"))?;
        let mut mutant = Self { mutation, rounds: false, says_bf16: false, native: false };
        for flag in flags {
            match flag.as_str() {
                "rounds" => mutant.rounds = true,
                "says-bf16" => mutant.says_bf16 = true,
                "native" => mutant.native = true,
                other => return Err(format!("no flag {other}")),
            }
        }
        Ok(mutant)
    }
}
