//! Bytes that follow from a model's shape and a job alone, and from how the engines store things: no measurement is in
//! them.

use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::Target;
use evalfw_engine::nf4::{BLOCK, NESTED_BLOCK};

/// Bytes of an f32.
pub const F32: u64 = 4;
/// Bytes of an element of a published checkpoint, bf16 or f16, which embedding and head keep.
const STORED: u64 = 2;

/// The logits that may exist together, in bytes: `LOGIT_BYTES` of `backends/kernels/src/loss.rs`.
pub const LOGIT_BYTES: u64 = 149 << 20;
/// Rows that a product takes at once; a chunk of the loss has whole panels of them (the same file).
const PANEL: u64 = 32;

/// What makes no figure of memory wrap around, however large the numbers in a `config.json` are.
pub fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |product: u64, &factor| product.saturating_mul(factor))
}

/// The same for a sum.
pub fn sum(terms: impl IntoIterator<Item = u64>) -> u64 {
    terms.into_iter().fold(0, u64::saturating_add)
}

/// The widths of a model, in elements of a position.
#[derive(Debug, Clone, Copy)]
pub struct Widths {
    pub layers: u64,
    pub hidden: u64,
    pub intermediate: u64,
    /// All query heads together.
    pub query: u64,
    /// All heads of the keys, or of the values, together.
    pub key_value: u64,
    pub heads: u64,
    pub vocab: u64,
}

impl Widths {
    pub fn of(config: &ModelConfig) -> Self {
        Self {
            layers: config.num_hidden_layers as u64,
            hidden: config.hidden_size as u64,
            intermediate: config.intermediate_size as u64,
            query: product(&[config.num_attention_heads as u64, config.head_dim as u64]),
            key_value: product(&[config.num_key_value_heads as u64, config.head_dim as u64]),
            heads: config.num_attention_heads as u64,
            vocab: config.vocab_size as u64,
        }
    }
}

/// Output and input features of the seven projections of a layer.
fn projections(config: &ModelConfig) -> impl Iterator<Item = [u64; 2]> {
    Target::ALL.into_iter().map(|target| config.projection_shape(target).map(|size| size as u64))
}

/// Codes of all projections in NF4, two to a byte.
pub fn nf4_codes(config: &ModelConfig) -> u64 {
    of_all_layers(config, |elements| elements.div_ceil(2))
}

/// Their scales: a byte for each block of 64, an f32 for each 256 of these, and the f32 of their mean.
pub fn nf4_scales(config: &ModelConfig) -> u64 {
    of_all_layers(config, |elements| {
        let blocks = elements.div_ceil(BLOCK as u64);
        blocks + F32 * blocks.div_ceil(NESTED_BLOCK as u64) + F32
    })
}

/// The projections as they are in the checkpoint.
pub fn dense_projections(config: &ModelConfig) -> u64 {
    of_all_layers(config, |elements| product(&[STORED, elements]))
}

fn of_all_layers(config: &ModelConfig, bytes: impl Fn(u64) -> u64) -> u64 {
    let of_layer = sum(projections(config).map(|[rows, columns]| bytes(product(&[rows, columns]))));
    product(&[config.num_hidden_layers as u64, of_layer])
}

/// The embedding, or a head of its own: `[vocab_size, hidden_size]`.
pub fn embedding(config: &ModelConfig) -> u64 {
    product(&[STORED, config.vocab_size as u64, config.hidden_size as u64])
}

/// Embedding and head; a tied head is the embedding.
pub fn embedding_and_head(config: &ModelConfig) -> u64 {
    product(&[if config.tie_word_embeddings { 1 } else { 2 }, embedding(config)])
}

/// Norms and biases, widened to f32.
pub fn norms_and_biases(config: &ModelConfig) -> u64 {
    let widths = Widths::of(config);
    let biases = Target::ALL.into_iter().filter(|target| target.has_bias());
    let biases = sum(biases.map(|target| config.projection_shape(target)[0] as u64));
    let of_layer = sum([biases, product(&[2, widths.hidden])]);
    product(&[F32, sum([product(&[widths.layers, of_layer]), widths.hidden])])
}

/// An adapter on all projections in f32: A `[r, in]` and B `[out, r]` of each. Its gradients take as much, and so does
/// each of AdamW's two moments.
pub fn adapter(config: &ModelConfig, rank: u64) -> u64 {
    let features = sum(projections(config).map(|[rows, columns]| sum([rows, columns])));
    product(&[F32, rank, config.num_hidden_layers as u64, features])
}

/// What each block gets, `[rows, hidden_size]` in f32: with checkpointing all of them are there from the forward on.
pub fn block_inputs(config: &ModelConfig, rows: u64) -> u64 {
    let widths = Widths::of(config);
    product(&[F32, widths.layers, rows, widths.hidden])
}

/// Rotated keys and values of a sequence in f32; a cache grows by whole `step`s.
pub fn key_value_cache(config: &ModelConfig, positions: u64, step: u64) -> u64 {
    let widths = Widths::of(config);
    product(&[2, F32, widths.layers, positions.div_ceil(step).saturating_mul(step), widths.key_value])
}

/// Rows of the logits that exist together for `rows` with a loss, as `rows_of_a_chunk` of
/// `backends/kernels/src/loss.rs` cuts them.
pub fn logit_rows(config: &ModelConfig, rows: u64, at_most_bytes: u64) -> u64 {
    let at_most = (at_most_bytes / F32 / (config.vocab_size as u64).max(1)).max(1);
    let chunks = rows.div_ceil(at_most).max(1);
    let chunk = rows.div_ceil(chunks).max(1);
    chunk.next_multiple_of(PANEL).min(at_most).min(rows)
}

