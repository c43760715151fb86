//! Where a model comes from: a folder, a preset that evalfw writes itself, or the hub.

mod bars;
mod error;
mod hub;
pub mod presets;
mod source;
pub mod synth;

pub use error::{Error, Result};
pub use hub::HubSettings;
pub use presets::Preset;
pub use source::{Context, ModelSource, Origin, ResolvedModel};
