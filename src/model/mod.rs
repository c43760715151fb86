mod error;
pub mod presets;
pub mod synth;
pub use error::{Error, Result};
pub use presets::Preset;
