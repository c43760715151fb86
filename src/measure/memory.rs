//! Memory of a worker, watched from the harness.
//!
//! A thread samples the resident size of the worker's process tree. On Linux the peak between samples
//! is exact for a single process: the kernel keeps the high-water mark `VmHWM`, which is reset where a
//! phase begins. At the end of a phase the proportional set size tells anonymous memory from
//! file-backed pages. Elsewhere the samples are all there is.

use serde::{Deserialize, Serialize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(20);
/// The timeline is thinned to half whenever it reaches this length.
const MAX_POINTS: usize = 1_000;

/// The process tree's resident bytes at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MemoryPoint {
    /// Since the worker was started.
    pub seconds: f64,
    pub resident_bytes: u64,
}

/// One phase of a cell, such as `load` or `train`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseMemory {
    pub name: String,
    pub seconds: f64,
    /// Largest resident size during the phase.
    pub peak_bytes: u64,
    /// Proportional set size at the end of the phase: anonymous memory.
    pub anonymous_bytes: Option<u64>,
    /// Proportional set size at the end of the phase: pages of files.
    pub file_bytes: Option<u64>,
}

/// Watches one process and its descendants until it is stopped or dropped.
pub struct MemoryProbe {
    pid: u32,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    stop: Condvar,
}

struct State {
    started: Instant,
    stopped: bool,
    timeline: Timeline,
    phase: Phase,
    finished: Vec<PhaseMemory>,
}

struct Phase {
    name: String,
    started: Instant,
    peak: u64,
}

impl Phase {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), started: Instant::now(), peak: 0 }
    }
}

impl MemoryProbe {
    /// Starts watching `pid`; the first phase is called `start`.
    pub fn start(pid: u32) -> Self {
        let state = State {
            started: Instant::now(),
            stopped: false,
            timeline: Timeline::default(),
            phase: Phase::new("start"),
            finished: Vec::new(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), stop: Condvar::new() });
        let watched = Arc::clone(&shared);
        let thread = std::thread::spawn(move || sample_until_stopped(pid, &watched));
        Self { pid, shared, thread: Some(thread) }
    }

    /// Ends the current phase and begins the next one.
    pub fn begin_phase(&self, name: &str) {
        self.end_phase(&mut self.lock());
        os::reset_peak(self.pid);
        self.lock().phase = Phase::new(name);
    }

    /// Stops watching and returns the phases and the timeline.
    pub fn finish(mut self) -> (Vec<PhaseMemory>, Vec<MemoryPoint>) {
        self.end_phase(&mut self.lock());
        self.stop();
        let mut state = self.lock();
        (std::mem::take(&mut state.finished), std::mem::take(&mut state.timeline.points))
    }

    fn end_phase(&self, state: &mut State) {
        let peak = os::peak(self.pid).unwrap_or(0).max(state.phase.peak);
        let parts = os::proportional(self.pid);
        // A phase in which the process was never seen has no figure.
        if peak > 0 {
            let phase = &state.phase;
            let record = PhaseMemory {
                name: phase.name.clone(),
                seconds: phase.started.elapsed().as_secs_f64(),
                peak_bytes: peak,
                anonymous_bytes: parts.map(|p| p.anonymous),
                file_bytes: parts.map(|p| p.file),
            };
            state.finished.push(record);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&mut self) {
        self.lock().stopped = true;
        self.shared.stop.notify_all();
        if let Some(thread) = self.thread.take() {
            // The sampler has nothing to report; if it panicked there are only fewer samples.
            let _ = thread.join();
        }
    }
}

impl Drop for MemoryProbe {
    fn drop(&mut self) {
        self.stop();
    }
}

