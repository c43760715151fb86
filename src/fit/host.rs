//! The CPU engines, whose tensors come from one heap that keeps what is freed: its size is the peak.
//!
//! Widths are counted in the tensors of `backends/candle/src/{block,linear}.rs`, `backends/burn/src/fused` and
//! `backends/kernels/src/lora.rs`.

use super::components::{self, F32, Widths, product, sum};
use super::engines::{EngineModel, Family, Kept};
use super::{Component, InferJob, Phase, TrainJob, base, logit_rows, part};
use evalfw_engine::config::ModelConfig;

/// The CPU's caches grow by so many positions.
const CACHE_STEP: u64 = 256;
/// Of the product of a gradient with the head: parts of the depth, columns of a group and lanes
/// (`backends/kernels/src/product/deep.rs`).
const PARTS: u64 = 16;
const COLUMNS: u64 = 192;
const LANES: u64 = 16;
/// A head has so many times more rows than columns for that way to be taken.
const DEPTH_OVER_WIDTH: u64 = 8;

/// Elements of a position that the forward pass of the blocks leaves free in pieces too small for the logits: of the last
/// projection gate, up and their product, and its packed copy; with dropout also the mask and what it leaves. Of Burn's the
/// last two lie at the end of the heap, which the logits take over.
fn forward_width(family: Family, widths: &Widths, dropout: bool) -> u64 {
    let wide = match (family, dropout) {
        (Family::CandleHost, true) => 6,
        (Family::CandleHost, false) | (_, true) => 4,
        (_, false) => 3,
    };
    sum([product(&[wide, widths.intermediate]), product(&[4, widths.hidden])])
}

/// Elements of a position that a block with its graph has at its most. With dropout that is in the backward of the last
/// projection: gate, up and their product, mask and masked input, the gradient and the adapter's part of it. Without, in
/// that of the gated activation: gate, up and their product, and the gradient of each. Beside them are the narrow tensors of
/// the graph: six of the hidden size with the result and the gradient, three of the queries, three of keys and values.
fn backward_width(widths: &Widths, dropout: bool) -> u64 {
    let wide = if dropout { 7 } else { 6 };
    sum([
        product(&[wide, widths.intermediate]),
        product(&[8, widths.hidden]),
        product(&[3, widths.query]),
        product(&[3, widths.key_value]),
    ])
}

/// Elements of a position that the graph of a block keeps.
fn graph_width(widths: &Widths) -> u64 {
    sum([
        product(&[3, widths.intermediate]),
        product(&[6, widths.hidden]),
        product(&[3, widths.query]),
        product(&[3, widths.key_value]),
    ])
}

/// Elements of a position that a block keeps for its backward; the result of the last projection is not needed.
fn kept_width(widths: &Widths, kept: Kept) -> u64 {
    sum([
        product(&[if kept.attention { 2 } else { 1 }, widths.query]),
        product(&[2, widths.key_value]),
        widths.hidden,
        product(&[2, widths.intermediate]),
    ])
}

/// Bytes of the results of as many blocks as the memory for them holds, and how many these are.
pub fn kept_results(widths: &Widths, kept: Option<Kept>, rows: u64, at_most: u64) -> (u64, u64) {
    let Some(kept) = kept else { return (0, 0) };
    let of_block = product(&[kept.bytes, rows, kept_width(widths, kept)]).max(1);
    let layers = (at_most / of_block).min(widths.layers);
    (product(&[of_block, layers]), layers)
}

/// The sums of the parts of the head's depth, `[parts, groups of columns, rows, columns]`.
fn head_sums(widths: &Widths, rows: u64) -> u64 {
    if widths.vocab < product(&[DEPTH_OVER_WIDTH, widths.hidden]) {
        return 0;
    }
    let padded = rows.div_ceil(LANES).saturating_mul(LANES);
    product(&[F32, PARTS, widths.hidden.div_ceil(COLUMNS), COLUMNS, padded])
}

/// What the backward pass goes through, block by block from the last.
#[derive(Clone, Copy)]
struct Blocks {
    layers: u64,
    /// Of all blocks.
    inputs: u64,
    kept: u64,
    /// The first blocks, whose results are kept.
    layers_kept: u64,
    gradients: u64,
}

impl Blocks {
    /// Inputs, kept results and gradients while the gradients of a layer are computed.
    fn at(self, layer: u64) -> [u64; 3] {
        let of = |bytes: u64, layers: u64, all: u64| product(&[bytes / all.max(1), layers]);
        [
            of(self.inputs, layer + 1, self.layers),
            of(self.kept, self.layers_kept.min(layer + 1), self.layers_kept),
            of(self.gradients, self.layers - layer, self.layers),
        ]
    }

