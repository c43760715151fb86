//! What is known of each engine's memory that does not follow from a model's shape: how it works, since when, and a few
//! constants that were measured.
//!
//! The constants are bytes of the process, of the libraries and of the allocator, and for GPUs how many tensors of a
//! kind a block has at a time. [`EngineModel::calibrated`] names the records they were taken from; every other
//! record is a check of them.

/// Who allocates, and in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// candle's tensors with our kernels on the CPU: a tape for each block, freed memory is kept.
    CandleHost,
    /// Burn's flex with the same kernels.
    BurnHost,
    /// candle on a GPU: matrices are decoded as a whole, attention works on pieces of the scores.
    CandleDevice,
    /// Burn on wgpu: matrices are decoded in pieces, the scores of a sequence exist together.
    BurnDevice,
}

/// What a block keeps of its forward beside its input, within the scenario's `kept_activations_gb`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Of an element.
    pub bytes: u64,
    /// Whether the result of the attention is kept as well as those of the projections.
    pub attention: bool,
}

/// Figures that were measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Constants {
    /// The process with its libraries before a model is there; on a GPU the context and the libraries' workspaces.
    pub process: u64,
    /// What the allocator, threads and libraries have on top when training.
    pub training: u64,
    /// The same when generating.
    pub generating: u64,
    /// Tensors of attention scores that a block's backward has at a time. On the CPU scores never exist as a whole.
    pub scores: f64,
    /// Tensors as wide as the MLP, `[rows, intermediate_size]`, that a block's backward has at a time on a GPU.
    pub intermediates: f64,
    /// Tensors of logits that the loss has at a time on a GPU.
    pub logits: f64,
}

/// How an engine uses memory, from a moment on.
#[derive(Debug, Clone, Copy)]
pub struct EngineModel {
    pub engine: &'static str,
    /// When the commit was made since which it is so; UTC.
    pub since: &'static str,
    pub family: Family,
    pub kept: Option<Kept>,
    /// Products in bf16, or results kept in it.
    pub bf16: bool,
    /// Logits that may exist together.
    pub logit_bytes: u64,
    pub constants: Constants,
    /// The records that the constants are from.
    pub calibrated: &'static str,
    /// What has to be said of every prediction.
    pub caveat: Option<&'static str>,
}

const MB: u64 = 1_000_000;

use super::components::LOGIT_BYTES;

/// In records of proportional set size a process has some 10 MB before it loads, in older ones, which count shared pages
/// in full, up to 16. The 6 MB are pools of threads, packed tiles and the training rows.
const HOST: Constants = Constants {
    process: 12 * MB,
    training: 6 * MB,
    generating: 6 * MB,
    scores: 0.0,
    intermediates: 0.0,
    logits: 1.0,
};

const HOST_RECORDS: &str = "20261128-093644-default, and for what Burn's forward leaves peers/20261128-005000 and -051233; \
                            checks: 20261124-162829-large (7b), 20261124-204355-default, 20261125-145208-stock and the \
                            other peers";

/// Four tensors of scores: the exponentials, the weights, and the gradient of each.
const WGPU: Constants = Constants {
    process: 0,
    training: 203 * MB,
    generating: 150 * MB,
    scores: 4.0,
    intermediates: 9.5,
    logits: 1.2,
};

const CUDA: Constants = Constants {
    process: 722 * MB,
    training: 316 * MB,
    generating: 40 * MB,
    scores: 2.4,
    intermediates: 9.3,
    logits: 5.0,
};

/// The library of products in bf16 has a workspace.
const CUDA_BF16: Constants = Constants { generating: 130 * MB, ..CUDA };

const CUDA_RECORDS: &str = "20261124-122548-large, 20261124-131617-gpu, 20261124-131752-gpu, 20261124-132058-long and \
                            peers/20261124-12*-cuda (all there are: none is left as a check)";

const CUDA_CAVEAT: &str = "no record is of the engine as it is now: its constants are from before the loss took 256 rows \
                           at a time (2026-11-24)";

const PROJECTIONS_F32: Kept = Kept { bytes: 4, attention: false };
const PROJECTIONS_BF16: Kept = Kept { bytes: 2, attention: false };
const ALL_F32: Kept = Kept { bytes: 4, attention: true };
const ALL_BF16: Kept = Kept { bytes: 2, attention: true };

