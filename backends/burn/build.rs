//! Finds the version of burn in the lock file, so that what the engine reports is what was built.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let manifest_dir = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let lock: Option<PathBuf> =
        Path::new(&manifest_dir).ancestors().map(|dir| dir.join("Cargo.lock")).find(|path| path.exists());
    let version = lock.as_ref().and_then(|path| burn_version(&fs::read_to_string(path).ok()?));
    if let Some(path) = lock {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-env=BURN_VERSION={}", version.as_deref().unwrap_or("unknown"));
}

fn burn_version(lock: &str) -> Option<String> {
    let mut lines = lock.lines().skip_while(|line| *line != "name = \"burn\"");
    let version = lines.nth(1)?.strip_prefix("version = \"")?;
    version.strip_suffix('"').map(str::to_owned)
}
