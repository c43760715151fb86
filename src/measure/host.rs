//! The machine and the build that a figure was measured on.

use serde::{Deserialize, Serialize};
use std::process::Command;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    pub os: String,
    pub kernel: Option<String>,
    pub arch: String,
    pub cpu: String,
    pub physical_cores: Option<usize>,
    pub logical_cores: usize,
    pub memory_bytes: u64,
    /// GPUs that the operating system knows of, whether or not an engine can use them.
    pub gpus: Vec<String>,
    pub evalfw_version: String,
    /// The commit that evalfw was built from, with `-dirty` when the tree was changed.
    pub commit: Option<String>,
    pub features: Vec<String>,
}

impl Environment {
    pub fn detect() -> Self {
        let refresh = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(refresh).ok();
        let cpus = system.as_ref().map_or(&[][..], |s| s.cpus());
        let cpu = cpus.first().map(|c| c.brand().trim().to_owned());
        Self {
            os: System::long_os_version().unwrap_or_else(|_| std::env::consts::OS.to_owned()),
            kernel: System::kernel_version().ok(),
            arch: std::env::consts::ARCH.to_owned(),
            cpu: cpu.filter(|name| !name.is_empty()).unwrap_or_else(|| "unknown CPU".to_owned()),
            physical_cores: System::physical_core_count().ok(),
            logical_cores: cpus.len(),
            memory_bytes: system.as_ref().map_or(0, System::total_memory),
            gpus: gpus(),
            evalfw_version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: option_env!("EVALFW_COMMIT").filter(|c| !c.is_empty()).map(str::to_owned),
            features: features(),
        }
    }
}

fn features() -> Vec<String> {
    let all = [
        ("candle", cfg!(feature = "candle")),
        ("burn", cfg!(feature = "burn")),
        ("cuda", cfg!(feature = "cuda")),
        ("metal", cfg!(feature = "metal")),
    ];
    all.iter().filter(|(_, on)| *on).map(|(name, _)| name.to_string()).collect()
}

/// Names of GPUs, from the drivers' own tools; empty where there are none or they do not say.
fn gpus() -> Vec<String> {
    let (program, arguments): (&str, &[&str]) = match std::env::consts::OS {
        "macos" => ("system_profiler", &["SPDisplaysDataType", "-detailLevel", "mini"]),
        _ => ("nvidia-smi", &["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]),
    };
    let Ok(output) = Command::new(program).args(arguments).output() else { return Vec::new() };
    if !output.status.success() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
    match std::env::consts::OS {
        "macos" => lines.filter_map(|l| l.strip_prefix("Chipset Model: ").map(str::to_owned)).collect(),
        _ => lines.map(str::to_owned).collect(),
    }
}