/// The last of an engine's lines is how it is now.
pub const MODELS: [EngineModel; 9] = [
    EngineModel {
        engine: "candle-cpu",
        // The head's screen in 6 bits.
        since: "2026-11-24T19:10:24Z",
        family: Family::CandleHost,
        kept: Some(ALL_F32),
        bf16: false,
        logit_bytes: LOGIT_BYTES,
        constants: HOST,
        calibrated: HOST_RECORDS,
        caveat: None,
    },
    EngineModel {
        engine: "candle-cpu-bf16",
        since: "2026-11-24T19:10:24Z",
        family: Family::CandleHost,
        kept: Some(ALL_BF16),
        bf16: true,
        logit_bytes: LOGIT_BYTES,
        constants: HOST,
        calibrated: HOST_RECORDS,
        caveat: None,
    },
    EngineModel {
        engine: "burn-flex",
        // Results of projections are kept.
        since: "2026-11-24T20:14:37Z",
        family: Family::BurnHost,
        kept: Some(PROJECTIONS_F32),
        bf16: false,
        logit_bytes: LOGIT_BYTES,
        constants: HOST,
        calibrated: HOST_RECORDS,
        caveat: None,
    },
    EngineModel {
        engine: "burn-flex-bf16",
        since: "2026-11-24T20:14:37Z",
        family: Family::BurnHost,
        kept: Some(PROJECTIONS_BF16),
        bf16: true,
        logit_bytes: LOGIT_BYTES,
        constants: HOST,
        calibrated: HOST_RECORDS,
        caveat: None,
    },
    EngineModel {
        engine: "burn-wgpu",
        // Dropout masks are made on the GPU.
        since: "2026-11-25T15:03:03Z",
        family: Family::BurnDevice,
        kept: None,
        bf16: false,
        logit_bytes: LOGIT_BYTES,
        constants: WGPU,
        calibrated: "20261128-045053-gpu (0.5b), 20261128-045706-large (7b), 20261128-094221-default and, for training, \
                     20261128-064931-gpu (1.5b); checks: 20261125-151208-gpu, 20261125-151424-gpu and \
                     20261125-145400-large",
        caveat: None,
    },
    EngineModel {
        engine: "candle-cuda",
        since: "2026-11-24T06:00:00Z",
        family: Family::CandleDevice,
        kept: Some(PROJECTIONS_F32),
        bf16: false,
        logit_bytes: 64 << 20,
        constants: CUDA,
        calibrated: CUDA_RECORDS,
        caveat: None,
    },
    EngineModel {
        engine: "candle-cuda",
        since: "2026-11-24T16:09:09Z",
        family: Family::CandleDevice,
        kept: Some(ALL_F32),
        bf16: false,
        logit_bytes: LOGIT_BYTES,
        constants: CUDA,
        calibrated: CUDA_RECORDS,
        caveat: Some(CUDA_CAVEAT),
    },
    EngineModel {
        engine: "candle-cuda-bf16",
        since: "2026-11-24T06:00:00Z",
        family: Family::CandleDevice,
        kept: Some(PROJECTIONS_F32),
        bf16: true,
        logit_bytes: 64 << 20,
        constants: CUDA_BF16,
        calibrated: CUDA_RECORDS,
        caveat: None,
    },
    EngineModel {
        engine: "candle-cuda-bf16",
        since: "2026-11-24T16:09:09Z",
        family: Family::CandleDevice,
        kept: Some(ALL_BF16),
        bf16: true,
        logit_bytes: LOGIT_BYTES,
        constants: CUDA_BF16,
        calibrated: CUDA_RECORDS,
        caveat: Some(CUDA_CAVEAT),
    },
];

/// How an engine uses memory now.
pub fn now(engine: &str) -> Option<&'static EngineModel> {
    MODELS.iter().rfind(|model| model.engine == engine)
}

/// How it did at a moment (RFC 3339, UTC), and whether that is what is known of it: before the first line it worked in
/// another way, and the first line stands in.
pub fn at(engine: &str, moment: &str) -> Option<(&'static EngineModel, bool)> {
    let of_engine = || MODELS.iter().filter(|model| model.engine == engine);
    match of_engine().rfind(|model| model.since <= moment) {
        Some(model) => Some((model, true)),
        None => of_engine().next().map(|model| (model, false)),
    }
}

/// The engines that have a model, for a message.
pub fn names() -> String {
    let mut names: Vec<&str> = MODELS.iter().map(|model| model.engine).collect();
    names.dedup();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_is_of_a_registered_engine_and_in_the_order_of_time() {
        for model in &MODELS {
            assert!(crate::engines::ENGINES.iter().any(|engine| engine.name == model.engine));
            assert!(model.since.parse::<jiff::Timestamp>().is_ok(), "{}", model.since);
        }
        for pair in MODELS.windows(2).filter(|pair| pair[0].engine == pair[1].engine) {
            assert!(pair[0].since < pair[1].since);
        }
    }

    #[test]
    fn a_record_is_held_against_the_engine_of_its_time() {
        let (then, known) = at("candle-cuda", "2026-11-24T13:16:17Z").unwrap();
        assert!(known && then.logit_bytes == 64 << 20);
        assert_eq!(now("candle-cuda").unwrap().logit_bytes, LOGIT_BYTES);
        let (_, known) = at("burn-flex", "2026-11-24T13:16:17Z").unwrap();
        assert!(!known);
        assert!(at("candle-cpu-stock", "2026-11-24T13:16:17Z").is_none() && now("mlx").is_none());
    }
}
