//! The messages between the harness and a worker: one JSON object a line, a request and its reply in
//! turn. Bulk data goes by file; a message carries the path.

pub use crate::tuning::{Generate, Tune, Tuning};
use crate::{Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Raised when a message changes its meaning. Harness and worker must agree.
pub const VERSION: u32 = 1;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Request {
    pub id: u64,
    #[serde(flatten)]
    pub call: Call,
}

/// Exactly one of `result` and `error` is there.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Response {
    pub id: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "method", content = "params", rename_all = "snake_case")]
pub enum Call {
    Hello(Hello),
    Limits(MeasureLimits),
    Load(Load),
    AttachAdapter(AttachAdapter),
    Tune(Tune),
    TrainStep(TrainStep),
    Gradients(Gradients),
    Evaluate(Evaluate),
    Prefill(Prefill),
    Decode(Decode),
    Logits(Logits),
    DecodedWeights(DecodedWeights),
    Tokenize(Tokenize),
    SaveAdapter(SaveAdapter),
    Memory(Memory),
    Bye(Bye),
}

/// A call with the type of its reply.
pub trait CallType: Serialize + DeserializeOwned + Into<Call> {
    type Reply: Serialize + DeserializeOwned;
}

macro_rules! calls {
    ($($call:ident as $variant:ident -> $reply:ty;)*) => {$(
        impl From<$call> for Call {
            fn from(call: $call) -> Self {
                Self::$variant(call)
            }
        }
        impl CallType for $call {
            type Reply = $reply;
        }
    )*
        /// Of each method the type of its result.
        #[cfg(feature = "schema")]
        fn results(generator: &mut schemars::SchemaGenerator) -> serde_json::Value {
            let mut results = serde_json::Map::new();
            $(results.insert(snake_case(stringify!($variant)), generator.subschema_for::<$reply>().into());)*
            results.into()
        }
    };
}

/// As serde names the variant.
#[cfg(feature = "schema")]
fn snake_case(variant: &str) -> String {
    let mut name = String::new();
    for (index, letter) in variant.chars().enumerate() {
        if letter.is_uppercase() && index > 0 {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

calls! {
    Hello as Hello -> EngineInfo;
    MeasureLimits as Limits -> DeviceLimits;
    Load as Load -> Loaded;
    AttachAdapter as AttachAdapter -> AdapterAttached;
    Tune as Tune -> Tuning;
    TrainStep as TrainStep -> StepReport;
    Gradients as Gradients -> StepReport;
    Evaluate as Evaluate -> EvaluationReport;
    Prefill as Prefill -> PrefillReport;
    Decode as Decode -> DecodeReport;
    Logits as Logits -> Done;
    DecodedWeights as DecodedWeights -> Done;
    Tokenize as Tokenize -> Tokenized;
    SaveAdapter as SaveAdapter -> Done;
    Memory as Memory -> DeviceMemory;
    Bye as Bye -> Done;
}

/// First message: agree on the protocol.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Hello {
    pub protocol: u32,
}

/// What a GPU can do at best, measured with the framework's own operations. Comes before a model is loaded.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct MeasureLimits {}

/// `None`: not measured, as for a CPU, which the harness measures itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct DeviceLimits {
    /// Bytes per second from the device's memory and back, both counted, of a tensor that fits into no cache.
    pub memory_bytes_per_second: Option<f64>,
    /// Operations per second of a large square product: 2 n³ over its time.
    pub f32_flops: Option<f64>,
    pub bf16_flops: Option<f64>,
}

/// Who answers, on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EngineInfo {
    pub protocol: u32,
    /// As on the command line, e.g. `candle-cpu`.
    pub engine: String,
    /// Version of the adapter code around the framework.
    pub engine_version: String,
    pub framework: String,
    pub framework_version: String,
    pub device: DeviceInfo,
    /// What there was to choose from, where the engine lists it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<Adapters>,
    /// The type in which activations are computed, e.g. `f32`.
    pub compute_dtype: String,
    /// Switches that change speed, e.g. `x86-v4`, `autotune`.
    pub features: Vec<String>,
    /// The forms of the base that the engine can load.
    #[serde(default = "Quantization::usual")]
    pub quantizations: Vec<Quantization>,
    pub threads: usize,
    /// Chooses kernels by measuring, and wants to do so before anything is timed.
    #[serde(default)]
    pub tunes: bool,
    /// Dropout masks are the framework's own, seeded by `dropout_seed` and `step`, and not those of `dropout`.
    #[serde(default)]
    pub own_dropout: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct DeviceInfo {
    pub kind: DeviceKind,
    pub name: String,
    /// Driver or graphics API, where there is one.
    pub driver: Option<String>,
    /// Renders on the CPU: works, but its speed says nothing about a GPU.
    pub software: bool,
    /// Memory of its own; `None` where it shares the host's.
    pub memory_bytes: Option<u64>,
}

impl EngineInfo {
    /// The devices, where there is more than one to choose from.
    pub fn choice(&self) -> Option<&Adapters> {
        self.adapters.as_ref().filter(|adapters| adapters.all.len() > 1)
    }
}

impl DeviceInfo {
    /// Its name, its driver, and whether it is no GPU.
    pub fn title(&self) -> String {
        let mut title = self.name.clone();
        if let Some(driver) = &self.driver {
            title += &format!(" ({driver})");
        }
        if self.software {
            title += "; software adapter, not comparable";
        }
        title
    }
}

/// The devices that an engine can compute on, by their numbers, and the one that it took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Adapters {
    pub taken: usize,
    pub all: Vec<DeviceInfo>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    Cpu,
    /// A GPU with memory of its own.
    DiscreteGpu,
    /// A GPU that shares the host's memory.
    UnifiedGpu,
}

