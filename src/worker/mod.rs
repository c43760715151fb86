//! Worker processes: starting them, talking to them, ending them.

pub mod agent;
mod client;
mod failure;
mod launch;
mod leftovers;
mod process;

pub use client::Client;
pub use failure::Failure;
pub use launch::{Launcher, LauncherError, Workers};
pub use process::{Line, Process, Stderr, WorkerCommand, kill_all};

/// Processes that the kernel has killed for memory since it booted, to tell such an end from a plain kill.
fn host_oom_kills() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// Whether a process that ended like this was killed for memory, by what was counted before it started.
fn is_oom_kill(before: Option<u64>, how: &str) -> bool {
    match (before, host_oom_kills()) {
        (Some(before), Some(now)) => now > before && how.contains("signal: 9"),
        _ => false,
    }
}
