//! `adapter_config.json` of Hugging Face PEFT.
//!
//! PEFT has dozens of options that change the computation, and every version adds some. Read as plain
//! LoRA, an adapter that uses one would give another loss without a word. So this is a list of what is
//! known to be plain; any other field must be null or false.

use crate::config::ModelConfig;
use crate::lora::{LoraConfig, Target};
use crate::{Error, Result};
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::fmt::Display;
use std::path::Path;

/// Fields with any value: they tell where the adapter comes from, or are read by PEFT only along with
/// another field that is refused, or only where a new adapter is initialised.
const WITHOUT_EFFECT: [&str; 9] = [
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
];

/// Fields for which empty means absent. Of others PEFT asks only whether they are null: `velora_config: {}` is
/// VeLoRA with its defaults.
const MAY_BE_EMPTY: [&str; 8] = [
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
];

/// Initialisations that leave the base weights alone when PEFT loads the adapter. PiSSA, OLoRA, CorDA and
/// LoftQ change them again, and MiCA is a method of its own.
const INITIALIZATIONS: [&str; 4] = ["eva", "gaussian", "lora_ga", "orthogonal"];

/// PEFT's name for every linear layer but the output head.
const ALL_LINEAR: &str = "all-linear";

#[derive(Deserialize)]
struct PeftConfig {
    peft_type: String,
    task_type: Option<String>,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f32,
    bias: Option<String>,
    init_lora_weights: Option<Value>,
    target_modules: Option<TargetModules>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TargetModules {
    /// `all-linear`, or a regular expression that has to match a module's whole name.
    Pattern(String),
    /// Names, or what names end with.
    Names(Vec<String>),
}

/// Reads the configuration of an adapter for `model`.
pub fn read(path: &Path, model: &ModelConfig) -> Result<LoraConfig> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    let raw: PeftConfig = serde_json::from_str(&text).map_err(|e| Error::file(path, e))?;
    raw.check(model).map_err(|problem| Error::file(path, problem))
}

/// The text of a configuration that PEFT reads.
pub fn to_json(config: &LoraConfig, base_model: &str) -> String {
    let modules = Target::ALL.map(Target::module);
    let value = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "target_modules": modules,
        "modules_to_save": null,
        "inference_mode": true,
    });
    format!("{value:#}")
}

