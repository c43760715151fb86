//! A Qwen2 `config.json`, read with its defaults and checked.

use crate::lora::Target;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

const MAX_LAYERS: usize = 10_000;

/// The shape of a Qwen2 / Qwen2.5 / Qwen2.5-Coder model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub tie_word_embeddings: bool,
}

impl ModelConfig {
    /// Reads and checks `config.json` in `dir`.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
        Self::parse(&text).map_err(|problem| Error::file(&path, problem))
    }

    fn parse(text: &str) -> std::result::Result<Self, String> {
        let raw: RawConfig = serde_json::from_str(text).map_err(|e| e.to_string())?;
        raw.check()
    }

    /// Output and input features of a projection.
    pub fn projection_shape(&self, target: Target) -> [usize; 2] {
        let hidden = self.hidden_size;
        let query = self.num_attention_heads * self.head_dim;
        let key_value = self.num_key_value_heads * self.head_dim;
        match target {
            Target::Q => [query, hidden],
            Target::K | Target::V => [key_value, hidden],
            Target::O => [hidden, query],
            Target::Gate | Target::Up => [self.intermediate_size, hidden],
            Target::Down => [hidden, self.intermediate_size],
        }
    }

    /// Every tensor of the checkpoint with its shape, in the order of a forward pass.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_hidden_layers {
            let prefix = format!("model.layers.{layer}");
            all.push((format!("{prefix}.input_layernorm.weight"), vec![hidden]));
            for target in Target::ALL {
                if target == Target::Gate {
                    all.push((format!("{prefix}.post_attention_layernorm.weight"), vec![hidden]));
                }
                let [rows, cols] = self.projection_shape(target);
                all.push((format!("{prefix}.{}.weight", target.path()), vec![rows, cols]));
                if target.has_bias() {
                    all.push((format!("{prefix}.{}.bias", target.path()), vec![rows]));
                }
            }
        }
        all.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        all
    }

    /// Parameters, with a tied head counted once.
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum()
    }
}

/// `config.json` as transformers 4 and 5 write it. Fields that change the computation and that no
/// engine implements are read in order to refuse them.
#[derive(Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeParameters>,
    rope_parameters: Option<RopeParameters>,
    tie_word_embeddings: Option<bool>,
    use_sliding_window: Option<bool>,
    hidden_act: Option<String>,
    quantization_config: Option<serde_json::Value>,
}

/// transformers 4 keeps `rope_theta` at the top and the scaling in `rope_scaling`; transformers 5
/// keeps both in `rope_parameters`.
#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    #[serde(rename = "type")]
    legacy_type: Option<String>,
}

impl RopeParameters {
    fn kind(&self) -> &str {
        self.rope_type.as_deref().or(self.legacy_type.as_deref()).unwrap_or("default")
    }
}

impl RawConfig {
    fn check(self) -> std::result::Result<ModelConfig, String> {
        if self.model_type.as_deref() != Some("qwen2") {
            let found = self.model_type.as_deref().unwrap_or("missing");
            return Err(format!("model_type is {found}, but only qwen2 (Qwen2, Qwen2.5) is supported"));
        }
        if let Some(other) = self.architectures.iter().flatten().find(|a| *a != "Qwen2ForCausalLM") {
            return Err(format!("architectures names {other}, but only Qwen2ForCausalLM is supported"));
        }
        if let Some(activation) = self.hidden_act.as_deref().filter(|a| *a != "silu") {
            return Err(format!("hidden_act is {activation}, but Qwen2 uses silu"));
        }
        if self.use_sliding_window == Some(true) {
            return Err("use_sliding_window is true, which no engine implements".into());
        }
        if self.quantization_config.is_some() {
            return Err(
                "quantization_config: the weights are already quantized; give the original checkpoint".into(),
            );
        }
        for (field, rope) in
            [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)]
        {
            if let Some(kind) = rope.as_ref().map(RopeParameters::kind).filter(|k| *k != "default") {
                return Err(format!("{field} asks for {kind} scaling, which no engine implements"));
            }
        }