/// The largest chunk for up to `rows` with a loss: fewer rows may make a larger one, as they are cut evenly.
pub fn most_logit_rows(config: &ModelConfig, rows: u64, at_most_bytes: u64) -> u64 {
    rows.min((at_most_bytes / F32 / (config.vocab_size as u64).max(1)).max(1))
}

/// The head in 6 bits, made when a token is first generated (`backends/kernels/src/argmax`): groups of 128 codes in 96
/// bytes, and three f32 for each row, in pieces of 256 rows.
pub fn screen(config: &ModelConfig) -> u64 {
    let widths = Widths::of(config);
    let codes = product(&[widths.vocab, widths.hidden.div_ceil(128), 96]);
    sum([codes, product(&[widths.vocab.div_ceil(256), 256, 3, F32])])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;

    fn config(size: &str) -> ModelConfig {
        Preset::parse(size).unwrap().config
    }

    /// 7b by hand: q and o are 3584 × 3584, k and v 512 × 3584, gate, up and down 18 944 × 3584. In all
    /// 2 · 12 845 056 + 2 · 1 835 008 + 3 · 67 895 296 = 233 046 016 elements a layer, 28 layers.
    #[test]
    fn nf4_takes_a_half_byte_a_weight_a_byte_a_block_and_an_f32_for_256_blocks() {
        let config = config("7b");
        assert_eq!(nf4_codes(&config), 28 * 233_046_016 / 2);
        // Blocks: 200 704, 28 672, 1 060 864. Of 256 of them: 784, 112, 4144. Seven means.
        let of_layer = 2 * (200_704 + 4 * 784) + 2 * (28_672 + 4 * 112) + 3 * (1_060_864 + 4 * 4144) + 7 * 4;
        assert_eq!(nf4_scales(&config), 28 * of_layer);
        assert_eq!(dense_projections(&config), 2 * 28 * 233_046_016);
    }

    #[test]
    fn nf4_is_as_large_as_the_engines_own_tensor() {
        for shape in [[3, 50], [64, 64], [130, 896], [7, 2341]] {
            let tensor = evalfw_engine::nf4::Nf4Tensor::quantize(shape, &vec![0.5; shape[0] * shape[1]]);
            let mut config = config("tiny");
            config.num_hidden_layers = 1;
            // One projection of that shape, and six that are empty.
            (config.hidden_size, config.intermediate_size) = (shape[1], 0);
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim) = (0, 1, shape[0]);
            let twice = 2 * tensor.bytes() as u64;
            // Keys and values are the two that are left; each empty one has the f32 of its mean.
            assert_eq!(nf4_codes(&config) + nf4_scales(&config), twice + 5 * 4, "{shape:?}");
        }
    }

    /// 0.5b by hand: r · (in + out) of q and o 2 · 1792, k and v 2 · 1024, gate, up and down 3 · 5760: 22 912 a layer.
    #[test]
    fn an_adapter_has_r_rows_of_both_sides_of_each_projection() {
        assert_eq!(adapter(&config("0.5b"), 16), 4 * 16 * 24 * 22_912);
        assert_eq!(adapter(&config("0.5b"), 1), 4 * 24 * 22_912);
    }

    #[test]
    fn a_tied_head_is_the_embedding() {
        assert_eq!(embedding_and_head(&config("0.5b")), 151_936 * 896 * 2);
        assert_eq!(embedding_and_head(&config("7b")), 2 * 152_064 * 3584 * 2);
    }

    /// What candle tells that is in use on the GPU in `results/20261124-122548-large`, 7b: 5 547 520 832 bytes after loading,
    /// and 6 031 962 944 after training with rank 16, where the gradients are gone and both moments stay. The driver rounds
    /// each tensor up, and the tables of the codes are there once.
    #[test]
    fn weights_and_optimizer_are_what_a_gpu_says_is_in_use() {
        let config = config("7b");
        let parts =
            [nf4_codes(&config), nf4_scales(&config), embedding_and_head(&config), norms_and_biases(&config)];
        let loaded = sum(parts);
        let trained = loaded + 3 * adapter(&config, 16);
        for (ours, told) in [(loaded, 5_547_520_832), (trained, 6_031_962_944)] {
            assert!(ours <= told && told - ours < 1_000_000, "{ours} {told}");
        }
    }

    #[test]
    fn a_cache_grows_by_whole_steps() {
        let config = config("7b");
        assert_eq!(key_value_cache(&config, 160, 256), 28 * 256 * 512 * 2 * 4);
        assert_eq!(key_value_cache(&config, 257, 256), 28 * 512 * 512 * 2 * 4);
    }

    /// As `rows_of_a_chunk`: 323 rows in two chunks of 162, which is six panels of 32; 256 rows at most.
    #[test]
    fn a_chunk_of_logits_has_whole_panels() {
        let config = config("7b");
        for (rows, expected) in [(323, 192), (1389, 256), (165, 165), (257, 160), (1, 1), (0, 0)] {
            assert_eq!(logit_rows(&config, rows, LOGIT_BYTES), expected, "{rows}");
        }
    }

    #[test]
    fn no_figure_wraps_around() {
        let mut config = config("7b");
        config.vocab_size = usize::MAX;
        config.num_hidden_layers = usize::MAX;
        assert_eq!(embedding(&config), u64::MAX);
        assert_eq!(nf4_codes(&config), u64::MAX);
        assert_eq!(adapter(&config, u64::MAX), u64::MAX);
    }
}