fn sample_until_stopped(pid: u32, shared: &Shared) {
    let mut sampler = os::Sampler::new(pid);
    let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    while !state.stopped {
        drop(state);
        let resident = sampler.resident_bytes();
        state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(resident_bytes) = resident {
            let seconds = state.started.elapsed().as_secs_f64();
            state.phase.peak = state.phase.peak.max(resident_bytes);
            state.timeline.push(MemoryPoint { seconds, resident_bytes });
        }
        let waited = shared.stop.wait_timeout_while(state, INTERVAL, |s| !s.stopped);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// A timeline of bounded length that keeps each interval's largest value.
#[derive(Default)]
struct Timeline {
    points: Vec<MemoryPoint>,
    /// Samples that are folded into one point: 1, 2, 4, ...
    stride: usize,
    folded: usize,
}

impl Timeline {
    fn push(&mut self, point: MemoryPoint) {
        self.stride = self.stride.max(1);
        match self.points.last_mut() {
            Some(last) if self.folded < self.stride => {
                if point.resident_bytes > last.resident_bytes {
                    *last = point;
                }
            }
            _ => {
                self.points.push(point);
                self.folded = 0;
            }
        }
        self.folded += 1;
        if self.points.len() >= MAX_POINTS {
            self.points = self.points.chunks(2).map(larger).collect();
            self.stride *= 2;
        }
    }
}

fn larger(points: &[MemoryPoint]) -> MemoryPoint {
    let first = points[0];
    points.iter().fold(first, |a, b| if b.resident_bytes > a.resident_bytes { *b } else { a })
}

/// Proportional set size by kind of page.
#[derive(Clone, Copy, Default)]
struct Parts {
    anonymous: u64,
    file: u64,
}

#[cfg(target_os = "linux")]
mod os {
    use super::Parts;
    use std::fs;

    pub struct Sampler {
        root: u32,
    }

    impl Sampler {
        pub fn new(root: u32) -> Self {
            Self { root }
        }

        /// Sum over the process tree.
        pub fn resident_bytes(&mut self) -> Option<u64> {
            let sum: u64 = tree(self.root).into_iter().filter_map(|pid| status(pid, "VmRSS")).sum();
            (sum > 0).then_some(sum)
        }
    }

    /// The kernel's high-water mark. With children it says too little, and the samples decide.
    pub fn peak(root: u32) -> Option<u64> {
        status(root, "VmHWM")
    }

    pub fn reset_peak(root: u32) {
        // proc(5): 5 resets the peak resident set size. Refused only for a process of another user.
        let _ = fs::write(format!("/proc/{root}/clear_refs"), "5");
    }

    pub fn proportional(root: u32) -> Option<Parts> {
        let mut sum = Parts::default();
        let mut seen = false;
        for pid in tree(root) {
            let Ok(rollup) = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { continue };
            sum.anonymous += field(&rollup, "Pss_Anon").unwrap_or(0);
            sum.file += field(&rollup, "Pss_File").unwrap_or(0) + field(&rollup, "Pss_Shmem").unwrap_or(0);
            seen = true;
        }
        seen.then_some(sum)
    }

    fn tree(root: u32) -> Vec<u32> {
        let mut all = vec![root];
        let mut next = 0;
        while next < all.len() {
            let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", all[next]));
            all.extend(
                children.iter().flat_map(|c| c.split_whitespace()).filter_map(|p| p.parse::<u32>().ok()),
            );
            next += 1;
        }
        all
    }

    fn status(pid: u32, name: &str) -> Option<u64> {
        field(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, name)
    }

    /// A value in kB of a file of `Name:   123 kB` lines, in bytes.
    fn field(text: &str, name: &str) -> Option<u64> {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    }
}

#[cfg(not(target_os = "linux"))]
mod os {
    use super::Parts;
    use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

    pub struct Sampler {
        root: Pid,
        /// `None` where the system refuses to tell of processes.
        system: Option<System>,
    }

    impl Sampler {
        pub fn new(root: u32) -> Self {
            Self { root: Pid::from_u32(root), system: System::new().ok() }
        }

        pub fn resident_bytes(&mut self) -> Option<u64> {
            let kind = ProcessRefreshKind::nothing().with_memory();
            let system = self.system.as_mut()?;
            system.refresh_processes_specifics(ProcessesToUpdate::Some(&[self.root]), true, kind);
            system.process(self.root).map(|p| p.memory())
        }
    }

    pub fn peak(_root: u32) -> Option<u64> {
        None
    }

    pub fn reset_peak(_root: u32) {}

    pub fn proportional(_root: u32) -> Option<Parts> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_timeline_stays_bounded_and_keeps_its_spike() {
        let mut timeline = Timeline::default();
        for i in 0..100_000u64 {
            let resident_bytes = if i == 54_321 { 1_000_000 } else { i % 7 };
            timeline.push(MemoryPoint { seconds: i as f64, resident_bytes });
        }
        assert!(timeline.points.len() <= MAX_POINTS);
        assert!(timeline.points.iter().any(|p| p.seconds == 54_321.0 && p.resident_bytes == 1_000_000));
        assert!(timeline.points.windows(2).all(|w| w[0].seconds < w[1].seconds));
        assert!(timeline.points.last().unwrap().seconds > 99_000.0);
    }
}
