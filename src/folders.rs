//! Where evalfw keeps what is no cache: what the user asked it to install.

use anyhow::{Context, Result};
use std::path::PathBuf;

const DATA_VARIABLE: &str = "EVALFW_DATA";

/// `$EVALFW_DATA`, or `evalfw` in the user's data folder.
pub fn data_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os(DATA_VARIABLE).filter(|dir| !dir.is_empty()) {
        return std::path::absolute(&dir).with_context(|| PathBuf::from(&dir).display().to_string());
    }
    let strategy = etcetera::choose_base_strategy().context("no data folder; set EVALFW_DATA")?;
    Ok(etcetera::BaseStrategy::data_dir(&strategy).join("evalfw"))
}
