//! Hands the version of candle to the crate. candle exposes none itself, so the lock file decides.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let version = match lock_file() {
        Some(path) => {
            println!("cargo::rerun-if-changed={}", path.display());
            locked_version(&path, "candle-core")
        }
        None => None,
    };
    println!("cargo::rustc-env=CANDLE_VERSION={}", version.as_deref().unwrap_or("unknown"));
}

/// The nearest `Cargo.lock` at or above this package.
fn lock_file() -> Option<PathBuf> {
    let package = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR")?);
    package.ancestors().map(|dir| dir.join("Cargo.lock")).find(|path| path.exists())
}

fn locked_version(lock: &Path, package: &str) -> Option<String> {
    let text = std::fs::read_to_string(lock).ok()?;
    let mut lines = text.lines();
    lines.find(|line| *line == format!("name = \"{package}\""))?;
    let version = lines.next()?.strip_prefix("version = \"")?.strip_suffix('"')?;
    Some(version.to_owned())
}
