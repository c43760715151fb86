//! Hands the version of candle to the crate, which candle itself does not expose: the lock file decides. With the
//! feature `cuda`, compiles our kernels to PTX.

use std::path::{Path, PathBuf};
use std::process::Command;

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
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some()
        && let Err(problem) = compile_kernels()
    {
        println!("cargo::error={problem}");
    }
}

const KERNELS: &str = "src/cuda/kernels.cu";

/// The oldest architecture with bf16; the driver compiles PTX further, for the GPU that it finds.
const OLDEST_CAPABILITY: &str = "80";

fn compile_kernels() -> Result<(), String> {
    println!("cargo::rerun-if-changed={KERNELS}");
    for name in ["CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let folder = std::env::var_os("CUDA_HOME").or_else(|| std::env::var_os("CUDA_PATH"));
    let nvcc = folder.map_or_else(|| "nvcc".into(), |folder| PathBuf::from(folder).join("bin/nvcc"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("kernels.ptx");
    let capability = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| OLDEST_CAPABILITY.to_owned());
    let status = Command::new(&nvcc)
        .args([
            "--ptx",
            "-O3",
            "-std=c++17",
            &format!("--gpu-architecture=compute_{capability}"),
            KERNELS,
            "-o",
        ])
        .arg(&out)
        .status()
        .map_err(|e| format!("{}: {e}; the feature `cuda` needs the CUDA toolkit", nvcc.display()))?;
    if status.success() { Ok(()) } else { Err(format!("{} failed on {KERNELS}", nvcc.display())) }
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