        // The largest Qwen2.5 has 80 layers. A number far beyond would only eat memory before it failed.
        if let Some(layers) = self.num_hidden_layers.filter(|&n| n > MAX_LAYERS) {
            return Err(format!("num_hidden_layers is {layers}, which is above {MAX_LAYERS}"));
        }
        let hidden_size = positive("hidden_size", self.hidden_size)?;
        let num_attention_heads = positive("num_attention_heads", self.num_attention_heads)?;
        let num_key_value_heads =
            positive("num_key_value_heads", self.num_key_value_heads.or(Some(num_attention_heads)))?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(format!(
                "num_attention_heads {num_attention_heads} is not a multiple of num_key_value_heads {num_key_value_heads}"
            ));
        }
        let head_dim = match self.head_dim {
            Some(dim) => dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                return Err(format!(
                    "hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}"
                ));
            }
        };
        if head_dim == 0 || head_dim % 2 == 1 {
            return Err(format!("head_dim is {head_dim}, but rotary positions need an even number"));
        }
        let in_parameters = self.rope_parameters.as_ref().and_then(|r| r.rope_theta);
        let rope_theta = in_parameters.or(self.rope_theta).unwrap_or(10_000.0);
        let rms_norm_eps = self.rms_norm_eps.unwrap_or(1e-6);
        if !(rope_theta.is_finite() && rope_theta > 1.0) {
            return Err(format!("rope_theta is {rope_theta}, which is not above 1"));
        }
        if !(rms_norm_eps.is_finite() && rms_norm_eps >= 0.0) {
            return Err(format!("rms_norm_eps is {rms_norm_eps}, which is not a small positive number"));
        }
        Ok(ModelConfig {
            vocab_size: positive("vocab_size", self.vocab_size)?,
            hidden_size,
            intermediate_size: positive("intermediate_size", self.intermediate_size)?,
            num_hidden_layers: positive("num_hidden_layers", self.num_hidden_layers)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings: positive(
                "max_position_embeddings",
                self.max_position_embeddings.or(Some(32_768)),
            )?,
            rms_norm_eps,
            rope_theta,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
        })
    }
}

fn positive(field: &str, value: Option<usize>) -> std::result::Result<usize, String> {
    match value {
        Some(0) => Err(format!("{field} is 0")),
        Some(value) => Ok(value),
        None => Err(format!("{field} is missing")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn small() -> Value {
        json!({
            "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 100,
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6,
            "tie_word_embeddings": false, "hidden_act": "silu", "rms_norm_eps": 1e-6
        })
    }

    fn parse(value: &Value) -> std::result::Result<ModelConfig, String> {
        ModelConfig::parse(&value.to_string())
    }

    #[test]
    fn transformers_5_keeps_theta_in_rope_parameters() {
        let mut value = small();
        value.as_object_mut().unwrap().remove("rope_theta");
        value["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 500000.0});
        assert_eq!(parse(&value).unwrap().rope_theta, 500_000.0);
    }

    #[test]
    fn what_no_engine_implements_is_refused_by_field() {
        let cases = [
            ("model_type", json!("llama")),
            ("architectures", json!(["Qwen2MoeForCausalLM"])),
            ("use_sliding_window", json!(true)),
            ("rope_scaling", json!({"type": "yarn", "factor": 4.0})),
            ("hidden_act", json!("gelu")),
            ("hidden_size", json!(0)),
            ("num_hidden_layers", json!(4_000_000_000u64)),
            ("num_key_value_heads", json!(3)),
            ("quantization_config", json!({"load_in_4bit": true})),
        ];
        for (field, bad) in cases {
            let mut value = small();
            value[field] = bad;
            let error = parse(&value).unwrap_err();
            assert!(error.contains(field), "{field}: {error}");
        }
    }

    #[test]
    fn only_an_untied_model_has_a_head_and_only_qkv_have_biases() {
        let mut value = small();
        let names = |v: &Value| parse(v).unwrap().tensors().into_iter().map(|(n, _)| n).collect::<Vec<_>>();
        let untied = names(&value);
        assert!(untied.contains(&"lm_head.weight".to_owned()));
        assert_eq!(untied.iter().filter(|n| n.ends_with(".bias")).count(), 2 * 3);
        value["tie_word_embeddings"] = json!(true);
        assert_eq!(names(&value).len(), untied.len() - 1);
    }
}
