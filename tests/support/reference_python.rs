//! The Python with transformers, peft and bitsandbytes, where it has been installed.

use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;

pub struct ReferencePython {
    program: PathBuf,
}

impl ReferencePython {
    /// `$EVALFW_REFERENCE_VENV`, or the environment that `tests/reference/make` cached for just these
    /// requirements. Says on standard error what is missing.
    pub fn find() -> Option<Self> {
        if let Some(environment) = std::env::var_os("EVALFW_REFERENCE_VENV").filter(|v| !v.is_empty()) {
            let program = Path::new(&environment).join("bin/python");
            assert!(program.exists(), "EVALFW_REFERENCE_VENV: there is no {}", program.display());
            return Some(Self { program });
        }
        let found = cached().filter(|environment| environment.join("complete").exists());
        if found.is_none() {
            eprintln!("left out: no reference environment; `tests/reference/make --python` makes it (6 GB)");
        }
        found.map(|environment| Self { program: environment.join("bin/python") })
    }

    /// Runs a script of `tests/reference` and returns the losses that it prints as JSON.
    pub fn losses(&self, script: &str, arguments: &[&Path]) -> Vec<f64> {
        let output = Command::new(&self.program)
            .arg(scripts().join(script))
            .args(arguments)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .output()
            .unwrap();
        let [stdout, stderr] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
        assert!(output.status.success(), "{script}: {stderr}");
        serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{script}: {e} in {stdout}"))
    }
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference")
}

/// Where `tests/reference/make` puts its environment.
fn cached() -> Option<PathBuf> {
    let requirements = std::fs::read(scripts().join("requirements.txt")).unwrap();
    let digest: String = Sha256::digest(requirements).iter().take(8).map(|b| format!("{b:02x}")).collect();
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = cache.or_else(|| Some(std::env::home_dir()?.join(".cache")))?;
    Some(cache.join(format!("evalfw/reference-{digest}")))
}
