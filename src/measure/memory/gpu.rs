//! Memory of NVIDIA GPUs, as the driver tells it.

use super::GpuMemory;
use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use std::sync::OnceLock;
use std::time::Duration;

pub const INTERVAL: Duration = Duration::from_millis(100);

/// The driver's library; `None` where there is no NVIDIA driver.
pub fn nvml() -> Option<&'static Nvml> {
    static NVML: OnceLock<Option<Nvml>> = OnceLock::new();
    NVML.get_or_init(|| Nvml::init().ok()).as_ref()
}

pub fn has_nvidia_gpu() -> bool {
    nvml().and_then(|nvml| nvml.device_count().ok()).is_some_and(|count| count > 0)
}

pub struct Watcher {
    nvml: &'static Nvml,
    gpus: Vec<Option<GpuMemory>>,
}

impl Watcher {
    /// `None` where there is nothing to watch.
    pub fn open() -> Option<Self> {
        let nvml = nvml()?;
        let count = nvml.device_count().ok().filter(|count| *count > 0)?;
        Some(Self { nvml, gpus: vec![None; count as usize] })
    }

    pub fn look(&mut self, pids: &[u32]) {
        for (index, seen) in (0..).zip(&mut self.gpus) {
            look_at(self.nvml, index, pids, seen);
        }
    }

    pub fn figures(&self) -> Vec<GpuMemory> {
        self.gpus.iter().flatten().cloned().collect()
    }
}

fn look_at(nvml: &Nvml, index: u32, pids: &[u32], seen: &mut Option<GpuMemory>) {
    let Ok(device) = nvml.device_by_index(index) else { return };
    let Ok(memory) = device.memory_info() else { return };
    let gpu = seen.get_or_insert_with(|| GpuMemory {
        name: device.name().unwrap_or_else(|_| format!("GPU {index}")),
        before_bytes: memory.used,
        device_peak_bytes: memory.used,
        process_peak_bytes: None,
    });
    gpu.device_peak_bytes = gpu.device_peak_bytes.max(memory.used);
    // A program that renders may be in the second list alone, and one that does both in both.
    let mut processes = device.running_compute_processes().unwrap_or_default();
    for process in device.running_graphics_processes().unwrap_or_default() {
        if !processes.iter().any(|known| known.pid == process.pid) {
            processes.push(process);
        }
    }
    let own = processes.iter().filter(|process| pids.contains(&process.pid));
    let used: Vec<u64> = own
        .filter_map(|process| match process.used_gpu_memory {
            // Some drivers say "all bits set" where they do not know.
            UsedGpuMemory::Used(bytes) if bytes < u64::MAX => Some(bytes),
            _ => None,
        })
        .collect();
    if !used.is_empty() {
        gpu.process_peak_bytes = gpu.process_peak_bytes.max(Some(used.iter().sum()));
    }
}