/// How the frozen base is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// As in the checkpoint: the exact-parity path.
    None,
    /// NF4 with double quantisation for the seven projections; embedding, head and norms as they are.
    Nf4,
    /// The framework's own quantized format for the seven projections, 4 bits where it can.
    Native,
}

impl Quantization {
    /// What every engine has.
    pub fn usual() -> Vec<Self> {
        vec![Self::None, Self::Nf4]
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Load {
    /// A Hugging Face folder.
    pub model: PathBuf,
    pub quantization: Quantization,
}

/// Where the time of a load went, in seconds on the clock: the parts add up to the total. Where some threads read
/// while others quantize, what passes meanwhile is divided by the share of all threads' time that either took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LoadTimes {
    /// From file to memory.
    pub read_seconds: f64,
    /// Widening to f32 and quantizing.
    pub quantize_seconds: f64,
    /// The engine's own part: conversion to its tensors, transfer to the device.
    pub upload_seconds: f64,
    /// From the call to the first possible forward pass.
    pub total_seconds: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Loaded {
    pub times: LoadTimes,
    pub parameters: u64,
    /// Bytes of the model's tensors in the checkpoint.
    pub checkpoint_bytes: u64,
}

/// AdamW (Loshchilov and Hutter 2019) with the names and defaults of PyTorch, except the rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TrainingConfig {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Decoupled, as in `torch.optim.AdamW`.
    pub weight_decay: f64,
    /// Gradients are scaled down to this L2 norm, as by `torch.nn.utils.clip_grad_norm_`.
    pub max_grad_norm: Option<f64>,
    /// Keep only each block's input and compute the block again in the backward pass.
    pub gradient_checkpointing: bool,
    /// With gradient checkpointing, memory for activations that an engine may keep instead of computing
    /// them again. An engine that cannot keeps none.
    #[serde(default)]
    pub kept_activation_bytes: u64,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            learning_rate: 2e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: None,
            gradient_checkpointing: true,
            kept_activation_bytes: 0,
        }
    }
}