impl PeftConfig {
    fn check(self, model: &ModelConfig) -> std::result::Result<LoraConfig, String> {
        only("peft_type", &self.peft_type, "LORA")?;
        // Other tasks have another head.
        only("task_type", self.task_type.as_deref().unwrap_or("CAUSAL_LM"), "CAUSAL_LM")?;
        only("bias", self.bias.as_deref().unwrap_or("none"), "none")?;
        match &self.init_lora_weights {
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(Value::String(name)) if INITIALIZATIONS.contains(&name.as_str()) => {}
            Some(other) => {
                return Err(format!("init_lora_weights {other} is not supported: it may change the base"));
            }
        }
        let has_effect = |name: &str, value: &Value| {
            let off = matches!(value, Value::Null | Value::Bool(false));
            let absent = MAY_BE_EMPTY.contains(&name) && is_empty(value);
            !(off || absent || WITHOUT_EFFECT.contains(&name))
        };
        if let Some((name, value)) = self.rest.iter().find(|(name, value)| has_effect(name, value)) {
            return Err(format!("{name} is not supported, and is {value}"));
        }
        match &self.target_modules {
            Some(targets) => targets.check(model)?,
            None => return Err("target_modules is missing: PEFT would choose some".into()),
        }
        if self.r == 0 {
            return Err("r is 0".into());
        }
        if !self.lora_alpha.is_finite() {
            return Err(format!("lora_alpha is {}", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(format!("lora_dropout is {}, which is not in [0, 1)", self.lora_dropout));
        }
        Ok(LoraConfig { r: self.r, lora_alpha: self.lora_alpha, lora_dropout: self.lora_dropout })
    }
}

fn only(field: &str, value: &str, supported: &str) -> std::result::Result<(), String> {
    match value == supported {
        true => Ok(()),
        false => Err(format!("{field} is {value}, but only {supported} is supported")),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

impl TargetModules {
    /// The seven projections of every layer, and no other module.
    fn check(&self, model: &ModelConfig) -> std::result::Result<(), String> {
        let matches: Box<dyn Fn(&str) -> bool> = match self {
            Self::Pattern(pattern) if pattern.eq_ignore_ascii_case(ALL_LINEAR) => return Ok(()),
            Self::Pattern(pattern) => {
                let regex = whole_name(pattern).map_err(|e| format!("target_modules {pattern:?}: {e}"))?;
                Box::new(move |module| regex.is_match(module))
            }
            Self::Names(names) => Box::new(|module| names.iter().any(|name| ends_with(module, name))),
        };
        let (adapted, others) = modules(model);
        if let Some(missing) = adapted.iter().find(|module| !matches(module)) {
            return Err(format!(
                "target_modules leaves out {missing}, but only adapters of all seven projections of every layer are supported"
            ));
        }
        if let Some(other) = others.iter().find(|module| matches(module)) {
            return Err(format!("target_modules names {other}, which is none of the seven projections"));
        }
        Ok(())
    }
}

/// As Python's `re.fullmatch`.
fn whole_name(pattern: &str) -> std::result::Result<Regex, impl Display> {
    Regex::new(&format!(r"\A(?:{pattern})\z"))
}

fn ends_with(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

/// The modules of a Qwen2 model in transformers: the projections that are adapted, and all others.
fn modules(model: &ModelConfig) -> (Vec<String>, Vec<String>) {
    let mut adapted = Vec::new();
    let mut others: Vec<String> =
        ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
            .map(Into::into)
            .into();
    for layer in 0..model.num_hidden_layers {
        let layer = format!("model.layers.{layer}");
        adapted.extend(Target::ALL.map(|target| format!("{layer}.{}", target.path())));
        let inner = ["self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm"];
        others.extend(inner.map(|module| format!("{layer}.{module}")));
        others.push(layer);
    }
    (adapted, others)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

    fn model() -> ModelConfig {
        ModelConfig { num_hidden_layers: 2, ..crate::lora::tests::model() }
    }

    /// What PEFT 0.21 writes for plain LoRA.
    fn plain() -> Value {
        json!({
            "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
            "base_model_name_or_path": "base", "bias": "none", "corda_config": null,
            "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
            "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "kasa_config": null,
            "layer_replication": null, "layers_pattern": null, "layers_to_transform": null,
            "loftq_config": {}, "lora_alpha": 16, "lora_bias": false, "lora_dropout": 0.0,
            "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
            "modules_to_save": null, "monteclora_config": null, "peft_type": "LORA",
            "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": null,
            "target_modules": MODULES, "target_parameters": null, "task_type": "CAUSAL_LM",
            "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
            "use_rslora": false, "velora_config": null
        })
    }

    fn check(field: &str, value: Value) -> std::result::Result<LoraConfig, String> {
        let mut config = plain();
        config[field] = value;
        serde_json::from_value::<PeftConfig>(config).map_err(|e| e.to_string())?.check(&model())
    }

    #[test]
    fn what_has_no_effect_on_the_computation_is_read() {
        let expected = LoraConfig { r: 8, lora_alpha: 16.0, lora_dropout: 0.0 };
        let neutral = [
            ("task_type", Value::Null),
            ("revision", json!("main")),
            ("modules_to_save", json!([])),
            ("init_lora_weights", json!(false)),
            ("init_lora_weights", json!("gaussian")),
            ("init_lora_weights", json!("orthogonal")),
            ("init_lora_weights", json!("eva")),
            ("init_lora_weights", json!("lora_ga")),
            ("eva_config", json!({"rho": 2.0})),
            ("an_option_of_tomorrow", Value::Null),
        ];
        for (field, value) in neutral {
            assert_eq!(check(field, value.clone()).as_ref(), Ok(&expected), "{field} {value}");
        }
    }

    #[test]
    fn what_changes_the_computation_is_refused_by_field() {
        let others = [
            ("peft_type", json!("LOHA")),
            ("task_type", json!("SEQ_CLS")),
            ("bias", json!("lora_only")),
            ("alpha_pattern", json!({"q_proj": 40})),
            ("rank_pattern", json!({"q_proj": 3})),
            ("alora_invocation_tokens", json!([3, 4])),
            ("arrow_config", json!({"top_k": 1})),
            ("corda_config", json!({"corda_method": "ipm"})),
            ("ensure_weight_tying", json!(true)),
            ("exclude_modules", json!(["q_proj"])),
            ("fan_in_fan_out", json!(true)),
            ("kasa_config", json!({"beta": 0.1})),
            ("layer_replication", json!([[0, 2], [1, 3]])),
            ("layers_to_transform", json!([0])),
            ("layers_to_transform", json!(0)),
            ("loftq_config", json!({"loftq_bits": 4})),
            ("lora_bias", json!(true)),
            ("megatron_config", json!({"a": 1})),
            ("modules_to_save", json!(["lm_head"])),
            ("monteclora_config", json!({"num_samples": 2})),
            ("target_parameters", json!(["mlp.experts.down_proj"])),
            ("trainable_token_indices", json!([1])),
            ("use_bdlora", json!({"nblocks": 2})),
            ("use_dora", json!(true)),
            ("use_qalora", json!(true)),
            ("use_rslora", json!(true)),
            ("velora_config", json!({"num_groups": 2})),
            ("velora_config", json!({})),
            ("alora_invocation_tokens", json!([])),
            ("an_option_of_tomorrow", json!(1)),
            ("r", json!(0)),
            ("lora_dropout", json!(1.0)),
        ];
        let initializations = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "mica"];
        let initializations = initializations.map(|name| ("init_lora_weights", json!(name)));
        for (field, value) in others.into_iter().chain(initializations) {
            let problem = check(field, value.clone()).expect_err(field);
            assert!(problem.contains(field), "{field} {value}: {problem}");
        }
    }

    #[test]
    fn target_modules_must_be_the_seven_projections_as_peft_matches_them() {
        let with = |extra: &str| json!(MODULES.into_iter().chain([extra]).collect::<Vec<_>>());
        for good in [
            json!("all-linear"),
            json!(".*_proj"),
            json!(r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"),
            json!(
                r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
            ),
            with("self_attn.q_proj"),
            with("a_module_that_is_not_there"),
        ] {
            assert!(check("target_modules", good.clone()).is_ok(), "{good}");
        }
        for bad in [
            Value::Null,
            json!([]),
            json!(["q_proj", "v_proj"]),
            json!(["all-linear"]),
            with("lm_head"),
            with("embed_tokens"),
            // Matches a part of the names only.
            json!("_proj"),
            json!(r"model\.layers\.0\..*_proj"),
            json!(".*"),
            json!("(q_proj"),
            // Python has lookahead, this does not.
            json!("(?!x).*_proj"),
        ] {
            let problem = check("target_modules", bad.clone()).expect_err(&bad.to_string());
            assert!(problem.contains("target_modules"), "{bad}: {problem}");
        }
    }
}
