//! The models that evalfw can write by itself: the exact shapes of Qwen2.5-Coder, two layers of one with a
//! smaller vocabulary for verification, a tiny one, and one that can learn the data set from random weights (its head is its own, so that logits
//! can grow).

use super::{Error, Result};
use evalfw_engine::config::ModelConfig;

/// What the names of the published sizes begin with; `0.5b` is short for `qwen2.5-coder-0.5b`.
const FAMILY: &str = "qwen2.5-coder-";

/// A model's shape, by name.
#[derive(Debug, Clone, PartialEq)]
pub struct Preset {
    pub name: String,
    pub config: ModelConfig,
}

/// Sizes as in the `config.json` of the published checkpoints.
struct Shape {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    key_value_heads: usize,
    vocab: usize,
    tied: bool,
}

#[rustfmt::skip]
const SHAPES: [Shape; 9] = [
    Shape { name: "learner", hidden: 128, intermediate: 384, layers: 2, heads: 4, key_value_heads: 2, vocab: 320, tied: false },
    Shape { name: "tiny", hidden: 64, intermediate: 192, layers: 2, heads: 4, key_value_heads: 2, vocab: 151_936, tied: true },
    Shape { name: "qwen2.5-coder-0.5b-2layers", hidden: 896, intermediate: 4864, layers: 2, heads: 14, key_value_heads: 2, vocab: 8192, tied: true },
    Shape { name: "qwen2.5-coder-0.5b", hidden: 896, intermediate: 4864, layers: 24, heads: 14, key_value_heads: 2, vocab: 151_936, tied: true },
    Shape { name: "qwen2.5-coder-1.5b", hidden: 1536, intermediate: 8960, layers: 28, heads: 12, key_value_heads: 2, vocab: 151_936, tied: true },
    Shape { name: "qwen2.5-coder-3b", hidden: 2048, intermediate: 11_008, layers: 36, heads: 16, key_value_heads: 2, vocab: 151_936, tied: true },
    Shape { name: "qwen2.5-coder-7b", hidden: 3584, intermediate: 18_944, layers: 28, heads: 28, key_value_heads: 4, vocab: 152_064, tied: false },
    Shape { name: "qwen2.5-coder-14b", hidden: 5120, intermediate: 13_824, layers: 48, heads: 40, key_value_heads: 8, vocab: 152_064, tied: false },
    Shape { name: "qwen2.5-coder-32b", hidden: 5120, intermediate: 27_648, layers: 64, heads: 40, key_value_heads: 8, vocab: 152_064, tied: false },
];

impl Preset {
    /// Finds a preset by its full name or by its size, in any case.
    pub fn parse(name: &str) -> Result<Self> {
        let lower = name.to_lowercase();
        SHAPES
            .iter()
            .find(|shape| shape.name == lower || shape.name.strip_prefix(FAMILY) == Some(&lower))
            .map(Shape::preset)
            .ok_or_else(|| Error::UnknownPreset { name: name.to_owned(), presets: Self::names() })
    }

    /// Every preset, from the smallest to the largest.
    pub fn all() -> impl Iterator<Item = Self> {
        SHAPES.iter().map(Shape::preset)
    }

    /// The names, for a message.
    pub fn names() -> String {
        SHAPES.map(|shape| shape.name).join(", ")
    }

    /// One line per preset with its size, for help.
    pub fn table() -> String {
        Self::all().map(|preset| preset.line()).collect()
    }

    fn line(&self) -> String {
        let parameters = self.config.parameters();
        let (millions, gigabytes) = (parameters as f64 / 1e6, self.checkpoint_bytes() as f64 / 1e9);
        format!("{:<26} {millions:>8.1} M parameters {gigabytes:>6.2} GB in bf16\n", self.name)
    }

    /// Bytes of the weights in bf16.
    pub fn checkpoint_bytes(&self) -> u64 {
        2 * self.config.parameters()
    }
}

impl Shape {
    fn preset(&self) -> Preset {
        Preset {
            name: self.name.to_owned(),
            config: ModelConfig {
                vocab_size: self.vocab,
                hidden_size: self.hidden,
                intermediate_size: self.intermediate,
                num_hidden_layers: self.layers,
                num_attention_heads: self.heads,
                num_key_value_heads: self.key_value_heads,
                head_dim: self.hidden / self.heads,
                max_position_embeddings: 32_768,
                rms_norm_eps: 1e-6,
                rope_theta: 1e6,
                tie_word_embeddings: self.tied,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_are_those_of_the_published_models() {
        let published = [
            ("0.5b", 494_032_768),
            ("1.5b", 1_543_714_304),
            ("3b", 3_085_938_688),
            ("7b", 7_615_616_512),
            ("14b", 14_770_033_664),
            ("32b", 32_763_876_352),
        ];
        for (size, parameters) in published {
            assert_eq!(Preset::parse(size).unwrap().config.parameters(), parameters, "{size}");
        }
    }

    #[test]
    fn a_preset_answers_to_its_full_name_and_to_its_size() {
        let short = Preset::parse("0.5b").unwrap();
        assert_eq!(short, Preset::parse("Qwen2.5-Coder-0.5B").unwrap());
        assert_eq!(short.name, "qwen2.5-coder-0.5b");
        assert_eq!(Preset::parse("tiny").unwrap().config.hidden_size, 64);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        for unknown in ["8b", "", "qwen2.5-coder-", "qwen2.5-coder-tiny"] {
            let error = Preset::parse(unknown).unwrap_err().to_string();
            for preset in Preset::all() {
                assert!(error.contains(&preset.name), "{error}");
            }
        }
    }

    #[test]
    fn help_lists_every_preset_with_its_size() {
        let table = Preset::table();
        assert_eq!(table.lines().count(), SHAPES.len());
        assert!(table.contains("494.0 M parameters") && table.contains("15.23 GB"), "{table}");
    }
}