impl TrainingConfig {
    /// As `torch.optim.AdamW` checks its arguments, and `clip_grad_norm_` cannot: the message names the field.
    pub fn check(&self) -> Result<()> {
        let finite_and = |holds: fn(f64) -> bool| move |value: f64| value.is_finite() && holds(value);
        let not_negative = finite_and(|value| value >= 0.0);
        let positive = finite_and(|value| value > 0.0);
        let decay_rate = |value: f64| (0.0..1.0).contains(&value);
        let fields = [
            ("learning_rate", self.learning_rate, not_negative(self.learning_rate), "at least 0"),
            ("beta1", self.beta1, decay_rate(self.beta1), "in [0, 1)"),
            ("beta2", self.beta2, decay_rate(self.beta2), "in [0, 1)"),
            ("epsilon", self.epsilon, positive(self.epsilon), "above 0"),
            ("weight_decay", self.weight_decay, not_negative(self.weight_decay), "at least 0"),
        ];
        let clipping = self.max_grad_norm.map(|norm| ("max_grad_norm", norm, positive(norm), "above 0"));
        match fields.into_iter().chain(clipping).find(|(_, _, holds, _)| !holds) {
            Some((field, value, _, range)) => {
                Err(Error::protocol(format_args!("training: {field} is {value}, but must be {range}")))
            }
            None => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AttachAdapter {
    /// A PEFT adapter folder: the initialisation is the harness's.
    pub adapter: PathBuf,
    pub training: TrainingConfig,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AdapterAttached {
    pub trainable_parameters: u64,
}

/// Lines of a file of batches, counted from 0.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BatchRef {
    pub file: PathBuf,
    pub lines: Vec<usize>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TrainStep {
    pub step: u64,
    pub dropout_seed: u64,
    /// One line for each micro-batch.
    pub batches: BatchRef,
}

/// As [`TrainStep`], without an update: the gradients go to a safetensors file with the adapter's
/// tensor names.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Gradients {
    pub step: u64,
    pub dropout_seed: u64,
    pub batches: BatchRef,
    pub output: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct StepReport {
    /// Mean nats per supervised position, before the update.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Up to the synchronisation after the update.
    pub seconds: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Evaluate {
    pub batches: BatchRef,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EvaluationReport {
    /// Mean nats per supervised position.
    pub loss: f64,
    pub tokens: usize,
    pub seconds: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Prefill {
    pub tokens: Vec<u32>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PrefillReport {
    /// The most likely token after the prompt.
    pub next: u32,
    pub seconds: f64,
}

/// Greedy decoding that continues the last prefill or decode; end-of-sequence does not stop it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Decode {
    /// The token to begin with, as the last reply gave it.
    pub first: u32,
    pub steps: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct DecodeReport {
    /// The token after each step.
    pub tokens: Vec<u32>,
    /// Time of each step, each with its synchronisation.
    pub seconds: Vec<f64>,
}

/// Writes `logits` `[tokens, vocab_size]` as f32 safetensors.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Logits {
    pub tokens: Vec<u32>,
    pub output: PathBuf,
}

/// Writes the projections as the engine has stored them, decoded to f32, to a safetensors file with the checkpoint's
/// names and shapes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct DecodedWeights {
    pub output: PathBuf,
}

/// By the framework's own reader of the folder's `tokenizer.json`. Special tokens that stand in the text are taken for
/// such, and none are added.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Tokenize {
    pub folder: PathBuf,
    pub text: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Tokenized {
    pub tokens: Vec<u32>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SaveAdapter {
    /// Folder to write in PEFT's format.
    pub output: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Memory {}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Bye {}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Done {}

/// The device allocator's own figures in bytes; `None` where the framework does not tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct DeviceMemory {
    /// Bytes of live tensors.
    pub in_use_bytes: Option<u64>,
    /// Bytes taken from the device, free pool pages included.
    pub reserved_bytes: Option<u64>,
    /// The most bytes of the device that were taken while the process ran, tuning left out; where a framework
    /// cannot tell its own share, what other processes hold is in it, and where it knows no peak, `reserved_bytes`
    /// was looked at again and again.
    #[serde(default)]
    pub peak_bytes: Option<u64>,
}

/// The protocol as JSON Schema: what a request is, what a reply is, and what the result of each method is.
#[cfg(feature = "schema")]
pub fn schema() -> serde_json::Value {
    let mut generator = schemars::SchemaGenerator::default();
    let request = generator.subschema_for::<Request>();
    let response = generator.subschema_for::<Response>();
    let results = results(&mut generator);
    serde_json::json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The worker protocol of evalfw",
        "description": "One JSON object a line: a request, and its reply with the same id. backends/PROTOCOL.md says the rest.",
        "protocol": VERSION,
        "request": request,
        "response": response,
        "results": results,
        "$defs": generator.take_definitions(true),
    })
}

impl Response {
    pub fn new(id: u64, outcome: Result<serde_json::Value>) -> Self {
        match outcome {
            Ok(result) => Self { id, result: Some(result), error: None },
            Err(error) => Self { id, result: None, error: Some(error) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_adamw_cannot_train_with_are_refused_by_field() {
        let default = TrainingConfig::default;
        default().check().unwrap();
        TrainingConfig { learning_rate: 0.0, weight_decay: 0.0, max_grad_norm: Some(1.0), ..default() }
            .check()
            .unwrap();
        for (field, config) in [
            ("learning_rate", TrainingConfig { learning_rate: -1.0, ..default() }),
            ("learning_rate", TrainingConfig { learning_rate: f64::NAN, ..default() }),
            ("beta1", TrainingConfig { beta1: 1.0, ..default() }),
            ("beta2", TrainingConfig { beta2: -0.1, ..default() }),
            ("epsilon", TrainingConfig { epsilon: 0.0, ..default() }),
            ("weight_decay", TrainingConfig { weight_decay: f64::INFINITY, ..default() }),
            ("max_grad_norm", TrainingConfig { max_grad_norm: Some(0.0), ..default() }),
        ] {
            let error = config.check().unwrap_err();
            assert!(matches!(&error, Error::Protocol { message } if message.contains(field)), "{error}");
        }
    }
}
