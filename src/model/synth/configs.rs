//! `config.json` and `generation_config.json`, as transformers writes them for Qwen2.

use super::tokenizer::StructureIds;
use evalfw_engine::config::ModelConfig;
use serde_json::{Value, json};

pub fn model_config(config: &ModelConfig) -> Value {
    let ids = StructureIds::of(config.vocab_size);
    let mut value = json!({
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": ids.end_of_text(),
        "eos_token_id": ids.message_end(),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "qwen2",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": null,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "use_sliding_window": false,
        "vocab_size": config.vocab_size
    });
    // Usually implied by the two sizes; older releases of transformers do not know the field.
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        value["head_dim"] = config.head_dim.into();
    }
    value
}

pub fn generation_config(config: &ModelConfig) -> Value {
    let ids = StructureIds::of(config.vocab_size);
    json!({
        "bos_token_id": ids.end_of_text(),
        "do_sample": false,
        "eos_token_id": [ids.message_end(), ids.end_of_text()],
        "pad_token_id": ids.end_of_text()
    })
}
