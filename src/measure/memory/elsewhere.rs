//! A process tree on other systems, from sysinfo: the working set under Windows.

use super::{CgroupPeak, PhaseFigures};
use std::time::{Duration, Instant};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

pub const MEASURE: &str = if cfg!(windows) { "working_set" } else { "resident" };

/// Looking through all processes for children costs more than looking at those that are known.
const CHILDREN_EVERY: Duration = Duration::from_millis(500);

pub struct Watcher {
    tree: Vec<Pid>,
    /// `None` where the system refuses to tell of processes.
    system: Option<System>,
    next_search: Instant,
    peak: u64,
}

impl Watcher {
    pub fn new(root: u32) -> Self {
        Self {
            tree: vec![Pid::from_u32(root)],
            system: System::new().ok(),
            next_search: Instant::now(),
            peak: 0,
        }
    }

    pub fn look(&mut self) -> Option<u64> {
        let system = self.system.as_mut()?;
        let kind = ProcessRefreshKind::nothing().with_memory();
        if Instant::now() >= self.next_search {
            system.refresh_processes_specifics(ProcessesToUpdate::All, true, ProcessRefreshKind::nothing());
            self.tree.truncate(1);
            let mut next = 0;
            while let Some(&pid) = self.tree.get(next) {
                let children = system.processes().values().filter(|p| p.parent() == Some(pid));
                self.tree.extend(children.map(|p| p.pid()));
                next += 1;
            }
            self.next_search = Instant::now() + CHILDREN_EVERY;
        }
        system.refresh_processes_specifics(ProcessesToUpdate::Some(&self.tree), true, kind);
        let sum: u64 = self.tree.iter().filter_map(|pid| system.process(*pid)).map(|p| p.memory()).sum();
        self.peak = self.peak.max(sum);
        (sum > 0).then_some(sum)
    }

    pub fn pids(&self) -> Vec<u32> {
        self.tree.iter().map(|pid| pid.as_u32()).collect()
    }

    pub fn begin_phase(&mut self) {
        self.peak = 0;
    }

    pub fn end_phase(&mut self) -> Option<PhaseFigures> {
        self.look();
        let peak = self.peak;
        (peak > 0).then(|| PhaseFigures { peak, anonymous: None, file: None, high_water: None })
    }

    pub fn cgroup_peak(&mut self) -> Option<CgroupPeak> {
        None
    }
}

pub fn thread_cpu_seconds() -> Option<f64> {
    None
}
