//! The contract between evalfw and an engine.
//!
//! An *engine* is a framework on a device that can load a Qwen2 checkpoint, train a LoRA adapter on
//! its frozen, quantized base, and generate text. It implements [`Engine`] and [`Model`];
//! [`serve`](serve::serve) turns any implementation into a worker process that speaks the line-delimited
//! JSON [`protocol`].
//!
//! What has to be equal between engines lives here or comes from the harness: the model's
//! [`config`], the [`checkpoint`] reader, the [`nf4`] codes, the [`lora`] adapter on disk, the token
//! ids of each [`batch`], the [`dropout`] masks. No framework is known in this crate.

pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod dropout;
mod engine;
mod error;
pub mod host;
pub mod limits;
pub mod lora;
pub mod nf4;
mod peft_config;
pub mod protocol;
pub mod rope;
pub mod serve;
pub mod tensor_file;
mod tuning;
pub mod weights;

pub use engine::{Engine, Evaluation, LoadedModel, Model, StepInput, StepResult};
pub use error::{Error, Result};