    /// Where they are the most. Between the ends and the last layer whose results are kept they change evenly.
    fn most(self) -> [u64; 3] {
        let turns = [0, self.layers_kept.saturating_sub(1), self.layers_kept, self.layers.saturating_sub(1)];
        let layers = turns.into_iter().filter(|&layer| layer < self.layers);
        layers.map(|layer| self.at(layer)).max_by_key(|parts| sum(*parts)).unwrap_or_default()
    }
}

pub fn train(model: &EngineModel, config: &ModelConfig, job: &TrainJob) -> Vec<Phase> {
    let widths = Widths::of(config);
    let rows = job.rows();
    let adapter = components::adapter(config, job.rank);
    let of_rows = |width: u64| product(&[F32, rows, width]);
    let mut all = base(model, config, job.quantization);
    all.push(part("adapter", adapter));
    all.push(part("optimizer state", product(&[2, adapter])));
    all.push(part("threads and packing", model.constants.training));

    // Burn adds to gradients that are there from the first block on.
    let at_loss = if model.family == Family::BurnHost { adapter } else { 0 };
    let graph = product(&[widths.layers, of_rows(graph_width(&widths))]);
    let backward = of_rows(backward_width(&widths, job.dropout));
    let (held, at_backward, working_set) = if job.gradient_checkpointing {
        let (inputs, at_most) = (components::block_inputs(config, rows), job.kept_activations_bytes);
        let (kept, layers_kept) = kept_results(&widths, model.kept, rows, at_most);
        let blocks = Blocks { layers: widths.layers, inputs, kept, layers_kept, gradients: adapter };
        let [inputs_left, kept_left, gradients] = match at_loss {
            0 => blocks.most(),
            there => [inputs, kept, there],
        };
        let names = ["block inputs", "kept activations"];
        (
            [part(names[0], inputs), part(names[1], kept)],
            [part(names[0], inputs_left), part(names[1], kept_left), part("adapter gradients", gradients)],
            backward,
        )
    } else {
        let (name, none) = ("graph of all blocks", part("", 0));
        let held = [part(name, graph), none.clone()];
        let working_set = backward.saturating_sub(of_rows(graph_width(&widths)));
        (held, [part(name, graph), none, part("adapter gradients", adapter)], working_set)
    };

    let logits = logit_rows(config, job, model.logit_bytes);
    let loss = [
        part("adapter gradients", at_loss),
        part("freed by the forward pass", of_rows(forward_width(model.family, &widths, job.dropout))),
        part("logits", product(&[F32, logits, widths.vocab])),
        part("head's gradient in parts", head_sums(&widths, logits)),
    ];
    let blocks = [part("working set of one block", working_set)];
    vec![
        Phase::new("the loss", &all, &[&held[..], &loss].concat()),
        Phase::new("the backward pass of a block", &all, &[&at_backward[..], &blocks].concat()),
    ]
}

/// Elements of a position of a prompt: gate, up and their product, and of candle's its packed copy and more that is narrow.
fn prompt_width(family: Family, widths: &Widths) -> u64 {
    let [wide, hidden, query] = if family == Family::BurnHost { [3, 2, 0] } else { [4, 5, 2] };
    sum([
        product(&[wide, widths.intermediate]),
        product(&[hidden, widths.hidden]),
        product(&[query, widths.query]),
    ])
}

pub fn infer(model: &EngineModel, config: &ModelConfig, job: &InferJob) -> Vec<Phase> {
    let widths = Widths::of(config);
    let positions = job.prompt_tokens.saturating_add(job.generated_tokens);
    let mut all = base(model, config, job.quantization);
    let screen = components::screen(config);
    all.push(part("head in 6 bits", screen));
    all.push(part("KV cache", components::key_value_cache(config, positions, CACHE_STEP)));
    if model.family == Family::CandleHost {
        // A cache that grows is copied, and the room of the smaller one is too small for the next.
        let before = positions.saturating_sub(1) / CACHE_STEP * CACHE_STEP;
        all.push(part("caches it grew out of", components::key_value_cache(config, before, CACHE_STEP)));
    }
    all.push(part("threads and packing", model.constants.generating));
    let working_set = product(&[F32, job.prompt_tokens, prompt_width(model.family, &widths)]);
    // The first prompt is done before the head is narrowed, which then takes its memory.
    let beside = if job.prompts > 1 { working_set } else { working_set.saturating_sub(screen) };
    let prompt: [Component; 1] = [part("working set of the prompt", beside)];
    vec![Phase::new("the prompt", &all, &prompt)]
}
