//! GPUs: memory of the device. Its pools hand out pages, so that what a sum of tensors takes is known to within some of
//! them only.

use super::components::{self, F32, Widths, product, sum};
use super::engines::{EngineModel, Family};
use super::host::kept_results;
use super::{InferJob, Phase, TrainJob, base, logit_rows, part};
use evalfw_engine::config::ModelConfig;

/// Caches of both frameworks grow by so many positions.
const CACHE_STEP: u64 = 256;
/// Elements of the scores that candle has at a time (`backends/candle/src/ops/attention.rs`).
const SCORES: u64 = 32 << 20;
/// Bytes of a dense matrix that candle converts at a time (`backends/candle/src/matrix/device.rs`).
const TILE_BYTES: u64 = 256 << 20;

/// One tensor of attention scores.
fn scores(family: Family, widths: &Widths, examples: u64, sequence: u64) -> u64 {
    let of_query = product(&[examples, widths.heads, sequence]);
    let all = product(&[of_query, sequence]);
    let elements = match family {
        // As many queries as fit, but one at least.
        Family::CandleDevice => all.min(SCORES.max(of_query)),
        _ => all,
    };
    product(&[F32, elements])
}

/// Burn's mask of what a query does not see, `[sequence, sequence]`; a truth value takes four bytes.
fn mask(family: Family, sequence: u64) -> u64 {
    match family {
        Family::BurnDevice => product(&[4, sequence, sequence]),
        _ => 0,
    }
}

fn times(factor: f64, bytes: u64) -> u64 {
    (factor * bytes as f64) as u64
}

/// The largest matrix as candle decodes it for a product.
fn decoded(model: &EngineModel, widths: &Widths) -> u64 {
    product(&[if model.bf16 { 2 } else { 4 }, widths.intermediate, widths.hidden])
}

pub fn train(model: &EngineModel, config: &ModelConfig, job: &TrainJob) -> Vec<Phase> {
    let (widths, constants) = (Widths::of(config), &model.constants);
    let (family, rows) = (model.family, job.rows());
    let adapter = components::adapter(config, job.rank);
    let mut all = base(model, config, job.quantization);
    all.push(part("adapter", adapter));
    all.push(part("optimizer state", product(&[2, adapter])));
    all.push(part("adapter gradients", adapter));
    all.push(part("block inputs", components::block_inputs(config, rows)));
    let (kept, _) = kept_results(&widths, model.kept, rows, job.kept_activations_bytes);
    all.push(part("kept activations", kept));
    all.push(part("the pool's free pages", constants.training));
    let logits = product(&[F32, logit_rows(config, job, model.logit_bytes), widths.vocab]);
    let converted = match family {
        Family::CandleDevice if !model.bf16 => TILE_BYTES.min(product(&[F32, widths.vocab, widths.hidden])),
        _ => 0,
    };
    let loss = [
        part("logits and their gradient", times(constants.logits, logits)),
        part("head, converted", converted),
    ];
    let blocks = [
        part("attention scores", times(constants.scores, scores(family, &widths, job.batch, job.sequence))),
        part("causal mask", mask(family, job.sequence)),
        part(
            "working set of one block",
            times(constants.intermediates, product(&[F32, rows, widths.intermediate])),
        ),
    ];
    vec![Phase::new("the loss", &all, &loss), Phase::new("the backward pass of a block", &all, &blocks)]
}

pub fn infer(model: &EngineModel, config: &ModelConfig, job: &InferJob) -> Vec<Phase> {
    let (widths, family) = (Widths::of(config), model.family);
    let positions = job.prompt_tokens.saturating_add(job.generated_tokens);
    let mut all = base(model, config, job.quantization);
    all.push(part("KV cache", components::key_value_cache(config, positions, CACHE_STEP)));
    all.push(part("the pool's free pages", model.constants.generating));
    // The prompt's last products, and of candle's pool the decoded matrices of two of them.
    let (wide, matrices) = match family {
        Family::CandleDevice => (3, product(&[2, decoded(model, &widths)])),
        _ => (4, 0),
    };
    let of_scores =
        sum([product(&[2, scores(family, &widths, 1, job.prompt_tokens)]), mask(family, job.prompt_tokens)]);
    let prompt = [
        part("decoded matrices", matrices),
        part("attention scores", of_scores),
        part("working set of the prompt", product(&[F32, wide, job.prompt_tokens, widths.intermediate])),
    ];
    vec![Phase::new("the prompt", &all, &prompt)]
}
