//! A process tree under macOS, from `proc_pid_rusage`.

use super::{CgroupPeak, PhaseFigures};

pub const MEASURE: &str = "phys_footprint";

pub struct Watcher {
    root: u32,
    /// Largest of the looks in this phase.
    peak: u64,
    /// The root's largest footprint ever, when the phase began.
    largest_before: u64,
}

impl Watcher {
    pub fn new(root: u32) -> Self {
        Self { root, peak: 0, largest_before: 0 }
    }

    pub fn look(&mut self) -> Option<u64> {
        let footprints = tree(self.root).into_iter().filter_map(usage);
        let sum: u64 = footprints.map(|usage| usage.ri_phys_footprint).sum();
        self.peak = self.peak.max(sum);
        (sum > 0).then_some(sum)
    }

    pub fn begin_phase(&mut self) {
        self.peak = 0;
        self.largest_before = largest(self.root);
    }

    pub fn end_phase(&mut self) -> Option<PhaseFigures> {
        self.look();
        let largest = largest(self.root);
        // A new largest footprint was reached in this phase, maybe between two looks.
        let exact = if largest > self.largest_before { largest } else { 0 };
        let peak = self.peak.max(exact);
        (peak > 0).then(|| PhaseFigures { peak, anonymous: None, file: None, high_water: None })
    }

    pub fn cgroup_peak(&mut self) -> Option<CgroupPeak> {
        None
    }
}

pub fn thread_cpu_seconds() -> Option<f64> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Some(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

fn largest(pid: u32) -> u64 {
    usage(pid).map_or(0, |usage| usage.ri_lifetime_max_phys_footprint)
}

fn usage(pid: u32) -> Option<libc::rusage_info_v4> {
    let pid = libc::c_int::try_from(pid).ok()?;
    let mut usage = std::mem::MaybeUninit::<libc::rusage_info_v4>::zeroed();
    // SAFETY: the buffer is as large as the flavour that is asked for, and all of its fields may be zero.
    unsafe {
        let status = libc::proc_pid_rusage(pid, libc::RUSAGE_INFO_V4, usage.as_mut_ptr().cast());
        (status == 0).then(|| usage.assume_init())
    }
}

/// The process and its descendants.
fn tree(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut next = 0;
    while let Some(&pid) = all.get(next) {
        all.extend(children(pid));
        next += 1;
    }
    all
}

/// More children than this are not seen.
const MAX_CHILDREN: usize = 1024;

fn children(pid: u32) -> Vec<u32> {
    let Ok(parent) = libc::pid_t::try_from(pid) else { return Vec::new() };
    let mut pids = [0 as libc::pid_t; MAX_CHILDREN];
    let bytes = libc::c_int::try_from(size_of_val(&pids)).unwrap_or(0);
    // SAFETY: the system writes at most as many bytes as it is told that the buffer has.
    let count = unsafe { libc::proc_listchildpids(parent, pids.as_mut_ptr().cast(), bytes) };
    let count = usize::try_from(count).unwrap_or(0).min(MAX_CHILDREN);
    pids[..count].iter().filter_map(|&pid| u32::try_from(pid).ok()).collect()
}
