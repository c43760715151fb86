//! Processes that a worker started and that have left its process group. A variable of the environment, which every
//! process hands on to its children, tells whose they are.

use std::sync::atomic::{AtomicU64, Ordering};

pub const VARIABLE: &str = "EVALFW_WORKER";

/// Another one for each worker of this machine.
pub fn mark() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}-{number}", std::process::id(), since.as_nanos())
}

/// Ends them. A process that this one may not look at is another user's.
#[cfg(target_os = "linux")]
pub fn kill(mark: &str) {
    use rustix::process::{Pid, Signal, kill_process};
    let wanted = format!("{VARIABLE}={mark}");
    let Ok(entries) = std::fs::read_dir("/proc") else { return };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(environment) = std::fs::read(entry.path().join("environ")) else { continue };
        let is_its = environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes());
        if let (true, Some(pid)) = (is_its, Pid::from_raw(pid)) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Only Linux tells the environment of other processes; elsewhere the process group has to do.
#[cfg(not(target_os = "linux"))]
pub fn kill(_mark: &str) {}
